"""Read PartImageNet: one COCO-style json per split, over images of ImageNet in folders per split.

One record of each list of a file (licence: annotations not stated; images under ImageNet's terms, for research only):

    categories:  {"id": 0, "name": "Quadruped Head", "supercategory": "Quadruped"}
    images:      {"id": 1, "file_name": "n02071294_3451.JPEG", "height": 375, "width": 500}
    annotations: {"id": 1, "image_id": 1, "category_id": 0, "iscrowd": 0, "area": 2204, "bbox": [210, 41, 58, 38],
                  "segmentation": [[210, 41, 268, 41, 268, 79, 210, 79], [212, 80]]}

    FOLDER/train.json (or FOLDER/annotations/train/train.json)
    FOLDER/train/n02071294/n02071294_3451.JPEG (or without the inner folder, or all of it in FOLDER/images/)

An object is one of the eleven supercategories, not its ImageNet class, and each image shows one object. Polygons of
fewer than three points are skipped. Names such as "Car Tier", for a tyre, are kept in lower case.
"""

from typing import Any

from plum_partonomy.records import DataError
from plum_partonomy.sources.coco import CocoParts
from plum_partonomy.sources.untrusted import typed


class PartImageNet(CocoParts):
    """40 categories: the parts of 11 supercategories."""

    name = "partimagenet"
    licence = "annotations not stated; images under the ImageNet terms of access"
    annotation_files = {
        split: (f"{file}.json", f"annotations/{file}/{file}.json", f"annotations/{file}.json")
        for split, file in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    image_folders = ("{split}/{synset}", "{split}", "images/{split}/{synset}", "images/{split}", "images", "")
    category_count = 40

    @staticmethod
    def labels(category: dict[str, Any], *, where: str) -> tuple[str, str]:
        """
        Return (object, part) of a category.

        >>> PartImageNet.labels({"name": "Car Side Mirror", "supercategory": "Car"}, where="record 0")
        ('car', 'side mirror')
        """
        label = typed(category, "supercategory", str, where=where).strip().lower()
        name = typed(category, "name", str, where=where).strip().lower()
        part = name.removeprefix(label).strip()
        if not label or not part:
            raise DataError(f"{where}, field 'name': expected the supercategory {label!r} and a part, found {name!r}")
        return label, part
