"""Read PartImageNet++: one COCO-style json for each of ImageNet's 1,000 classes, 100 images each.

Records of the lists of a class file, shortened (licence: MIT, by the data set's card; images under ImageNet's terms):

    categories:  {"id": 1, "name": "head", "supercategory": "goldfish"}
    images:      {"id": 1, "file_name": "n01443537_78.JPEG", "height": 375, "width": 500}
    annotations: {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[210, 41, 268, 41, 268, 79, 210, 79]],
                  "area": 2204, "bbox": [210, 41, 58, 38], "iscrowd": 0}

    FOLDER/json/n01443537.json  FOLDER/category_name.json
    FOLDER/images/n01443537_78.JPEG (or images/n01443537/, train/n01443537/, n01443537/, or beside the json folder)

The card (huggingface.co/datasets/lixiao20/PartImageNetPP) defines no splits: the last tenth of a class, by id, is
test, as in public code, and the rest is train. The card does not say which fields hold the class names. The name of a
class is its entry in `category_name.json` (a text, or a list that starts with one), else the `supercategory` of its
parts. If two classes have the same name, their number is appended. A class name before a colon is removed from part
names. Parts may include each other (see the folder `including`); each keeps its own mask.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plum_partonomy.records import DataError
from plum_partonomy.sources.coco import CocoParts
from plum_partonomy.sources.json_files import list_records, read_json
from plum_partonomy.sources.untrusted import typed

CLASS_FOLDER, NAMES_FILE = "json", "category_name.json"
ID_RANGE = 10**8
"""Upper bound of ids in a class file; the number of the file makes them unique over all files."""
TEST_SHARE = 10
"""One in this many images of a class belongs to the test split."""


class PartImageNetPP(CocoParts):
    """3,308 categories: the parts of 1,000 classes."""

    name = "partimagenet_pp"
    licence = "annotations MIT; images under the ImageNet terms of access"
    annotation_files = {split: (CLASS_FOLDER,) for split in ("train", "test")}
    image_folders = ("images", "images/{synset}", "train/{synset}", "{synset}", "")
    category_count = 3308
    published_counts = {"train": {"images": 90_000}, "test": {"images": 10_000}}

    def __init__(self, folder: str | Path, **options: Any):
        """Arguments as in `CocoParts`."""
        self._class_files = self._list_classes(Path(folder))
        self._names = _class_names(Path(folder) / NAMES_FILE)
        self._places: dict[str, list[str]] = {"categories": [], "images": [], "annotations": []}
        super().__init__(folder, **options)

    @classmethod
    def _list_classes(cls, folder: Path) -> list[Path]:
        if not (files := sorted((folder / CLASS_FOLDER).glob("n*.json"))):
            raise DataError(
                f"{folder}: no annotations of {cls.name}; expected {CLASS_FOLDER}/n01443537.json and others"
            )
        return files

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return both splits. Raises DataError if there is no class file."""
        cls._list_classes(Path(folder))
        return list(cls.annotation_files)

    @classmethod
    def record_paths(cls) -> set[str]:
        return {CLASS_FOLDER, NAMES_FILE}

    @classmethod
    def annotation_path(cls, folder: Path, split: str) -> Path:
        return folder / CLASS_FOLDER

    @staticmethod
    def labels(category: dict[str, Any], *, where: str) -> tuple[str, str]:
        """
        Return (object, part) of a category.

        >>> PartImageNetPP.labels({"name": "Goldfish:Tail fin", "class_name": "goldfish"}, where="record 0")
        ('goldfish', 'tail fin')
        """
        part = typed(category, "name", str, where=where).rpartition(":")[2].replace("_", " ").strip().lower()
        label = typed(category, "class_name", str, where=where)
        if not part:
            raise DataError(f"{where}, field 'name': expected the name of a part, found {category['name']!r}")
        return label, part

    def records(self, field: str) -> Iterator[tuple[str, Any]]:
        """Yield the records of all class files, with unique ids; images and annotations of this split only."""
        places = self._places[field]
        places.clear()
        for number, path in enumerate(self._class_files):
            members = None if field == "categories" else self._members(path)
            for where, record in list_records(path, field):
                if isinstance(record, dict):
                    if members is not None and record.get("id" if field == "images" else "image_id") in members:
                        continue
                    record = self._in_one_list(record, number, field=field, where=where)
                places.append(where)
                yield where, record

    def place(self, field: str, number: int) -> str:
        return self._places[field][number]

    def _members(self, path: Path) -> set[int]:
        """Return the ids of the images of a class that belong to the other split."""
        ids = sorted({record["id"] for _, record in list_records(path, "images") if _has_id(record)})
        held_out = set(ids[len(ids) - len(ids) // TEST_SHARE :])
        return held_out if self.split == "train" else set(ids) - held_out

    def _in_one_list(self, record: dict, number: int, *, field: str, where: str) -> dict:
        shifted = {
            name: value + number * ID_RANGE
            for name in ("id", "image_id", "category_id")
            if type(value := record.get(name)) is int and 0 <= value < ID_RANGE
        }
        if field == "categories":
            synset = self._class_files[number].stem
            label = self._names.get(synset) or str(record.get("supercategory") or "").replace("_", " ").strip().lower()
            if not label:
                raise DataError(f"{where}: expected the name of the class {synset} in {NAMES_FILE}")
            shifted["class_name"] = label
        return record | shifted


def _has_id(record: Any) -> bool:
    return isinstance(record, dict) and type(record.get("id")) is int


def _class_names(path: Path) -> dict[str, str]:
    """Return synset -> unique class name; empty without the file. Raises DataError."""
    if not path.is_file():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of class numbers and names, found {type(content).__name__}")
    names = {}
    for synset, value in content.items():
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{path}, field {synset!r}: expected the name of a class, found {value!r:.80}")
        names[synset] = value.split(",")[0].replace("_", " ").strip().lower()
    shared = Counter(names.values())
    return {synset: name if shared[name] == 1 else f"{name} {synset}" for synset, name in names.items()}
