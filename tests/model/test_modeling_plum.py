"""The model on tiny random weights: against naive versions, batched against single, saved against loaded."""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.utils import ModelOutput

import modules_plum
from modeling_plum import PlumForConditionalGeneration
from modules_plum import count_loss_items, decode_spans, dice_loss, focal_tversky_loss
from plum_partonomy.training.trainer import build_teacher
from segmenters_plum import downscale_masks, label_frame, shrink_mask, upscale_masks
from tests.tiny import (
    conversation,
    mixed_conversations,
    random_image,
    random_mask,
    tiny_config,
    tiny_model,
    tiny_processor,
)

ROOT = Path(__file__).parents[2]
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def mixed_batch(processor, **options):
    """Two images of different sizes, three, one and no spans, and a row without an image."""
    conversations, masks = mixed_conversations()
    return processor.apply_chat_template(conversations, masks=masks, tokenize=True, return_dict=True, **options)


@pytest.fixture(scope="module", params=[True, False], ids=["shared_vision", "own_vision_tower"])
def model_and_processor(request):
    return tiny_model(request.param), tiny_processor(request.param)


def naive_spans(tags):
    spans = []
    for row, row_tags in enumerate(tags):
        start = None
        for position, tag in enumerate([*row_tags, 0]):
            if tag != 2 and start is not None:
                spans.append([row, start, position])
                start = None
            if tag == 1:
                start = position
    return spans


def test_decoded_spans_equal_a_naive_scan_on_random_tags():
    tags = torch.randint(0, 3, (200, 13), generator=torch.Generator().manual_seed(0))
    assert decode_spans(tags).tolist() == naive_spans(tags.tolist())


def test_tags_outside_the_answer_do_not_make_spans():
    tags = torch.tensor([[1, 2, 1, 2, 2, 1]])
    answer = torch.tensor([[False, False, True, True, False, False]])
    assert decode_spans(tags, answer).tolist() == [[0, 2, 4]]


def test_each_row_of_a_mixed_batch_equals_the_row_alone(model_and_processor):
    model, processor = model_and_processor
    batch = mixed_batch(processor)
    with torch.no_grad():
        together = model(**batch)
    wide, tall = random_image(50, 70, seed=1), random_image(90, 40, seed=2)
    single = [
        conversation(wide, "I can see a <p>wheel</p>, another <p>wheel</p> and a <p>left wing</p>."),
        conversation(tall, "The <p>tail</p> is red."),
    ]
    for row, members in ((0, slice(0, 3)), (1, slice(3, 4))):
        alone = processor.apply_chat_template([single[row]], tokenize=True, return_dict=True)
        with torch.no_grad():
            expected = model(**alone)
        length = alone["input_ids"].shape[1]
        assert_close(together.logits[row, :length], expected.logits[0], **EXACT)
        assert_close(together.span_logits[row, :length], expected.span_logits[0], **EXACT)
        assert_close(together.pred_masks[members], expected.pred_masks, **EXACT)
        assert_close(together.iou_scores[members], expected.iou_scores, **EXACT)


def test_left_and_right_padding_give_the_same_masks_losses_and_choices(model_and_processor):
    model, processor = model_and_processor
    right, left = (mixed_batch(processor, padding_side=side) for side in ("right", "left"))
    with torch.no_grad():
        outputs_right, outputs_left = model(**right), model(**left)
    assert_close(outputs_right.pred_masks, outputs_left.pred_masks, **EXACT)
    assert_close(outputs_right.losses, outputs_left.losses, **EXACT)
    assert_close(model.score_choices(**right, num_choices=2), model.score_choices(**left, num_choices=2), **EXACT)


def test_image_embeddings_may_be_given_instead_of_pixels(model_and_processor):
    model, processor = model_and_processor
    batch = mixed_batch(processor)
    with torch.no_grad():
        expected = model(**batch)
        embeddings = model.get_image_embeddings(batch.pop("sam_pixel_values"))
        found = model(**batch, sam_image_embeddings=embeddings)
    assert_close(found.pred_masks, expected.pred_masks, rtol=0, atol=0)
    assert_close(found.logits, expected.logits, rtol=0, atol=0)


def test_mask_feedback_equals_multi_head_attention_per_grid_cell():
    model = tiny_model()
    feedback, grid, width = model.mask_feedback, model.config.sam_grid_size, 32
    attention = nn.MultiheadAttention(width, feedback.num_heads)
    attention.in_proj_weight.data = torch.cat(
        [layer.weight for layer in (feedback.q_proj, feedback.k_proj, feedback.v_proj)]
    )
    attention.in_proj_bias.data = torch.cat(
        [layer.bias for layer in (feedback.q_proj, feedback.k_proj, feedback.v_proj)]
    )
    attention.out_proj = feedback.out_proj
    features = torch.randn(4, grid * grid, width)  # four earlier masks, after FiLM and positions
    with torch.no_grad():
        # batch axis = positions, key axis = masks
        expected, _ = attention(feedback.queries[None], features, features)
        dense = feedback(feedback.k_proj(features)[None], feedback.v_proj(features)[None])
    assert_close(dense[0].flatten(1).T, expected[0], **EXACT)


def test_a_given_mask_changes_only_the_later_spans_of_its_own_row():
    model, processor = tiny_model(), tiny_processor()
    torch.nn.init.normal_(model.mask_feedback.out_proj.weight, std=1.0)
    batch = mixed_batch(processor)
    predicted = model.segment_spans(**batch)
    given = random_mask(50, 70, seed=9)
    corrected = model.segment_spans(**batch, given_masks={1: given})
    assert_close(corrected.pred_masks[[0, 3]], predicted.pred_masks[[0, 3]], rtol=0, atol=0)
    assert not torch.allclose(corrected.pred_masks[2], predicted.pred_masks[2], atol=1e-4)
    result = processor.post_process_segmentation(corrected)[0].spans[1]
    overlap = (result.mask & given).sum() / (result.mask | given).sum()
    assert overlap > 0.8  # through the 32 px frame and back


def test_without_feedback_every_span_is_decoded_on_its_own():
    model, processor = tiny_model(mask_feedback=False), tiny_processor()
    batch = mixed_batch(processor)
    together = model.segment_spans(**batch)
    assert_close(model.segment(**batch).pred_masks, together.pred_masks, rtol=0, atol=0)
    batch["spans"] = batch["spans"][2:3]
    assert_close(model.segment_spans(**batch).pred_masks[0], together.pred_masks[2], **EXACT)


def test_upscaled_masks_equal_those_of_the_sam_image_processor():
    processor, masks = tiny_processor().sam_image_processor, torch.randn(3, 32, 32)
    expected = processor.post_process_masks([masks[:, None]], [(50, 70)], [(46, 64)], binarize=False)[0]
    assert_close(upscale_masks(masks, 64, (46, 64), (50, 70)), expected[:, 0])


def test_a_mask_survives_the_low_res_frame_and_back():
    mask = torch.zeros(50, 70, dtype=torch.bool)
    mask[10:35, 20:60] = True
    (low_res,) = downscale_masks(mask[None], 64, (46, 64), 32)
    restored = upscale_masks(low_res[None], 64, (46, 64), (50, 70))[0] > 0
    assert (restored & mask).sum() / (restored | mask).sum() > 0.9


def test_overlap_losses_equal_their_formulas_written_out_per_mask():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator)
    targets = (torch.rand(3, 6, 5, generator=generator) > 0.5).float()
    targets[2] = 0
    for i in range(3):
        p, t = logits[i].sigmoid().numpy().ravel().astype(float), targets[i].numpy().ravel()
        true_positive, false_negative, false_positive = (p * t).sum(), ((1 - p) * t).sum(), (p * (1 - t)).sum()
        index = (true_positive + 1e-6) / (true_positive + 0.7 * false_negative + 0.3 * false_positive + 1e-6)
        tversky = focal_tversky_loss(logits, targets, 0.7, 0.3, 0.75)[i]
        assert float(tversky) == pytest.approx((1 - index) ** 0.75, rel=1e-5)
        dice = 1 - (2 * true_positive / 1000 + 1e-6) / ((p.sum() + t.sum()) / 1000 + 1e-6)
        assert float(dice_loss(logits, targets)[i]) == pytest.approx(dice, rel=1e-4)


def test_the_focal_tversky_loss_of_a_perfect_mask_has_finite_gradients():
    targets = torch.zeros(1, 8, 8)
    targets[0, 2:5] = 1
    logits = ((targets * 2 - 1) * 200).requires_grad_()
    focal_tversky_loss(logits, targets, 0.7, 0.3, 0.75).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("size, frame", [((50, 60), (50, 60)), ((50, 70), (46, 64)), ((3000, 4000), (48, 64))])
def test_mask_labels_are_compared_at_the_size_of_the_image_or_in_sams_input_if_it_is_larger(size, frame):
    model, processor = tiny_model(), tiny_processor()
    mask = np.zeros(size, dtype=bool)
    mask[size[0] // 4 :, : size[1] // 2] = True
    chat = conversation(Image.new("RGB", size[::-1]), "A <p>wheel</p>.")
    batch = processor.apply_chat_template([chat], masks=[[mask]], tokenize=True, return_dict=True)
    (label,) = batch["mask_labels"]
    assert label.dtype == torch.bool and tuple(label.shape) == frame
    assert float(label.float().mean()) == pytest.approx(mask.mean(), abs=0.01)
    with torch.no_grad():
        found = model(**batch)
        whole = model(**{**batch, "mask_labels": [torch.from_numpy(mask)]})
    assert_close(whole.losses, found.losses, rtol=0, atol=0)
    logits = upscale_masks(found.pred_masks, 64, batch["reshaped_input_sizes"][0].tolist(), frame)
    expected = nn.functional.binary_cross_entropy_with_logits(logits[0], label.float())
    assert_close(found.losses["mask_bce"], expected)


def test_a_thin_mask_does_not_vanish_when_it_is_made_small():
    mask = torch.zeros(400, 600, dtype=torch.bool)
    mask[:, 100] = True  # a tenth of a pixel wide
    small = shrink_mask(mask, label_frame((400, 600), (40, 60)))
    assert small[:, 10].all() and small.sum() == 40
    assert not shrink_mask(torch.zeros(400, 600), (40, 60)).any()


def test_mask_losses_computed_in_parts_are_those_of_all_masks_at_once(model_and_processor, monkeypatch):
    model, processor = copy.deepcopy(model_and_processor[0]), model_and_processor[1]
    batch, results = mixed_batch(processor), []
    for pixels in (2**22, 1):
        monkeypatch.setattr(modules_plum, "MASK_PIXELS_AT_ONCE", pixels)
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        results.append((outputs.losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_close(results[1][0], results[0][0], **EXACT)
    assert results[1][1].keys() == results[0][1].keys()
    assert_close(results[1][1], results[0][1], **EXACT)


def test_losses_over_parts_of_a_batch_add_up_to_those_of_the_whole(model_and_processor):
    model, processor = copy.deepcopy(model_and_processor[0]), model_and_processor[1]
    whole = mixed_batch(processor)
    model(**whole).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    counts = count_loss_items(
        model.config, **{name: whole[name] for name in ("labels", "span_labels", "spans", "mask_labels")}
    )
    total, of_images = 0.0, ("sam_pixel_values", "original_sizes", "reshaped_input_sizes")
    for rows, members in (([0], slice(0, 3)), ([1, 2, 3], slice(3, 4))):
        images = whole["sam_image_index"][rows]
        part = {name: whole[name][rows] for name in ("input_ids", "attention_mask", "labels", "span_labels")}
        spans = whole["spans"][members].clone()
        spans[:, 0] -= rows[0]
        if "pixel_values" in whole:
            part["pixel_values"] = whole["pixel_values"][[row for row in rows if row < 3]]
        outputs = model(
            **part,
            spans=spans,
            mask_labels=whole["mask_labels"][members],
            sam_image_index=images,
            **{name: whole[name][: images.max() + 1] for name in of_images},
            loss_counts=counts,
        )
        outputs.loss.backward()
        total += outputs.loss.detach()
    assert_close(total, model(**whole).loss.detach(), **EXACT)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_the_span_loss_counts_the_positions_of_its_scope():
    processor = tiny_processor()
    batch = mixed_batch(processor)
    labels = batch["span_labels"]
    answer, sequence = (tiny_model(span_loss_scope=scope) for scope in ("answer", "sequence"))
    weights = torch.tensor([0.1, 1.0, 1.0])
    expected = weights[labels[labels >= 0]].sum()  # rows 0..2, answers only
    assert_close(count_loss_items(answer.config, span_labels=labels)["tag_weight"], expected)
    expected = weights[labels[:2].clamp(min=0)].sum()  # the two rows with a span, all positions
    assert_close(count_loss_items(sequence.config, span_labels=labels)["tag_weight"], expected)

    with torch.no_grad():
        outputs = sequence(**batch)
    reference = nn.functional.cross_entropy(
        outputs.span_logits[:2].flatten(0, 1), labels[:2].clamp(min=0).flatten(), weight=weights
    )
    assert_close(outputs.losses["span_tagging"], reference)


def test_the_teacher_loss_is_half_the_squared_distance_averaged_over_spans():
    model, processor = tiny_model(teacher_kl_sigma=2.0), tiny_processor()
    batch = mixed_batch(processor)
    with torch.no_grad():
        student = model(**batch).last_hidden_state
        teacher = student + torch.randn(student.shape, generator=torch.Generator().manual_seed(0))
        found = model(**batch, teacher=lambda **_: ModelOutput(last_hidden_state=teacher)).losses["teacher_kl"]
    squared = (student - teacher).square()
    expected = [0.5 / 4 * squared[row, start:end].mean() for row, start, end in batch["spans"].tolist()]
    assert_close(found, torch.stack(expected).mean())


def test_a_teacher_gets_the_students_input_embeddings_and_no_gradients(model_and_processor):
    model, processor = copy.deepcopy(model_and_processor[0]), model_and_processor[1]
    batch = mixed_batch(processor)
    teacher = copy.deepcopy(model.vlm.get_decoder())
    assert model(**batch, teacher=teacher).losses["teacher_kl"].item() == 0.0
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2.0)
    assert model(**batch, teacher=teacher).losses["teacher_kl"].item() == 0.0
    with torch.no_grad():
        model.vlm.get_decoder().norm.weight.mul_(2.0)
    outputs = model(**batch, teacher=teacher)
    assert float(outputs.losses["teacher_kl"]) > 0.0
    outputs.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_text_only_batch_trains_and_has_zero_mask_losses(model_and_processor):
    model, processor = model_and_processor
    conversations = [conversation(None, "It is red."), conversation(None, "No wheel.")]
    batch = processor.apply_chat_template(conversations, masks=[[], None], tokenize=True, return_dict=True)
    outputs = model(**batch)
    assert outputs.pred_masks is None
    assert float(outputs.losses["mask_bce"]) == 0.0
    assert outputs.loss.requires_grad and outputs.loss.isfinite()


def test_segment_generates_what_generate_does_and_masks_what_follows_the_stop_token(model_and_processor):
    model, processor = copy.deepcopy(model_and_processor[0]), model_and_processor[1]
    images = [random_image(seed=1), random_image(90, 40, seed=2), None]
    prompts = processor.apply_chat_template(
        [conversation(image, None) for image in images],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding_side="left",
    )
    sequences = model.generate(**prompts, max_new_tokens=8, do_sample=False)
    stop = int(sequences[0, -4])
    model.generation_config.eos_token_id = stop
    outputs = model.segment(**prompts, max_new_tokens=8, do_sample=False)
    length = prompts["input_ids"].shape[1]
    assert torch.equal(outputs.sequences, model.generate(**prompts, max_new_tokens=8, do_sample=False))
    for row in range(3):
        answer = sequences[row, length:].tolist()
        answer = answer[: answer.index(stop)] if stop in answer else answer
        assert outputs.sequences[row][outputs.answer_mask[row]].tolist() == answer
    inside = outputs.answer_mask[outputs.spans[:, 0], outputs.spans[:, 1]]
    assert inside.all() and (outputs.spans[:, 0] < 2).all()  # no span in the row without an image


def test_generated_spans_have_the_masks_of_the_same_answer_given(model_and_processor):
    model, processor = model_and_processor
    prompts = processor.apply_chat_template(
        [conversation(random_image(seed=1), None), conversation(random_image(90, 40, seed=2), None)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        padding_side="left",
    )
    generated = model.segment(**prompts, max_new_tokens=12, do_sample=False)
    assert len(generated.spans)
    given = dict(prompts)
    given["input_ids"] = generated.sequences
    given["attention_mask"] = torch.cat([prompts["attention_mask"], torch.ones(2, 12, dtype=torch.long)], dim=1)
    labels = torch.where(generated.answer_mask, generated.sequences, -100)
    tagged = model.segment_answers(**given, labels=labels)
    assert torch.equal(model.segment(**given, labels=labels).spans, tagged.spans)
    assert_close(tagged.spans, generated.spans)
    assert_close(tagged.pred_masks, generated.pred_masks, **EXACT)


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_the_language_loss_in_parts_has_the_gradients_of_all_logits_at_once(monkeypatch, rows):
    model, processor = tiny_model().train(), tiny_processor()
    batch = mixed_batch(processor)
    targets = batch["labels"][:, 1:].flatten()
    outputs = model(**{**batch, "labels": None})
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(modules_plum, "LOGITS_AT_ONCE", rows * outputs.logits.shape[-1])
    outputs = model(**batch)
    assert outputs.logits is None
    assert_close(outputs.losses["language_modeling"], expected)
    outputs.losses["language_modeling"].backward()
    for name, p in model.named_parameters():
        if gradients[name] is not None:
            assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_choice_scores_equal_log_probabilities_summed_token_by_token(model_and_processor):
    model, processor = model_and_processor
    image = random_image(seed=1)
    answers = ["It is red.", "The wheel.", "No.", "Which parts can you see?"]
    conversations = [conversation(image, answer) for answer in answers]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    with torch.no_grad():
        log_probabilities = model(**batch).logits.log_softmax(-1)
    for reduction in ("answer_mean", "answer_sum", "sequence_mean"):
        expected = []
        for row, (ids, labels, mask) in enumerate(
            zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True)
        ):
            counted = [
                position
                for position in range(1, len(ids))
                if (labels[position] != -100 if reduction != "sequence_mean" else mask[position])
                and ids[position] != processor.image_token_id
            ]
            total = -sum(float(log_probabilities[row, position - 1, ids[position]]) for position in counted)
            expected.append(total if reduction == "answer_sum" else total / len(counted))
        scores = model.score_choices(**batch, num_choices=2, reduction=reduction)
        assert_close(scores, torch.tensor(expected).view(2, 2), rtol=1e-4, atol=1e-4)


def test_sdpa_and_eager_attention_agree(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    batch = mixed_batch(processor)
    loaded = {
        name: PlumForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name)
        for name in ("sdpa", "eager")
    }
    assert loaded["eager"].vlm.model.language_model.config._attn_implementation == "eager"
    assert loaded["sdpa"].vlm.model.language_model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        sdpa, eager = (loaded[name].eval()(**batch) for name in ("sdpa", "eager"))
    assert_close(sdpa.loss, eager.loss, **EXACT)
    assert_close(sdpa.pred_masks, eager.pred_masks, **EXACT)


def test_gradient_checkpointing_leaves_the_gradients_as_they_are():
    processor = tiny_processor()
    batch, gradients = mixed_batch(processor), []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert_close(gradients[1], gradients[0], **EXACT)


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"dtype": torch.bfloat16}], ids=str)
def test_a_saved_model_loads_to_the_same_function(tmp_path, options):
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path, **options).eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(options.get("dtype", torch.float32))), name
    batch = mixed_batch(processor)
    with torch.no_grad():
        found, expected = loaded(**batch), model(**batch)
    tolerance = {"rtol": 0.1, "atol": 0.1} if "dtype" in options else {"rtol": 0, "atol": 0}
    assert_close(found.logits.float(), expected.logits, **tolerance)
    assert_close(found.pred_masks.float(), expected.pred_masks, **tolerance)
    assert len(loaded.segment_spans(**batch).pred_masks) == 4


def test_fresh_weights_can_be_learned_from():
    model = tiny_model()
    positions = model.sam.shared_image_embedding.positional_embedding
    assert 0.5 < float(positions.std()) < 1.5
    assert positions is model.sam.prompt_encoder.shared_embedding.positional_embedding
    assert float(model.sam.vision_encoder.pos_embed.std()) > 0.1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_auto_classes_load_the_model_as_remote_code_from_another_folder(tmp_path):
    folder, elsewhere = tmp_path / "plum", tmp_path / "elsewhere"
    elsewhere.mkdir()
    model, processor = tiny_model(), tiny_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    script = textwrap.dedent(
        """
        import sys
        from PIL import Image
        from transformers import (
            AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
        )
        folder = sys.argv[1]
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "plum"
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (70, 50))},
                                             {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "A <p>wheel</p>."}]
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
            model = auto_class.from_pretrained(folder, trust_remote_code=True)
            outputs = model.segment_spans(**inputs)
            answer = processor.post_process_segmentation(outputs)[0]
            print(answer.text, answer.spans[0].text, answer.spans[0].mask.shape, float(outputs.pred_masks.sum()))
        model.save_pretrained(folder + "-again")
        processor.save_pretrained(folder + "-again")
        AutoModel.from_pretrained(folder + "-again", trust_remote_code=True)
        """
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder)],
        cwd=elsewhere,
        env={**environment, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    first, *others = run.stdout.strip().splitlines()
    assert others == [first] * 2 and first.startswith("A wheel. wheel (50, 70)")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"sam_image_index": torch.tensor([-1, 1, 0, -1])}, "Rows \\[0\\] have spans to segment but no image"),
        ({"sam_image_index": torch.tensor([0, 0, 0, -1])}, "expected for each of 4 rows the index of one of 2 images"),
        ({"sam_image_index": torch.tensor([0, 1, 2, -1])}, "expected for each of 4 rows the index of one of 2 images"),
        ({"sam_image_index": torch.tensor([0, 1])}, "expected for each of 4 rows the index of one of 2 images"),
        ({"mask_labels": [torch.zeros(50, 70)]}, "Found 1 mask_labels for 4 spans"),
        ({"mask_labels": [torch.zeros(9, 9)] * 4}, r"\(9, 9\) pixels but its image is \(50, 70\)"),
        ({"spans": torch.tensor([[1, 2, 3], [0, 2, 3], [0, 4, 5], [0, 6, 7]])}, "sorted by row"),
        ({"spans": torch.tensor([[0, 4, 5], [0, 2, 3], [0, 6, 7], [1, 2, 3]])}, r"Span 1 is \[0, 2, 3\], after one"),
        (
            {"spans": torch.tensor([[0, 2, 3], [0, 4, 5], [0, 6, 7], [9, 2, 3]])},
            r"Span 3 is \[9, 2, 3\], out of range",
        ),
        ({"spans": torch.tensor([[-1, 2, 3], [0, 4, 5], [0, 6, 7], [1, 2, 3]])}, r"Span 0 .* out of range"),
        (
            {"spans": torch.tensor([[0, 2, 3], [0, 4, 999], [0, 6, 7], [1, 2, 3]])},
            "Span 1 .* out of range: there are 4",
        ),
        ({"spans": torch.tensor([[0, -2, 3], [0, 4, 5], [0, 6, 7], [1, 2, 3]])}, "Span 0 .* out of range"),
        ({"spans": torch.tensor([[0, 2, 3], [0, 5, 4], [0, 6, 7], [1, 2, 3]])}, r"Span 1 is \[0, 5, 4\].* no token"),
        ({"spans": torch.tensor([[0, 2, 3], [0, 4, 4], [0, 6, 7], [1, 2, 3]])}, r"Span 1 is \[0, 4, 4\].* no token"),
        ({"spans": torch.ones(4, 2, dtype=torch.long)}, r"shape \(S, 3\).*found torch.int64 \(4, 2\)"),
        ({"spans": torch.ones(4, 3)}, r"must be integers.*found torch.float32"),
    ],
)
def test_wrong_links_between_spans_masks_and_images_are_refused(change, words):
    model, processor = tiny_model(shared_vision=False), tiny_processor(shared_vision=False)
    with pytest.raises(ValueError, match=words):
        model(**{**mixed_batch(processor), **change})


def test_prompts_padded_on_the_right_are_refused(model_and_processor):
    model, processor = model_and_processor
    chats = [conversation(random_image(), None), conversation(None, None)]
    batch = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True)
    for continued in (model.generate, model.segment):
        with pytest.raises(ValueError, match="padded on the left"):
            continued(**batch, max_new_tokens=2)


@torch.no_grad()
def test_arguments_that_wrappers_add_to_every_call_change_nothing_but_the_form(model_and_processor):
    model, processor = model_and_processor
    batch = mixed_batch(processor)
    expected = model(**batch)
    unset = dict.fromkeys(("inputs_embeds", "output_attentions", "return_dict", "task_ids"))
    called = model(**batch, **unset, use_cache=False, output_hidden_states=True)
    assert torch.equal(called.hidden_states[-1], called.last_hidden_state)
    assert called.loss == expected.loss and torch.equal(called.logits, expected.logits)
    values = model(**batch, return_dict=False)
    assert values[0] == expected.loss and torch.equal(values[1], expected.logits)


@torch.no_grad()
def test_masks_of_one_size_may_be_one_tensor():
    chat, masks = (
        conversation(random_image(), "A <p>wheel</p> and a <p>tail</p>."),
        [random_mask(), random_mask(seed=1)],
    )
    batch = tiny_processor().apply_chat_template(chat, masks=masks, tokenize=True, return_dict=True)
    model, stacked = tiny_model(), torch.stack(batch["mask_labels"])
    assert model(**{**batch, "mask_labels": stacked}).loss == model(**batch).loss


@torch.no_grad()
def test_the_predictions_of_transformers_trainer_start_with_the_logits(model_and_processor, tmp_path):
    model, processor = model_and_processor
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = Trainer(model, arguments, data_collator=lambda rows: mixed_batch(processor))
    logits, span_logits, *_ = trainer.predict(range(4)).predictions
    expected = model(**mixed_batch(processor))
    assert_close(torch.from_numpy(logits), expected.logits, **EXACT)
    assert_close(torch.from_numpy(span_logits), expected.span_logits, **EXACT)


def test_a_processor_with_another_count_of_image_tokens_is_refused_by_the_model(model_and_processor):
    model, processor = model_and_processor
    processor = copy.deepcopy(processor)
    processor.num_image_tokens = 9
    batch = processor.apply_chat_template([conversation(random_image(), "Yes.")], tokenize=True, return_dict=True)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**batch)


@torch.no_grad()
def test_image_tokens_without_an_image_are_refused_instead_of_being_read_as_words(model_and_processor):
    model, processor = model_and_processor
    chats = [conversation(random_image(), "Yes."), conversation(random_image(), "No.")]
    batch = dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True))
    for name in ("pixel_values", "sam_pixel_values"):
        batch.pop(name, None)
    for run in (model, model.segment_answers, lambda **inputs: model.score_choices(**inputs, num_choices=2)):
        with pytest.raises(ValueError, match="contain image tokens, but no image is passed with them"):
            run(**batch)
    prompts = processor.apply_chat_template([conversation(random_image(), None)], add_generation_prompt=True,
                                            tokenize=True, return_dict=True)  # fmt: skip
    with pytest.raises(ValueError, match="contain image tokens, but no image is passed with them"):
        model.generate(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=2)


@torch.no_grad()
def test_images_that_sam_has_not_seen_are_not_taken_for_images_without_parts(model_and_processor):
    model, processor = model_and_processor
    chats = [conversation(random_image(), "Yes.")]
    batch = dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True))
    batch["hidden_states"] = model.encode_conversations(**batch)
    batch = {name: value for name, value in batch.items() if not name.startswith(("sam_", "pixel_values"))}
    with pytest.raises(ValueError, match="have images, but nothing to segment them with; pass sam_pixel_values"):
        model.segment_answers(**batch)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"span_class_weights": [1.0, 1.0]}, "three weights"),
        ({"mask_feedback_num_heads": 5}, "mask_feedback_num_heads is 5.*width 32"),
        ({"mask_overlap_loss": "iou"}, "mask_overlap_loss"),
    ],
)
def test_a_config_that_does_not_fit_together_names_both_values(options, words):
    with pytest.raises(Exception, match=words):
        tiny_config(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"span_class_weights": [1.0, 1.0]}, "three weights"),
        ({"mask_feedback_num_heads": 5}, "mask_feedback_num_heads is 5.*width 32"),
        ({"span_source": "seg_token"}, "span_source is 'seg_token' but seg_token_id is None"),
    ],
)
def test_fields_changed_after_the_check_are_checked_by_the_model(options, words):
    config = tiny_config()
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=words):
        PlumForConditionalGeneration(config)


def test_spans_given_by_hand_are_checked_before_they_are_segmented():
    model, batch = tiny_model(), mixed_batch(tiny_processor())
    answers = batch["labels"] != -100
    start = int(answers[0].int().argmax())
    for span, words in (
        ([0, start, start], "contains no token"),
        ([0, start + 1, start], "contains no token"),
        ([0, start, 10_000], "out of range"),
        ([7, start, start + 1], "out of range"),
        ([0, 0, 2], "is not part of an answer"),
        ([0, start - 1, start + 1], "is not part of an answer"),
    ):
        with pytest.raises(ValueError, match=f"Span 0 is .*{words}"):
            model.segment_spans(**{**batch, "spans": torch.tensor([span])})
    assert model.segment_spans(**{**batch, "spans": torch.tensor([[0, start, start + 1]])}).pred_masks.isfinite().all()
    assert len(model.segment_spans(**{**batch, "spans": torch.zeros(0, 3, dtype=torch.long)}).pred_masks) == 0


@pytest.mark.parametrize(
    "given, words",
    [
        ({1: np.zeros((9, 9))}, r"given mask of span 1 is \(9, 9\) but its image is \(50, 70\)"),
        ({4: np.zeros((50, 70))}, "given_masks has key 4, expected the index of one of 4 spans"),
        ({-1: np.zeros((50, 70))}, "given_masks has key -1"),
        ({"wheel": np.zeros((50, 70))}, "given_masks has key 'wheel'"),
        ({True: np.zeros((50, 70))}, "given_masks has key True"),
        ({0: Image.new("1", (70, 50))}, "given mask of span 0 is of type Image, expected an array or tensor"),
        ({0: None}, "given mask of span 0 is of type NoneType"),
        ([np.zeros((50, 70))], "given_masks is a list, expected a dict"),
        ({0: np.full((50, 70), np.nan)}, "given mask of span 0 has values that are not numbers"),
    ],
)
def test_given_masks_are_arrays_of_the_size_of_their_image_for_spans_that_are_there(given, words):
    model, processor = tiny_model(), tiny_processor()
    with pytest.raises(ValueError, match=words):
        model.segment_spans(**mixed_batch(processor), given_masks=given)


def test_what_is_not_zero_is_inside_a_given_mask():
    model, batch = tiny_model(), mixed_batch(tiny_processor())
    drawn = random_mask(50, 70, seed=9)
    expected = model.segment_spans(**batch, given_masks={1: drawn}).pred_masks
    for form in (drawn.astype(np.uint8) * 255, drawn.astype(np.float64), torch.from_numpy(drawn)):
        assert_close(
            model.segment_spans(**batch, given_masks={np.int64(1): form}).pred_masks, expected, rtol=0, atol=0
        )


def test_a_teacher_computes_where_its_inputs_are():
    model = tiny_model(teacher_kl_loss_weight=1.0)
    teacher = build_teacher(model)
    inputs = {
        "inputs_embeds": torch.zeros(1, 3, 32, device="meta"),
        "position_ids": torch.arange(3, device="meta")[None],
    }
    assert teacher(**inputs).last_hidden_state.device.type == "meta"
    assert next(model.vlm.parameters()).device.type == "cpu"
