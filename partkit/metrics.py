"""The figures of the PARTONOMY benchmark, computed from questions and predictions alone: no model, no image.

Every mask is a COCO RLE ({"size": [height, width], "counts": str}) in the pixel frame of the question's image, and is
compared by run lengths, never as a dense array. Two protocols stand side by side:

    strict     masks are paired by part name; a missing or surplus part scores 0, no question is left out
    reference  the evaluator of the PARTONOMY authors (github.com/AnselBlume/partonomy, src/evaluation/evaluators):
               masks are paired by position, unmatched masks cost nothing, questions without a predicted mask are left
               out, an empty mask against an empty mask scores 1

gIoU is the grounded mean IoU of the paper: `macro` is the mean over questions of the mean IoU inside a question,
`micro` the mean over all pairs of all questions. docs/benchmark.md works one example through both protocols.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import fsum
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from partkit.masks import RLE, area, union
from partkit.predictions import Prediction, SpanMask
from partkit.schema import PartMask, Question

Pair = tuple[Question, Prediction]
Figures = dict[str, int | float | None]

__all__ = [
    "Counts",
    "accuracy",
    "evaluate_predictions",
    "iou_per_part",
    "matched_ious",
    "normalise",
    "part_counts",
    "strict_ious",
]


def normalise(name: str) -> str:
    """A part name as it is compared: without surrounding blanks, in lower case."""
    return name.strip().lower()


# ---------------------------------------------------------------- masks


def mask_iou(predicted: RLE, true: RLE) -> float | None:
    """Intersection over union of two RLE masks of one frame; None when both are empty."""
    united = area(union([predicted, true]))
    return (area(predicted) + area(true) - united) / united if united else None


def unite_by_name(masks: Iterable[tuple[str, RLE]]) -> dict[str, RLE]:
    """One mask per normalised part name: masks that share a name are united."""
    groups: dict[str, list[RLE]] = defaultdict(list)
    for name, rle in masks:
        groups[normalise(name)].append(rle)
    return {name: union(rles) for name, rles in groups.items()}


def strict_ious(predicted: Iterable[tuple[str, RLE]], true: Iterable[tuple[str, RLE]]) -> dict[str, float]:
    """IoU of every part that is true or predicted, by normalised name.

    A part with a mask on one side only scores 0. A part whose masks are empty on both sides says nothing about the
    model and is left out.

    Args:
        predicted: (part name, RLE) pairs in any order; equal names are united.
        true: the same for the ground truth.
    """
    predicted, true = unite_by_name(predicted), unite_by_name(true)
    ious = {name: mask_iou(predicted[name], true[name]) for name in predicted.keys() & true.keys()}
    ious |= dict.fromkeys(predicted.keys() ^ true.keys(), 0.0)
    return {name: ious[name] for name in sorted(ious) if ious[name] is not None}


def matched_ious(
    predicted: Sequence[RLE],
    true: Sequence[RLE],
    *,
    matching: Literal["paired", "greedy", "hungarian", "union"] = "paired",
) -> list[float]:
    """IoU of the matched masks of one image under the authors' protocol; part names play no role.

    Args:
        predicted: RLE masks in the order of the answer's spans.
        true: RLE masks in the order of the answer's parts.
        matching: `paired` by position, the longer list cut; `greedy` by descending IoU; `hungarian` for the largest
            sum; `union` compares the union of each side, one pair.

    Raises:
        ValueError: one side has no mask (the authors' evaluator skips such an image).
    """
    if not predicted or not true:
        raise ValueError(f"Matching needs masks on both sides, found {len(predicted)} predicted, {len(true)} true.")
    if matching == "union":
        predicted, true = [union(list(predicted))], [union(list(true))]
    if matching in ("paired", "union"):
        return [_reference_iou(*pair) for pair in zip(predicted, true, strict=False)]

    ious = np.array([[_reference_iou(left, right) for right in true] for left in predicted])  # (predicted, true)
    if matching == "hungarian":
        return ious[linear_sum_assignment(ious, maximize=True)].tolist()
    matched = []
    while ious.size:
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        matched.append(float(ious[row, column]))
        ious = np.delete(np.delete(ious, row, axis=0), column, axis=1)
    return matched


def _reference_iou(predicted: RLE, true: RLE) -> float:
    iou = mask_iou(predicted, true)
    return 1.0 if iou is None else iou


# ---------------------------------------------------------------- names, choices, tags


class Counts(NamedTuple):
    """Hits and totals that add up over questions before any ratio is taken."""

    hits: float
    predicted: float
    true: float

    @property
    def precision(self) -> float:
        return self.hits / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        return self.hits / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def pool(counts: Iterable[Counts]) -> Counts:
    """Sums of hits and totals over questions."""
    return Counts(*(fsum(column) for column in zip(Counts(0, 0, 0), *counts, strict=True)))


def part_counts(
    predicted: Iterable[str], true: Iterable[str], *, protocol: Literal["strict", "reference"] = "strict"
) -> Counts:
    """Part names in common after normalising.

    `strict` compares sets. `reference` compares lists as the authors' `part_text` evaluator does: a repeated
    prediction counts as a hit each time, so that recall and F1 can exceed 1.
    """
    predicted, true = [normalise(name) for name in predicted], [normalise(name) for name in true]
    if protocol == "strict":
        predicted, true = list(dict.fromkeys(predicted)), list(dict.fromkeys(true))
    return Counts(sum(name in true for name in predicted), len(predicted), len(true))


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Share of equal choice indices (the authors' `mc_text`)."""
    return fmean(left == right for left, right in zip(predicted, true, strict=True))


# ---------------------------------------------------------------- questions against predictions


def true_parts(question: Question) -> list[str]:
    """Part names of the correct answer, in the order the answer names them."""
    return question.choice_parts[question.correct]


def true_masks(question: Question) -> list[PartMask]:
    """Masks of the correct answer's parts, in the order the answer names them."""
    by_label = {mask.label: mask for mask in question.masks}
    return [by_label[part] for part in true_parts(question)]


def _question_ious(question: Question, spans: Iterable[SpanMask]) -> dict[str, float]:
    predicted = [(span.text, span.rle) for span in spans]
    return strict_ious(predicted, [(mask.label, mask.rle) for mask in true_masks(question)])


def _macro_micro(per_question: Iterable[Sequence[float]]) -> tuple[float | None, float | None]:
    scored = [ious for ious in per_question if ious]
    if not scored:
        return None, None
    return fmean(fmean(ious) for ious in scored), fmean(iou for ious in scored for iou in ious)


def _mask_figures(pairs: Sequence[Pair]) -> Figures:
    strict = [list(_question_ious(question, prediction.given_spans).values()) for question, prediction in pairs]
    reference = [
        matched_ious([span.rle for span in prediction.given_spans], [mask.rle for mask in true_masks(question)])
        for question, prediction in pairs
        if prediction.given_spans
    ]
    end_to_end = [
        list(_question_ious(question, prediction.generated_spans).values()) for question, prediction in pairs
    ]
    figures: Figures = {}
    figures["strict_macro_giou"], figures["strict_micro_giou"] = _macro_micro(strict)
    figures["reference_macro_giou"], figures["reference_micro_giou"] = _macro_micro(reference)
    figures["end_to_end_giou"], _ = _macro_micro(end_to_end)
    return figures


def _named(prefix: str, counts: Counts, suffix: str = "") -> Figures:
    return {
        f"{prefix}_precision{suffix}": counts.precision,
        f"{prefix}_recall{suffix}": counts.recall,
        f"{prefix}_f1{suffix}": counts.f1,
    }


def _text_figures(pairs: Sequence[Pair]) -> Figures:
    chosen = pool(part_counts(q.choice_parts[p.choice], true_parts(q)) for q, p in pairs)
    written = [part_counts([span.text for span in p.generated_spans], true_parts(q)) for q, p in pairs]
    tagged = pool(
        Counts(len(set(p.true_tags) & set(p.predicted_tags)), len(p.predicted_tags), len(p.true_tags))
        for _, p in pairs
    )
    figures: Figures = {
        "choice_accuracy": accuracy([p.choice for _, p in pairs], [q.correct for q, _ in pairs]),
        "object_choice_accuracy": None,
        **_named("part", chosen),
        "span_f1": tagged.f1,
        **_named("generated_part", pool(written)),
        "generated_exact": fmean(counts.hits == counts.predicted == counts.true for counts in written),
    }
    objects = [(p.object_choice, q.object_correct) for q, p in pairs if q.object_question is not None]
    if objects:
        figures["object_choice_accuracy"] = accuracy(*zip(*objects, strict=True))
    return figures


def _random_figures(questions: Sequence[Question]) -> Figures:
    """What a uniformly random choice gets: the exact expectation of accuracy, and the ratios of the expected counts
    for precision, recall and F1 (counts are pooled before a ratio is taken, for a model as for chance)."""
    expected = []
    for question in questions:
        choices = [part_counts(parts, true_parts(question)) for parts in question.choice_parts]
        expected.append(Counts(*(fmean(column) for column in zip(*choices, strict=True))))
    objects = [1 / len(q.object_choices) for q in questions if q.object_question is not None]
    return {
        "choice_accuracy_random": fmean(1 / len(question.choices) for question in questions),
        "object_choice_accuracy_random": fmean(objects) if objects else None,
        **_named("part", pool(expected), "_random"),
    }


def _figures(pairs: Sequence[Pair]) -> Figures:
    figures = {"n": len(pairs), **_mask_figures(pairs), **_text_figures(pairs)}
    if pairs[0][1].wrong_image is not None:
        control = [(question, prediction.wrong_image) for question, prediction in pairs]
        control_figures = _mask_figures(control) | _text_figures(control)
        figures |= {f"{name}_wrong_image": value for name, value in control_figures.items()}
    return figures | _random_figures([question for question, _ in pairs])


def pair_by_id(questions: Sequence[Question], predictions: Iterable[Prediction]) -> list[Pair]:
    """Every question with its prediction, in question order.

    Raises:
        ValueError: there is no question, a question has no prediction or several, a prediction answers no question,
            the number of choices or the size of a mask differs, or the wrong-image control ran for some questions.
    """
    if not questions:
        raise ValueError("There is no question to score: give a split that has at least one.")
    by_id: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.question_id in by_id:
            raise ValueError(f"Question {prediction.question_id!r} has two predictions, expected one.")
        by_id[prediction.question_id] = prediction
    missing = [question.id for question in questions if question.id not in by_id]
    surplus = by_id.keys() - {question.id for question in questions}
    if missing or surplus:
        raise ValueError(
            f"Expected one prediction for each of {len(questions)} questions, found {len(missing)} without "
            f"(first: {missing[:1]}) and {len(surplus)} predictions of other questions (first: {sorted(surplus)[:1]})."
        )
    pairs = [(question, by_id[question.id]) for question in questions]
    for question, prediction in pairs:
        _check_fit(question, prediction)
    with_control = sum(prediction.wrong_image is not None for _, prediction in pairs)
    if with_control not in (0, len(pairs)):
        raise ValueError(
            f"The wrong-image control ran for {with_control} of {len(pairs)} questions: run it for all or none."
        )
    return pairs


def _check_fit(question: Question, prediction: Prediction) -> None:
    for name in ("choices", "object_choices"):
        choices = getattr(question, name)
        scores = prediction.choice_scores if name == "choices" else prediction.object_choice_scores
        expected, found = len(choices or ()), len(scores or ())
        if expected != found:
            raise ValueError(
                f"Question {question.id!r} has {expected} {name}, its prediction has {found} scores for them: "
                "predict again."
            )
    size = list(question.masks[0].rle["size"])
    for span in (*prediction.given_spans, *prediction.generated_spans):
        if list(span.rle["size"]) != size:
            raise ValueError(
                f"Question {question.id!r} has an image of [height, width] {size}, the predicted mask of "
                f"{span.text!r} has {list(span.rle['size'])}: resize the mask to the image."
            )
    if prediction.wrong_image is not None:
        _check_fit(question, prediction.wrong_image)


def evaluate_predictions(questions: Sequence[Question], predictions: Iterable[Prediction]) -> dict[str, Any]:
    """All figures, over all questions (`overall`) and by question type (`by_type`).

    Every figure is a share in [0, 1], or None where no question can tell (object choices without an object question,
    reference gIoU without any predicted mask). Figures of the wrong-image control carry the suffix `_wrong_image`,
    those of a random choice `_random`. The order of questions and predictions does not matter.

    >>> wing = {"size": [2, 3], "counts": "024"}  # the left column of a 2 x 3 image, column by column
    >>> question = Question(
    ...     id="q", image=None, image_id="i", image_label="plane", question_type="identification",
    ...     question="What visible parts does the object in the image have?",
    ...     choices=["The object ...: wing.", "The object ...: wheel."], correct=0,
    ...     choice_parts=[["wing"], ["wheel"]], masks=[PartMask("wing", wing)])
    >>> span = SpanMask(text="wing", start=16, end=20, rle=wing, score=0.9)
    >>> prediction = Prediction(question_id="q", image_id="i", choice_scores=[0.1, 0.7], given_spans=[span],
    ...     true_tags=[(4, 5)], predicted_tags=[(4, 5)], generated_text="The object ...: wing.", generated_spans=[])
    >>> figures = evaluate_predictions([question], [prediction])["overall"]
    >>> figures["choice_accuracy"], figures["choice_accuracy_random"], figures["strict_macro_giou"]
    (1.0, 0.5, 1.0)
    >>> figures["end_to_end_giou"], figures["generated_part_recall"]
    (0.0, 0.0)
    """
    pairs = pair_by_id(questions, predictions)
    by_type: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_type[pair[0].question_type].append(pair)
    return {
        "overall": _figures(pairs),
        "by_type": {question_type: _figures(by_type[question_type]) for question_type in sorted(by_type)},
    }


def iou_per_part(questions: Sequence[Question], predictions: Iterable[Prediction]) -> dict[str, dict[str, float]]:
    """Mean strict IoU and number of questions of every part of the given answers, by part name."""
    ious: dict[str, list[float]] = defaultdict(list)
    for question, prediction in pair_by_id(questions, predictions):
        for name, iou in _question_ious(question, prediction.given_spans).items():
            ious[name].append(iou)
    return {name: {"mean_iou": fmean(ious[name]), "n": len(ious[name])} for name in sorted(ious)}
