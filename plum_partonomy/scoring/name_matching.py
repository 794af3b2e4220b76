"""Which part names of a generated answer mean which parts of the correct one, beyond equal names.

A predicted name that means a true part is replaced by that part's name; every figure of the generated answer, masks
included, then compares names exactly. A true part is meant by names equal to it; else by names of the same key
(`lemmatised`), or by the one name nearest to it in embedding (`embedding`, one to one).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from plum_partonomy.masks import DataError
from plum_partonomy.questions.synonyms import PartKey
from plum_partonomy.records import Question
from plum_partonomy.scoring.mask_metrics import normalise
from plum_partonomy.scoring.metrics import true_parts
from plum_partonomy.scoring.predictions import Prediction

__all__ = [
    "EMBEDDING_THRESHOLD",
    "NameMatcher",
    "by_embedding",
    "by_key",
    "embed_names",
    "generated_names",
    "rename_generated",
]

EMBEDDING_THRESHOLD = 0.75
"""Least cosine of two names that mean the same part, as in the authors' evaluator (evaluators/part_text.py)."""

NameMatcher = Callable[[Sequence[str], Sequence[str]], dict[str, str]]
"""(predicted, true) names, all different and normalised -> the true name for each predicted name that means one."""


def by_key(key: PartKey) -> NameMatcher:
    """Names with equal keys mean the same part.

    >>> by_key(lambda name: name.rstrip("s"))(["wheels", "oar"], ["wheel", "mast"])
    {'wheels': 'wheel'}
    """

    def match(predicted: Sequence[str], true: Sequence[str]) -> dict[str, str]:
        true_of = {key(name): name for name in true}
        return {name: true_of[key(name)] for name in predicted if key(name) in true_of}

    return match


def by_embedding(embeddings: Mapping[str, np.ndarray], *, threshold: float = EMBEDDING_THRESHOLD) -> NameMatcher:
    """The one-to-one assignment with the largest sum of cosines, of which pairs below the threshold are dropped.

    The authors' evaluator assigns all names so; here equal names are paired before the others are assigned.

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
    """The predictions with matched names in their generated answers, the wrong-image control's included.

    Args:
        questions, predictions: one prediction for each question, in any order.
        matcher: tells which names mean which.
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
    """Every name that a matcher may be asked about, normalised and sorted."""
    written = [
        name
        for prediction in predictions
        for shown in (prediction, prediction.wrong_image)
        if shown is not None
        for name in shown.named_parts or ()
    ]
    parts = [part for question in questions for part in true_parts(question)]
    return sorted({normalise(name) for name in [*parts, *written]})


def embed_names(names: Sequence[str], model: str, *, batch_size: int = 64) -> dict[str, np.ndarray]:
    """Embeddings by name: the mean over its tokens of the last hidden state of a text encoder.

    Args:
        names: texts, not empty.
        model: folder or Hub name of a model of transformers, such as sentence-transformers/all-MiniLM-L6-v2.

    Raises:
        DataError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        encoder = AutoModel.from_pretrained(model, trust_remote_code=False, use_safetensors=True).eval()
    except (ValueError, OSError) as error:
        raise DataError(f"Cannot load {model!r} as a sentence-embedding model of transformers: {error}") from error
    embeddings = {}
    for start in range(0, len(names), batch_size):
        batch = list(names[start : start + batch_size])
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            states = encoder(**inputs).last_hidden_state  # (names, tokens, width)
        mask = inputs["attention_mask"].unsqueeze(-1)
        means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        embeddings |= dict(zip(batch, means.float().numpy(), strict=True))
    return embeddings
