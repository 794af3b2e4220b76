"""Convert shapes of Labelme and X-AnyLabeling to masks.

A file, shortened; shapes are polygons, rectangles, rotated rectangles, circles or masks:

    {"imagePath": "0007.jpg", "imageHeight": 480, "imageWidth": 640, "flags": {"sedan": true, "pickup": false},
     "shapes": [{"label": "wheel", "shape_type": "polygon", "points": [[10.5, 20.0], ...]}]}
"""

import base64
import math
from typing import Any

import numpy as np

from plum_partonomy.images import open_image
from plum_partonomy.masks import RLE, DataError, Size, encode
from plum_partonomy.sources.untrusted import read_polygons, typed, typed_list

CIRCLE_POINTS = 64
"""Number of corners of the polygon that approximates a circle."""
POINTS = {"rectangle": (2, 4), "rotation": (4,), "oriented_rectangle": (4,), "circle": (2,), "mask": (2,)}
"""Shape -> possible numbers of its points; X-AnyLabeling writes the four corners of a rectangle."""


def read_shape(shape: dict[str, Any], *, size: Size, where: str) -> RLE:
    """Return a shape as the RLE of a mask of size (height, width). Raises DataError."""
    kind = typed(shape, "shape_type", str, where=where) if shape.get("shape_type") is not None else "polygon"
    points = typed_list(shape, "points", list, where=where)
    expected = POINTS.get(kind, (len(points),))
    pairs = all(len(point) == 2 and all(type(value) in (int, float) for value in point) for point in points)
    if not pairs or len(points) not in expected:
        counts = " or ".join(map(str, expected))
        raise DataError(f"{where}, field 'points': expected {counts} points [x, y], found {points!r:.80}")
    match kind:
        case "rectangle" if len(points) == 2:
            (x0, y0), (x1, y1) = points
            polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
        case "polygon" | "rectangle" | "rotation" | "oriented_rectangle":
            polygon = [value for point in points for value in point]
        case "circle":
            (x, y), rim = points
            radius = math.dist((x, y), rim)
            angles = [2 * math.pi * step / CIRCLE_POINTS for step in range(CIRCLE_POINTS)]
            polygon = [value for a in angles for value in (x + radius * math.cos(a), y + radius * math.sin(a))]
        case "mask":
            return _read_mask(shape, points, size=size, where=where)
        case _:
            raise DataError(
                f"{where}, field 'shape_type': expected polygon, rectangle, circle or mask, which enclose an area, "
                f"found {kind!r}"
            )
    return read_polygons([polygon], size=size, where=where)


def _read_mask(shape: dict[str, Any], points: list[list[float]], *, size: Size, where: str) -> RLE:
    """
    Return a mask stored as an image of its box; `points` are the upper left and lower right pixel of the box.

    A mask that was moved by hand has fractions of pixels: its corners are rounded, each for itself, so that the image
    may differ from the box by a pixel.
    """
    if not all(0 <= value <= max(size) for point in points for value in point):  # rejects NaN as well
        raise DataError(f"{where}, field 'points': the box {points!r:.80} leaves the image of size {list(size)}")
    (left, top), (right, bottom) = ([round(value) for value in point] for point in points)
    slack = int(any(value % 1 for point in points for value in point))
    if not (0 <= left <= right < size[1] + slack and 0 <= top <= bottom < size[0] + slack):
        raise DataError(f"{where}, field 'points': the box {points} leaves the image of size {list(size)}")
    place = f"{where}, field 'mask'"
    try:
        content = base64.b64decode(typed(shape, "mask", str, where=where))
    except ValueError as error:
        raise DataError(f"{place}: expected a picture in base64 ({error})") from error
    box = (right - left + 1, bottom - top + 1)
    picture = open_image(content, where=place, max_pixels=(box[0] + slack) * (box[1] + slack))
    if any(abs(side - expected) > slack for side, expected in zip(picture.size, box, strict=True)):
        raise DataError(f"{place}: the picture has {picture.size} pixels, but its box {points}")
    inside = np.asarray(picture.convert("L")) > 0
    mask = np.zeros(size, dtype=bool)
    target = mask[top : top + len(inside), left : left + inside.shape[1]]
    target[:] = inside[: target.shape[0], : target.shape[1]]
    return encode(mask)
