"""How far blind heuristics get on questions of either scheme of distractors.

    python scripts/measure_leak.py                       # the drawn miniature
    python scripts/measure_leak.py --data_dir FOLDER     # a descriptor.json and its images; every third image tests

Prints one line per scheme: questions, chance, and the accuracy of each heuristic without seeing an image.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from partkit import synthesis
from partkit.knowledge import PartKnowledge, collect_knowledge, even_presence
from partkit.leak import measure_leak
from partkit.questions import SCHEMES, QuestionMaker
from partkit.schema import PartExample
from partkit.sources.descriptor import Descriptor

TRAIN_DRAWINGS = 400
TEST_DRAWINGS = 150


@dataclass
class Options:
    data_dir: str | None = field(default=None, metadata={"help": "Folder of a descriptor.json; default: drawings."})
    seed: int = 0


def main(options: Options) -> None:
    if options.data_dir is None:
        train = [synthesis.draw_example("train", index) for index in range(TRAIN_DRAWINGS)]
        test = [synthesis.draw_example("test", index) for index in range(TEST_DRAWINGS)]
        graphs = {"part_graph": synthesis.part_graph(), "instance_graph": synthesis.instance_graph()}
    else:
        descriptor = Descriptor(options.data_dir)
        examples = list(descriptor)
        test = examples[::3]
        train = [example for index, example in enumerate(examples) if index % 3]
        graphs = {"part_graph": descriptor.part_graph, "instance_graph": descriptor.instance_graph}
    counted = collect_knowledge(map(_annotation, train + test), **graphs)
    for scheme in SCHEMES:
        knowledge = counted
        if scheme == "balanced" and options.data_dir is None:
            presence = even_presence(synthesis.required_parts(), part_graph=graphs["part_graph"])
            knowledge = PartKnowledge(**graphs, presence=presence)
        maker = QuestionMaker(knowledge, scheme=scheme, seed=options.seed)
        asked = {
            split: [question for example in examples for question in maker.questions(example)]
            for split, examples in (("train", train), ("test", test))
        }
        leak = measure_leak(asked["train"], asked["test"])
        figures = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in leak.items())
        print(f"{scheme}: {len(asked['train'])} + {len(asked['test'])} questions about {len(test)} images; {figures}")


def _annotation(example: PartExample) -> tuple[str, list[str]]:
    return example.image_label, [mask.label for mask in example.masks]


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Options).parse_args_into_dataclasses()
    main(parsed)
