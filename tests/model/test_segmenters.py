"""PLUM with the segmenters of every family: each decodes as it does alone, and every path of the model runs."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from PIL import Image
from torch.testing import assert_close
from transformers import AutoConfig, Sam3Config, Sam3TrackerVideoConfig, Sam3VideoConfig, SamImageProcessor

from configuration_plum import SEGMENTER_TYPES, PlumConfig, as_segmenter_config
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.embedding_cache import EmbeddingCache
from processing_plum import PlumProcessor
from segmenters_plum import SEGMENTERS
from tests import tiny_segmenters
from tests.tiny import conversation, mixed_conversations, random_image, random_mask
from tests.tiny_backbones import llava_clip

AutoConfig.register("plum", PlumConfig, exist_ok=True)
EXACT = {"rtol": 1e-4, "atol": 1e-5}
PLUM = {"span_tagger_num_heads": 4, "span_tagger_intermediate_size": 64}
WIDE, TALL = random_image(50, 70, seed=1), random_image(90, 40, seed=2)
CHATS, MASKS = mixed_conversations()
FAMILIES = {"sam": "sam", "sam_hq": "sam_hq", "sam2": "sam2", "sam2_video": "sam2", "sam3_tracker": "sam3_tracker"}
STRETCHED = ("sam2", "sam3_tracker")


@pytest.fixture(scope="module")
def vlm_folder(tmp_path_factory):
    return str(llava_clip(tmp_path_factory.mktemp("vlm")))


@pytest.fixture(scope="module", params=FAMILIES)
def sam_folder(request, tmp_path_factory):
    return str(getattr(tiny_segmenters, request.param)(tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def plum(vlm_folder, sam_folder):
    torch.manual_seed(0)
    model = PlumForConditionalGeneration.from_backbones(vlm=vlm_folder, sam=sam_folder, **PLUM)
    return model, PlumProcessor.from_backbones(vlm=vlm_folder, sam=sam_folder)


@pytest.fixture(scope="module")
def batch(plum):
    return plum[1].apply_chat_template(CHATS, masks=MASKS, tokenize=True, return_dict=True)


def test_every_type_of_the_configuration_has_a_segmenter():
    assert set(SEGMENTERS) == set(SEGMENTER_TYPES) == set(FAMILIES.values())


def test_a_mask_is_that_of_transformers_own_forward_with_the_same_prompt(plum, sam_folder, batch):
    model, _ = plum
    alone = type(model.sam).from_pretrained(sam_folder, config=model.config.sam_config).eval()
    if model.config.sam_config.model_type == "sam3_tracker":
        # transformers adds this embedding to a level that the tracker does not read; here it is added to the grid.
        for sam in (model.sam, alone):
            torch.nn.init.zeros_(sam.no_memory_embedding)
    points, pixels = torch.tensor([[[[20.0, 30.0]]], [[[40.0, 10.0]]]]), batch["sam_pixel_values"]
    labels = torch.ones(2, 1, 1, dtype=torch.long)
    with torch.no_grad():
        expected = alone(pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=False)
        sparse, dense = model.sam.prompt_encoder(points, labels, None, None)
        embeddings = model.get_image_embeddings(pixels)
        positions = model._grid_positions(dense).expand(2, -1, -1, -1)
        dense = model._no_mask_prompt(sparse[:, 0, 0])
        masks, scores = model.segmenter.decode(model.sam, embeddings, positions, sparse[:, 0], dense)
    assert_close(masks, expected.pred_masks[:, 0, 0], **EXACT)
    object_logits = getattr(expected, "object_score_logits", None)
    probability = 1 if object_logits is None else object_logits[:, 0, 0].sigmoid()
    assert_close(scores, expected.iou_scores[:, 0, 0] * probability, **EXACT)
    assert embeddings.shape[1] == model.segmenter.embedding_width(model.config.sam_config)


@torch.no_grad()
def test_a_mask_corrected_in_a_window_as_large_as_the_image_is_that_corrected_in_the_image(plum):
    model, processor = plum
    side = model.config.sam_image_size
    chat = conversation(random_image(side, side), "A <p>wing</p> and a <p>tail</p>.")
    inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
    mask = torch.zeros(side, side, dtype=torch.bool)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    inputs |= {"input_masks": {0: mask}, "input_points": {0: [[side // 3, side // 3]]}, "input_labels": {0: [0]}}
    expected, found = model.segment_spans(**inputs), {}
    for factor in (100.0, 1.5):
        zooming = copy.copy(model)
        zooming.config = copy.deepcopy(model.config)
        zooming.config.correction_window = factor
        found[factor] = zooming.segment_spans(**inputs)
    assert expected.mask_windows is None and found[100.0].mask_windows.tolist() == [[0, 0, side]] * 2
    assert_close(found[100.0].pred_masks, expected.pred_masks, **EXACT)
    assert_close(found[100.0].iou_scores, expected.iou_scores, **EXACT)
    assert found[1.5].mask_windows.tolist() == [[3 * side / 16, 3 * side / 16, 3 * side / 8], [0, 0, side]]
    assert not torch.allclose(found[1.5].pred_masks[0], expected.pred_masks[0], atol=1e-3)


def test_the_finer_features_of_an_image_change_its_masks(plum, batch):
    model, _ = plum
    width = model.config.sam_width
    with torch.no_grad():
        embeddings = model.get_image_embeddings(batch["sam_pixel_values"])
        inputs = {**batch, "sam_image_embeddings": embeddings}
        del inputs["sam_pixel_values"]
        expected = model.segment_spans(**inputs).pred_masks
        inputs["sam_image_embeddings"] = torch.cat([embeddings[:, :width], embeddings[:, width:] + 1], dim=1)
        changed = model.segment_spans(**inputs).pred_masks
    assert torch.equal(changed, expected) == (embeddings.shape[1] == width)


def test_the_frame_is_that_of_the_familys_own_image_processor(plum, batch):
    model, processor = plum
    side = model.config.sam_image_size
    assert batch["sam_pixel_values"].shape == (2, 3, side, side)
    assert batch["original_sizes"].tolist() == [[50, 70], [90, 40]]
    if model.config.sam_config.model_type in STRETCHED:
        assert batch["reshaped_input_sizes"].tolist() == [[side, side]] * 2
        expected = processor.sam_image_processor([WIDE, TALL], return_tensors="pt")["pixel_values"]
        grey = Image.new("RGB", (7, 9), (128, 128, 128))
        mean = torch.tensor([0.485, 0.456, 0.406]) if side != 64 else torch.full((3,), 0.5)
        std = torch.tensor([0.229, 0.224, 0.225]) if side != 64 else torch.full((3,), 0.5)
        (pixels,) = processor._encode_for_sam([grey])["sam_pixel_values"]
        assert_close(pixels[:, 5, 5], (128 / 255 - mean) / std)
    else:
        assert batch["reshaped_input_sizes"].tolist() == [[46, 64], [64, 28]]
        plain = SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side})
        expected = plain([WIDE, TALL], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["sam_pixel_values"], torch.as_tensor(expected))


def test_a_training_step_lowers_the_loss_and_reaches_encoder_and_decoder(plum, batch):
    model = copy.deepcopy(plum[0]).train()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    touched = {name for name, gradient in gradients.items() if gradient.abs().sum() > 0}
    for part in ("mask_feedback.film", "sam.mask_decoder.transformer", "sam.prompt_encoder.mask_embed"):
        assert any(part in name for name in touched), part
    for part in model.segmenter.image_encoder(model.sam):
        assert any(name.startswith(f"sam.{part}") for name in touched), part
    with torch.no_grad():
        for name, gradient in gradients.items():
            model.get_parameter(name).sub_(1e-4 * gradient)
        assert loss.isfinite() and float(model(**batch).loss) < float(loss)


def test_answers_and_masks_of_a_batch_equal_those_alone(plum):
    model, processor = plum
    options = {"max_new_tokens": 12, "do_sample": False}
    prompts = [conversation(image, None) for image in (WIDE, TALL, None)]
    encoding = {"add_generation_prompt": True, "padding_side": "left", "tokenize": True, "return_dict": True}
    together = model.segment(**processor.apply_chat_template(prompts, **encoding), **options)
    answers = processor.post_process_segmentation(together)
    for row, chat in enumerate(prompts):
        alone = model.segment(**processor.apply_chat_template([chat], **encoding), **options)
        (expected,) = processor.post_process_segmentation(alone)
        assert answers[row].text == expected.text
        assert_close(together.pred_masks[together.spans[:, 0] == row], alone.pred_masks, **EXACT)
    given = [conversation(image, "A <p>wing</p> and a <p>tail</p>.") for image in (WIDE, TALL)]
    batch = processor.apply_chat_template(given, tokenize=True, return_dict=True)
    together = model.segment_spans(**batch)
    for row, (chat, image) in enumerate(zip(given, (WIDE, TALL), strict=True)):
        alone = model.segment_spans(**processor.apply_chat_template([chat], tokenize=True, return_dict=True))
        assert_close(together.pred_masks[2 * row : 2 * row + 2], alone.pred_masks, **EXACT)
        (answer,) = processor.post_process_segmentation(alone)
        assert {span.mask.shape for span in answer.spans} == {image.size[::-1]}


def test_a_given_mask_is_kept_and_guides_the_later_ones(plum, batch):
    model, processor = plum
    plain = model.segment_spans(**batch)
    mask = random_mask(50, 70, seed=9)
    guided = model.segment_spans(**batch, given_masks={0: mask})
    answers = processor.post_process_segmentation(guided)
    overlap = (answers[0].spans[0].mask & mask).sum() / (answers[0].spans[0].mask | mask).sum()
    assert overlap > 0.9
    assert not torch.allclose(guided.pred_masks[1:3], plain.pred_masks[1:3])
    assert torch.equal(guided.pred_masks[3:], plain.pred_masks[3:])


def test_choices_score_the_same_with_every_segmenter_as_in_a_forward_pass(plum, batch):
    model, _ = plum
    with torch.no_grad():
        log_probabilities = model(**batch).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    picked = log_probabilities.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    scores = model.score_choices(**batch, num_choices=2, reduction="answer_sum")
    assert_close(scores, -picked.sum(1).view(2, 2), **EXACT)


def test_cached_embeddings_are_those_of_the_model_and_belong_to_its_encoder(plum, batch, tmp_path):
    model = copy.deepcopy(plum[0])
    pixels = batch["sam_pixel_values"]
    cache = EmbeddingCache(tmp_path, model)
    first = cache.embed(pixels)
    assert_close(first, model.get_image_embeddings(pixels), rtol=1e-2, atol=1e-3)  # stored as bfloat16
    assert torch.equal(cache.embed(pixels), first)
    for part in model.segmenter.image_encoder(model.sam).values():
        with torch.no_grad():
            weight = part if isinstance(part, torch.nn.Parameter) else next(part.parameters())
            weight.add_(0.5)
            other = EmbeddingCache(tmp_path, model)
            weight.sub_(0.5)
        assert other.folder != cache.folder


LOAD = """\
import json, sys, torch
from transformers import AutoModel, AutoProcessor
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = [{"type": "image", "image": sys.argv[2]}, {"type": "text", "text": "Which parts?"}]
answer = "A <p>wing</p> and a <p>tail</p>."
chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
batch = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
print(json.dumps([type(model.sam).__name__, model.segment_spans(**batch).pred_masks.double().sum((1, 2)).tolist()]))
"""


@pytest.mark.slow
def test_a_saved_model_loads_through_the_auto_classes_in_another_process(plum, tmp_path):
    model, processor = plum
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    WIDE.save(tmp_path / "wide.png")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "saved"), str(tmp_path / "wide.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    name, sums = json.loads(done.stdout.splitlines()[-1])
    chat = conversation(WIDE, "A <p>wing</p> and a <p>tail</p>.", "Which parts?")
    batch = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
    assert name == type(model.sam).__name__
    assert_close(
        torch.tensor(sums), model.segment_spans(**batch).pred_masks.sum((1, 2)).detach(), rtol=1e-4, atol=1e-3
    )


def test_a_saved_model_loads_to_the_same_function(plum, batch, tmp_path):
    model, processor = plum
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path).eval()
    again = PlumProcessor.from_pretrained(tmp_path).apply_chat_template(
        CHATS, masks=MASKS, tokenize=True, return_dict=True
    )
    assert type(loaded.config.sam_config) is type(model.config.sam_config)
    assert torch.equal(again["sam_pixel_values"], batch["sam_pixel_values"])
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    # Weights from a file lie elsewhere in memory, where a processor may sum in another order.
    assert_close(loaded.segment_spans(**again).pred_masks, model.segment_spans(**batch).pred_masks, **EXACT)


def test_the_tracker_inside_a_sam3_video_model_is_taken():
    tracker = Sam3TrackerVideoConfig(vision_config=tiny_segmenters.vit(), mask_decoder_config={"mlp_dim": 9})
    tracker.image_size = 64
    video = Sam3VideoConfig(tracker_config=tracker)
    found = as_segmenter_config(video)
    assert found.model_type == "sam3_tracker" and found.mask_decoder_config.mlp_dim == 9
    assert found.vision_config.backbone_feature_sizes == tiny_segmenters.LEVELS


def test_a_detector_is_refused_as_a_segmenter():
    with pytest.raises(ValueError, match="sam_config is a 'sam3' model.*SAM 3's detector takes words.*its tracker"):
        PlumConfig(sam_config=Sam3Config())


def test_levels_that_do_not_fit_the_grid_are_refused():
    sam = {"model_type": "sam2", "prompt_encoder_config": {"image_size": 512}}
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"backbone_feature_sizes is \[\[256, 256\].*images of 512 pixels"
    ):
        PlumConfig(sam_config=sam)


def test_embeddings_of_another_segmenter_are_refused(plum, batch):
    model, _ = plum
    inputs = {name: value for name, value in batch.items() if name != "sam_pixel_values"}
    others = torch.zeros(2, model.segmenter.embedding_width(model.config.sam_config) + 1, 8, 8)
    with pytest.raises(ValueError, match=f"those of this model's '{model.config.sam_config.model_type}' are"):
        model.segment_spans(**inputs, sam_image_embeddings=others)
