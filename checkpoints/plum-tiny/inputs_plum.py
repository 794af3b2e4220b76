"""
Check and convert the inputs of users and files: images and masks.

    path, URL, base64, bytes, open file ──> one of FORMATS, measured before it is decoded ──┐
    PIL image, array, tensor ───────────────────────────────────────────────────────────────┴─> upright, RGB
    array, tensor, image, RLE, polygons ──> boolean array of the size of its image

Processor and readers share this file. It needs numpy, Pillow and pycocotools, but not torch.

An RLE is `{"size": [height, width], "counts": str}` as in COCO: pixels in column-major order, alternating runs of
background and foreground, starting with background. pycocotools encodes and decodes. This file adds the checks that it
lacks: the runs must fill exactly height * width pixels, so that a forged string can neither read nor write out of
bounds, and polygons must be short enough to be drawn.

Transparency becomes white, 16-bit values keep their upper 8 bits, and EXIF orientation is applied.
"""

import base64
import binascii
import http.client
import io
import math
import re
import sys
import urllib.request
from collections.abc import Sequence
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as coco

# ---------------------------------------------------------------- masks

RLE = dict[str, Any]
Size = tuple[int, int]

MAX_PIXELS = 64_000_000
"""Maximum size of an image or mask, in pixels."""

MAX_PERIMETER = 4_000_000
"""Maximum outline of a mask given as polygons, in pixels; rasterising needs about 50 bytes per pixel of it."""


class DataError(ValueError):
    """A record that cannot be used. The message names the file, the record and the field."""

    def __init__(self, message: str):
        # file names and texts of records may contain characters that no terminal or file can show, and line ends
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message.encode("utf-8", "backslashreplace").decode("utf-8")))


def decode_rle(rle: Any, *, expected_size: Size | None = None, where: str = "mask") -> np.ndarray:
    """Return an untrusted RLE as a boolean array of shape (height, width).

    Raises DataError, starting with `where`, if the RLE is malformed or its size is not `expected_size`.
    """
    rle = validate_rle(rle, expected_size=expected_size, where=where)
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode("ascii")}).astype(bool)


def validate_rle(rle: Any, *, expected_size: Size | None = None, where: str = "mask") -> RLE:
    """Return the RLE with text counts, after a check that its runs match its size.

    Uncompressed counts (a list of run lengths) are compressed. No memory is allocated before the runs are summed.
    Raises DataError, starting with `where`.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise DataError(f"{where}: expected an RLE with 'size' and 'counts', found {rle!r:.80}")
    height, width = check_size(rle["size"], where=where)
    if expected_size is not None and (height, width) != tuple(expected_size):
        raise DataError(
            f"{where}: the mask has size [{height}, {width}], but its image has [height, width] "
            f"{list(expected_size)}; resize the mask"
        )
    counts = rle["counts"]
    if isinstance(counts, str):
        filled = _filled_pixels(counts, limit=height * width, where=where)
    elif isinstance(counts, list) and all(_is_integer(run) and run >= 0 for run in counts):
        filled = sum(counts)
    else:
        raise DataError(f"{where}: expected counts as text or a list of run lengths, found {counts!r:.80}")
    if filled != height * width:
        raise DataError(
            f"{where}: the counts decode to {'more than ' * (filled > height * width)}{min(filled, height * width)} "
            f"pixels, but size [{height}, {width}] has {height * width}"
        )
    if isinstance(counts, list):
        return _as_text(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    return {"size": [height, width], "counts": counts}


def polygons_to_rle(polygons: Any, *, size: Size, where: str = "polygon") -> RLE:
    """Return flat polygons [x0, y0, x1, y1, ...] (pixels) of one part as a mask of `size` (height, width).

    Raises DataError if a polygon has fewer than three points or lies more than one image size outside the image, or
    if the outlines are longer than MAX_PERIMETER together.
    """
    height, width = size = check_size(size, where=where)
    limit = max(size)
    if not isinstance(polygons, list) or not polygons:
        raise DataError(f"{where}: expected a list of polygons, found {polygons!r:.80}")
    perimeter = 0.0
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(map(_is_number, polygon))
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{where}: expected a polygon of at least three x, y pairs, found {polygon!r:.80}")
        if any(not -limit <= value <= 2 * limit for value in polygon):  # also true for NaN
            raise DataError(
                f"{where}: expected coordinates near the image of size {list(size)}, found {polygon!r:.80}"
            )
        perimeter += _perimeter(polygon)
    if perimeter > MAX_PERIMETER:
        raise DataError(
            f"{where}: the outline of the mask is {perimeter:.0f} pixels long, more than {MAX_PERIMETER}; "
            "give it as an RLE or with fewer points"
        )
    return _as_text(coco.merge(coco.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width)))


def check_size(size: Any, *, where: str) -> Size:
    """Return an untrusted (height, width). Raises DataError unless it is two positive integers within MAX_PIXELS."""
    size = size.tolist() if hasattr(size, "tolist") else size  # `datasets` stores lists as arrays or tensors
    valid = isinstance(size, list | tuple) and len(size) == 2 and all(_is_integer(side) and side > 0 for side in size)
    if not valid:
        raise DataError(f"{where}: expected a size [height, width] of two positive integers, found {size!r:.80}")
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{where}: size {list(size)!s:.80} exceeds the limit of {MAX_PIXELS} pixels")
    return int(size[0]), int(size[1])


def check_number(value: Any, *, name: str, least: float = -math.inf, whole: bool = False) -> None:
    """Raise DataError unless an option is a finite number, an integer if `whole`, of at least `least`."""
    number = value.item() if isinstance(value, np.generic) else value  # float32 would be compared in its own range
    is_number = _is_integer(number) if whole else _is_number(number) and abs(number) <= sys.float_info.max
    if not is_number or number < least:
        kind = "an integer" if whole else "a finite number"
        bound = "" if least == -math.inf else f" of at least {least}"
        raise DataError(f"{name} must be {kind}{bound}, found {value!r:.80}.")


def _perimeter(polygon: Sequence[float]) -> float:
    """Return the number of steps for rasterising the closed outline, at least one per edge."""
    points = np.asarray(polygon, dtype=float).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)


def _filled_pixels(counts: str, *, limit: int, where: str) -> int:
    """Return the sum of the runs of compressed counts; stop at the first run that ends beyond `limit`.

    A run is encoded in base 32, lowest digit first, one character each (code 48 upwards): 0x20 means that more
    follow, 0x10 of the last digit is the sign. From the fourth run on, the difference from the run two places before
    is stored.
    """
    total, runs, value, shift = 0, [0, 0], 0, 0
    position = 0
    for character in counts:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 30:
            raise DataError(f"{where}: the counts contain {character!r}, which no RLE has at this place")
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        if position > 2:
            value += runs[position % 2]
        if value < 0:
            raise DataError(f"{where}: the counts decode to a negative run length")
        runs[position % 2] = value
        total += value
        if total > limit:
            return total
        position, value, shift = position + 1, 0, 0
    if shift:
        raise DataError(f"{where}: the counts end in the middle of a run")
    return total


def _is_integer(value: Any) -> bool:
    return type(value) is int or isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(value, Real) and not isinstance(value, bool)


def _as_text(rle: RLE) -> RLE:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def to_binary_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """
    Return a mask in any common form as a boolean array.

    Args:
        mask: Array, tensor, PIL image or nested list `(height, width)`, with or without one axis of length 1 for its
            single channel (non-zero is inside); COCO RLE `{"size", "counts"}`; or a list of polygons
            `[x0, y0, x1, y1, ...]` in pixels, which are merged.
        size: (height, width) of the image of the mask.

    Raises:
        ValueError: The size differs from that of the image, or the RLE or the polygons are damaged. No memory is
            allocated before this check.
    """
    size = (int(size[0]), int(size[1]))
    if isinstance(mask, dict):
        counts = mask.get("counts")
        counts = counts.decode("latin-1") if isinstance(counts, bytes) else counts
        return decode_rle({**mask, "counts": counts}, expected_size=size)
    if isinstance(mask, (list, tuple)):
        mask = [item.tolist() if hasattr(item, "tolist") else item for item in mask]
        if not _is_dense(mask, size):
            polygons = [list(item) if isinstance(item, tuple) else item for item in mask]
            return decode_rle(polygons_to_rle(polygons, size=size, where="mask"))
    mask = _as_array(mask, size)
    if mask.shape in ((1, *size), (*size, 1)):
        mask = mask.reshape(size)
    if mask.shape != size:
        raise DataError(f"A mask is {mask.shape} (height, width) but its image is {size}; resize the mask.")
    if mask.dtype.kind not in "biuf":
        raise DataError(f"Expected a mask of booleans or numbers, found an array of {mask.dtype}.")
    if mask.dtype.kind == "f" and not np.isfinite(mask).all():
        raise DataError("Expected a mask of finite numbers, found NaN or infinity.")
    return mask != 0


def _as_array(mask, size: tuple[int, int]) -> np.ndarray:
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu()
        return (mask.float() if mask.is_floating_point() else mask).numpy()
    if not isinstance(mask, Image.Image):
        return np.asarray(mask)
    if mask.size != size[::-1] or len(mask.getbands()) != 1:  # checked before the pixels are decoded
        raise DataError(
            f"Expected a mask picture of one channel of {size} (height, width), found mode {mask.mode!r} of "
            f"{mask.size[::-1]}; convert it with .convert('L') or resize it."
        )
    try:
        return np.asarray(mask)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"A mask picture cannot be decoded: {error}.") from error


def _is_dense(mask: list, size: tuple[int, int]) -> bool:
    """Return whether a nested list is pixels (0 and one other value) or polygons, whose coordinates differ."""
    if len(mask) == 1 and isinstance(mask[0], (list, tuple)) and mask[0] and isinstance(mask[0][0], (list, tuple)):
        mask = mask[0]
    if len(mask) != size[0] or not all(isinstance(row, (list, tuple)) and len(row) == size[1] for row in mask):
        return False
    values = [value for row in mask for value in row]
    return all(isinstance(value, (Number, np.bool_)) for value in values) and len({0, *values}) <= 2


# ---------------------------------------------------------------- images

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""File formats that are opened, by Pillow's names; only the first of several frames is used. Pillow supports many
more, and passes some of them to other programs."""

MAX_BYTES = 512 * 1024**2
"""Maximum size of an image file, in bytes."""

MAX_ASPECT_RATIO = 256
"""Maximum ratio of the sides; above it the short side of a resized image would have no pixel."""

URL_TIMEOUT = 30
"""Maximum seconds without a response of a server."""

CHANNELS = (1, 3, 4)
"""Possible numbers of channels of an array: grey, RGB, RGBA."""

SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
UNBOUNDED_MODES = ("I", "F")
UNREADABLE = "not a readable image ({}); save or download the file again"


def read_image(
    source: Any, *, where: str = "image", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """
    Return an image as upright RGB.

    Args:
        source: Path, `http(s)` URL, `data:` URL or base64 text; bytes or a binary file; `{"bytes", "path"}` as
            `datasets` stores it; PIL image, opened or made; array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)` of
            1, 3 or 4 (with alpha) channels: uint8, uint16 (the whole range), bool, other integers of 0 to 255, or
            floats of 0 to 1 or, if any is larger, 0 to 255.
        where: Start of error messages.
        max_pixels, max_bytes: Maximum size of the image and the file.

    Raises:
        DataError: It is not a readable image of FORMATS, too large, or too narrow to be resized.
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
        image.load()  # decodes an image that the caller only opened
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        upright = ImageOps.exif_transpose(image) if rotated else image
    except Exception as error:  # corrupt files make Pillow's decoders raise almost any exception
        raise DataError(f"{where}: {UNREADABLE.format(error)}") from error
    return to_rgb(upright, where=where)


def open_image(
    source: Any, *, where: str = "image", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Return the decoded image of a file in its own mode, not rotated; arguments and errors as in `read_image`."""
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
        if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit, before the size is known
            problem = f"the image has more than {max_pixels / 10**6:g} megapixels; make it smaller"
            raise DataError(f"{where}: {problem}") from error
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"expected {', '.join(FORMATS)}, found another format or a damaged file"
            raise DataError(f"{where}: not a readable image ({reason})") from error
        raise DataError(f"{where}: {UNREADABLE.format(error)}") from error


def check_mode(image: Image.Image, *, where: str) -> None:
    """Raise DataError for 32-bit pixels, whose range is unknown."""
    if image.mode in UNBOUNDED_MODES:
        raise DataError(
            f"{where}: the image has 32-bit pixels (Pillow's mode {image.mode!r}), whose range is unknown; save it "
            "with 8 or 16 bits per channel"
        )


def check_shape(size: tuple[int, int], *, where: str) -> None:
    """Raise DataError if one side is so much longer than the other that the short one would be resized to nothing."""
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"{where}: the image has {size[0]} x {size[1]} pixels, and one side may be at most {MAX_ASPECT_RATIO} "
            "times the other; crop or pad it"
        )


def to_rgb(image: Image.Image, *, where: str) -> Image.Image:
    """Return the image in mode RGB, with transparency on white and the upper 8 of 16 bits. Raises DataError."""
    check_mode(image, where=where)
    try:
        if image.mode in SIXTEEN_BIT_MODES:
            # Pillow would clip at 255 and return a mostly white image
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "La":
            image = image.convert("LA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # decodes an opened image; corrupt files raise almost any exception
        raise DataError(f"{where}: {UNREADABLE.format(error)}") from error


def encode_for_sam(images: list[Image.Image], image_processor: Any) -> dict[str, np.ndarray]:
    """
    Return RGB images as SAM's image processor of transformers does, bit by bit, in less time: the longest side resized
    to `size["longest_edge"]` and padded, or, for SAM 2 and 3, both sides resized to a square `size`.

    A resized pixel is one byte per channel, so rescaling and normalising are a table of 256 values per channel, which
    the processor itself computes. Its own passes over whole images in float64 take most of its time.

    Returns:
        `sam_pixel_values` `(N, 3, height, width)` float32, zero outside the image, `original_sizes` and
        `reshaped_input_sizes` `(N, 2)` (height, width).
    """
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    table = image_processor([ramp], return_tensors="pt", do_resize=False, do_pad=False)["pixel_values"]
    table = np.asarray(table, dtype=np.float32).reshape(3, 256)
    side, shapes = side_for_sam(image_processor), []
    longest = dict(image_processor.size).get("longest_edge")
    pixels = np.zeros((len(images), 3, side, side), np.float32)
    for image, filled in zip(images, pixels, strict=True):
        scales = [side / edge if longest is None else longest / max(image.size) for edge in image.size]
        width, height = size = tuple(int(edge * scale + 0.5) for edge, scale in zip(image.size, scales, strict=True))
        resized = np.asarray(image if image.size == size else image.resize(size, image_processor.resample))
        for channel, values in enumerate(table):
            # "clip" writes without a buffer; no byte is out of range
            np.take(values, resized[..., channel], out=filled[channel, :height, :width], mode="clip")
        shapes.append((height, width))
    sizes = {"original_sizes": [image.size[::-1] for image in images], "reshaped_input_sizes": shapes}
    return {"sam_pixel_values": pixels, **{name: np.array(values) for name, values in sizes.items()}}


def side_for_sam(image_processor: Any) -> int:
    """
    Return the side, in pixels, of the square that an image processor makes of images for SAM.

    Raises:
        ValueError: It makes no square.
    """
    size, pad = (dict(getattr(image_processor, name, None) or {}) for name in ("size", "pad_size"))
    square = pad if size.get("longest_edge") else size
    side = square.get("height")
    if side is None or square.get("width") != side or size.get("longest_edge", side) != side:
        raise ValueError(
            f"The image processor for SAM has size {size} and pad_size {pad}, expected a longest edge padded to a "
            "square, or a square size; take the one that SAM was published with."
        )
    return side


def _check_format(image: Image.Image, *, where: str) -> None:
    # Pillow opens a JPEG with several images, as written by phones, as MPO
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
    """Return the input for Pillow; for a file its path, so that it is not read before it is known to be an image."""
    if isinstance(source, dict) and source.keys() == {"bytes", "path"}:
        source = source["bytes"] if source["bytes"] is not None else source["path"]
    if isinstance(source, str):
        source = _from_text(source, where=where, max_bytes=max_bytes)
    if isinstance(source, Path):
        try:
            if not source.is_file():  # reading a device or a pipe might never end
                problem = "there is no image file {}; check its path"
                if source.exists():
                    kind = "a folder" if source.is_dir() else "not a regular file"
                    problem = f"{{}} is {kind}; give the path of an image file"
                raise DataError(f"{where}: {problem.format(f'{str(source)!r:.200}')}")
            size = source.stat().st_size
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{where}: expected the path of an image, or base64 text of one of {', '.join(FORMATS)}, found "
                f"{str(source)!r:.80} ({getattr(error, 'strerror', None) or error})"
            ) from error
        _check_bytes(size, where=where, max_bytes=max_bytes)
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = bytes(source)
    elif hasattr(source, "read"):
        try:
            content = source.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # such as a file that is closed
            raise DataError(f"{where}: the image cannot be read ({error})") from error
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
    """Return the content of a URL, the bytes of base64 text, or else a path."""
    if not text.strip():
        raise DataError(f"{where}: found an empty text; give the path or URL of an image")
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", text, re.IGNORECASE)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise DataError(
            f"{where}: expected a path or a URL with http or https, found {text!r:.200}; give the path of the file"
        )
    if scheme:
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
    """Return whether bytes start like an image; many paths are valid base64 by chance."""
    try:
        Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:  # Pillow's readers raise almost any exception
        return False
    return True


def _from_array(source: Any, *, where: str) -> Image.Image:
    """Return an array or tensor as an image of mode L, RGB or RGBA."""
    is_tensor = hasattr(source, "detach")
    if is_tensor:
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source  # numpy has no bfloat16
    pixels = np.asarray(source)
    if pixels.ndim == 3:
        # if both ends could be channels, those of tensors come first, unless only the last has three
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
    if not 0 <= low <= high <= 255:  # also true for NaN
        raise DataError(
            f"{where}: expected pixels of 0 to 255, or floats of 0 to 1, found {low:g} to {high:g}; an image that was "
            "normalised must be given as it was before"
        )
    if pixels.dtype.kind == "f":
        pixels = np.rint(pixels * (255 if high <= 1 else 1))
    return pixels.astype(np.uint8)
