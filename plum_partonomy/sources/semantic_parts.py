"""Pascal-Part, PACO-LVIS and PartImageNet as semantic parts: each part is asked for by a name such as "bird wing".

Files, images and masks are those of `pascal_part`, `paco_lvis` and `partimagenet`: all parts of one name in an image
form one mask, and a red box marks the object if there are several. Only the conversations differ.
"""

from collections.abc import Iterator

from plum_partonomy.questions.grounding import ask_for_parts
from plum_partonomy.records import GroundedConversation
from plum_partonomy.sources.coco import CocoParts
from plum_partonomy.sources.paco_lvis import PacoLvis
from plum_partonomy.sources.partimagenet import PartImageNet
from plum_partonomy.sources.pascal_part import PascalPart


class _PartsByName(CocoParts):
    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversations about the parts of one example. Raises DataError."""
        yield from ask_for_parts(self.example(index), seed=seed)


class SemanticPascalPart(_PartsByName, PascalPart):
    name = "semantic_pascal_part"


class SemanticPacoLvis(_PartsByName, PacoLvis):
    name = "semantic_paco_lvis"


class SemanticPartImageNet(_PartsByName, PartImageNet):
    name = "semantic_partimagenet"
