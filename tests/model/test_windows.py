"""Windows in which corrected masks are decoded: their geometry, inference and training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.testing import assert_close

from modeling_plum import PlumForConditionalGeneration
from modules_plum import MASK_LOSSES, mask_losses
from segmenters_plum import (
    GIVEN_MASK_LOGIT,
    SpanPrompt,
    crop_windows,
    paste_windows,
    share_logits,
    upscale_masks,
    windows_around,
)
from supervision_plum import PROMPT_DRAWS, supervise_masks
from tests.tiny import IMAGE_SIZE, mixed_conversations, tiny_model, tiny_processor

SIDE = IMAGE_SIZE // 2
EXACT = {"rtol": 1e-5, "atol": 1e-5}
CORRECTION, CLICK, BOX = 0.1, 0.6, 0.9
POINTS, LABELS = [[30.0, 12.0], [24.5, 20.0]], [1, 0]
MASKS = [torch.zeros(50, 70, dtype=torch.bool) for _ in range(3)]  # of the first three spans
for number, drawn in enumerate(MASKS):
    drawn[8 : 20 + number, 22 - number : 34] = True


@pytest.fixture(scope="module")
def model():
    return tiny_model(correction_window=1.5)


@pytest.fixture(scope="module")
def batch():
    conversations, masks = mixed_conversations()
    inputs = tiny_processor().apply_chat_template(conversations, masks=masks, tokenize=True, return_dict=True)
    return {**inputs, "sam_pixel_values": torch.rand_like(inputs["sam_pixel_values"])}


def corrected(model, batch, spans=(1,), **others) -> dict:
    """Inputs of `segment_spans` that correct spans with two clicks on a drawn mask."""
    prompts = {"input_points": POINTS, "input_labels": LABELS}
    prompts = {name: dict.fromkeys(spans, value) for name, value in prompts.items()}
    return {**batch, **prompts, "input_masks": {span: MASKS[span] for span in spans}, **others}


# ------------------------------------------------------------------- geometry


def box_mask(x0, y0, x1, y1, size=64) -> torch.BoolTensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize(
    "mask, prompt, expected",
    [
        (box_mask(20, 30, 40, 34), {}, [15, 17, 30]),  # 20 wide, centre (30, 32)
        (box_mask(20, 30, 24, 34), {}, [14, 24, 16]),  # at least a quarter of the input
        (box_mask(0, 0, 20, 4), {}, [0, 0, 30]),  # moved into the input
        (box_mask(0, 0, 60, 4), {}, [0, 0, 64]),  # at most the input
        (box_mask(20, 30, 40, 34), {"points": [[49.0, 31.0], [30.0, 31.0]]}, [12.5, 9.5, 45]),
        (box_mask(0, 0, 0, 0), {"points": [[49.0, 31.0]]}, [41.5, 23.5, 16]),
        (box_mask(20, 30, 40, 34), {"box": [16.0, 28.0, 40.0, 36.0]}, [10, 14, 36]),
        (box_mask(0, 0, 0, 0), {}, [0, 0, 64]),  # nothing to look at
    ],
)
@pytest.mark.parametrize("cells", [1, 2])  # masks of a value for each pixel, or finer
def test_windows_are_around_masks_and_prompts_and_inside_the_input(mask, prompt, expected, cells):
    masks = mask[None].repeat_interleave(cells, 1).repeat_interleave(cells, 2)
    prompts = SpanPrompt(**{name: torch.tensor([value]) for name, value in prompt.items()})
    assert windows_around(masks, prompts, 64, 1.5).tolist() == [expected]


def test_a_window_of_whole_pixels_is_the_resized_crop():
    frames, window = torch.rand(2, 3, 64, 64), torch.tensor([[8.0, 16.0, 32.0], [32.0, 0.0, 16.0]])
    found = crop_windows(frames, window, 64, 64)
    for frame, (x0, y0, side), cropped in zip(frames, window.int().tolist(), found, strict=True):
        crop = frame[None, :, y0 : y0 + side, x0 : x0 + side]
        expected = F.interpolate(crop, (64, 64), mode="bilinear", align_corners=False)[0]
        inner = slice(3, -3)  # at the border a window sees what is beside it
        assert_close(cropped[:, inner, inner], expected[:, inner, inner])
    whole = torch.tensor([[0.0, 0.0, 64.0]]).expand(2, 3)
    assert_close(crop_windows(frames, whole, 64, 64), frames)
    assert_close(paste_windows(frames[:, 0], whole, 64, 64), frames[:, 0])


def test_a_mask_that_is_cropped_and_pasted_is_the_mask_and_nothing_is_outside():
    mask = box_mask(20, 30, 40, 34)[None]
    window = windows_around(mask, SpanPrompt(), 64, 1.5)
    cropped = SpanPrompt(mask=share_logits(mask.float())).in_windows(window, 64, 32).mask
    assert cropped.shape == (1, 32, 32) and cropped.abs().max() == GIVEN_MASK_LOGIT
    pasted = paste_windows(cropped, window, 64, 64)
    assert torch.equal(pasted > 0, mask)
    outside = ~box_mask(15, 17, 45, 47)
    assert (pasted[0][outside] == -GIVEN_MASK_LOGIT).all()
    # The original is half as large as SAM's input.
    assert torch.equal(upscale_masks(cropped, 64, (64, 64), (32, 32), window) > 0, mask[:, ::2, ::2])


def test_points_and_boxes_mean_the_same_pixels_in_the_window():
    window = torch.tensor([[8.0, 16.0, 32.0]])
    points, box = torch.tensor([[[8.0, 16.0], [39.0, 47.0]]]), torch.tensor([[8.0, 16.0, 40.0, 32.0]])
    found = SpanPrompt(points=points, labels=torch.tensor([[1, 0]]), box=box).in_windows(window, 64, 16)
    assert found.points.tolist() == [[[0.5, 0.5], [62.5, 62.5]]]  # centres of pixels that are twice as large
    assert found.box.tolist() == [[0.0, 0.0, 64.0, 32.0]] and found.labels.tolist() == [[1, 0]]


# ------------------------------------------------------------------ inference


@torch.no_grad()
def test_a_corrected_mask_is_that_of_the_window_as_an_image(model, batch):
    outputs = model.segment_spans(**corrected(model, batch))
    window = outputs.mask_windows[1]
    assert outputs.mask_windows[[0, 2, 3]].tolist() == [[0, 0, IMAGE_SIZE]] * 3 and window[2] < IMAGE_SIZE
    image = int(batch["sam_image_index"][batch["spans"][1, 0]])
    pixels = crop_windows(batch["sam_pixel_values"][image, None], window[None], IMAGE_SIZE, IMAGE_SIZE)
    # The same span of another model, which sees the window as its image, in which the prompts are already given.
    alone = tiny_model()
    original, reshaped = batch["original_sizes"][image], batch["reshaped_input_sizes"][image]
    scale = torch.tensor([reshaped[1] / original[1], reshaped[0] / original[0]])
    points = (torch.tensor(POINTS) * scale + 0.5 - window[:2]) * IMAGE_SIZE / window[2] - 0.5
    states = model.encode_conversations(**batch)
    row = {name: batch[name][[int(batch["spans"][1, 0])]] for name in ("input_ids", "attention_mask", "labels")}
    span = batch["spans"][1:2].clone()
    states, span[:, 0] = states[span[:, 0]], 0
    (given,) = model._read_given_spans(
        batch["spans"], model._take_images(batch["input_ids"], batch)[0], None, [None, None, None, {1: MASKS[1]}]
    )["prompts"].values()
    low_res = SpanPrompt(mask=given.mask[None]).in_windows(window[None], IMAGE_SIZE, SIDE).mask[0]
    square = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]])
    expected = alone.segment_spans(
        **row,
        spans=span,
        hidden_states=states,
        sam_pixel_values=pixels,
        original_sizes=square,
        reshaped_input_sizes=square,
        input_points={0: points},
        input_labels={0: LABELS},
        input_masks={0: low_res},
    )
    assert expected.mask_windows is None
    assert_close(outputs.pred_masks[1], expected.pred_masks[0], **EXACT)
    assert_close(outputs.iou_scores[1], expected.iou_scores[0], **EXACT)


@torch.no_grad()
def test_other_spans_stay_and_later_ones_follow_the_corrected_mask(model, batch):
    before, after = model.segment_spans(**batch), model.segment_spans(**corrected(model, batch))
    for span in (0, 3):
        assert torch.equal(after.pred_masks[span], before.pred_masks[span])
    pasted = paste_windows(after.pred_masks[1, None], after.mask_windows[1, None], IMAGE_SIZE, SIDE)
    given = {1: pasted[0]}
    inputs = (
        model.encode_conversations(**batch),
        batch["spans"],
        model.get_image_embeddings(batch["sam_pixel_values"]),
    )
    expected, _ = model.decode_masks(*inputs, batch["sam_image_index"], given)
    assert_close(after.pred_masks[2], expected[2], **EXACT)
    assert not torch.equal(after.pred_masks[2], before.pred_masks[2])


@torch.no_grad()
def test_spans_corrected_together_are_those_corrected_alone(model, batch):
    together = model.segment_spans(**corrected(model, batch, spans=(0, 1, 2), input_boxes={0: [2, 2, 30, 40]}))
    for span in (0, 1, 2):
        box = {"input_boxes": {0: [2, 2, 30, 40]}} if span == 0 else {}
        alone = model.segment_spans(**corrected(model, batch, spans=(span,), **box))
        for name in ("pred_masks", "iou_scores", "mask_windows"):
            assert_close(getattr(together, name)[span], getattr(alone, name)[span], **EXACT)


@torch.no_grad()
def test_the_mask_in_the_image_is_that_of_its_window(model, batch):
    processor, outputs = tiny_processor(), model.segment_spans(**corrected(model, batch))
    spans = [span for answer in processor.post_process_segmentation(outputs) for span in answer.spans]
    in_frame = paste_windows(outputs.pred_masks[1, None], outputs.mask_windows[1, None], IMAGE_SIZE, IMAGE_SIZE)
    shown = F.interpolate(in_frame[None, :, :46], (50, 70), mode="bilinear", align_corners=False)[0, 0] > 0
    assert np.array_equal(spans[1].mask, shown.numpy()) and spans[1].mask.any()


@torch.no_grad()
def test_windows_need_pixels_and_nothing_else_does(model, batch, tmp_path):
    embeddings = model.get_image_embeddings(batch["sam_pixel_values"])
    cached = {name: value for name, value in batch.items() if name != "sam_pixel_values"}
    cached["sam_image_embeddings"] = embeddings
    with pytest.raises(ValueError, match="decoded in a window of the image; pass sam_pixel_values beside"):
        model.segment_spans(**corrected(model, cached))
    both = corrected(model, cached, sam_pixel_values=batch["sam_pixel_values"])
    expected = model.segment_spans(**corrected(model, batch))
    assert torch.equal(model.segment_spans(**both).pred_masks, expected.pred_masks)
    without_mask = {"input_points": {1: POINTS}, "input_labels": {1: LABELS}}
    found, whole = (each.segment_spans(**cached, **without_mask) for each in (model, tiny_model()))
    assert found.mask_windows is None and torch.equal(found.pred_masks, whole.pred_masks)
    model.save_pretrained(tmp_path)
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.segment_spans(**both).pred_masks, expected.pred_masks)


@pytest.mark.parametrize("factor", [0.99, -2.0, float("nan"), 1000.0])
def test_a_window_of_no_use_is_refused(factor):
    with pytest.raises(
        StrictDataclassClassValidationError, match="correction_window must be a number from 1 to 100, found"
    ):
        tiny_model(correction_window=factor)


# ------------------------------------------------------------------- training


@torch.no_grad()
def test_training_decodes_in_the_windows_of_inference(model, batch):
    draws = torch.rand(len(batch["spans"]), PROMPT_DRAWS, generator=torch.Generator().manual_seed(3))
    draws[:, 0] = torch.tensor([CORRECTION, CLICK, BOX, CORRECTION])
    draws[:, -3], draws[:, -2] = 0.5, 0.9  # windows as large as those of a user; with queries
    rounds = torch.tensor([1, 3, 2, 0])
    images, _ = model._take_images(batch["input_ids"], batch)
    sizes, states = images.sizes_of(batch["spans"]), model.encode_conversations(**batch)
    drawn = {"prompt_rounds": rounds, "prompt_draws": draws, "sam_pixels": images.sam_pixels}
    targets, sampled = supervise_masks(model.config, batch["mask_labels"], sizes, **drawn)
    given = states, batch["spans"], images.sam_embeddings, images.index
    prompts_of = []

    class Recorded(type(sampled)):
        def decode(self, own_masks, decode):
            def record(members, dense, prompts, windows):
                found = decode(members, dense, prompts, windows)
                prompts_of.append((members, prompts, windows, found))
                return found

            super().decode(own_masks, record)

    sampled.__class__ = Recorded
    own = model.decode_masks(*given, targets=targets, sampled=sampled)
    in_windows = [(*each[:2], *each[3]) for each in prompts_of if each[2] is not None]
    assert sum(len(members) for members, *_ in in_windows) == 4  # one correction, two later clicks, one after a box
    for members, prompts, masks, scores in in_windows:
        for place, span in enumerate(members.tolist()):
            values = {name: value[place] for name, value in vars(prompts).items() if value is not None}
            found = model.decode_corrected(states, batch["spans"], images, None, {span: SpanPrompt(**values)})
            assert_close((found[0][span], found[1][span]), (masks[place], scores[place]), **EXACT)

    _, masks, scores, labels, found_sizes = sampled.with_own(*own, batch["mask_labels"], sizes)
    outputs = model(**batch, prompt_rounds=rounds, prompt_draws=draws)
    expected = mask_losses(model.config, masks, scores, labels, found_sizes, torch.tensor(10.0))
    assert_close({name: outputs.losses[name] for name in MASK_LOSSES}, expected, **EXACT)


def test_labels_of_windows_are_the_true_masks_in_them(batch):
    model = tiny_model(correction_window=1.5)
    count = len(batch["spans"])
    drawn = {"prompt_rounds": torch.ones(count, dtype=torch.long), "sam_pixels": batch["sam_pixel_values"]}
    draws = torch.full((count, PROMPT_DRAWS), 0.9)
    draws[:, 0] = CORRECTION
    images, _ = model._take_images(batch["input_ids"], batch)
    sizes, states = images.sizes_of(batch["spans"]), model.encode_conversations(**batch)
    targets, sampled = supervise_masks(model.config, batch["mask_labels"], sizes, prompt_draws=draws, **drawn)
    given = states, batch["spans"], images.sam_embeddings, images.index
    own = model.decode_masks(*given, targets=targets, sampled=sampled)
    true, *_, labels, found_sizes = sampled.with_own(*own, batch["mask_labels"], sizes)
    assert found_sizes[count:].unique().tolist() == [IMAGE_SIZE] and true.tolist() == [*range(count)] * 2
    members, _, _, windows = sampled.decoded[0]
    for number, (span, window) in enumerate(zip(members.tolist(), windows, strict=True)):
        logits, size = share_logits(labels[count + number][None].float()), batch["mask_labels"][span].shape
        shown = upscale_masks(logits, IMAGE_SIZE, sizes[span, 2:].tolist(), size, window[None])
        seen = paste_windows(torch.full_like(logits, 10.0), window[None], IMAGE_SIZE, IMAGE_SIZE)
        seen = upscale_masks(seen, IMAGE_SIZE, sizes[span, 2:].tolist(), size)[0] > 0
        true = batch["mask_labels"][span].bool() & seen
        wrong = (shown[0] > 0) ^ true
        assert wrong.sum() < 0.12 * true.sum().clamp(min=20)  # resized twice
    own[0].sum().backward()
    model(**batch, prompt_rounds=drawn["prompt_rounds"], prompt_draws=draws).loss.backward()
    assert all(weight.grad is not None for weight in model.sam.vision_encoder.parameters())


def test_training_with_windows_needs_pixels(model, batch):
    cached = {name: value for name, value in batch.items() if name != "sam_pixel_values"}
    count = len(batch["spans"])
    drawn = {"prompt_rounds": torch.ones(count, dtype=torch.long), "prompt_draws": torch.rand(count, PROMPT_DRAWS)}
    embeddings = model.get_image_embeddings(batch["sam_pixel_values"])
    with pytest.raises(ValueError, match="corrected masks in windows of the image: pass sam_pixel_values beside"):
        model(**cached, sam_image_embeddings=embeddings, **drawn)
