"""Compute the metrics of the PARTONOMY benchmark from questions and predictions, without model and images.

Each mask is a COCO RLE ({"size": [height, width], "counts": str}) of the size of the question's image, and is compared
by run lengths. There are two protocols:

    strict     masks are paired by part name; a missing or surplus part scores 0, no question is skipped
    reference  the evaluator of the PARTONOMY authors (github.com/AnselBlume/partonomy, src/evaluation/evaluators):
               masks are paired by position, unmatched masks are ignored, questions without a predicted mask are
               skipped, an empty mask against an empty mask scores 1

gIoU is the grounded mean IoU of the paper: `macro` is the mean over questions of the mean IoU inside a question,
`micro` the mean over all pairs of all questions. docs/benchmark.md computes one example in both protocols.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import fsum
from statistics import fmean
from typing import Any, Literal, NamedTuple

from plum_partonomy.masks import DataError
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring.bootstrap import Figures, Ratio, Tally, confidence_intervals, summarise
from plum_partonomy.scoring.mask_metrics import RLE, count_masks, normalise, strict_ious
from plum_partonomy.scoring.predictions import Prediction, SpanMask

Pair = tuple[Question, Prediction]
MaskSource = Literal["gt_answer", "predicted_answer", "generated"]


__all__ = [
    "Counts",
    "MaskSource",
    "accuracy",
    "check_fit",
    "evaluate_predictions",
    "iou_per_part",
    "mean_iou",
    "part_counts",
    "question_ious",
    "tally",
]


# ---------------------------------------------------------------- names, choices, tags


class Counts(NamedTuple):
    """Hits and totals, summed over questions before a ratio is taken."""

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

    def ratios(self, prefix: str) -> dict[str, Ratio]:
        """Return numerators and denominators of precision, recall and F1 (2 * hits over the names of both sides)."""
        return {
            f"{prefix}_precision": (self.hits, self.predicted),
            f"{prefix}_recall": (self.hits, self.true),
            f"{prefix}_f1": (2 * self.hits, self.predicted + self.true),
        }


def pool(counts: Iterable[Counts]) -> Counts:
    """Return the sums of hits and totals over questions."""
    return Counts(*(fsum(column) for column in zip(Counts(0, 0, 0), *counts, strict=True)))


def part_counts(
    predicted: Iterable[str], true: Iterable[str], *, protocol: Literal["strict", "reference"] = "strict"
) -> Counts:
    """Return the counts of common part names after normalising.

    `strict` compares sets. `reference` compares lists as the authors' `part_text` evaluator does: a repeated
    prediction counts as a hit each time, so recall and F1 can exceed 1.

    >>> part_counts(["wing", "Wing"], ["wing", "tail"]).recall
    0.5
    >>> part_counts(["wing", "Wing"], ["wing", "tail"], protocol="reference").recall
    1.0
    """
    predicted, true = [normalise(name) for name in predicted], [normalise(name) for name in true]
    if protocol == "strict":
        predicted, true = list(dict.fromkeys(predicted)), list(dict.fromkeys(true))
    return Counts(sum(name in true for name in predicted), len(predicted), len(true))


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Return the share of equal choice indices (the authors' `mc_text`)."""
    return fmean(left == right for left, right in zip(predicted, true, strict=True))


# ---------------------------------------------------------------- questions against predictions


def true_parts(question: Question) -> list[str]:
    """Return the part names of the correct answer, in its order."""
    return question.choice_parts[question.correct]


def true_masks(question: Question) -> list[PartMask]:
    """Return the masks of the correct answer's parts, in its order."""
    by_label = {mask.label: mask for mask in question.masks}
    return [by_label[part] for part in true_parts(question)]


def _named_masks(spans: Iterable[SpanMask]) -> list[tuple[str, RLE]]:
    return [(span.text, span.rle) for span in spans]


def _named_truth(question: Question) -> list[tuple[str, RLE]]:
    return [(mask.label, mask.rle) for mask in true_masks(question)]


def question_ious(question: Question, spans: Iterable[SpanMask]) -> dict[str, float]:
    """Return the strict IoU of each part of the correct answer and of the spans, by normalised name."""
    return strict_ious(_named_masks(spans), _named_truth(question))


def mean_iou(question: Question, spans: Iterable[SpanMask]) -> float:
    """Return the mean of `question_ious`; 0 if there is nothing to compare."""
    ious = question_ious(question, spans)
    return fmean(ious.values()) if ious else 0.0


def scored_spans(prediction: Prediction, mask_source: MaskSource) -> list[SpanMask] | None:
    """Return the masks that are scored, or None for a model without masks."""
    return prediction.generated_spans if mask_source == "generated" else prediction.given_spans


# ---------------------------------------------------------------- one question


def tally(question: Question, prediction: Prediction, *, mask_source: MaskSource) -> Tally:
    """Return the contribution of one question to the metrics, without metrics that do not apply to it."""
    result = Tally(ratios=_text_ratios(question, prediction))
    spans = scored_spans(prediction, mask_source)
    if spans is not None:
        counts = count_masks([(span.text, span.rle, span.score) for span in spans], _named_truth(question))
        result.ratios |= counts.ratios
        result.detections, result.true_masks = counts.detections, counts.true_masks
    if prediction.generated_spans is not None:
        ious = question_ious(question, prediction.generated_spans)
        if ious:
            result.ratios["end_to_end_giou"] = (fmean(ious.values()), 1)
    return result


def _text_ratios(question: Question, prediction: Prediction) -> dict[str, Ratio]:
    ratios: dict[str, Ratio] = {}
    true = true_parts(question)
    if prediction.choice_scores is not None:
        ratios["choice_accuracy"] = (prediction.choice == question.correct, 1)
        ratios |= part_counts(question.choice_parts[prediction.choice], true).ratios("part")
    if question.object_question is not None and prediction.object_choice_scores is not None:
        ratios["object_choice_accuracy"] = (prediction.object_choice == question.object_correct, 1)
    if prediction.true_tags is not None:
        found, expected = set(prediction.predicted_tags), set(prediction.true_tags)
        ratios["span_f1"] = (2 * len(found & expected), len(prediction.predicted_tags) + len(prediction.true_tags))
    if prediction.named_parts is not None:
        written = part_counts(prediction.named_parts, true)
        ratios |= written.ratios("generated_part")
        ratios["generated_exact"] = (written.hits == written.predicted == written.true, 1)
    return ratios


# ---------------------------------------------------------------- all questions


def _random_figures(questions: Sequence[Question]) -> Figures:
    """Return the metrics of a uniformly random choice: the exact expectation of accuracy, and the ratios of the
    expected counts for precision, recall and F1 (counts are pooled before the ratio, as for a model).
    """
    expected = []
    for question in questions:
        choices = [part_counts(parts, true_parts(question)) for parts in question.choice_parts]
        expected.append(Counts(*(fmean(column) for column in zip(*choices, strict=True))))
    objects = [1 / len(q.object_choices) for q in questions if q.object_question is not None]
    parts = pool(expected)
    return {
        "choice_accuracy_random": fmean(1 / len(question.choices) for question in questions),
        "object_choice_accuracy_random": fmean(objects) if objects else None,
        "part_precision_random": parts.precision,
        "part_recall_random": parts.recall,
        "part_f1_random": parts.f1,
    }


def pair_by_id(questions: Sequence[Question], predictions: Iterable[Prediction]) -> list[Pair]:
    """Return each question with its prediction, in question order.

    Raises:
        DataError: There is no question, a question has no or several predictions, a prediction matches no question,
            the number of choices or the size of a mask differs, or only some questions have the wrong-image control.
    """
    if not questions:
        raise DataError("There is no question to score: give a split that has at least one.")
    by_id: dict[str, Prediction] = {}
    for prediction in predictions:
        if prediction.question_id in by_id:
            raise DataError(f"Question {prediction.question_id!r} has two predictions, expected one.")
        by_id[prediction.question_id] = prediction
    missing = [question.id for question in questions if question.id not in by_id]
    surplus = by_id.keys() - {question.id for question in questions}
    if missing or surplus:
        raise DataError(
            f"Expected one prediction for each of {len(questions)} questions, found {len(missing)} without "
            f"(first: {missing[:1]}) and {len(surplus)} predictions of other questions (first: {sorted(surplus)[:1]})."
        )
    pairs = [(question, by_id[question.id]) for question in questions]
    for question, prediction in pairs:
        check_fit(question, prediction)
    with_control = sum(prediction.wrong_image is not None for _, prediction in pairs)
    if with_control not in (0, len(pairs)):
        raise DataError(
            f"The wrong-image control ran for {with_control} of {len(pairs)} questions: run it for all or none."
        )
    return pairs


def check_fit(question: Question, prediction: Prediction) -> None:
    """Raise DataError if the number of scores or the size of a mask differs between question and prediction."""
    for name in ("choices", "object_choices"):
        choices = getattr(question, name)
        scores = prediction.choice_scores if name == "choices" else prediction.object_choice_scores
        if scores is None and prediction.true_tags is None:
            continue
        expected, found = len(choices or ()), len(scores or ())
        if expected != found:
            raise DataError(
                f"Question {question.id!r} has {expected} {name}, its prediction has {found} scores for them: "
                "predict again."
            )
    size = list(question.masks[0].rle["size"])
    for span in (*(prediction.given_spans or ()), *(prediction.generated_spans or ())):
        if list(span.rle["size"]) != size:
            raise DataError(
                f"Question {question.id!r} has an image of [height, width] {size}, the predicted mask of "
                f"{span.text!r} has {list(span.rle['size'])}: resize the mask to the image."
            )
    if prediction.wrong_image is not None:
        check_fit(question, prediction.wrong_image)


def evaluate_predictions(
    questions: Sequence[Question],
    predictions: Iterable[Prediction],
    *,
    mask_source: MaskSource = "gt_answer",
    intervals: bool = False,
) -> dict[str, Any]:
    """Return all metrics, over all questions (`overall`) and by question type (`by_type`).

    A metric is a share in [0, 1], or None if it applies to no question (object choices without an object question,
    reference gIoU without a predicted mask). Metrics of the wrong-image control have the suffix `_wrong_image`, those
    of a random choice `_random`. The order of questions and predictions does not matter.

    Args:
        questions, predictions: One prediction per question.
        mask_source: The scored masks: those of the given answer, which is the correct one (`gt_answer`) or the chosen
            one (`predicted_answer`), or those of the generated answer (`generated`). They are always compared with
            the masks of the correct answer.
        intervals: Also return `intervals`, the 95 % bootstrap intervals [low, high] in the same two groups.

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
    # sorted, so that resampling does not depend on the order of the questions
    pairs = sorted(pair_by_id(questions, predictions), key=lambda pair: pair[0].id)
    by_type: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_type[pair[0].question_type].append(pair)
    groups = {"": pairs} | {name: by_type[name] for name in sorted(by_type)}
    results = {name: _figures(group, mask_source=mask_source, intervals=intervals) for name, group in groups.items()}
    figures = {name: result[0] for name, result in results.items()}
    metrics = {"overall": figures.pop(""), "by_type": figures}
    if intervals:
        ranges = {name: result[1] for name, result in results.items()}
        metrics["intervals"] = {"overall": ranges.pop(""), "by_type": ranges}
    return metrics


def _figures(
    pairs: Sequence[Pair], *, mask_source: MaskSource, intervals: bool
) -> tuple[Figures, dict[str, tuple[float, float]]]:
    """Return the metrics of a group of questions, and their intervals."""
    tallies = [tally(question, prediction, mask_source=mask_source) for question, prediction in pairs]
    photographs = [question.photograph for question, _ in pairs]
    counts = {"n": len(pairs), "photographs": len(set(photographs))}
    counts["objects"] = len({question.image_label for question, _ in pairs})
    figures: Figures = {**counts, **summarise(tallies)}
    ranges = confidence_intervals(tallies, photographs) if intervals else {}
    if pairs[0][1].wrong_image is not None:
        control = [tally(q, prediction.wrong_image, mask_source=mask_source) for q, prediction in pairs]
        figures |= {f"{name}_wrong_image": value for name, value in summarise(control).items()}
        if intervals:
            limits = confidence_intervals(control, photographs)
            ranges |= {f"{name}_wrong_image": limits[name] for name in limits}
    return figures | _random_figures([question for question, _ in pairs]), ranges


def iou_per_part(
    questions: Sequence[Question], predictions: Iterable[Prediction], *, mask_source: MaskSource = "gt_answer"
) -> dict[str, dict[str, float]]:
    """Return the mean strict IoU and the number of questions of each part, by part name; empty for a model without
    masks.
    """
    ious: dict[str, list[float]] = defaultdict(list)
    for question, prediction in pair_by_id(questions, predictions):
        for name, iou in question_ious(question, scored_spans(prediction, mask_source) or ()).items():
            ious[name].append(iou)
    return {name: {"mean_iou": fmean(ious[name]), "n": len(ious[name])} for name in sorted(ious)}
