"""Match part names of a generated answer with part names of the correct one, beyond equal names.

A predicted name that matches a true part is replaced by the name of that part. All metrics of the generated answer,
including masks, then compare names exactly. A true part matches names equal to it; otherwise names with the same lemma
(`lemmatised`), or the one name with the nearest embedding (`embedding`, one to one).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from scipy.optimize import linear_sum_assignment

from plum_partonomy.questions.wording import inflect_engine
from plum_partonomy.records import Question
from plum_partonomy.scoring.mask_metrics import normalise
from plum_partonomy.scoring.metrics import true_parts
from plum_partonomy.scoring.predictions import Prediction

__all__ = [
    "EMBEDDING_THRESHOLD",
    "NameMatcher",
    "by_embedding",
    "by_lemma",
    "generated_names",
    "lemmatised",
    "rename_generated",
]

EMBEDDING_THRESHOLD = 0.75
"""Minimum cosine of two names of the same part, as in the authors' evaluator (evaluators/part_text.py)."""

NameMatcher = Callable[[Sequence[str], Sequence[str]], dict[str, str]]
"""(predicted, true) names, all different and normalised -> the true name of each predicted name with a match."""


@cache
def lemmatised(name: str) -> str:
    """Return the name in lower case, with spaces for hyphens and underscores, and its last word in the singular.

    >>> lemmatised("Front_Wheels"), lemmatised("side-mirror")
    ('front wheel', 'side mirror')
    """
    words = re.split(r"[\s_-]+", name.strip().casefold())
    words[-1] = inflect_engine().singular_noun(words[-1]) or words[-1] if words[-1] else words[-1]
    return " ".join(words)


def by_lemma(predicted: Sequence[str], true: Sequence[str]) -> dict[str, str]:
    """Match names with the same lemma; a [`NameMatcher`].

    >>> by_lemma(["wheels", "oar"], ["wheel", "mast"])
    {'wheels': 'wheel'}
    """
    true_of = {lemmatised(name): name for name in true}
    return {name: true_of[lemmatised(name)] for name in predicted if lemmatised(name) in true_of}


def by_embedding(embeddings: Mapping[str, np.ndarray], *, threshold: float = EMBEDDING_THRESHOLD) -> NameMatcher:
    """Return a matcher: the one-to-one assignment with the largest sum of cosines, without pairs below the threshold.

    The authors' evaluator assigns all names in this way; here equal names are paired first.

    >>> vectors = {"tyre": np.array([0.8, 0.6]), "oar": np.array([0.0, 1.0]), "wheel": np.array([1.0, 0.0])}
    >>> by_embedding(vectors)(["oar", "tyre"], ["wheel"])
    {'tyre': 'wheel'}
    """

    def match(predicted: Sequence[str], true: Sequence[str]) -> dict[str, str]:
        equal = set(predicted) & set(true)
        predicted, true = [[name for name in names if name not in equal] for names in (predicted, true)]
        if not predicted or not true:
            return {}
        vectors = [
            np.stack([embeddings[name] / np.linalg.norm(embeddings[name]) for name in names])
            for names in (predicted, true)
        ]
        cosines = vectors[0] @ vectors[1].T
        pairs = zip(*linear_sum_assignment(cosines, maximize=True), strict=True)
        return {predicted[row]: true[column] for row, column in pairs if cosines[row, column] >= threshold}

    return match


def rename_generated(
    questions: Sequence[Question], predictions: Sequence[Prediction], matcher: NameMatcher
) -> list[Prediction]:
    """Return the predictions with matched names in their generated answers, including the wrong-image control.

    Args:
        questions, predictions: One prediction for each question, in any order.
        matcher: Matches predicted with true names.
    """
    by_id = {question.id: question for question in questions}

    def rename(prediction: Prediction, true: list[str]) -> Prediction:
        names = prediction.named_parts or []
        matched = matcher(list(dict.fromkeys(map(normalise, names))), true)
        names = [matched.get(normalise(name), name) for name in names]
        spans, parts = prediction.generated_spans, prediction.generated_parts
        if spans is not None:
            spans = [replace(span, text=name) for span, name in zip(spans, names, strict=True)]
        wrong_image = prediction.wrong_image
        return replace(
            prediction,
            generated_spans=spans,
            generated_parts=parts if parts is None or spans is not None else names,
            wrong_image=None if wrong_image is None else rename(wrong_image, true),
        )

    return [rename(p, [normalise(part) for part in true_parts(by_id[p.question_id])]) for p in predictions]


def generated_names(questions: Sequence[Question], predictions: Sequence[Prediction]) -> list[str]:
    """Return all names that a matcher may receive, normalised and sorted."""
    written = [
        name
        for prediction in predictions
        for shown in (prediction, prediction.wrong_image)
        if shown is not None
        for name in shown.named_parts or ()
    ]
    parts = [part for question in questions for part in true_parts(question)]
    return sorted({normalise(name) for name in [*parts, *written]})
