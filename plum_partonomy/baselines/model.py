"""Ask any model PARTONOMY's questions through three small methods, and check its results.

A model under test is an object with some of these methods; missing ones are skipped and have no metrics:

    choose(seen, messages, choices) -> list[float]       one finite score for each choice, larger is better
    answer(seen, messages) -> str                        the generated answer, in plain text
    segment(seen, question, parts) -> list[(mask, score)]
                                                         for each part a boolean mask (height, width) of the image

    encode(image) -> seen                                optional: features of an RGB image for all its questions

`messages` are {"role", "content"} with plain texts; the first one is about the image. `Asker` has the same `predict`
as `Predictor`, which answers whole batches with PLUM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from plum_partonomy.baselines.plain_text import find_parts
from plum_partonomy.inference.image_cache import ImageCache
from plum_partonomy.masks import DataError, encode, resize
from plum_partonomy.records import Question
from plum_partonomy.scoring.benchmark import Asked
from plum_partonomy.scoring.metrics import MaskSource
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from plum_partonomy.sources.untrusted import check_unicode

__all__ = ["METHODS", "Asker", "UnderTest"]

METHODS = ("choose", "answer", "segment")
IMAGES_KEPT = 8
"""Features of an image take about 0.1 GB in large models, and the questions about one image are consecutive."""


@dataclass(frozen=True)
class UnderTest:
    """A model that is ready for questions.

    Attributes:
        predictor: Has `predict(asked)`, which returns one prediction per question asked, and its cache `images`.
        settings: Settings that its predictions depend on besides the arguments.
        choice_reduction: How a choice is scored.
        run: Its description for metrics.json.
        training_curves: CSV of its training, if there is one.
    """

    predictor: Any
    settings: dict[str, Any]
    choice_reduction: str
    run: dict[str, Any] = field(default_factory=dict)
    training_curves: Path | None = None


class Asker:
    """Asks questions of a model that has some of METHODS.

    Args:
        model: The model under test.
        mask_source: Source of the masks besides those of its generated answer.
        known_parts: Part names that are recognised in the sentences of its answers.
        image_cache_size: Number of images whose features are kept.
    """

    def __init__(
        self, model: Any, *, mask_source: MaskSource, known_parts: Sequence[str], image_cache_size: int = IMAGES_KEPT
    ):
        if not any(hasattr(model, method) for method in METHODS):
            raise DataError(f"Expected a model with some of {', '.join(METHODS)}, found {type(model).__name__}.")
        needed = {"predicted_answer": ["choose", "segment"], "generated": ["answer", "segment"]}
        if lacking := [method for method in needed.get(mask_source, ()) if not hasattr(model, method)]:
            raise DataError(
                f"--mask_source {mask_source} needs the method {lacking[0]!r}, which {type(model).__name__} does not "
                "have; use --mask_source gt_answer."
            )
        self.model = model
        self.mask_source = mask_source
        self.known_parts = list(known_parts)
        self.images = ImageCache(getattr(model, "encode", lambda image: image), size=image_cache_size)

    def predict(self, asked: Sequence[Asked]) -> list[Prediction]:
        """Return one prediction per question.

        Raises:
            DataError: The model returns an invalid result; names the question.
        """
        return [self._predict(each) for each in asked]

    def _predict(self, asked: Asked) -> Prediction:
        question, seen = asked.question, self.images.look_up([asked])[asked.image_id]
        scores = self._choose(seen, question, ask(question), question.choices)
        object_scores = None
        if question.object_question is not None:
            object_scores = self._choose(seen, question, ask_object(question), question.object_choices)
        given = None
        if hasattr(self.model, "segment"):
            index = question.correct if self.mask_source != "predicted_answer" else int(np.argmin(scores))
            parts = [(part, 0, 0) for part in question.choice_parts[index]]
            given = self._segment(seen, asked, parts)
        return Prediction(
            question_id=question.id,
            image_id=asked.image_id,
            choice_scores=scores,
            given_spans=given,
            true_tags=None,
            predicted_tags=None,
            object_choice_scores=object_scores,
            **self._answer(seen, asked),
        )

    def _choose(
        self, seen: Any, question: Question, messages: list[dict[str, str]], choices: Sequence[str]
    ) -> list[float] | None:
        """Return scores as in `Prediction`: the smallest is chosen."""
        if not hasattr(self.model, "choose"):
            return None
        found = self._call("choose", question, seen, messages, list(choices))
        scores = [_finite(score) for score in _listed(found)]
        if len(scores) != len(choices) or None in scores:
            raise DataError(
                f"Question {question.id!r}: expected {len(choices)} finite scores from 'choose', found {found!r:.200}."
            )
        return [-score for score in scores]

    def _answer(self, seen: Any, asked: Asked) -> dict[str, Any]:
        """Return the fields of the generated answer; without masks only the names of its parts."""
        if not hasattr(self.model, "answer"):
            return {"generated_text": None, "generated_spans": None}
        question = asked.question
        text = self._call("answer", question, seen, ask(question))
        if not isinstance(text, str):
            raise DataError(f"Question {question.id!r}: expected a text from 'answer', found {text!r:.80}.")
        check_unicode(text, where=f"Question {question.id!r}, 'answer'")
        parts = find_parts(text, self.known_parts)
        if not hasattr(self.model, "segment"):
            names = [name for name, _, _ in parts]
            return {"generated_text": text, "generated_spans": None, "generated_parts": names}
        return {"generated_text": text, "generated_spans": self._segment(seen, asked, parts)}

    def _segment(self, seen: Any, asked: Asked, parts: Sequence[tuple[str, int, int]]) -> list[SpanMask]:
        if not parts:
            return []
        question = asked.question
        names = [name for name, _, _ in parts]
        found = self._call("segment", question, seen, question, names)
        masks = _listed(found)
        if len(masks) != len(names) or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in masks):
            raise DataError(
                f"Question {question.id!r}: expected {len(names)} masks from 'segment', each with its score, found "
                f"{len(masks)}: {found!r:.80}."
            )
        return [self._make_span(part, mask, asked) for part, mask in zip(parts, masks, strict=True)]

    def _make_span(self, part: tuple[str, int, int], segmented: Any, asked: Asked) -> SpanMask:
        """Return the record of a segmented part. A mask of a wrong image is resized to the question's image."""
        (name, start, end), (mask, score) = part, segmented
        mask, image, question = np.asarray(mask), asked.image, asked.question
        if mask.dtype != bool or mask.shape != (image.height, image.width):
            raise DataError(
                f"Question {question.id!r}: expected boolean masks of [height, width] "
                f"{[image.height, image.width]} from 'segment', found {mask.dtype} of {list(mask.shape)}."
            )
        if _finite(score) is None:
            raise DataError(f"Question {question.id!r}: expected a finite score from 'segment', found {score!r:.80}.")
        rle = resize(encode(mask), question.masks[0].rle["size"])
        return SpanMask(text=name, start=start, end=end, rle=rle, score=float(score))

    def _call(self, method: str, question: Question, *arguments: Any) -> Any:
        """Return the result of a method of the model; its errors get the id of the question."""
        try:
            return getattr(self.model, method)(*arguments)
        except DataError as error:
            raise DataError(f"Question {question.id!r}: {error}") from error
        except Exception as error:
            error.add_note(f"raised by {method!r} of the model for question {question.id!r}")
            raise


def _listed(found: Any) -> list[Any]:
    """Return the items of a list, array or generator; nothing for other values."""
    try:
        return [] if isinstance(found, str | bytes | dict) else list(found)
    except TypeError:
        return []


def _finite(value: Any) -> float | None:
    """Return a finite number of any type as a float, and None for other values."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def ask(question: Question) -> list[dict[str, str]]:
    """Return the messages up to the part question; `whole_to_part` first asks for the object, with its answer."""
    messages = [{"role": "user", "content": question.question}]
    if question.question_type != "whole_to_part":
        return messages
    answer = question.object_choices[question.object_correct]
    return [
        {"role": "user", "content": question.object_question},
        {"role": "assistant", "content": answer},
        *messages,
    ]


def ask_object(question: Question) -> list[dict[str, str]]:
    """Return the messages up to the object question; `part_to_whole` first asks for the parts, with their answer."""
    messages = [{"role": "user", "content": question.object_question}]
    if question.question_type != "part_to_whole":
        return messages
    return [*ask(question), {"role": "assistant", "content": question.choices[question.correct]}, *messages]
