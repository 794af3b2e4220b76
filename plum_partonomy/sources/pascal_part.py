"""Read Pascal-Part: COCO-style `train.json` and `val.json` as converted by VLPart, over the VOC 2010 images.

One record of each list of the file (licence: annotations not stated; photographs from Flickr, under Flickr's terms):

    categories:  {"id": 19, "name": "bus:license plate", "abbr": "bus:liplate"}
    images:      {"id": 2008000003, "file_name": "2008_000003.jpg", "height": 333, "width": 500}
    annotations: {"id": 7, "image_id": 2008000003, "category_id": 19, "iscrowd": 0, "area": 96.0,
                  "bbox": [46.0, 105.0, 12.0, 8.0], "segmentation": {"size": [333, 500], "counts": "Yc?5m96K4L3N2"}}

    FOLDER/train.json  FOLDER/val.json  FOLDER/VOCdevkit/VOC2010/JPEGImages/2008_000003.jpg

Only parts are annotated, not whole objects, so the parts of all buses of an image form one example. `abbr` is the name
in the original Matlab files and is not used.
"""

from typing import Any

from plum_partonomy.records import DataError
from plum_partonomy.sources.coco import CocoParts
from plum_partonomy.sources.untrusted import typed


class PascalPart(CocoParts):
    """93 categories. VLPart's files for its 77 base categories are another version."""

    name = "pascal_part"
    licence = "annotations not stated; images under the Flickr terms of use"
    annotation_files = {"train": ("train.json",), "validation": ("val.json",)}
    image_folders = ("VOCdevkit/VOC2010/JPEGImages", "VOC2010/JPEGImages", "JPEGImages", "")
    category_count = 93

    @staticmethod
    def labels(category: dict[str, Any], *, where: str) -> tuple[str, str]:
        """
        Return (object, part) of a category.

        >>> PascalPart.labels({"name": "bus:license plate"}, where="record 0")
        ('bus', 'license plate')
        """
        name = typed(category, "name", str, where=where)
        label, _, part = (piece.strip() for piece in name.partition(":"))
        if not label or not part or ":" in part:
            raise DataError(f"{where}, field 'name': expected object:part, found {name!r}")
        return label, part
