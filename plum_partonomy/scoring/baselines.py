"""Baselines without a model, as a reference for the metrics of a benchmark.

    random        a uniformly drawn choice; a random box in the image for each part of the correct answer
    majority      the choice closest to the parts that at least half of the images with this label show, counted over
                  the training questions, or without them over the other images of the split; no masks
    full_image    the whole image as the mask of each part of the correct answer; no choices
    ground_truth  the correct choice, its tags and its masks, also as the generated answer: 1.0 everywhere

Masks belong to the given correct answer, as for a model with `gt_answer`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from plum_partonomy.masks import encode
from plum_partonomy.records import Question
from plum_partonomy.scoring.mask_metrics import RLE, normalise
from plum_partonomy.scoring.metrics import true_masks, true_parts
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from plum_partonomy.seeding import seeded_generator

__all__ = ["BASELINES", "SEED", "answer_without_model"]

BASELINES = ("random", "majority", "full_image", "ground_truth")
SEED = 0


def answer_without_model(
    name: str, questions: Sequence[Question], *, training: Sequence[Question] | None = None
) -> list[Prediction]:
    """Return the predictions of a baseline, one per question; those of `random` depend only on the question ids.

    Args:
        name: One of BASELINES.
        questions: The questions to answer.
        training: The questions that `majority` counts; if None, those about the other images.
    """
    if name == "majority":
        return _majority(questions, training)
    answer: Callable[[Question], Prediction] = {
        "random": _random,
        "full_image": _full_image,
        "ground_truth": _ground_truth,
    }[name]
    return [answer(question) for question in questions]


def _random(question: Question) -> Prediction:
    generator = seeded_generator(SEED, "baseline", question.id)
    choice = int(generator.integers(len(question.choices)))
    object_choice = int(generator.integers(len(question.object_choices))) if question.object_choices else None
    height, width = question.masks[0].rle["size"]
    spans = []
    for part in true_parts(question):
        box = np.zeros((height, width), bool)
        top, bottom = sorted(generator.integers(0, height + 1, size=2))
        left, right = sorted(generator.integers(0, width + 1, size=2))
        box[top:bottom, left:right] = True
        spans.append(_span(part, encode(box), score=float(generator.random())))
    return _prediction(question, choice=choice, object_choice=object_choice, spans=spans)


def _majority(questions: Sequence[Question], training: Sequence[Question] | None) -> list[Prediction]:
    """Return the predictions of `majority`. An image does not count for itself; without another image of its label no
    part is common.
    """
    counted = questions if training is None else training
    parts_of = {q.image_id: (q.image_label, {normalise(mask.label) for mask in q.masks}) for q in counted}
    shown: dict[str, Counter] = defaultdict(Counter)
    for label, parts in parts_of.values():
        shown[label].update(parts)
    images = Counter(label for label, _ in parts_of.values())
    predictions = []
    for question in questions:
        label = question.image_label
        own = parts_of[question.image_id][1] if question.image_id in parts_of else set()
        others = images[label] - (question.image_id in parts_of)
        usual = {part for part, count in shown[label].items() if others and 2 * (count - (part in own)) >= others}
        distance = [len(usual ^ set(map(normalise, parts))) for parts in question.choice_parts]
        predictions.append(_prediction(question, choice=int(np.argmin(distance))))
    return predictions


def _full_image(question: Question) -> Prediction:
    full = encode(np.ones(question.masks[0].rle["size"], bool))
    return _prediction(question, spans=[_span(part, full) for part in true_parts(question)])


def _ground_truth(question: Question) -> Prediction:
    spans = [_span(mask.label, mask.rle) for mask in true_masks(question)]
    tags = [(index, index + 1) for index in range(len(spans))]
    return Prediction(
        question_id=question.id,
        image_id=question.image_id,
        choice_scores=_chosen(question.correct, question.choices),
        object_choice_scores=_chosen(question.object_correct, question.object_choices),
        given_spans=spans,
        true_tags=tags,
        predicted_tags=tags,
        generated_text=question.choices[question.correct],
        generated_spans=spans,
    )


def _span(part: str, rle: RLE, *, score: float = 1.0) -> SpanMask:
    return SpanMask(text=part, start=0, end=0, rle=rle, score=score)


def _chosen(index: int | None, choices: Sequence[str] | None) -> list[float] | None:
    return None if index is None else [float(i != index) for i in range(len(choices))]


def _prediction(
    question: Question,
    *,
    choice: int | None = None,
    object_choice: int | None = None,
    spans: list[SpanMask] | None = None,
) -> Prediction:
    return Prediction(
        question_id=question.id,
        image_id=question.image_id,
        choice_scores=_chosen(choice, question.choices),
        object_choice_scores=_chosen(object_choice, question.object_choices),
        given_spans=spans,
        true_tags=None,
        predicted_tags=None,
        generated_text=None,
        generated_spans=None,
    )
