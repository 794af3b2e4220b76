"""Part names of generated answers that mean true parts, as `--match` compares them."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.scoring.name_matching import by_embedding, by_lemma, generated_names, rename_generated
from plum_partonomy.scoring.predictions import Prediction


def match_names(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    *,
    match: Literal["exact", "lemmatised", "embedding"],
    model: str | None = None,
) -> list[Prediction]:
    """The predictions with the part names of generated answers as `match` reads them.

    Args:
        questions, predictions: one prediction per question.
        match: how names are compared.
        model: for `embedding`, folder or Hub name of the text encoder.

    Raises:
        DataError: the text encoder cannot be loaded.
    """
    if match == "exact":
        return list(predictions)
    if match == "lemmatised":
        return rename_generated(questions, predictions, by_lemma)
    embeddings = embed_names(generated_names(questions, predictions), model)
    return rename_generated(questions, predictions, by_embedding(embeddings))


def embed_names(names: Sequence[str], model: str, *, batch_size: int = 64) -> dict[str, np.ndarray]:
    """Embeddings by name: the mean over its tokens of the last hidden state of a text encoder.

    Args:
        names: texts, not empty.
        model: folder or Hub name of a model of transformers, such as sentence-transformers/all-MiniLM-L6-v2.

    Raises:
        DataError: the model cannot be loaded.
    """
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
