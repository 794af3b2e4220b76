"""Smaller and exported models."""

from pathlib import Path

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from plum_partonomy.inference.one_image import Plum, load_model, segment_words
from plum_partonomy.scoring.benchmark import load_image, load_questions
from scripts.measure_int8 import measure, quantise, weigh
from tests.tiny import random_image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shared_vision", [True, False])
def test_few_bit_weights_are_those_of_the_vision_language_model_alone(shared_vision):
    model = tiny_model(shared_vision)
    skipped = list(model.full_precision_modules)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    converted = [name for name in linear if should_convert_module(name, skipped)]
    assert converted == [name for name in linear if name.startswith("vlm.model.")]
    assert any("language_model" in name for name in converted)
    assert not [name for name in skipped if name not in dict(model.named_modules())]


@pytest.mark.parametrize("encoder", [False, True])
def test_int8_weights_are_those_of_the_language_model_and_if_asked_of_the_encoder(encoder):
    model = tiny_model()
    smaller = quantise(model, encoder=encoder)
    linear, kept = (
        {name for name, module in each.named_modules() if isinstance(module, torch.nn.Linear)}
        for each in (model, smaller)
    )
    quantised = ("vlm.model.language_model.", "sam.vision_encoder.") if encoder else ("vlm.model.language_model.",)
    assert linear - kept == {name for name in linear if name.startswith(quantised)}
    assert weigh(smaller) < weigh(model)
    question = [{"role": "user", "content": "Which parts?"}]
    expected, found = (
        segment_words(Plum(each, tiny_processor()), random_image(), question, "A wing.", [(2, 6)]).outputs.pred_masks
        for each in (model, smaller)
    )
    assert not torch.equal(found, expected)
    assert torch.allclose(found, expected, atol=0.1 * expected.abs().max().item())


def test_the_effect_of_int8_is_measured_with_the_metrics_of_an_evaluation():
    rows, questions = load_questions(str(ROOT / "partonomy"), name="mini_questions", split="test", limit=3)
    images = {question.image_id: load_image(rows, index, question) for index, question in enumerate(questions)}
    _, plum = load_model(ROOT / "checkpoints" / "plum-tiny")
    giou, seconds = measure(plum, questions, images)
    assert 0.5 < giou <= 1 and seconds > 0


@pytest.mark.slow
def test_onnx_files_of_the_mask_branch_compute_what_torch_does(tmp_path):
    pytest.importorskip("onnxruntime", reason="pip install .[onnx]")
    from scripts.export_onnx import TOLERANCE, export, largest_difference

    model = tiny_model()
    # At its small initial weights the feedback would hardly tell one earlier mask from another.
    for parameter in model.mask_feedback.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    export(model, tmp_path)
    assert largest_difference(model, tmp_path, spans=4) < TOLERANCE


def test_a_model_without_feedback_has_no_mask_branch_to_export(tmp_path):
    from scripts.export_onnx import export

    with pytest.raises(ValueError, match="no mask feedback"):
        export(tiny_model(mask_feedback=False), tmp_path)
