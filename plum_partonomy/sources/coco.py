"""Convert COCO-style part annotations to part examples; base of Pascal-Part, PACO-LVIS and PartImageNet.

    images[i].id <--- annotations[j].image_id
                      annotations[j].category_id ---> categories[k].id: an object, or a part of an object

An image has one example for each object label with parts, uncropped. An image without parts has none. If the file
assigns parts to objects (PACO's `obj_ann_id`) and the image shows several objects of one label, the example is about
the object with the most parts (if equal, the largest), with a red box around it as in the published benchmark.
Otherwise the parts of all objects of the label are merged.

A segmentation is a list of polygons, a compressed RLE, or an uncompressed RLE as in COCO's crowd regions. Parts
without a polygon of at least three points are skipped and counted in `blank`. A part whose masks cover no pixel is not
visible and has no mask in the example.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import ImageDraw
from pycocotools import mask as coco

from plum_partonomy.images import read_image
from plum_partonomy.masks import RLE, DataError, Size, area, union
from plum_partonomy.questions.conversations import converse
from plum_partonomy.records import GroundedConversation, PartExample, PartMask
from plum_partonomy.sources.json_files import list_records, record_place
from plum_partonomy.sources.untrusted import (
    ImageFiles,
    OnError,
    check_labels,
    find_file,
    known_id,
    read_segmentation,
    refuse,
    typed,
)

Graph = dict[str, list[str]]

BOX_MARGIN, BOX_WIDTH = 5, 3
"""Distance in pixels between an object and its red box, and the line width of the box."""


@dataclass(frozen=True, slots=True)
class _ImageRecord:
    file_name: str
    size: Size


@dataclass(frozen=True, slots=True)
class _Annotation:
    number: int
    id: int
    part: str | None
    object_id: int | None
    crowd: bool
    segmentation: str
    """JSON text, because polygons as lists of Python numbers take several times the memory of the file."""


class CocoParts:
    """One open split of a data set. Ids, labels and references are checked on opening, masks and images on access.

    The order of the records in the file does not matter.
    """

    name: ClassVar[str]
    licence: ClassVar[str]
    annotation_files: ClassVar[dict[str, tuple[str, ...]]]
    """Split -> possible paths of its annotations, relative to the folder."""
    image_folders: ClassVar[tuple[str, ...]]
    """Possible folders of images, relative to the folder, with {split} (stem of the annotation file) and {synset} (of
    the image file)."""
    category_count: ClassVar[int]
    """Number of categories of the published version."""
    published_counts: ClassVar[dict[str, dict[str, int]]] = {}
    """Split -> the publishers' counts of images, objects and parts."""

    def __init__(self, folder: str | Path, *, split: str = "train", on_error: OnError = refuse):
        """Args:
            on_error: Receives a DataError for each record that lacks a field, has an invalid reference or repeats an
                id. All images with the same id are skipped, and so is an image with a bad annotation, because one of
                its parts would be missing.

        Raises:
            DataError: The file is missing, is not JSON of this form, or belongs to another version.
        """
        self.folder, self.split = Path(folder), split
        self.path = self.annotation_path(self.folder, split)
        self.blank = 0
        self.categories = self._read_categories()
        self.part_graph = self._read_part_graph()
        objects = sorted(self.part_graph)
        self.instance_graph: Graph = {"object": objects} | {label: [] for label in objects}
        self.images = self._read_images(on_error)
        self.counts = {"images": len(self.images), "objects": 0, "parts": 0}
        self._groups = self._read_annotations(on_error)
        self._keys = sorted(key for key, group in self._groups.items() if any(item.part for item in group))
        if not self._keys:
            raise DataError(f"{self.path}: no image shows a part")
        self._files = ImageFiles(self.folder, field="file_name")

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return the splits whose annotations exist in the folder. Raises DataError if there are none."""
        found = [
            split
            for split, names in cls.annotation_files.items()
            if any((Path(folder) / name).is_file() for name in names)
        ]
        if not found:
            expected = ", ".join(name for names in cls.annotation_files.values() for name in names)
            raise DataError(f"{folder}: no annotations of {cls.name}; expected one of {expected}")
        return found

    @classmethod
    def record_paths(cls) -> set[str]:
        return {name for names in cls.annotation_files.values() for name in names}

    @classmethod
    def annotation_path(cls, folder: Path, split: str) -> Path:
        names = cls.annotation_files[split]
        return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])

    @staticmethod
    def labels(category: dict[str, Any], *, where: str) -> tuple[str, str | None]:
        """Return (object, part) of a category, cleaned; part is None for an object. Raises DataError."""
        raise NotImplementedError

    def owner(self, record: dict[str, Any], *, where: str) -> int | None:
        """Return the annotation id of the object that a part belongs to, or None if the file does not assign parts."""
        return None

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[PartExample]:
        return (self.example(index) for index in range(len(self)))

    def image_path(self, index: int) -> str:
        """Return the image path of an example, relative to the folder; examples may share one. Raises DataError."""
        record, where = self._image_record(index)
        name = record.file_name
        synset = Path(name).name.split("_")[0]
        folders = [folder.format(split=self.path.stem, synset=synset) for folder in self.image_folders]
        candidates = [f"{folder}/{name}" if folder else name for folder in folders]
        if (path := find_file(self.folder, candidates)) is None:
            raise DataError(
                f"{where}, field 'file_name': there is no image {' nor '.join(candidates)} in {self.folder}"
            )
        return path

    def example(self, index: int) -> PartExample:
        """Return a part example with its image. Raises DataError that names file, record and field."""
        image_path, (record, where) = self.image_path(index), self._image_record(index)
        file = self._files.locate(image_path, where=where)
        self._files.check_frame(image_path, record.size, where=f"{where}, fields 'height' and 'width'")
        example = self.annotation(index)
        chosen, _ = self._one_object(index)
        example.image = {"bytes": None, "path": str(file)}
        if chosen is not None:
            example.image = {"bytes": _with_box(file, self._mask(chosen, size=record.size)), "path": None}
        return example

    def annotation(self, index: int) -> PartExample:
        """Return a part example without reading its image. Raises DataError that names file, record and field."""
        image_id, label = self._keys[index]
        record, where = self._image_record(index)
        _, parts = self._one_object(index)
        pieces: dict[str, list[RLE]] = {}
        for item in parts:
            pieces.setdefault(item.part, []).append(self._mask(item, size=record.size))
        masks = [PartMask(part, union(pieces[part])) for part in sorted(pieces)]
        masks = [mask for mask in masks if area(mask.rle)]
        if not masks:
            raise DataError(f"{where}: the masks of {label!r} cover no pixel")
        return PartExample(
            image=None,
            image_id=f"{self.split}-{image_id}-{label}",
            image_label=label,
            masks=masks,
            source=self.name,
            licence=self.licence,
        )

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversation about an example. Raises DataError."""
        yield converse(self.example(index), part_graph=self.part_graph, seed=seed)

    def _one_object(self, index: int) -> tuple[_Annotation | None, list[_Annotation]]:
        """Return the object of the example, if a box must distinguish it from others of its label, and its parts."""
        group = self._groups[self._keys[index]]
        parts = [item for item in group if item.part]
        objects = {item.id: item for item in group if not item.part}
        owned: dict[int, list[_Annotation]] = {}
        for item in parts:
            if item.object_id is not None and item.object_id not in objects:
                raise DataError(
                    f"{self.place('annotations', item.number)}, field 'obj_ann_id': {item.object_id} is no "
                    f"{self._keys[index][1]!r} in its image"
                )
            owned.setdefault(item.object_id, []).append(item)
        if None in owned or len(objects) == 1:
            return None, parts
        size = self.images[self._keys[index][0]][1].size
        candidates = [id for id in owned if not objects[id].crowd] or list(owned)
        best = max(
            candidates, key=lambda id: (len({item.part for item in owned[id]}), self._area(objects[id], size), -id)
        )
        return objects[best], owned[best]

    def _area(self, item: _Annotation, size: Size) -> int:
        return area(self._mask(item, size=size))

    def _mask(self, item: _Annotation, *, size: Size) -> RLE:
        where = f"{self.place('annotations', item.number)}, field 'segmentation'"
        return read_segmentation(json.loads(item.segmentation), size=size, where=where)

    def _read_categories(self) -> dict[int, tuple[str, str | None]]:
        """Return category id -> (object, part)."""
        categories, owners = {}, {}
        for number, (where, record) in enumerate(self.records("categories")):
            id = typed(record, "id", int, where=where)
            _claim(owners, id, number, where=where)
            categories[id] = self.labels(record, where=where)
            if (twin := next((other for other in categories if categories[other] == categories[id]), id)) != id:
                raise DataError(f"{where}: names {categories[id]}, as does the category of id {twin}")
        return categories

    def _read_part_graph(self) -> Graph:
        graph: dict[str, set[str]] = {}
        for label, part in self.categories.values():
            graph.setdefault(label, set()).update([part] if part else [])
        where = f"{self.path}, field 'categories'"
        check_labels(graph, where=where)
        check_labels(sorted(set().union(*graph.values())), where=where)
        if not any(graph.values()):
            raise DataError(f"{where}: no category names a part of an object; this is another version of {self.name}")
        return {label: sorted(graph[label]) for label in sorted(graph)}

    def _read_images(self, on_error: OnError) -> dict[int, tuple[int, _ImageRecord]]:
        images, owners = {}, {}
        for number, (where, record) in enumerate(self.records("images")):
            try:
                id = typed(record, "id", int, where=where)
                _claim(owners, id, number, where=where)
                size = (typed(record, "height", int, where=where), typed(record, "width", int, where=where))
                images[id] = (number, _ImageRecord(typed(record, "file_name", str, where=where), size))
            except DataError as error:
                on_error(error)
                images.pop(_id(record, "id"), None)
        return images

    def _read_annotations(self, on_error: OnError) -> dict[tuple[int, str], list[_Annotation]]:
        """Return (image id, object label) -> annotations of objects and parts."""
        groups, owners, incomplete = {}, {}, set()
        for number, (_, record) in enumerate(self.records("annotations")):
            try:
                self._read_annotation(number, record, groups, owners)
            except DataError as error:
                on_error(error)
                incomplete.add(_id(record, "image_id"))
        return {key: group for key, group in groups.items() if key[0] not in incomplete}

    def _read_annotation(
        self, number: int, record: Any, groups: dict[tuple[int, str], list[_Annotation]], owners: dict[int, int]
    ) -> None:
        """Add the annotation to its group, and its id to `owners`."""
        where = self.place("annotations", number)
        id = typed(record, "id", int, where=where)
        _claim(owners, id, number, where=where)
        image_id = known_id(record, "image_id", self.images, where=where)
        label, part = self.categories[known_id(record, "category_id", self.categories, where=where)]
        segmentation = typed(record, "segmentation", (list, dict), where=where)
        self.counts["parts" if part else "objects"] += 1
        if isinstance(segmentation, list):
            segmentation = [item for item in segmentation if not isinstance(item, list) or len(item) >= 6]
        if part and not segmentation:
            self.blank += 1
            return
        object_id = self.owner(record, where=where) if part else None
        crowd = bool(record.get("iscrowd", 0))
        group = groups.setdefault((image_id, label), [])
        group.append(_Annotation(number, id, part, object_id, crowd, json.dumps(segmentation)))

    def _image_record(self, index: int) -> tuple[_ImageRecord, str]:
        number, record = self.images[self._keys[index][0]]
        return record, self.place("images", number)

    def records(self, field: str) -> Iterator[tuple[str, Any]]:
        """Yield (place, record) for each item of a list of the annotations. Raises DataError."""
        return list_records(self.path, field)

    def place(self, field: str, number: int) -> str:
        """Return the place of an item of a list, for error messages."""
        return record_place(self.path, field, number)


def _claim(owners: dict[int, int], id: int, number: int, *, where: str) -> None:
    if owners.setdefault(id, number) != number:
        raise DataError(f"{where}, field 'id': {id} is also the id of record {owners[id]}")


def _id(record: Any, field: str) -> int | None:
    value = record.get(field) if isinstance(record, dict) else None
    return value if isinstance(value, int) else None


def _with_box(file: Path, rle: RLE) -> bytes:
    """Return the upright image as JPEG, with a red box around the mask."""
    left, top, width, height = coco.toBbox({"size": rle["size"], "counts": rle["counts"].encode("ascii")}).tolist()
    drawn = read_image(file, where=str(file))
    right, bottom = min(left + width + BOX_MARGIN, drawn.width - 1), min(top + height + BOX_MARGIN, drawn.height - 1)
    box = (max(left - BOX_MARGIN, 0), max(top - BOX_MARGIN, 0), right, bottom)
    ImageDraw.Draw(drawn).rectangle(box, outline="red", width=BOX_WIDTH)
    content = io.BytesIO()
    drawn.save(content, format="JPEG", quality=95)
    return content.getvalue()
