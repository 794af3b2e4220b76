"""The data sets that are read split by split into grounded conversations."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Protocol

from plum_partonomy.records import GroundedConversation
from plum_partonomy.sources.instructpart import InstructPart, InstructPartNames
from plum_partonomy.sources.label_maps import Ade20k, CocoStuff, Mapillary
from plum_partonomy.sources.llava import LlavaInstruct, LlavaMixture
from plum_partonomy.sources.paco_lvis import PacoLvis
from plum_partonomy.sources.partimagenet import PartImageNet
from plum_partonomy.sources.partimagenet_pp import PartImageNetPP
from plum_partonomy.sources.pascal_part import PascalPart
from plum_partonomy.sources.question_chats import CoreConversations, CoreStage2
from plum_partonomy.sources.reasonseg import ReasonSeg
from plum_partonomy.sources.referring import (
    GRefCoco,
    RefClef,
    RefCoco,
    RefCocoG,
    RefCocoGGoogle,
    RefCocoGoogle,
    RefCocoPlus,
)
from plum_partonomy.sources.semantic_parts import SemanticPacoLvis, SemanticPartImageNet, SemanticPascalPart


class Source(Protocol):
    """One open split of a data set."""

    name: ClassVar[str]
    published_counts: ClassVar[dict[str, dict[str, int]]]
    """Split -> the publishers' counts."""
    split: str
    path: Path
    """The file named in problems of the whole split."""
    counts: dict[str, int]
    """Counts of the split, with every key of its published counts."""
    blank: int
    """Number of records read so far without content for a conversation."""

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return the splits that exist in the folder. Raises DataError if there are none."""

    @classmethod
    def record_paths(cls) -> set[str]:
        """Return the possible files of records, and folders of such files, relative to the folder."""

    def __init__(self, folder: str | Path, *, split: str): ...

    def __len__(self) -> int: ...

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversations about one image or record of the split. Raises DataError that names file, record and
        field.
        """


SOURCES: dict[str, type[Source]] = {
    kind.name: kind
    for kind in (
        PascalPart,
        PacoLvis,
        PartImageNet,
        PartImageNetPP,
        SemanticPascalPart,
        SemanticPacoLvis,
        SemanticPartImageNet,
        Ade20k,
        CocoStuff,
        Mapillary,
        RefCoco,
        RefCocoGoogle,
        RefCocoPlus,
        RefCocoG,
        RefCocoGGoogle,
        RefClef,
        GRefCoco,
        ReasonSeg,
        InstructPart,
        InstructPartNames,
        LlavaInstruct,
        LlavaMixture,
        CoreConversations,
        CoreStage2,
    )
}
