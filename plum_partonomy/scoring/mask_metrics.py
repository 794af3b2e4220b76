"""Compare predicted with true masks: counts, IoU, matching and average precision, computed on run lengths.

Each mask is a COCO RLE ({"size": [height, width], "counts": str}); compared masks have the same size. pycocotools
computes on the run lengths, and no mask is decoded. This file needs only numpy, scipy and pycocotools.

The examples use an image of one row and four columns, where the counts can be read as digits: "022" is no pixel of
background, two of foreground, two of background.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco
from scipy.optimize import linear_sum_assignment

RLE = dict[str, Any]
Matching = Literal["paired", "greedy", "hungarian", "union"]

MATCHINGS: tuple[Matching, ...] = ("paired", "greedy", "hungarian", "union")
AP_THRESHOLD = 0.5
"""IoU from which a mask counts as found."""


@dataclass(frozen=True)
class MaskCounts:
    """The contribution of one image to the mask metrics.

    Attributes:
        ratios: (numerator, denominator) by metric, each to be summed over images; without metrics that do not apply.
        detections: Score of each predicted part and whether it is found, for average precision.
        true_masks: Number of true parts.
    """

    ratios: dict[str, tuple[float, float]]
    detections: list[tuple[float, bool]]
    true_masks: int


def count_masks(predicted: Sequence[tuple[str, RLE, float]], true: Sequence[tuple[str, RLE]]) -> MaskCounts:
    """Return the contribution of one image with the (part name, RLE, score) of its predicted masks and the (part name,
    RLE) of its true ones.
    """
    overlaps = strict_overlaps([(name, rle) for name, rle, _ in predicted], true)
    ious = {name: both / united if united else 0.0 for name, (both, united) in overlaps.items()}
    ratios: dict[str, tuple[float, float]] = {}
    if ious:
        ratios["strict_macro_giou"] = (fmean(ious.values()), 1)
        ratios["strict_micro_giou"] = (fsum(ious.values()), len(ious))
        ratios["strict_ciou"] = tuple(map(sum, zip(*overlaps.values(), strict=True)))
    scores: dict[str, float] = {}
    for label, _, score in predicted:
        name = normalise(label)
        scores[name] = max(score, scores.get(name, score))
    if predicted and true:
        ratios |= reference_ratios([rle for _, rle, _ in predicted], [rle for _, rle in true])
    detections = [(scores[name], ious[name] >= AP_THRESHOLD) for name in scores if name in ious]
    return MaskCounts(ratios, detections, len({normalise(name) for name, _ in true} & ious.keys()))


def reference_ratios(predicted: Sequence[RLE], true: Sequence[RLE]) -> dict[str, tuple[float, float]]:
    """Return the contribution of one image to the metrics of the authors' evaluator under each matching."""
    ratios: dict[str, tuple[float, float]] = {}
    for matching in MATCHINGS:
        matched = matched_ious(predicted, true, matching=matching)
        name = "reference" if matching == "paired" else f"reference_{matching}"
        ratios[f"{name}_macro_giou"] = (fmean(matched), 1)
        ratios[f"{name}_micro_giou"] = (fsum(matched), len(matched))
    return ratios


def normalise(name: str) -> str:
    """Return a part name in the form used for comparison: stripped and in lower case."""
    return name.strip().lower()


def overlap(predicted: RLE, true: RLE) -> tuple[int, int]:
    """Return the pixels of the intersection and of the union of two masks of one size.

    >>> first = {"size": [1, 4], "counts": "013"}
    >>> left = {"size": [1, 4], "counts": "022"}
    >>> overlap(first, left)
    (1, 2)
    """
    predicted, true = _as_bytes(predicted), _as_bytes(true)
    both = area(coco.merge([predicted, true], intersect=True))
    return both, area(predicted) + area(true) - both


def area(rle: RLE) -> int:
    """Return the number of pixels of a mask."""
    return int(coco.area(_as_bytes(rle)))


def strict_overlaps(
    predicted: Iterable[tuple[str, RLE]], true: Iterable[tuple[str, RLE]]
) -> dict[str, tuple[int, int]]:
    """Return (intersection, union) in pixels of each true or predicted part, by normalised name.

    A part with a mask on one side only has no intersection. A part with empty masks on both sides is skipped. Masks
    with the same name are merged first.
    """
    predicted, true = unite_by_name(predicted), unite_by_name(true)
    overlaps = {name: overlap(predicted[name], true[name]) for name in predicted.keys() & true.keys()}
    overlaps = {name: counts for name, counts in overlaps.items() if counts[1]}
    for side in (predicted, true):
        alone = side.keys() - (predicted.keys() & true.keys())
        overlaps |= {name: (0, area(side[name])) for name in alone}
    return {name: overlaps[name] for name in sorted(overlaps)}


def strict_ious(predicted: Iterable[tuple[str, RLE]], true: Iterable[tuple[str, RLE]]) -> dict[str, float]:
    """Return the IoU of each true or predicted part, by normalised name; 0 for a part that is missing on one side.

    Half of the hull is found, and the mast is predicted as a flag:

    >>> left = {"size": [1, 4], "counts": "022"}
    >>> first = {"size": [1, 4], "counts": "013"}
    >>> last = {"size": [1, 4], "counts": "31"}
    >>> strict_ious([("hull", first), ("flag", last)], [("Hull", left), ("mast", last)])
    {'flag': 0.0, 'hull': 0.5, 'mast': 0.0}

    Args:
        predicted: (part name, RLE) pairs in any order; equal names are merged.
        true: the same for the ground truth.
    """
    overlaps = strict_overlaps(predicted, true)
    return {name: both / united if united else 0.0 for name, (both, united) in overlaps.items()}


def unite_by_name(masks: Iterable[tuple[str, RLE]]) -> dict[str, RLE]:
    """Return one mask per normalised part name; masks with the same name are merged."""
    groups: dict[str, list[RLE]] = defaultdict(list)
    for name, rle in masks:
        groups[normalise(name)].append(rle)
    return {name: unite(rles) for name, rles in groups.items()}


def matched_ious(predicted: Sequence[RLE], true: Sequence[RLE], *, matching: Matching = "paired") -> list[float]:
    """Return the IoU of the matched masks of one image in the authors' protocol, which ignores part names.

    Two empty masks have an IoU of 1; unmatched masks are ignored:

    >>> left = {"size": [1, 4], "counts": "022"}
    >>> first = {"size": [1, 4], "counts": "013"}
    >>> last = {"size": [1, 4], "counts": "31"}
    >>> nothing = {"size": [1, 4], "counts": "4"}
    >>> [matched_ious([first, last], [last, left], matching=matching) for matching in MATCHINGS]
    [[0.0, 0.0], [1.0, 0.5], [0.5, 1.0], [0.6666666666666666]]
    >>> matched_ious([nothing], [nothing, left])
    [1.0]

    Args:
        predicted: RLE masks in the order of the answer's spans.
        true: RLE masks in the order of the answer's parts.
        matching: `paired` by position, with the longer list cut; `greedy` by descending IoU; `hungarian` for the
            largest sum; `union` compares the union of each side.

    Raises:
        ValueError: One side has no mask (the authors' evaluator skips such an image).
    """
    if not predicted or not true:
        raise ValueError(f"Matching needs masks on both sides, found {len(predicted)} predicted, {len(true)} true.")
    if matching == "union":
        predicted, true = [unite(predicted)], [unite(true)]
    ious = iou_matrix(predicted, true)
    if matching in ("paired", "union"):
        return ious.diagonal().tolist()
    if matching == "hungarian":
        return ious[linear_sum_assignment(ious, maximize=True)].tolist()
    matched = []
    while ious.size:
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        matched.append(float(ious[row, column]))
        ious = np.delete(np.delete(ious, row, axis=0), column, axis=1)
    return matched


def average_precision(
    scores: np.ndarray, hits: np.ndarray, *, true: float, weights: np.ndarray | None = None
) -> float | None:
    """Return average precision as in COCO: precision at 101 recalls, each the maximum at that recall or above.

    Three masks for two true parts; the best two scores are a hit and a miss, the last is the second hit. Precision is
    1 up to a recall of 1/2 (51 of 101 recalls) and 2/3 beyond:

    >>> ap = average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), true=2)
    >>> round(ap, 4) == round((51 * 1 + 50 * 2 / 3) / 101, 4)
    True

    Args:
        scores: (N,) confidences; masks of equal confidence enter together, so their order has no effect.
        hits: (N,) bool, whether the mask matches its true mask at the threshold; at most one hit per true mask.
        true: Number of true masks (with `weights`, their weighted number).
        weights: (N,) number of times each mask counts; once if None.

    Returns:
        Average precision in [0, 1], or None without a true mask.
    """
    if not true:
        return None
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum((weights * hits)[order])
    shown = np.cumsum(weights[order])
    last_of_score = np.append(np.diff(scores[order]) != 0, True)[: len(scores)] & (shown > 0)
    found, shown = found[last_of_score], shown[last_of_score]
    precision = np.maximum.accumulate((found / shown)[::-1])[::-1]
    # the tolerance keeps a recall of 1/2 in floating point on the correct side
    reached = np.searchsorted(found / true, np.linspace(0, 1, 101) - 1e-9)
    return float(np.append(precision, 0.0)[reached].sum() / 101)


def iou_matrix(predicted: Sequence[RLE], true: Sequence[RLE]) -> np.ndarray:
    """Return the IoU matrix (predicted, true); 1 where both masks are empty."""
    predicted, true = [_as_bytes(rle) for rle in predicted], [_as_bytes(rle) for rle in true]
    sizes = {tuple(rle["size"]) for rle in [*predicted, *true]}
    if len(sizes) != 1:
        raise ValueError(f"Expected masks of one image, found the sizes [height, width] {sorted(sizes)}.")
    ious = np.asarray(coco.iou(predicted, true, [0] * len(true))).reshape(len(predicted), len(true))
    both_empty = np.logical_and.outer(coco.area(predicted) == 0, coco.area(true) == 0)
    return np.where(both_empty, 1.0, ious)


def unite(rles: Sequence[RLE]) -> RLE:
    """Return the union of one or more masks of one size. Raises ValueError for masks of several sizes."""
    if len(rles) == 1:
        return rles[0]
    sizes = {tuple(rle["size"]) for rle in rles}
    if len(sizes) != 1:
        raise ValueError(f"A union needs masks of one size, found {sorted(sizes)}.")
    return coco.merge([_as_bytes(rle) for rle in rles])


def _as_bytes(rle: RLE) -> RLE:
    counts = rle["counts"]
    return {"size": rle["size"], "counts": counts.encode("ascii") if isinstance(counts, str) else counts}
