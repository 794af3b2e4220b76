"""Read the images of stored records with `inputs_plum.py`."""

from typing import TYPE_CHECKING, Any

from PIL import Image

import inputs_plum
from inputs_plum import MAX_ASPECT_RATIO, check_shape, open_image, to_rgb
from plum_partonomy.masks import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["MAX_ASPECT_RATIO", "check_shape", "open_image", "read_image", "to_rgb", "undecoded"]


def read_image(source: Any, *, where: str) -> Image.Image:
    """Return the image as `inputs_plum.read_image` does, and read paths that `datasets` streams (`hf://...`,
    `zip://...`).
    """
    path = source["path"] if isinstance(source, dict) and source.get("bytes") is None else None
    if isinstance(path, str) and "://" in path and not path.startswith(("http://", "https://")):
        from datasets.utils.file_utils import xopen  # slow to import, and rarely needed

        try:
            with xopen(path, "rb") as file:
                source = file.read(inputs_plum.MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: the image cannot be read from {path!r:.200} ({error})") from error
    return inputs_plum.read_image(source, where=where)


def undecoded(
    records: "datasets.Dataset | datasets.IterableDataset",
) -> "datasets.Dataset | datasets.IterableDataset":
    """Return the records with images as stored, for `read_image`; `datasets` would open any format known to Pillow."""
    import datasets  # slow to import; already imported where records exist

    if isinstance((records.features or {}).get("image"), datasets.Image):
        return records.cast_column("image", datasets.Image(decode=False))
    return records
