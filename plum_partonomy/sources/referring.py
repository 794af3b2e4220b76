"""Read referring expressions: RefCOCO, RefCOCO+, RefCOCOg, RefCLEF and gRefCOCO.

    refs[i].image_id ───> instances.json: images[j].id
    refs[i].ann_id ─────> instances.json: annotations[k].id

One record of the list in the pickle `refs(unc).p`, shortened:

    {"ref_id": 0, "ann_id": 1719310, "image_id": 581857, "category_id": 1, "split": "train",
     "file_name": "COCO_train2014_000000581857_16.jpg", "sent_ids": [0, 1],
     "sentences": [{"sent_id": 0, "sent": "the lady with the blue shirt", "raw": "THE LADY WITH THE BLUE SHIRT",
                    "tokens": ["the", "lady", "with", "the", "blue", "shirt"]}, ...]}

In gRefCOCO (`grefs(unc).json`), `ann_id` is a list of objects, whose masks are merged, or [-1] for an expression that
matches nothing. `instances.json` has COCO's format; in RefCLEF a segmentation is a list of compressed RLEs.

    FOLDER/refcoco/refs(unc).p  FOLDER/refcoco/instances.json  FOLDER/grefcoco/grefs(unc).json ...
    FOLDER/images/mscoco/images/train2014/COCO_train2014_000000581857.jpg (or FOLDER/images/train2014/)
    FOLDER/images/saiapr_tc-12/... (RefCLEF)

Each expression about an image is asked for once. Expressions without words or without a mask are counted in `blank`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from plum_partonomy.masks import RLE, DataError, Size, area, union
from plum_partonomy.questions.grounding import ask_for_each
from plum_partonomy.records import GroundedConversation, PartExample, PartMask
from plum_partonomy.sources.json_files import list_records, read_json
from plum_partonomy.sources.plain_pickle import read_plain_pickle
from plum_partonomy.sources.untrusted import (
    ImageFiles,
    OnError,
    find_existing,
    read_segmentation,
    refuse,
    typed,
    typed_list,
)

SPLITS = {"val": "validation"}
"""Split name in the files -> name here, where they differ."""
COCO_FOLDERS = ("images/mscoco/images/train2014", "images/train2014")


@dataclass(frozen=True, slots=True)
class _Reference:
    where: str
    expressions: tuple[str, ...]
    annotation_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _ImageRecord:
    file_name: str
    size: Size


class Referring:
    """One open split of a data set. Records and references are checked on opening, masks on access."""

    name: ClassVar[str]
    refs_file: ClassVar[str]
    image_folders: ClassVar[tuple[str, ...]] = COCO_FOLDERS
    licence: ClassVar[str] = "annotations not stated; images under the Flickr terms of use"
    published_counts: ClassVar[dict[str, dict[str, int]]] = {}

    def __init__(self, folder: str | Path, *, split: str = "train", on_error: OnError = refuse):
        """Args:
            on_error: Receives a DataError for each record that lacks a field and each reference to a missing record.

        Raises:
            DataError: A file is missing, damaged or contains more than plain data, or no reference can be used.
        """
        self.folder, self.split, self.blank = Path(folder), split, 0
        self.path = self.folder / self.refs_file
        self._references: dict[int, list[_Reference]] = {}
        for number, record in enumerate(_read_refs(self.folder, self.refs_file)):
            where = f"{self.path}, record {number}"
            if _split(record, where=where) != split:
                continue
            try:
                image_id = typed(record, "image_id", int, where=where)
                reference = _read_reference(record, where=where)
            except DataError as error:
                on_error(error)
            else:
                self._references.setdefault(image_id, []).append(reference)
        self._instances = self.path.with_name("instances.json")
        self._images = self._read_images(on_error)
        self._segmentations = self._read_segmentations(on_error)
        self._leave_out_dangling(on_error)
        if not self._references:
            raise DataError(f"{self.path}: no record of the split {split!r} that can be used")
        self._image_ids = sorted(self._references)
        self._files = ImageFiles(self.folder, field="file_name")

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return the splits of the file. Raises DataError if it cannot be read."""
        path = Path(folder) / cls.refs_file
        records = enumerate(_read_refs(Path(folder), cls.refs_file))
        return sorted({_split(record, where=f"{path}, record {number}") for number, record in records})

    @classmethod
    def record_paths(cls) -> set[str]:
        return {cls.refs_file, f"{Path(cls.refs_file).parent}/instances.json"}

    @property
    def counts(self) -> dict[str, int]:
        return {"images": len(self), "references": sum(map(len, self._references.values()))}

    def __len__(self) -> int:
        return len(self._image_ids)

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversations about the expressions of one image. Raises DataError that names file, record and
        field.
        """
        image_id = self._image_ids[index]
        record = self._images[image_id]
        where = f"{self._instances}, image {image_id}"
        names = [f"{folder}/{record.file_name}" for folder in self.image_folders]
        image_path = str(find_existing(self.folder, names, what=f"the image of {where}").relative_to(self.folder))
        self._files.check_frame(image_path, record.size, where=where)
        asked: dict[tuple[str, tuple[int, ...]], RLE | None] = {}
        for reference in self._references[image_id]:
            rle = self._mask(reference, record.size)
            for expression in reference.expressions:
                if not expression or (reference.annotation_ids and rle is None):
                    self.blank += 1
                else:
                    asked[expression, reference.annotation_ids] = rle
        example = PartExample(
            image={"bytes": None, "path": str(self._files.locate(image_path, where=where))},
            image_id=f"{self.split}-{image_id}",
            image_label="",
            masks=[PartMask(expression, rle) for (expression, _), rle in asked.items() if rle],
            source=self.name,
            licence=self.licence,
        )
        absent = [expression for (expression, _), rle in asked.items() if rle is None]
        yield from ask_for_each(example, absent=absent, seed=seed)

    def _mask(self, reference: _Reference, size: Size) -> RLE | None:
        """Return the merged mask of the expression, or None if it matches nothing or covers no pixel."""
        rles = []
        for id in reference.annotation_ids:
            _, segmentation = self._segmentations[id]
            if segmentation != "[]":
                where = f"{self._instances}, annotation {id}, field 'segmentation'"
                rles.append(read_segmentation(json.loads(segmentation), size=size, where=where))
        rle = union(rles) if rles else None
        return rle if rle and area(rle) else None

    def _read_images(self, on_error: OnError) -> dict[int, _ImageRecord]:
        images = {}
        for where, record in list_records(self._instances, "images"):
            try:
                id = typed(record, "id", int, where=where)
                if id in self._references:
                    size = (typed(record, "height", int, where=where), typed(record, "width", int, where=where))
                    images[id] = _ImageRecord(typed(record, "file_name", str, where=where), size)
            except DataError as error:
                on_error(error)
        return images

    def _read_segmentations(self, on_error: OnError) -> dict[int, tuple[int, str]]:
        """Return annotation id -> (image id, segmentation as JSON, which takes less memory than Python numbers)."""
        references = (item for references in self._references.values() for item in references)
        wanted = {id for reference in references for id in reference.annotation_ids}
        segmentations = {}
        for where, record in list_records(self._instances, "annotations"):
            try:
                id = typed(record, "id", int, where=where)
                if id in wanted:
                    segmentation = typed(record, "segmentation", (list, dict), where=where)
                    segmentations[id] = typed(record, "image_id", int, where=where), json.dumps(segmentation)
            except DataError as error:
                on_error(error)
        return segmentations

    def _leave_out_dangling(self, on_error: OnError) -> None:
        """Remove references to a missing image or annotation."""
        for image_id, references in list(self._references.items()):
            found = [reference for reference in references if self._is_good(reference, image_id, on_error)]
            self._references[image_id] = found
            if not found:
                del self._references[image_id]

    def _is_good(self, reference: _Reference, image_id: int, on_error: OnError) -> bool:
        if image_id not in self._images:
            missing = f"field 'image_id': {self._instances} has no image {image_id}"
        else:
            ids = reference.annotation_ids
            lost = [id for id in ids if self._segmentations.get(id, (None, ""))[0] != image_id]
            if not lost:
                return True
            missing = f"field 'ann_id': {self._instances} has no annotation {lost[0]} of image {image_id}"
        on_error(DataError(f"{reference.where}, {missing}"))
        return False


class RefCoco(Referring):
    """RefCOCO, UNC split."""

    name = "refcoco"
    refs_file = "refcoco/refs(unc).p"
    published_counts = {"validation": {"images": 1500}, "testA": {"images": 750}, "testB": {"images": 750}}


class RefCocoGoogle(Referring):
    """RefCOCO, Google split."""

    name = "refcoco_google"
    refs_file = "refcoco/refs(google).p"


class RefCocoPlus(Referring):
    """RefCOCO+ (expressions without words of place), UNC split."""

    name = "refcoco+"
    refs_file = "refcoco+/refs(unc).p"
    published_counts = RefCoco.published_counts


class RefCocoG(Referring):
    """RefCOCOg (longer expressions), UMD split, in which no image is in two splits."""

    name = "refcocog"
    refs_file = "refcocog/refs(umd).p"
    published_counts = {"train": {"images": 21899}, "validation": {"images": 1300}, "test": {"images": 2600}}


class RefCocoGGoogle(Referring):
    """RefCOCOg, Google split, in which some images are in several splits."""

    name = "refcocog_google"
    refs_file = "refcocog/refs(google).p"


class RefClef(Referring):
    """RefCLEF (expressions about IAPR TC-12), UNC split."""

    name = "refclef"
    refs_file = "refclef/refs(unc).p"
    image_folders = ("images/saiapr_tc-12",)
    licence = "not stated"


class GRefCoco(Referring):
    """gRefCOCO: expressions for several objects or for none."""

    name = "grefcoco"
    refs_file = "grefcoco/grefs(unc).json"


def _read_refs(folder: Path, name: str) -> list[Any]:
    path = find_existing(folder, [name], what="the expressions")
    return _load_refs(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_refs(path: Path, modified: int) -> list[Any]:
    """Read the file once for all splits, unless it was modified."""
    records = read_json(path) if path.suffix == ".json" else read_plain_pickle(path)
    if not isinstance(records, list) or not records:
        raise DataError(f"{path}: expected a non-empty list of references, found {type(records).__name__}")
    return records


def _split(record: Any, *, where: str) -> str:
    split = typed(record, "split", str, where=where)
    if not split.isidentifier():
        raise DataError(f"{where}, field 'split': expected the name of a split, found {split!r:.80}")
    return SPLITS.get(split, split)


def _read_reference(record: dict[str, Any], *, where: str) -> _Reference:
    sentences = typed_list(record, "sentences", dict, where=where)
    places = [f"{where}, record sentences[{number}]" for number in range(len(sentences))]
    texts = [typed(sentence, "sent", str, where=place) for sentence, place in zip(sentences, places, strict=True)]
    ids = typed(record, "ann_id", (int, list), where=where)
    ids = typed_list(record, "ann_id", int, where=where) if isinstance(ids, list) else [ids]
    if not ids or (-1 in ids and len(ids) > 1):
        raise DataError(f"{where}, field 'ann_id': expected ids of annotations or [-1], found {ids}")
    return _Reference(
        where, tuple(" ".join(text.split()) for text in texts), () if ids == [-1] else tuple(sorted(ids))
    )
