"""Images of any mode as 8-bit RGB, in one way for every source."""

import numpy as np
from PIL import Image

from partkit.masks import DataError

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
UNBOUNDED_MODES = ("I", "F")


def check_mode(image: Image.Image, *, where: str) -> None:
    """Raises DataError if the pixels are 32-bit numbers, of which nobody can say what is black and what is white."""
    if image.mode in UNBOUNDED_MODES:
        raise DataError(
            f"{where}: the image has 32-bit pixels (Pillow's mode {image.mode!r}), whose range is unknown; save it "
            "with 8 or 16 bits per channel"
        )


def to_rgb(image: Image.Image, *, where: str) -> Image.Image:
    """The image in mode RGB; what is transparent lies on white, of 16 bits the upper 8 are kept. Raises DataError."""
    check_mode(image, where=where)
    if image.mode in SIXTEEN_BIT_MODES:
        # Pillow would clip at 255 and give an image that is white nearly everywhere
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
