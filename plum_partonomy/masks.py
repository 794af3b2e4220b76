"""Encode masks as run lengths (RLE), and compute areas, unions and resized masks.

An RLE is `{"size": [height, width], "counts": str}`. `inputs_plum.py` checks and decodes untrusted RLEs and polygons.
"""

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from inputs_plum import MAX_PIXELS, RLE, DataError, Size, polygons_to_rle, validate_rle
from inputs_plum import decode_rle as decode

__all__ = [
    "MAX_PIXELS",
    "RLE",
    "DataError",
    "Size",
    "area",
    "decode",
    "encode",
    "polygons_to_rle",
    "resize",
    "union",
    "validate_rle",
]


def encode(mask: np.ndarray) -> RLE:
    """Return the RLE of a boolean mask of shape (height, width)."""
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"expected a boolean mask of shape (height, width), found {mask.dtype} of shape {mask.shape}")
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def resize(rle: RLE, size: Size) -> RLE:
    """Return a valid RLE resized to (height, width), by nearest neighbour."""
    if tuple(rle["size"]) == tuple(size):
        return rle
    height, width = size
    stretched = Image.fromarray(decode(rle)).resize((width, height), Image.Resampling.NEAREST)
    return encode(np.asarray(stretched))


def area(rle: RLE) -> int:
    """Return the number of foreground pixels of a valid RLE."""
    return int(coco.area(_as_bytes(rle)))


def union(rles: list[RLE]) -> RLE:
    """Return the union of valid RLEs of one size."""
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"a union needs masks of one size, found {sorted(sizes)}")
    if len(rles) == 1:
        return rles[0]
    return _as_text(coco.merge([_as_bytes(rle) for rle in rles]))


def _as_bytes(rle: RLE) -> RLE:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}


def _as_text(rle: RLE) -> RLE:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
