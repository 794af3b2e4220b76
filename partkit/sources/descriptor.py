"""The authors' descriptor of a raw data set: `descriptor.json` and images -> part examples and the graphs.

The file, shortened (licence: that of the images, which the file does not state):

    {"dataset_name": "car parts",
     "instances": [{"image_path": "images/train108.jpg", "image_label": "pickup truck",
                    "segmentations": {"hood": [{"size": [512, 512], "counts": "kV]12k?3N3L..."}], "wheel": [...]},
                    "segmentation_labels": ["hood", "wheel"]}, ...],
     "part_graph": {"pickup truck": ["hood", "tailgate", "wheel"]},
     "instance_graph": {"vehicle": ["pickup truck", "car"]}}

Labels may carry the data set's own prefixes, "object--pickup truck--part:hood", which are removed. Among such labels
"object--pickup truck" names the mask of the whole object: no part, so left out; an instance that has no other mask
gives no example.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from partkit.schema import DataError, PartExample
from partkit.sources.files import ImageFiles, check_labels, read_json, read_part_masks, typed, typed_list

DESCRIPTOR_FILE = "descriptor.json"
LICENCE = "not stated"

Graph = dict[str, list[str]]


class Descriptor:
    """An opened descriptor. The graphs are checked at once, each instance when it is asked for."""

    def __init__(self, folder: str | Path):
        """Raises DataError if the file is missing, too large, no JSON or empty, a graph is malformed, labels differ
        only in case or spaces, or two instances have one image and label."""
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
        self._numbers = [number for number, record in enumerate(self._records) if not _shows_no_part(record)]
        self._check_identities()
        self._images = ImageFiles(self.path.parent)

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[PartExample]:
        return (self.example(index) for index in range(len(self)))

    def image_path(self, index: int) -> str:
        """The image of an instance, relative to the folder; several instances may share one."""
        return typed(self._record(index), "image_path", str, where=self._where(index))

    def example(self, index: int) -> PartExample:
        """The instance as a part example. Raises DataError naming file, record and field."""
        where, record = self._where(index), self._record(index)
        image_path = self.image_path(index)
        label = clean_object_label(typed(record, "image_label", str, where=where))
        if label not in self.part_graph:
            raise DataError(f"{where}, field 'image_label': {label!r} is not in part_graph")
        self._images.size(image_path, where=where)
        masks = read_part_masks(
            self._segmentations(record, label, where=where),
            images=self._images,
            image_path=image_path,
            where=where,
        )
        return PartExample(
            image={"bytes": None, "path": str(self._images.locate(image_path, where=where))},
            image_id=f"{index:06d}-{Path(image_path).stem}",
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
        unknown = sorted(set(segmentations) - set(self.part_graph[label]))
        if unknown:
            raise DataError(f"{where}, field 'segmentations': part_graph[{label!r}] does not have {unknown}")
        return segmentations

    def _check_identities(self) -> None:
        seen: dict[tuple[str, str], int] = {}
        for index, number in enumerate(self._numbers):
            label = typed(self._record(index), "image_label", str, where=self._where(index))
            identity = (self.image_path(index), clean_object_label(label))
            if seen.setdefault(identity, number) != number:
                raise DataError(
                    f"{self._where(index)}: has the image and the label of record {seen[identity]}, {identity}; "
                    "put all masks of the object into one record"
                )

    def _record(self, index: int) -> dict[str, Any]:
        return self._records[self._numbers[index]]

    def _where(self, index: int) -> str:
        return f"{self.path}, record {self._numbers[index]}"


def clean_object_label(label: str) -> str:
    """
    >>> clean_object_label("object--pickup truck")
    'pickup truck'
    """
    return label.split("--part:")[0].rsplit("--", 1)[-1].strip()


def clean_part_label(label: str) -> str:
    """
    >>> clean_part_label("object--pickup truck--part:hood")
    'hood'
    """
    return label.rsplit("--part:", 1)[-1].strip()


def _names_part(label: str) -> bool:
    """Whether the label of a mask names a part; "object--pickup truck" names the whole object."""
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
