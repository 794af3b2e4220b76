"""Read your own photographs with part masks, in the format of your annotation tool.

The format is detected from the files of the folder:

    FOLDER/descriptor.json                       the authors' descriptor, see descriptor.py
    FOLDER/*.jsonl                               grounded conversations, see conversation_file.py
    FOLDER/*.json or FOLDER/*/*.json             one COCO file, as CVAT ("COCO 1.0") and others export it
    FOLDER/{train,valid,test}/_annotations.coco.json   a COCO file for each split, as Roboflow exports them
    FOLDER/annotations/instances_{train,val,test}.json   the same, as CVAT and Datumaro export subsets of these names
    FOLDER/*.json or FOLDER/*/*.json             Labelme files, one for each photograph, in one folder or in folders of
                                                 splits (train, val, test)

Records of a COCO file, shortened; images may be beside the file, in FOLDER, in images/ or in images/SUBSET/:

    categories:  {"id": 1, "name": "wheel", "supercategory": "car"}
    images:      {"id": 7, "file_name": "0007.jpg", "height": 480, "width": 640, "image_label": "sedan"}
    annotations: {"id": 3, "image_id": 7, "category_id": 1, "segmentation": [[10.5, 20.0, ...]]}

A category is a part. Its object is the `image_label` of its image, else the `supercategory`, else "object" (also if
the supercategory is empty, "none" or the name of the category itself, as some tools write it).

In a Labelme file (see labelme.py) the label of a shape is a part, and the one flag that is set is the object; without
one it is "object". Older files without the image size, or with null instead of flags, are accepted.

A mask or box of the whole object is not a part and is skipped: one with the name of its object, or of a category that
has no object and is the object of other categories.

An image has one example for each object label. Masks of one part are merged. The possible parts of an object are all
parts that any photograph of it shows.
"""

import posixpath
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from inputs_plum import FORMATS
from plum_partonomy.masks import RLE, DataError, Size, area, union
from plum_partonomy.questions.conversations import converse
from plum_partonomy.records import UNNAMED_OBJECT, GroundedConversation, PartExample, PartMask, check_plain
from plum_partonomy.sources.conversation_file import ConversationFile
from plum_partonomy.sources.descriptor import DESCRIPTOR_FILE, Descriptor, hold_out
from plum_partonomy.sources.json_files import list_records, read_json, stream_fields
from plum_partonomy.sources.labelme import read_shape
from plum_partonomy.sources.untrusted import (
    ImageFiles,
    OnError,
    check_labels,
    find_file,
    known_id,
    read_segmentation,
    refuse,
    typed,
    typed_list,
)

LICENCE = "not stated"
SPLIT_FILE = "_annotations.coco.json"
SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""Name of a folder or in the name of a COCO file, without a year -> split."""
NO_SUPERCATEGORY = ("", "none")


@dataclass
class _Photograph:
    """One object in one image.

    Attributes:
        segmentations: (place in the file, raw segmentation) for each part.
        searched: Possible paths of the image.
        split: The split given by the files, if any.
    """

    where: str
    image_path: str
    size: Size
    image_label: str = ""
    searched: tuple[str, ...] = ()
    split: str | None = None
    segmentations: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)


def record_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may contain records of any format, sorted, without hidden files."""
    found = (
        path.relative_to(folder) for pattern in ("*.jsonl", "*.json", "*/*.json") for path in folder.glob(pattern)
    )
    return sorted(folder / path for path in found if not any(name.startswith(".") for name in path.parts))


def unlisted_images(folder: Path, listed: Container[str]) -> list[str]:
    """Return the image files of a folder that are not listed, as sorted paths relative to it, without hidden ones."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    names = (path.as_posix() for path in found if not any(name.startswith(".") for name in path.parts))
    return sorted(name for name in names if name not in listed)


def open_own_parts(folder: str | Path, *, on_error: OnError = refuse) -> "OwnParts | Descriptor | ConversationFile":
    """Return the records of a folder in whichever format they are; `on_error` receives a DataError for each bad
    record.

    Raises DataError if the folder contains no records, records of several formats, or several COCO files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "expected a folder, found a file; unpack it" if folder.is_file() else "no such folder"
        raise DataError(f"{folder}: {problem}; data_dir must be the folder that holds your annotations")
    if (folder / DESCRIPTOR_FILE).is_file():
        return Descriptor(folder, on_error=on_error)
    found: dict[str, list[Path]] = {}
    for path in record_files(folder):
        found.setdefault("conversations" if path.suffix == ".jsonl" else _kind_of_json(path), []).append(path)
    unknown = found.pop("unknown", [])
    if not found:
        inner = next((path for path in sorted(folder.glob("*/*/*.json")) if "/." not in path.as_posix()), None)
        if inner is not None:
            raise DataError(
                f"{folder}: no annotations of parts here or one folder below; if {inner.relative_to(folder)} holds "
                f"them, give {folder / inner.relative_to(folder).parts[0]} instead"
            )
        others = f" ({len(unknown)} json files are neither, such as {unknown[0].name})" if unknown else ""
        raise DataError(
            f"{folder}: no annotations of parts; expected a COCO file, Labelme files{others}, {DESCRIPTOR_FILE} or "
            "*.jsonl with conversations. From CVAT export 'COCO 1.0'; its XML and pictures of masks are not read"
        )
    (kind, paths), *others = found.items()
    if others or (kind != "Labelme" and len(paths) > 1 and not (kind == "COCO" and _kept_splits(paths, kind))):
        listed = "; ".join(f"{kind}: {', '.join(path.name for path in paths[:3])}" for kind, paths in found.items())
        raise DataError(
            f"{folder}: expected one COCO file, one file of conversations or Labelme files alone, found {listed}; "
            "leave one of them in the folder, or COCO files named by their splits (train.json, val.json, test.json)"
        )
    if kind == "conversations":
        return ConversationFile(paths[0], on_error=on_error)
    return OwnParts(folder, kind=kind, paths=paths, others=unknown, on_error=on_error)


def _kept_splits(paths: list[Path], kind: str) -> dict[Path, str]:
    """Return the split of each file if their names or folders say it; empty for any other layout."""
    splits = {}
    for path in paths:
        in_folder = kind == "Labelme" or path.name == SPLIT_FILE
        name = path.parent.name if in_folder else path.stem.removeprefix("instances_")
        splits[path] = SPLITS.get(name.lower().rstrip("0123456789"))
    found = set(splits.values())
    one_each = kind == "Labelme" or len(found) == len(paths)
    return splits if one_each and len(found) > 1 and None not in found else {}


def _kind_of_json(path: Path) -> str:
    for name in stream_fields(path):
        if name in ("images", "annotations"):
            return "COCO"
        if name in ("shapes", "imagePath"):
            return "Labelme"
    return "unknown"


class OwnParts:
    """Photographs of a COCO file or of Labelme files. Records are checked on opening, masks and images on access.

    Args:
        others: Json files of the folder in another format.
        on_error: Receives a DataError for each bad record; its image is skipped.

    Attributes:
        unannotated: Listed images without parts. They have no example.
        whole_objects: Names of objects whose own masks are skipped.
    """

    name = "own_parts"

    def __init__(
        self,
        folder: Path,
        *,
        kind: str,
        paths: list[Path],
        others: Sequence[Path] = (),
        on_error: OnError = refuse,
    ):
        """Raises DataError if no image shows a part, or two labels differ only in case or spaces."""
        self.folder, self.kind, self.others = folder, kind, others
        self.path = paths[0] if kind == "COCO" and len(paths) == 1 else folder
        self.unannotated: list[str] = []
        self.whole_objects: set[str] = set()
        self._images = ImageFiles(folder, field="file_name" if kind == "COCO" else "imagePath")
        kept = _kept_splits(paths, kind)
        if kind == "COCO":
            photographs = [found for path in paths for found in self._read_coco(path, on_error, split=kept.get(path))]
        else:
            photographs = self._read_labelme(paths, on_error, kept)
        self._photographs = self._check_identities(photographs, on_error)
        if not self._photographs:
            raise DataError(f"{folder}: no image shows a part")
        graph: dict[str, set[str]] = {}
        for photograph in self._photographs:
            graph.setdefault(photograph.image_label, set()).update(photograph.segmentations)
        self.part_graph = {label: sorted(graph[label]) for label in sorted(graph)}
        self.instance_graph = {"object": sorted(graph)}
        check_labels(sorted(graph), where=f"{folder}, objects")
        check_labels(sorted(set().union(*graph.values())), where=f"{folder}, parts")
        self._objects_of_image: dict[str, int] = {}
        for photograph in self._photographs:
            count = self._objects_of_image.get(photograph.image_path, 0)
            self._objects_of_image[photograph.image_path] = count + 1

    def __len__(self) -> int:
        return len(self._photographs)

    def image_path(self, index: int) -> str:
        """Return the image path of an example, relative to the folder. Several examples may share one."""
        return self._photographs[index].image_path

    def splits(self, *, seed: int) -> dict[str, list[int]]:
        """Return split -> indices: the splits of the files, or else those of `hold_out`."""
        if self._photographs[0].split is None:
            return hold_out([self.image_path(index) for index in range(len(self))], seed=seed)
        splits: dict[str, list[int]] = {split: [] for split in SPLITS.values()}
        for index, photograph in enumerate(self._photographs):
            splits[photograph.split].append(index)
        return splits

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversation about an example. Raises DataError."""
        yield converse(self.example(index), part_graph=self.part_graph, seed=seed)

    def example(self, index: int) -> PartExample:
        """Return a part example with its image. Raises DataError that names file, record and field."""
        photograph = self._photographs[index]
        outside = photograph.image_path.startswith(("/", "../"))  # `locate` raises an error for it
        if photograph.searched and not outside and find_file(self.folder, [photograph.image_path]) is None:
            names = " nor ".join(
                f"{name!r:.200}" for name in dict.fromkeys(map(posixpath.normpath, photograph.searched))
            )
            raise DataError(f"{photograph.where}, field 'file_name': there is no image {names} in {self.folder}")
        file = self._images.locate(photograph.image_path, where=photograph.where)
        self._images.check_frame(photograph.image_path, photograph.size, where=photograph.where)
        example = self.annotation(index)
        example.image = {"bytes": None, "path": str(file)}
        return example

    def annotation(self, index: int) -> PartExample:
        """Return a part example without reading its image. Raises DataError that names file, record and field."""
        photograph = self._photographs[index]
        path, masks = photograph.image_path, []
        for part in sorted(photograph.segmentations):
            rles = []
            for place, found in photograph.segmentations[part]:
                rles.append(self._read_mask(found, size=photograph.size, where=place))
                if not area(rles[-1]):
                    raise DataError(f"{place}: the mask of {part!r} covers no pixel; draw it again or delete it")
            masks.append(PartMask(part, union(rles)))
        alone = self._objects_of_image[path] == 1
        return PartExample(
            image=None,
            image_id=path if alone else f"{path}#{photograph.image_label}",
            image_label=photograph.image_label,
            masks=masks,
            source=self.name,
            licence=LICENCE,
        )

    def _read_mask(self, found: Any, *, size: Size, where: str) -> RLE:
        if self.kind == "Labelme":
            return read_shape(found, size=size, where=where)
        return read_segmentation(found, size=size, where=where)

    def _check_identities(self, photographs: list[_Photograph], on_error: OnError) -> list[_Photograph]:
        kept: dict[tuple[str, str], _Photograph] = {}
        for photograph in photographs:
            first = kept.setdefault((photograph.image_path, photograph.image_label), photograph)
            if first is not photograph:
                on_error(
                    DataError(f"{photograph.where}: has the image {photograph.image_path!r}, as has {first.where}")
                )
        return list(kept.values())

    # ---------------------------------------------------------------- COCO

    def _read_coco(self, path: Path, on_error: OnError, *, split: str | None) -> list[_Photograph]:
        categories: dict[int, tuple[str, str]] = {}
        for where, record in list_records(path, "categories"):
            name = _part_name(record, "name", where=where)
            above = typed({"supercategory": None} | record, "supercategory", (str, type(None)), where=where) or ""
            named = above.strip().lower() not in (*NO_SUPERCATEGORY, name.lower())
            label = above.strip() if named else UNNAMED_OBJECT
            check_plain(label, where=f"{where}, field 'supercategory'")
            _claim(categories, record, (label, name), where=where)
        objects = {label.lower() for label, _ in categories.values()} - {UNNAMED_OBJECT}
        images: dict[int, _Photograph] = {}
        for where, record in list_records(path, "images"):
            try:
                _claim(images, record, self._read_coco_image(path, record, split=split, where=where), where=where)
            except DataError as error:
                on_error(error)
        photographs: dict[tuple[int, str], _Photograph] = {}
        incomplete, seen = set(), set()
        for where, record in list_records(path, "annotations"):
            image_id = record.get("image_id") if isinstance(record, dict) else None
            try:
                image = images[known_id(record, "image_id", images, where=where)]
                label, part = categories[known_id(record, "category_id", categories, where=where)]
                is_object = label == UNNAMED_OBJECT and part.lower() in objects
                label = image.image_label or label
                if is_object or _is_whole(part, label):
                    self.whole_objects.add(part)
                    continue
                segmentation = record.get("segmentation")
                if segmentation is not None:
                    typed(record, "segmentation", (list, dict), where=where)
                if not segmentation:
                    raise DataError(f"{where}, field 'segmentation': a box without a mask; outline the part")
            except DataError as error:
                on_error(error)
                incomplete.add(image_id)
                continue
            seen.add(image_id)
            new = replace(image, image_label=label, segmentations={})
            photograph = photographs.setdefault((image_id, label), new)
            place = f"{where}, field 'segmentation'"
            photograph.segmentations.setdefault(part, []).append((place, segmentation))
        self.unannotated += [image.image_path for id, image in images.items() if id not in seen | incomplete]
        return [photograph for (id, _), photograph in photographs.items() if id not in incomplete]

    def _read_coco_image(self, path: Path, record: Any, *, split: str | None, where: str) -> _Photograph:
        """Return the image of a record from anywhere in the folder; if it does not exist, the path beside the file."""
        size = (typed(record, "height", int, where=where), typed(record, "width", int, where=where))
        file_name = typed(record, "file_name", str, where=where).replace("\\", "/")
        label = typed({"image_label": ""} | record, "image_label", str, where=where).strip()
        check_plain(label, where=f"{where}, field 'image_label'")
        beside = path.parent.relative_to(self.folder).as_posix()
        subset = path.stem.removeprefix("instances_")
        folders = (beside, "", "images", f"images/{subset}")
        searched = tuple(posixpath.join(folder, file_name) for folder in folders)
        image_path = self._images.spell(find_file(self.folder, searched) or searched[0])
        return _Photograph(where, image_path, size, label, searched, split)

    # ---------------------------------------------------------------- Labelme

    def _read_labelme(self, paths: list[Path], on_error: OnError, kept: dict[Path, str]) -> list[_Photograph]:
        photographs = []
        for path in paths:
            try:
                photograph = self._read_labelme_file(path, split=kept.get(path))
            except DataError as error:
                on_error(error)
                continue
            if photograph.segmentations:
                photographs.append(photograph)
            else:
                self.unannotated.append(photograph.image_path)
        return photographs

    def _read_labelme_file(self, path: Path, *, split: str | None) -> _Photograph:
        content, where = read_json(path), str(path)
        image = typed(content, "imagePath", str, where=where).replace("\\", "/")
        image = self._images.spell(posixpath.join(path.parent.relative_to(self.folder).as_posix(), image))
        if content.get("imageHeight") is None and content.get("imageWidth") is None:  # older files do not say
            size = self._images.size(image, where=where)
        else:
            size = (typed(content, "imageHeight", int, where=where), typed(content, "imageWidth", int, where=where))
        flags = typed(content, "flags", dict, where=where) if content.get("flags") is not None else {}
        labels = [name.strip() for name, is_set in flags.items() if is_set is True]
        if len(labels) > 1:
            raise DataError(f"{where}, field 'flags': the flag that is set names the object, found several: {labels}")
        photograph = _Photograph(where, image, size, labels[0] if labels else UNNAMED_OBJECT, split=split)
        check_plain(photograph.image_label, where=f"{where}, field 'flags'")
        for number, shape in enumerate(typed_list(content, "shapes", dict, where=where)):
            place = f"{where}, field 'shapes[{number}]'"
            part = _part_name(shape, "label", where=place)
            if _is_whole(part, photograph.image_label):
                self.whole_objects.add(part)
            else:
                photograph.segmentations.setdefault(part, []).append((place, shape))
        return photograph


def _is_whole(part: str, label: str) -> bool:
    """Return whether a label names the object itself."""
    return label != UNNAMED_OBJECT and part.lower() == label.lower()


def _part_name(record: Any, field: str, *, where: str) -> str:
    name = typed(record, field, str, where=where).strip()
    if not name:
        raise DataError(f"{where}, field {field!r}: expected the name of a part, found an empty text; write it")
    check_plain(name, where=f"{where}, field {field!r}")
    return name


def _claim(records: dict[int, Any], record: Any, value: Any, *, where: str) -> None:
    id = typed(record, "id", int, where=where)
    if records.setdefault(id, value) is not value:
        raise DataError(f"{where}, field 'id': {id} is also the id of an earlier record")
