"""Read the authors' descriptor of a raw data set: `descriptor.json` and images -> part examples and graphs.

The file, shortened (licence: that of the images, not stated in the file):

    {"dataset_name": "car parts",
     "instances": [{"image_path": "images/train108.jpg", "image_label": "pickup truck",
                    "segmentations": {"hood": [{"size": [512, 512], "counts": "kV]12k?3N3L..."}], "wheel": [...]},
                    "segmentation_labels": ["hood", "wheel"]}, ...],
     "part_graph": {"pickup truck": ["hood", "tailgate", "wheel"]},
     "instance_graph": {"vehicle": ["pickup truck", "car"]}}

Prefixes of labels, as in "object--pickup truck--part:hood", are removed. A label such as "object--pickup truck" names
the mask of the whole object, which is not a part and is skipped. An instance without another mask has no example.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

from plum_partonomy.masks import area
from plum_partonomy.questions.conversations import converse
from plum_partonomy.records import DataError, GroundedConversation, PartExample
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.json_files import read_json
from plum_partonomy.sources.untrusted import (
    ImageFiles,
    OnError,
    check_labels,
    read_part_masks,
    refuse,
    typed,
    typed_list,
)

DESCRIPTOR_FILE = "descriptor.json"
LICENCE = "not stated"
HELD_OUT = 10
"""About one in this many images goes to the validation split, and as many to the test split."""

Graph = dict[str, list[str]]


class Descriptor:
    """An open descriptor. The graphs are checked on opening, each instance on access.

    Instances are sorted by image and label; their order in the file does not matter.
    """

    def __init__(self, folder: str | Path, *, on_error: OnError = refuse):
        """Args:
            on_error: Receives a DataError for each instance without an image path or a label, or with the image and
                label of another instance. All of these are skipped, because none has all masks of the object.

        Raises:
            DataError: The file is missing, too large, not JSON or empty, a graph is malformed, or labels differ only
                in case or spaces.
        """
        self.path = Path(folder) / DESCRIPTOR_FILE
        content = read_json(self.path)
        self.name: str = typed(content, "dataset_name", str, where=str(self.path))
        self.part_graph: Graph = _clean_graph(content, "part_graph", clean_value=clean_part_label, where=self.path)
        self.instance_graph: Graph = _clean_graph(
            content, "instance_graph", clean_value=clean_object_label, where=self.path
        )
        check_labels(self.part_graph, where=f"{self.path}, field 'part_graph'")
        parts = {part for parts in self.part_graph.values() for part in parts}
        check_labels(sorted(parts), where=f"{self.path}, field 'part_graph'")
        self._records = typed_list(content, "instances", dict, where=str(self.path))
        if not self._records:
            raise DataError(f"{self.path}, field 'instances': the list is empty")
        self._numbers = self._identify(on_error)
        self._images = ImageFiles(self.path.parent)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[PartExample]:
        return (self.example(index) for index in range(len(self)))

    def image_path(self, index: int) -> str:
        """Return the image path of an instance, relative to the folder. Several instances may share one."""
        return self._images.spell(typed(self._record(index), "image_path", str, where=self._where(index)))

    def splits(self, *, seed: int) -> dict[str, list[int]]:
        """Return split -> indices, see `hold_out`."""
        return hold_out([self.image_path(index) for index in range(len(self))], seed=seed)

    def example(self, index: int) -> PartExample:
        """Return an instance as a part example. Raises DataError that names file, record and field."""
        where, image_path = self._where(index), self.image_path(index)
        file = self._images.locate(image_path, where=where)
        example = self.annotation(index)
        size = example.masks[0].rle["size"]
        self._images.check_frame(image_path, size, where=f"{where}, field 'segmentations'")
        example.image = {"bytes": None, "path": str(file)}
        return example

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversation about an instance. Raises DataError."""
        yield converse(self.example(index), part_graph=self.part_graph, seed=seed)

    def annotation(self, index: int) -> PartExample:
        """Return a part example without reading its image. Raises DataError that names file, record and field."""
        where, record = self._where(index), self._record(index)
        label = clean_object_label(typed(record, "image_label", str, where=where))
        if label not in self.part_graph:
            raise DataError(f"{where}, field 'image_label': {label!r} is not in part_graph")
        masks = read_part_masks(self._segmentations(record, label, where=where), where=where)
        masks = [mask for mask in masks if area(mask.rle)]
        if not masks:
            raise DataError(f"{where}, field 'segmentations': the masks of {label!r} cover no pixel")
        return PartExample(
            image=None,
            image_id=f"{self.image_path(index)}#{label}",
            image_label=label,
            masks=masks,
            source=self.name,
            licence=LICENCE,
        )

    def _segmentations(self, record: dict[str, Any], label: str, *, where: str) -> dict[str, Any]:
        raw = typed(record, "segmentations", dict, where=where)
        named = typed_list(record, "segmentation_labels", str, where=where)
        if sorted(named) != sorted(raw):
            raise DataError(
                f"{where}, field 'segmentation_labels': names {sorted(named)}, but masks are {sorted(raw)}"
            )
        if not raw:
            raise DataError(f"{where}, field 'segmentations': no part has a mask")
        segmentations: dict[str, Any] = {}
        for key in filter(_names_part, raw):
            pieces = typed(raw, key, list, where=f"{where}, field 'segmentations'")
            segmentations.setdefault(clean_part_label(key), []).extend(pieces)
        check_labels([*self.part_graph[label], *segmentations], where=f"{where}, field 'segmentations'")
        unknown = sorted(set(segmentations) - set(self.part_graph[label]))
        if unknown:
            raise DataError(f"{where}, field 'segmentations': part_graph[{label!r}] does not have {unknown}")
        return segmentations

    def _identify(self, on_error: OnError) -> list[int]:
        """Return the indices of the records that show parts, sorted by image and label."""
        numbers: dict[tuple[str, str], int] = {}
        repeated = set()
        for number, record in enumerate(self._records):
            if _shows_no_part(record):
                continue
            where = f"{self.path}, record {number}"
            try:
                label = clean_object_label(typed(record, "image_label", str, where=where))
                identity = (typed(record, "image_path", str, where=where), label)
                if numbers.setdefault(identity, number) != number:
                    repeated.add(identity)
                    raise DataError(
                        f"{where}: has the image and the label of record {numbers[identity]}, {identity}; put all "
                        "masks of the object into one record"
                    )
            except DataError as error:
                on_error(error)
        return [numbers[identity] for identity in sorted(numbers.keys() - repeated)]

    def _record(self, index: int) -> dict[str, Any]:
        return self._records[self._numbers[index]]

    def _where(self, index: int) -> str:
        return f"{self.path}, record {self._numbers[index]}"


def hold_out(image_paths: list[str], *, seed: int) -> dict[str, list[int]]:
    """Return split -> indices of the examples with these images. Examples that share an image share a split.

    The split of an image depends only on the seed and its path, so it does not change when others are added. About one
    image in HELD_OUT is in validation, which selects checkpoints, and as many are in test. If chance gives either
    fewer than two images (fewer than one for less than 2 * HELD_OUT images), the images that came closest are added.
    Fewer images than HELD_OUT are all in train.
    """
    draws = {path: seeded_generator(seed, "held out", normalize("NFC", path)).random() for path in set(image_paths)}
    split_of = {path: "train" for path in draws}
    split_of |= {path: "validation" for path, draw in draws.items() if draw < 2 / HELD_OUT}
    split_of |= {path: "test" for path, draw in draws.items() if draw < 1 / HELD_OUT}
    if len(draws) < HELD_OUT:
        split_of = dict.fromkeys(draws, "train")
    closest = sorted((path for path in draws if split_of[path] == "train"), key=draws.get)
    for split in ("validation", "test"):
        for _ in range(min(2, len(draws) // HELD_OUT) - list(split_of.values()).count(split)):
            split_of[closest.pop(0)] = split
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index, image_path in enumerate(image_paths):
        splits[split_of[image_path]].append(index)
    return splits


def clean_object_label(label: str) -> str:
    """
    Return the label without the prefixes of the data set.

    >>> clean_object_label("object--pickup truck")
    'pickup truck'
    """
    return label.split("--part:")[0].rsplit("--", 1)[-1].strip()


def clean_part_label(label: str) -> str:
    """
    Return the label without the prefixes of the data set.

    >>> clean_part_label("object--pickup truck--part:hood")
    'hood'
    """
    return label.rsplit("--part:", 1)[-1].strip()


def _names_part(label: str) -> bool:
    """Return whether a mask label names a part; "object--pickup truck" names the whole object."""
    return "--part:" in label or "--" not in label


def _shows_no_part(record: dict[str, Any]) -> bool:
    segmentations = record.get("segmentations")
    return isinstance(segmentations, dict) and bool(segmentations) and not any(map(_names_part, segmentations))


def _clean_graph(content: Any, field: str, *, clean_value: Callable[[str], str], where: Path) -> Graph:
    raw = typed(content, field, dict, where=str(where))
    graph: dict[str, set[str]] = {}
    for label in raw:
        values = typed_list(raw, label, str, where=f"{where}, field {field!r}")
        graph.setdefault(clean_object_label(label), set()).update(map(clean_value, values))
    return {label: sorted(values) for label, values in graph.items()}
