"""Aggregate per-question counts into metrics, confidence intervals and differences between models.

Every metric except average precision is a ratio of two sums over questions (a mean is a sum over a count). A question
therefore contributes a numerator and a denominator, and several processes combine exactly. Average precision ranks the
masks of all questions.

Intervals are percentile bootstrap over images (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter
13): images are drawn with replacement, each with all its questions, and the metric is computed for each draw.
Questions about one image are correlated, so drawing single questions would give intervals that are too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import fsum

import numpy as np

from plum_partonomy.scoring.mask_metrics import average_precision

Ratio = tuple[float, float]
Figures = dict[str, int | float | None]

RESAMPLES = 1000
BOOTSTRAP_SEED = 0
LEVEL = 0.95

RATIO_FIGURES = (
    "strict_macro_giou",
    "strict_micro_giou",
    "strict_ciou",
    *(
        f"reference{matching}_{mean}_giou"
        for matching in ("", "_greedy", "_hungarian", "_union")
        for mean in ("macro", "micro")
    ),
    "choice_accuracy",
    "object_choice_accuracy",
    "part_precision",
    "part_recall",
    "part_f1",
    "span_f1",
    "generated_part_precision",
    "generated_part_recall",
    "generated_part_f1",
    "generated_exact",
    "end_to_end_giou",
)
FIGURES = (*RATIO_FIGURES, "ap50")


@dataclass
class Tally:
    """The contribution of one question to the metrics.

    Attributes:
        ratios: Metric -> (numerator, denominator). Metrics that do not apply to the question are absent.
        detections: (confidence, whether its IoU is at least 0.5) of each predicted mask.
        true_masks: Number of true masks.
    """

    ratios: dict[str, Ratio]
    detections: list[tuple[float, bool]] = field(default_factory=list)
    true_masks: int = 0


def summarise(tallies: Sequence[Tally]) -> Figures:
    """Return each metric, computed from sums over questions; None if it applies to no question.

    >>> summarise([Tally({"span_f1": (0.5, 1)}), Tally({"span_f1": (0.5, 3)})])["span_f1"]
    0.25
    """
    detections = _Detections(tallies)
    return {
        **ratio_figures(tallies, names=RATIO_FIGURES),
        "ap50": detections.average_precision(np.ones(len(tallies))),
    }


def ratio_figures(tallies: Sequence[Tally], *, names: Sequence[str]) -> Figures:
    """Return the named ratios of sums over questions; None if a ratio applies to no question."""
    figures: Figures = {}
    for name in names:
        ratios = [tally.ratios[name] for tally in tallies if name in tally.ratios]
        total = fsum(ratio[1] for ratio in ratios)
        figures[name] = (fsum(ratio[0] for ratio in ratios) / total if total else 0.0) if ratios else None
    return figures


def resample(
    tallies: Sequence[Tally], photographs: Sequence[str], *, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> dict[str, np.ndarray]:
    """Return each metric of `resamples` draws of the photographs with replacement: arrays (resamples,) by name.

    Metrics that apply to no question are absent; a draw without a question for a metric gives NaN. Equal photographs
    and seeds give equal draws, so two models with the same questions are compared draw by draw.

    Args:
        tallies: One per question.
        photographs: The photograph of each question; all its objects are drawn together.
    """
    weights = _draw(photographs, resamples=resamples, seed=seed)
    figures = _ratio_draws(tallies, weights, names=RATIO_FIGURES)
    detections = _Detections(tallies)
    if detections.true.any():
        values = [detections.average_precision(row) for row in weights]
        figures["ap50"] = np.array([np.nan if value is None else value for value in values])
    return figures


def ratio_draws(
    tallies: Sequence[Tally], photographs: Sequence[str], *, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the named ratios of each draw; arguments as in `resample`."""
    return _ratio_draws(tallies, _draw(photographs, resamples=RESAMPLES, seed=BOOTSTRAP_SEED), names=names)


def _draw(photographs: Sequence[str], *, resamples: int, seed: int) -> np.ndarray:
    """Return how often each question is drawn, with its photograph: (resamples, questions)."""
    unique, index = np.unique(photographs, return_inverse=True)
    n = len(unique)
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)[:, index]


def _ratio_draws(tallies: Sequence[Tally], weights: np.ndarray, *, names: Sequence[str]) -> dict[str, np.ndarray]:
    figures = {}
    resamples = len(weights)
    for name in names:
        if not any(name in tally.ratios for tally in tallies):
            continue
        addends = np.array([tally.ratios.get(name, (0, 0)) for tally in tallies], dtype=float)  # (questions, 2)
        numerator, denominator = (weights @ addends).T
        asked = weights @ np.array([name in tally.ratios for tally in tallies], dtype=float)
        values = np.divide(numerator, denominator, out=np.zeros(resamples), where=denominator > 0)
        figures[name] = np.where(asked > 0, values, np.nan)
    return figures


def confidence_intervals(tallies: Sequence[Tally], photographs: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval (low, high) of each metric with a value; arguments as in `resample`."""
    return {name: interval(draws) for name, draws in resample(tallies, photographs).items()}


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the range of the middle 95 % of the draws, without NaN."""
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class _Detections:
    """The predicted masks of all questions, ranked together."""

    def __init__(self, tallies: Sequence[Tally]):
        rows = [(index, *detection) for index, tally in enumerate(tallies) for detection in tally.detections]
        question, self.scores, hits = np.array(rows, dtype=float).reshape(-1, 3).T
        self.question, self.hits = question.astype(int), hits.astype(bool)
        self.true = np.array([tally.true_masks for tally in tallies], dtype=float)

    def average_precision(self, weights: np.ndarray) -> float | None:
        """Return average precision with the given weight of each question."""
        true = float(weights @ self.true)
        return average_precision(self.scores, self.hits, true=true, weights=weights[self.question])
