"""The images of stored records, read as everywhere else by `inputs_plum.py`."""

from typing import TYPE_CHECKING, Any

from PIL import Image

import inputs_plum
from inputs_plum import MAX_ASPECT_RATIO, check_shape, open_image, to_rgb
from plum_partonomy.masks import DataError

if TYPE_CHECKING:
    import datasets

__all__ = ["MAX_ASPECT_RATIO", "check_shape", "open_image", "read_image", "to_rgb", "undecoded"]


def read_image(source: Any, *, where: str) -> Image.Image:
    """As `inputs_plum.read_image`, and what `datasets` streams from elsewhere, a path such as `hf://...` or `zip://...`."""
    path = source["path"] if isinstance(source, dict) and source.get("bytes") is None else None
    if isinstance(path, str) and "://" in path and not path.startswith(("http://", "https://")):
        from datasets.utils.file_utils import xopen  # takes long to import; most images come without it

        try:
            with xopen(path, "rb") as file:
                source = file.read(inputs_plum.MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            raise DataError(f"{where}: the image cannot be read from {path!r:.200} ({error})") from error
    return inputs_plum.read_image(source, where=where)


def undecoded(
    records: "datasets.Dataset | datasets.IterableDataset",
) -> "datasets.Dataset | datasets.IterableDataset":
    """The records with images as they are stored, for `read_image`; `datasets` opens any format that Pillow knows."""
    import datasets  # takes long to import; whoever has records has it already

    if isinstance((records.features or {}).get("image"), datasets.Image):
        return records.cast_column("image", datasets.Image(decode=False))
    return records
