"""Names of generated answers that mean a true part, by lemma and by embedding."""

import doctest
from dataclasses import replace

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from plum_partonomy.evaluation.names import embed_names, match_names
from plum_partonomy.masks import DataError
from plum_partonomy.scoring import name_matching
from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.metrics import evaluate_predictions
from plum_partonomy.scoring.name_matching import by_embedding, generated_names, rename_generated
from tests.scoring.test_answers import QUESTIONS
from tests.tiny import tiny_tokenizer


def renamed(prediction, names):
    """The prediction with its generated parts under other names."""
    spans = [replace(span, text=names.get(span.text, span.text)) for span in prediction.generated_spans]
    return replace(prediction, generated_spans=spans)


PREDICTIONS = [renamed(p, {"hull": "Hulls"}) for p in answer_without_model("ground_truth", QUESTIONS)]


def figures(predictions):
    names = ("generated_part_f1", "generated_exact", "end_to_end_giou")
    found = evaluate_predictions(QUESTIONS, predictions)["overall"]
    return [found[name] for name in names]


def test_a_plural_is_the_same_part_by_lemma_in_names_and_masks_and_in_the_control():
    assert figures(match_names(QUESTIONS, PREDICTIONS, match="exact")) == pytest.approx([0.5, 0.0, 1 / 3])
    assert figures(match_names(QUESTIONS, PREDICTIONS, match="lemmatised")) == [1.0, 1.0, 1.0]
    with_control = [replace(p, wrong_image=p) for p in PREDICTIONS]
    found = match_names(QUESTIONS, with_control, match="lemmatised")
    assert [p.wrong_image.generated_spans[0].text for p in found] == ["hull"] * 3
    assert [p.given_spans for p in found] == [p.given_spans for p in PREDICTIONS]


def test_equal_names_are_paired_first_and_the_rest_one_to_one_above_the_threshold():
    angles = {"wheel": 0.0, "tyre": 0.3, "rim": 0.5, "door": 2.0, "window": 3.0}
    match = by_embedding({name: np.array([np.cos(a), np.sin(a)]) for name, a in angles.items()}, threshold=0.75)
    assert match(["tyre", "wheel"], ["wheel", "rim"]) == {"tyre": "rim"}
    assert match(["tyre", "rim"], ["wheel"]) == {"tyre": "wheel"}
    assert match(["window"], ["door"]) == {}
    assert match([], ["door"]) == match(["door"], ["door"]) == {}


def test_names_have_the_embeddings_alone_that_they_have_beside_longer_ones(tmp_path):
    tokenizer = tiny_tokenizer("wordpiece")
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    names = generated_names(QUESTIONS, PREDICTIONS)
    assert names == ["hull", "hulls", "mast"]
    together = embed_names([*names, "a left wing and a right wing"], str(tmp_path), batch_size=3)
    for name in names:
        assert together[name].shape == (16,)
        np.testing.assert_allclose(together[name], embed_names([name], str(tmp_path))[name], atol=1e-6)
    found = match_names(QUESTIONS, PREDICTIONS, match="embedding", model=str(tmp_path))
    assert found == rename_generated(QUESTIONS, PREDICTIONS, by_embedding(together))
    with pytest.raises(DataError, match="Cannot load .*absent"):
        match_names(QUESTIONS, PREDICTIONS, match="embedding", model=str(tmp_path / "absent"))


def test_the_examples_of_the_docstrings_run():
    result = doctest.testmod(name_matching)
    assert result.failed == 0 and result.attempted >= 3
