"""
Masks as others give them, checked before anything of them is allocated: run-length encodings and polygons.

An RLE is `{"size": [height, width], "counts": str}` as COCO writes it: pixels in column-major order, alternating runs
of background and foreground, starting with background. pycocotools does the work; what it leaves out is checked here:
that the runs fill exactly height * width pixels, so that a forged string can neither read nor write out of bounds, and
that polygons are short enough to be drawn. The file needs numpy and pycocotools only.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from pycocotools import mask as coco

RLE = dict[str, Any]
Size = tuple[int, int]

MAX_PIXELS = 64_000_000
"""Largest image or mask accepted, in pixels."""

MAX_PERIMETER = 4_000_000
"""Longest outline of a mask given as polygons, in pixels: rasterising walks it, at about 50 bytes a pixel."""


class DataError(ValueError):
    """A record that cannot be used. The message names the file, the record and the field."""

    def __init__(self, message: str):
        # names of files and texts of records may hold what no terminal and no file can show
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


def decode_rle(rle: Any, *, expected_size: Size | None = None, where: str = "mask") -> np.ndarray:
    """Decodes an untrusted RLE to a boolean array of shape (height, width).

    Raises DataError, opening with `where`, if the RLE is malformed or its size is not `expected_size` (height, width).
    """
    rle = validate_rle(rle, expected_size=expected_size, where=where)
    return coco.decode({"size": rle["size"], "counts": rle["counts"].encode("ascii")}).astype(bool)


def validate_rle(rle: Any, *, expected_size: Size | None = None, where: str = "mask") -> RLE:
    """The RLE with text counts, once its size and its runs agree.

    Uncompressed counts (a list of run lengths) are compressed. Nothing is allocated before the runs are summed.
    Raises DataError, opening with `where`.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise DataError(f"{where}: expected an RLE with 'size' and 'counts', found {rle!r:.80}")
    height, width = check_size(rle["size"], where=where)
    if expected_size is not None and (height, width) != tuple(expected_size):
        raise DataError(
            f"{where}: the mask has size [{height}, {width}], but its image has [height, width] {list(expected_size)}"
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
    """Rasterises flat polygons [x0, y0, x1, y1, ...] (pixels) of one part to a mask of `size` (height, width).

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
        if any(not -limit <= value <= 2 * limit for value in polygon):  # true of NaN, too
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
    """(height, width) of an untrusted size. Raises DataError unless it is two positive integers within MAX_PIXELS."""
    valid = isinstance(size, list | tuple) and len(size) == 2 and all(_is_integer(side) and side > 0 for side in size)
    if not valid:
        raise DataError(f"{where}: expected a size [height, width] of two positive integers, found {size!r:.80}")
    if size[0] * size[1] > MAX_PIXELS:
        raise DataError(f"{where}: size {list(size)!s:.80} exceeds the limit of {MAX_PIXELS} pixels")
    return int(size[0]), int(size[1])


def _perimeter(polygon: Sequence[float]) -> float:
    """Steps that rasterising takes along the closed outline, one at least for each edge."""
    points = np.asarray(polygon, dtype=float).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()) + len(points)


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


def _is_integer(value: Any) -> bool:
    return type(value) is int or isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(value, Real) and not isinstance(value, bool)


def _as_text(rle: RLE) -> RLE:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
