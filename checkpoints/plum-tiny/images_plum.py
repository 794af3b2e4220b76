"""
Images in any of the usual forms as 8-bit RGB, in one way for training, evaluation, processor, pipeline, shell and app.

    path, URL, base64, bytes, open file ──> one of FORMATS, measured before it is decoded ──┐
    PIL image, array, tensor ───────────────────────────────────────────────────────────────┴─> upright, RGB

What is transparent lies on white; of 16 bits the upper 8 are kept; an image is turned by its EXIF orientation. The
file needs Pillow and numpy only.
"""

import base64
import binascii
import http.client
import io
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

try:
    from .rle_plum import MAX_PIXELS, DataError
except ImportError:
    if __package__:
        raise
    from rle_plum import MAX_PIXELS, DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""File formats that are opened, in Pillow's words; of several frames the first is taken. Pillow knows many more, and
hands some of them to other programs."""

MAX_BYTES = 512 * 1024**2
"""Largest image file accepted, in bytes."""

MAX_ASPECT_RATIO = 256
"""Largest ratio of the sides: beyond it the short side of a resized image has no pixel."""

URL_TIMEOUT = 30
"""Seconds that a server may be silent."""

CHANNELS = (1, 3, 4)
"""How many channels an array may have: grey, RGB, and with alpha."""

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
UNBOUNDED_MODES = ("I", "F")


def read_image(
    source: Any, *, where: str = "image", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """
    An image as RGB, upright.

    Args:
        source: Path, `http(s)` URL, `data:` URL or base64 text; bytes or a binary file; `{"bytes", "path"}` as
            `datasets` stores it; PIL image, opened or made; array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)` of
            1, 3 or 4 (with alpha) channels: uint8, uint16 (the whole range), bool, other integers of 0 to 255, or
            floats of 0 to 1 or, if any is larger, 0 to 255.
        where: What error messages start with.
        max_pixels, max_bytes: Largest image and file accepted.

    Raises:
        DataError: It is no readable image of FORMATS, too large, or too narrow to be resized.
    """
    if not isinstance(source, Image.Image):
        is_array = hasattr(source, "__array__") or isinstance(source, np.ndarray)
        opened = _from_array(source, where=where) if is_array else None
        image = opened or open_image(source, where=where, max_pixels=max_pixels, max_bytes=max_bytes)
    else:
        image = source
        _check_format(image, where=where)
    _check_size(image, where=where, max_pixels=max_pixels)
    check_shape(image.size, where=where)
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # on corrupt files Pillow's decoders raise nearly anything
        raise DataError(f"{where}: no readable image ({error})") from error
    return to_rgb(upright, where=where)


def open_image(
    source: Any, *, where: str = "image", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """The decoded image of a file in its own mode, as it is stored, not turned; arguments and errors as above."""
    content = _content(source, where=where, max_bytes=max_bytes)
    try:
        with Image.open(content, formats=FORMATS) as image:
            _check_size(image, where=where, max_pixels=max_pixels)
            check_mode(image, where=where)
            image.load()
            image.getexif()  # read while the file is open, kept by the image
            return image
    except DataError:
        raise
    except Exception as error:  # as above
        reason = error
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"expected {', '.join(FORMATS)}, found another format or a damaged file"
        raise DataError(f"{where}: no readable image ({reason})") from error


def check_mode(image: Image.Image, *, where: str) -> None:
    """Raises DataError if the pixels are 32-bit numbers, of which nobody can say what is black and what is white."""
    if image.mode in UNBOUNDED_MODES:
        raise DataError(
            f"{where}: the image has 32-bit pixels (Pillow's mode {image.mode!r}), whose range is unknown; save it "
            "with 8 or 16 bits per channel"
        )


def check_shape(size: tuple[int, int], *, where: str) -> None:
    """Raises DataError if one side is so much longer than the other that the short one would be resized to nothing."""
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"{where}: the image has {size[0]} x {size[1]} pixels, and one side may be at most {MAX_ASPECT_RATIO} "
            "times the other; crop or pad it"
        )


def to_rgb(image: Image.Image, *, where: str) -> Image.Image:
    """The image in mode RGB; what is transparent lies on white, of 16 bits the upper 8 are kept. Raises DataError."""
    check_mode(image, where=where)
    try:
        if image.mode in SIXTEEN_BIT_MODES:
            # Pillow would clip at 255 and give an image that is white nearly everywhere
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # an opened image is decoded here, and corrupt files raise nearly anything
        raise DataError(f"{where}: no readable image ({error})") from error


def _check_format(image: Image.Image, *, where: str) -> None:
    # Pillow opens a JPEG of several pictures, as telephones write them, as MPO
    if image.format not in (None, "MPO", *FORMATS):
        raise DataError(
            f"{where}: expected an image of the formats {', '.join(FORMATS)}, found {image.format}; convert the file, "
            "or pass the decoded image (image.copy())"
        )


def _check_size(image: Image.Image, *, where: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"{where}: the image has {width} x {height} pixels, more than {max_pixels / 10**6:g} megapixels; make it "
            "smaller"
        )
    if not width * height:
        raise DataError(f"{where}: the image has no pixels, [height, width] {[height, width]}")


def _content(source: Any, *, where: str, max_bytes: int) -> io.BytesIO | Path:
    """What Pillow opens; of a file, its path, so that it is not read before it is known to be an image."""
    if isinstance(source, dict) and source.keys() == {"bytes", "path"}:
        source = source["bytes"] if source["bytes"] is not None else source["path"]
    if isinstance(source, str):
        source = _from_text(source, where=where, max_bytes=max_bytes)
    if isinstance(source, Path):
        try:
            if not source.is_file():  # a device or a pipe could be read for ever
                problem = "{} is no regular file" if source.exists() else "there is no image file {}"
                raise DataError(f"{where}: {problem.format(repr(str(source)))}")
            size = source.stat().st_size
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{where}: the image cannot be read ({reason})") from error
        _check_bytes(size, where=where, max_bytes=max_bytes)
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
    elif hasattr(source, "read"):
        content = source.read(max_bytes + 1)
    else:
        raise DataError(
            f"{where}: expected a path, a URL, bytes, a PIL image, an array or a tensor, found {type(source).__name__}"
        )
    _check_bytes(len(content), where=where, max_bytes=max_bytes)
    return io.BytesIO(content)


def _check_bytes(size: int, *, where: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(f"{where}: the file has more than {max_bytes / 10**6:g} MB; save it smaller")


def _from_text(text: str, *, where: str, max_bytes: int) -> Path | bytes:
    """A URL's content, the bytes of base64 text, else a path."""
    if text.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(text, timeout=URL_TIMEOUT) as response:
                return response.read(max_bytes + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(f"{where}: the image cannot be fetched from {text!r:.200} ({error})") from error
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    try:
        is_file = not text.startswith("data:") and Path(text).is_file()
    except (OSError, ValueError):  # too long for a path, or with a null character
        is_file = False
    if not is_file:
        try:
            content = base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError):
            content = b""
        if text.startswith("data:") or _opens(content):
            return content
    return Path(text)


def _opens(content: bytes) -> bool:
    """Whether bytes start as an image does; many a path is base64 by chance."""
    try:
        Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:  # Pillow's readers raise nearly anything
        return False
    return True


def _from_array(source: Any, *, where: str) -> Image.Image:
    """An array or tensor as an image of mode L, RGB or RGBA."""
    is_tensor = hasattr(source, "detach")
    if is_tensor:
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # numpy has no bfloat16
    pixels = np.asarray(source)
    if pixels.ndim == 3:
        # where both ends could be channels, tensors have theirs in front, unless only the last has three
        first, last = pixels.shape[0], pixels.shape[-1]
        in_front = last not in CHANNELS or is_tensor and (first == 3 or last != 3)
        if first in CHANNELS and in_front:
            pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[-1] in CHANNELS) or not pixels.size:
        raise DataError(
            f"{where}: expected an array (H, W), (H, W, C) or (C, H, W) of 1, 3 or 4 channels, found {pixels.shape}"
        )
    pixels = _as_bytes(pixels, where=where)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else np.ascontiguousarray(pixels))


def _as_bytes(pixels: np.ndarray, *, where: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels * np.uint8(255)
    if pixels.dtype == np.uint16:
        return (pixels >> 8).astype(np.uint8)
    if pixels.dtype.kind not in "iuf":
        raise DataError(f"{where}: expected an array of numbers, found {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= 255:  # true of NaN, too
        raise DataError(
            f"{where}: expected pixels of 0 to 255, or floats of 0 to 1, found {low:g} to {high:g}; an image that was "
            "normalised must be given as it was before"
        )
    if pixels.dtype.kind == "f":
        pixels = np.rint(pixels * (255 if high <= 1 else 1))
    return pixels.astype(np.uint8)
