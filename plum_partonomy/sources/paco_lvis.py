"""Read PACO-LVIS version 1: `annotations/paco_lvis_v1_SPLIT.json` over the images of COCO 2017.

Records of the lists of the file, shortened (licence: annotations not stated; photographs under Flickr's terms):

    categories:  {"id": 98, "name": "car_(automobile)", "supercategory": "OBJECT", "synset": "car.n.01"}
                 {"id": 301, "name": "car_(automobile):wheel", "supercategory": "PART"}
    images:      {"id": 391895, "file_name": "train2017/000000391895.jpg", "height": 360, "width": 640,
                  "neg_category_ids": [], "not_exhaustive_category_ids": []}
    annotations: {"id": 5, "image_id": 391895, "category_id": 98, "obj_ann_id": 5, "bbox": [359.1, 146.2, 112.4, 99.8],
                  "area": 13243.0, "segmentation": {"size": [360, 640], "counts": "kV]12k?3N3L..."},
                  "attribute_ids": [2, 30, 49], "dom_color_ids": [2], "unknown_color": 0, "unknown_material": 1, ...}
                 {"id": 6, "image_id": 391895, "category_id": 301, "obj_ann_id": 5, ...}

    FOLDER/annotations/paco_lvis_v1_train.json  FOLDER/images/train2017/000000391895.jpg (or FOLDER/coco/train2017/)

`obj_ann_id` of a part is the annotation id of its object. Attributes (colour, pattern, material, transparency) are not
used. Underscores and the sense in brackets are removed from labels: "car_(automobile)" becomes "car".
"""

import re
from typing import Any

from plum_partonomy.records import DataError
from plum_partonomy.sources.coco import CocoParts
from plum_partonomy.sources.untrusted import typed

_SENSE = re.compile(r"_\(.*?\)")


class PacoLvis(CocoParts):
    """531 categories: 75 objects and 456 parts of objects. Counts are from the publishers' data set document."""

    name = "paco_lvis"
    licence = "annotations not stated; images under the Flickr terms of use"
    annotation_files = {
        split: tuple(f"{where}paco_lvis_v1_{file}.json" for where in ("annotations/", "", "vlpart/paco/annotations/"))
        for split, file in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    image_folders = ("images", "coco", "")
    category_count = 531
    published_counts = {
        "train": {"images": 45790, "objects": 217117, "parts": 395071},
        "validation": {"images": 2410, "objects": 10794, "parts": 20945},
        "test": {"images": 9443, "objects": 45861, "parts": 86041},
    }

    @staticmethod
    def labels(category: dict[str, Any], *, where: str) -> tuple[str, str | None]:
        """
        Return (object, part) of a category; part is None for an object.

        >>> PacoLvis.labels({"name": "car_(automobile):wheel"}, where="record 0")
        ('car', 'wheel')
        """
        name = typed(category, "name", str, where=where)
        pieces = [_SENSE.sub("", piece).replace("_", " ").strip() for piece in name.split(":")]
        if len(pieces) > 2 or not all(pieces):
            raise DataError(f"{where}, field 'name': expected object or object:part, found {name!r}")
        return pieces[0], pieces[1] if len(pieces) == 2 else None

    def owner(self, record: dict[str, Any], *, where: str) -> int:
        return typed(record, "obj_ann_id", int, where=where)
