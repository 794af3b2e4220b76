"""Read data sets of label maps (PNG files whose pixel values are classes): ADE20K, COCO-Stuff and Mapillary Vistas.

Each image has conversations about its classes; all regions of a class form one mask. Pixels without a class, and of
classes that are skipped, belong to no mask. An image with nothing else is counted in `blank`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from plum_partonomy.masks import DataError, encode
from plum_partonomy.questions.grounding import ask_for_each
from plum_partonomy.records import GroundedConversation, PartExample, PartMask
from plum_partonomy.sources.json_files import read_json
from plum_partonomy.sources.untrusted import ImageFiles, check_labels, find_existing, read_text, typed, typed_list

Classes = dict[int, str | None]
"""Pixel value -> name, or None for a valid value that is skipped."""


class LabelMaps:
    """One open split of a data set. Classes are read on opening, label maps and images on access."""

    name: ClassVar[str]
    licence: ClassVar[str]
    layouts: ClassVar[dict[str, tuple[tuple[str, str], ...]]]
    """Split -> possible folders of its label maps and images."""
    class_files: ClassVar[tuple[str, ...]]
    """Possible paths of the class names."""
    class_count: ClassVar[int]
    """Number of entries of that file in the published version."""
    published_counts: ClassVar[dict[str, dict[str, int]]]

    def __init__(self, folder: str | Path, *, split: str = "train"):
        """Raises DataError if a folder or the class file is missing, or the classes belong to another version."""
        self.folder, self.split, self.blank = Path(folder), split, 0
        self._maps, self._pictures = self._layout(self.folder, split) or self.layouts[split][0]
        self._stems = sorted(path.stem for path in (self.folder / self._maps).glob("*.png"))
        if not self._stems:
            raise DataError(f"{self.folder / self._maps}: no label maps of {self.name}, split {split!r}")
        self.path = find_existing(self.folder, self.class_files, what=f"the classes of {self.name}")
        names = self.read_classes(self.path)
        if len(names) != self.class_count:
            raise DataError(
                f"{self.path}: {len(names)} classes, but the published version of {self.name} has {self.class_count}; "
                "this is another version"
            )
        check_labels([name for name in names.values() if name], where=str(self.path))
        self.classes = names
        self._files = ImageFiles(self.folder)

    @classmethod
    def splits(cls, folder: str | Path) -> list[str]:
        """Return the splits whose label maps and images exist in the folder. Raises DataError if there are none."""
        found = [split for split in cls.layouts if cls._layout(Path(folder), split)]
        if not found:
            expected = "; ".join(" and ".join(pair) for pair in cls.layouts["train"])
            raise DataError(f"{folder}: no such files of {cls.name}; expected the folders {expected}")
        return found

    @classmethod
    def record_paths(cls) -> set[str]:
        return {*cls.class_files, *(maps for layouts in cls.layouts.values() for maps, _ in layouts)}

    @classmethod
    def _layout(cls, folder: Path, split: str) -> tuple[str, str] | None:
        return next((pair for pair in cls.layouts[split] if all((folder / name).is_dir() for name in pair)), None)

    @staticmethod
    def read_classes(path: Path) -> Classes:
        """Return the classes of the file. Raises DataError."""
        raise NotImplementedError

    @property
    def counts(self) -> dict[str, int]:
        return {"images": len(self)}

    def __len__(self) -> int:
        return len(self._stems)

    def example(self, index: int) -> PartExample:
        """Return the image with a mask for each visible class that is not skipped. Raises DataError that names the
        label map.
        """
        stem = self._stems[index]
        map_path, image_path = f"{self._maps}/{stem}.png", f"{self._pictures}/{stem}.jpg"
        where = str(self.folder / map_path)
        # column order, as in the mask encoding, takes a quarter of the time
        values = np.asfortranarray(self._files.label_map(map_path, where=where))
        self._files.check_frame(image_path, values.shape, where=where)
        shown = np.unique(values).tolist()
        unknown = sorted(set(shown) - set(self.classes))
        if unknown:
            raise DataError(
                f"{where}: no class has the pixel values {unknown}; this is another version of {self.name}"
            )
        return PartExample(
            image={"bytes": None, "path": str(self._files.locate(image_path, where=where))},
            image_id=f"{self.split}-{stem}",
            image_label="",
            masks=[PartMask(name, encode(values == value)) for value in shown if (name := self.classes[value])],
            source=self.name,
            licence=self.licence,
        )

    def conversations(self, index: int, *, seed: int) -> Iterator[GroundedConversation]:
        """Yield the conversations about the classes of one image; none if it shows none of them. Raises DataError."""
        example = self.example(index)
        self.blank += not example.masks
        yield from ask_for_each(example, article="the ", seed=seed)


class Ade20k(LabelMaps):
    """ADE20K in the version of the scene parsing challenge of 2016, 150 classes: ADEChallengeData2016.zip.

        FOLDER/objectInfo150.txt: a head "Idx, Ratio, Train, Val, Name", then 150 lines, tab-separated:
            2	0.1072	6046	612	building, edifice
        FOLDER/images/training/ADE_train_00000001.jpg  FOLDER/annotations/training/ADE_train_00000001.png

    Pixel values are those of Idx; 0 is everything else. Where a class has several names, the first is used.
    """

    name = "ade20k"
    licence = "images for non-commercial research and education only"
    layouts = {
        "train": (("annotations/training", "images/training"),),
        "validation": (("annotations/validation", "images/validation"),),
    }
    class_files = ("objectInfo150.txt",)
    class_count = 151
    published_counts = {"train": {"images": 20210}, "validation": {"images": 2000}}

    @staticmethod
    def read_classes(path: Path) -> Classes:
        classes: Classes = {0: None}
        for number, line in enumerate(read_text(path).splitlines()[1:], start=2):
            columns = line.split("\t")
            if len(columns) < 5 or not columns[0].strip().isdecimal():
                raise DataError(f"{path}, line {number}: expected Idx, Ratio, Train, Val and Name, found {line!r:.80}")
            classes[int(columns[0])] = columns[-1].split(",")[0].strip()
        return classes


class CocoStuff(LabelMaps):
    """COCO-Stuff, label maps of COCO 2017 with 80 classes of things and 91 of stuff: stuffthingmaps_trainval2017.zip.

        FOLDER/labels.txt: 183 lines such as "1: person" or "96: building-other"
        FOLDER/images/train2017/000000000009.jpg  FOLDER/annotations/train2017/000000000009.png

    Pixel values are one less than the numbers of labels.txt; 255 is unlabelled. Classes with a hyphen, which are
    variants of a material or "other" classes, are skipped.
    """

    name = "coco_stuff"
    licence = "annotations CC BY 4.0; images under the Flickr terms of use"
    layouts = {
        split: tuple(
            (maps.format(file), images.format(file))
            for maps, images in (
                ("annotations/{}", "images/{}"),
                ("cocostuff/{}", "coco/{}"),
                ("stuffthingmaps_trainval2017/{}", "{}"),
            )
        )
        for split, file in (("train", "train2017"), ("validation", "val2017"))
    }
    class_files = ("labels.txt", "cocostuff/labels.txt", "stuffthingmaps_trainval2017/labels.txt")
    class_count = 183
    published_counts = {"train": {"images": 118287}, "validation": {"images": 5000}}

    @staticmethod
    def read_classes(path: Path) -> Classes:
        classes: Classes = {}
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            found = re.fullmatch(r"(\d{1,3}): (\S.*)", line.strip())
            if found is None:
                raise DataError(f"{path}, line {number}: expected a number and a name, found {line!r:.80}")
            label = int(found.group(1))
            asked = label > 0 and "-" not in found.group(2)
            classes[(label - 1) % 256] = found.group(2) if asked else None
        return classes


class Mapillary(LabelMaps):
    """Mapillary Vistas 2.0, street scenes: 124 classes in config_v2.0.json.

    One entry of its list `labels`:

        {"name": "animal--bird", "readable": "Bird", "color": [165, 42, 42], "instances": true, "evaluate": true}

        FOLDER/training/images/0035fkbjWljhaftpVM37-g.jpg  FOLDER/training/v2.0/labels/0035fkbjWljhaftpVM37-g.png

    Pixel values are positions in `labels`. Labels that are not evaluated (void, parts of the camera's own car) are
    skipped. Label maps are indexed images.
    """

    name = "mapillary"
    licence = "see the terms accepted for the download"
    layouts = {
        "train": (("training/v2.0/labels", "training/images"),),
        "validation": (("validation/v2.0/labels", "validation/images"),),
    }
    class_files = ("config_v2.0.json",)
    class_count = 124
    published_counts = {"train": {"images": 18000}, "validation": {"images": 2000}}

    @staticmethod
    def read_classes(path: Path) -> Classes:
        classes: Classes = {}
        for value, label in enumerate(typed_list(read_json(path), "labels", dict, where=str(path))):
            where = f"{path}, record labels[{value}]"
            readable = typed(label, "readable", str, where=where).lower()
            classes[value] = readable if typed(label, "evaluate", bool, where=where) else None
        return classes
