"""Run-length encoded masks: encoding, and decoding of untrusted ones.

An RLE is `{"size": [height, width], "counts": str}` as COCO writes it: pixels in column-major order, alternating runs
of background and foreground, starting with background. pycocotools does the work; what it leaves out is checked here:
that the runs fill exactly height * width pixels, so that a forged string can neither read nor write out of bounds.
"""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco

RLE = dict[str, Any]
Size = tuple[int, int]

MAX_PIXELS = 64_000_000
"""Largest image or mask accepted, in pixels."""


class DataError(ValueError):
    """A record that cannot be used. The message names the file, the record and the field."""


def encode(mask: np.ndarray) -> RLE:
    """Encodes a boolean mask of shape (height, width)."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"expected a boolean mask of shape (height, width), found {mask.dtype} of shape {mask.shape}")
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode(rle: RLE, *, expected_size: Size | None = None, where: str = "mask") -> np.ndarray:
    """Decodes to a boolean array of shape (height, width).

    Raises DataError, opening with `where`, if the RLE is malformed or its size is not `expected_size` (height, width).
    """
    return coco.decode(_as_bytes(validate_rle(rle, expected_size=expected_size, where=where))).astype(bool)


def area(rle: RLE) -> int:
    """Foreground pixels of a valid RLE."""
    return int(coco.area(_as_bytes(rle)))


def union(rles: list[RLE]) -> RLE:
    """The union of valid RLEs of one size."""
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"a union needs masks of one size, found {sorted(sizes)}")
    if len(rles) == 1:
        return rles[0]
    return _as_text(coco.merge([_as_bytes(rle) for rle in rles]))


def polygons_to_rle(polygons: list[list[float]], *, size: Size, where: str = "polygon") -> RLE:
    """Rasterises flat polygons [x0, y0, x1, y1, ...] (pixels) of one part to a mask of `size` (height, width).

    Raises DataError if a polygon has fewer than three points or lies more than one image size outside the image.
    """
    size = _checked_size(size, where=where)
    limit = max(size)
    if not isinstance(polygons, list) or not polygons:
        raise DataError(f"{where}: expected a list of polygons, found {polygons!r:.80}")
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(_is_number(value) for value in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{where}: expected a polygon of at least three x, y pairs, found {polygon!r:.80}")
        # rasterising walks every edge pixel by pixel, so a far point would cost unbounded memory
        if any(not -limit <= value <= 2 * limit for value in polygon):
            raise DataError(
                f"{where}: expected coordinates near the image of size {list(size)}, found {polygon!r:.80}"
            )
    return _as_text(coco.merge(coco.frPyObjects(polygons, *size)))


def validate_rle(rle: Any, *, expected_size: Size | None = None, where: str = "mask") -> RLE:
    """The RLE with text counts, once its size and its runs agree.

    Uncompressed counts (a list of run lengths) are compressed. Nothing is allocated before the runs are summed.
    Raises DataError, opening with `where`.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise DataError(f"{where}: expected an RLE with 'size' and 'counts', found {rle!r:.80}")
    height, width = _checked_size(rle["size"], where=where)
    if expected_size is not None and (height, width) != tuple(expected_size):
        raise DataError(
            f"{where}: the mask has size [{height}, {width}], but its image has [height, width] {list(expected_size)}"
        )
    counts = rle["counts"]
    if isinstance(counts, str):
        filled = _filled_pixels(counts, limit=height * width, where=where)
    elif isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts):
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


def _filled_pixels(counts: str, *, limit: int, where: str) -> int:
    """Sums the runs of compressed counts; stops at the first run that ends beyond `limit`.

    A run is written in base 32, lowest digit first, one character each (code 48 upwards): 0x20 marks that more follow,
    0x10 of the last digit is the sign. From the fourth run on the difference to the run two places before is written.
    """
    total, runs, value, shift = 0, [0, 0], 0, 0
    position = 0
    for character in counts:
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 30:
            raise DataError(f"{where}: the counts hold {character!r}, which no RLE has at this place")
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


def _checked_size(size: Any, *, where: str) -> Size:
    valid = isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if not valid:
        raise DataError(f"{where}: expected a size [height, width] of two positive integers, found {size!r:.80}")
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{where}: size {list(size)} exceeds the limit of {MAX_PIXELS} pixels")
    return size[0], size[1]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _as_bytes(rle: RLE) -> RLE:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _as_text(rle: RLE) -> RLE:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
