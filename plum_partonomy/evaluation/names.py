"""Match part names of generated answers with true parts, for `--match`."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

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
    """Return the predictions with matched part names in generated answers.

    Args:
        questions, predictions: One prediction per question.
        match: How names are compared.
        model: For `embedding`, folder or Hub name of the text encoder.

    Raises:
        DataError: The text encoder cannot be loaded.
    """
    if match == "exact":
        return list(predictions)
    if match == "lemmatised":
        return rename_generated(questions, predictions, by_lemma)
    embeddings = embed_names(generated_names(questions, predictions), model)
    return rename_generated(questions, predictions, by_embedding(embeddings))


def embed_names(names: Sequence[str], model: str, *, batch_size: int = 64) -> dict[str, np.ndarray]:
    """Return embeddings by name: the mean of the last hidden states of a text encoder over the tokens.

    Args:
        names: Texts, not empty.
        model: Folder or Hub name of a model of transformers, such as sentence-transformers/all-MiniLM-L6-v2.

    Raises:
        DataError: The model cannot be loaded.
    """
    import torch  # only here, because most evaluations compare names without a model
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
