"""The images of stored records, read as everywhere else by `images_plum.py`."""

import datasets

from images_plum import MAX_ASPECT_RATIO, check_shape, open_image, read_image, to_rgb

__all__ = ["MAX_ASPECT_RATIO", "check_shape", "open_image", "read_image", "to_rgb", "undecoded"]


def undecoded(
    records: datasets.Dataset | datasets.IterableDataset,
) -> datasets.Dataset | datasets.IterableDataset:
    """The records with images as they are stored, for `read_image`; `datasets` opens any format that Pillow knows."""
    if isinstance((records.features or {}).get("image"), datasets.Image):
        return records.cast_column("image", datasets.Image(decode=False))
    return records
