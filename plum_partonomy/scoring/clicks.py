"""Simulated clicks on the errors of a mask, after the usual protocol of interactive segmentation."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

__all__ = ["Click", "next_click"]


class Click(NamedTuple):
    """A pixel, and whether it is inside the true mask."""

    x: int
    y: int
    inside: bool


def next_click(mask: np.ndarray, true: np.ndarray) -> Click | None:
    """
    Return the pixel with the largest distance from the border of the largest connected error region, or None for a
    mask without errors.

    Pixels are connected over their sides. Missed and excess pixels form separate regions. Of equal regions and pixels
    the first counts: missed before excess, then by rows.

    Args:
        mask, true: bool (height, width).

    >>> true = np.zeros((5, 7), dtype=bool)
    >>> true[1:4, 1:6] = True
    >>> next_click(np.zeros_like(true), true), next_click(true, true)
    (Click(x=2, y=2, inside=True), None)
    """
    largest, size = None, 0
    for inside, errors in ((True, true & ~mask), (False, mask & ~true)):
        labels, count = ndimage.label(errors)
        if count:
            sizes = np.bincount(labels.ravel())[1:]
            label = int(sizes.argmax()) + 1
            if sizes[label - 1] > size:
                largest, size = (inside, labels, label), sizes[label - 1]
    if largest is None:
        return None
    inside, labels, label = largest
    rows, columns = ndimage.find_objects(labels, max_label=label)[label - 1]
    # Pixels outside the image are a border as well.
    distance = ndimage.distance_transform_edt(np.pad(labels[rows, columns] == label, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return Click(int(x) + columns.start, int(y) + rows.start, inside)
