"""Prompts by chance in training: which clicks and boxes the numbers give, and what is decoded from them."""

from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from modules_plum import MASK_LOSSES, count_loss_items, mask_losses
from plum_partonomy.training.examples import Collator, ConversationDataset
from segmenters_plum import GIVEN_MASK_LOGIT, SpanPrompt
from supervision_plum import MAX_PROMPT_ROUNDS, PROMPT_DRAWS, MaskTargets, SampledPrompts, supervise_masks
from tests.runs import make_records, record
from tests.tiny import IMAGE_SIZE, mixed_conversations, tiny_model, tiny_processor

SIDE = IMAGE_SIZE // 2
EXACT = {"rtol": 1e-5, "atol": 1e-5}
FRAMES = torch.tensor([[46, 64], [64, 28]])  # (height, width) of a wide and a tall image in SAM's input
CORRECTION, CLICK, BOX = 0.1, 0.6, 0.9
WITH_QUERY, BLIND = 0.9, 0.1
OWN = 0.9


@pytest.fixture(scope="module")
def batch():
    conversations, masks = mixed_conversations()
    return dict(tiny_processor().apply_chat_template(conversations, masks=masks, tokenize=True, return_dict=True))


def rectangle(top, bottom, left, right) -> torch.Tensor:
    logits = torch.full((SIDE, SIDE), -GIVEN_MASK_LOGIT)
    logits[top:bottom, left:right] = GIVEN_MASK_LOGIT
    return logits


def sample(true: list[torch.Tensor], own: list[torch.Tensor], draws: list[list[float]], rounds=None, frames=None):
    """The prompts of every round, of spans whose decodes return half of the mask before."""
    count = torch.arange(len(true))
    targets = MaskTargets(torch.stack(true), count, count, torch.zeros(len(true), dtype=torch.bool))
    targets.of_span = count
    frames = torch.full((len(true), 2), IMAGE_SIZE) if frames is None else frames
    rounds = torch.tensor([3] * len(true) if rounds is None else rounds)
    sampled, seen = (
        SampledPrompts(targets, in_frame(torch.stack(true)), rounds, torch.tensor(draws), frames, IMAGE_SIZE),
        [],
    )

    def decode(members, dense, prompts, windows):
        assert dense[:, 0].tolist() == members.tolist()
        seen.append(unbatch(members, prompts))
        decoded = torch.stack([own[span] for span in members.tolist()])
        decoded[:, :, SIDE // 2 :] = -GIVEN_MASK_LOGIT
        return decoded, torch.zeros(len(members))

    sampled.dense_prompts = [(count.flip(0), count.flip(0)[:, None])]
    sampled.decode(torch.stack(own), decode)
    prompted = [{} for _ in range(int(rounds.max()))]
    for prompts in seen:
        for span, prompt in prompts.items():
            prompted[next(number for number, already in enumerate(prompted) if span not in already)][span] = prompt
    return [dict(sorted(prompts.items())) for prompts in prompted], sampled


def unbatch(members: torch.LongTensor, prompts: SpanPrompt) -> dict[int, SpanPrompt]:
    """The prompts of each of the spans `members`."""
    batched = {field.name: getattr(prompts, field.name) for field in fields(prompts)}
    batched = {name: value for name, value in batched.items() if value is not None}
    assert all(len(value) == len(members) for value in batched.values())
    return {
        span: SpanPrompt(**{name: value[place] for name, value in batched.items()})
        for place, span in enumerate(members.tolist())
    }


def in_frame(logits: torch.Tensor) -> torch.BoolTensor:
    """Low-res masks `(n, SIDE, SIDE)` in SAM's input, as inference scales them."""
    return F.interpolate(logits[:, None], (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")[:, 0] > 0


def pixel_of(prompt: SpanPrompt, number: int = -1) -> tuple[int, int]:
    """Row and column of a point in SAM's input."""
    x, y = prompt.points[number].tolist()
    assert x % 1 == y % 1 == 0  # SAM's prompt encoder adds half a pixel
    return int(y), int(x)


def inner_part(region: np.ndarray) -> tuple[int, np.ndarray]:
    """How often a region can lose 1, then 2, 4, ... pixels on all sides, and what is left, pixel by pixel."""
    level, inner = 0, region
    while True:
        radius = 2**level
        padded, window = np.pad(region, radius), 2 * radius + 1
        windows = np.lib.stride_tricks.sliding_window_view(padded, (window, window))
        left = windows.all(axis=(2, 3))
        if not left.any():
            return level, inner
        level, inner = level + 1, left


def expected_click(true: torch.Tensor, found: torch.Tensor, draw: float) -> tuple[tuple[int, int], int]:
    """The clicked pixel and its label from low-res logits `(SIDE, SIDE)`."""
    true, found = (in_frame(logits[None])[0].numpy() for logits in (true, found))
    regions = []
    for label, region in ((1, true & ~found), (0, found & ~true)):
        level, inner = inner_part(region)
        regions.append((level, int(region.sum()), label, np.argwhere(inner).tolist()))
    *_, label, pixels = max(regions)
    return tuple(pixels[int(draw * len(pixels))]), label


def test_clicks_are_the_nth_inner_pixel_of_the_deeper_error_region_with_its_label():
    generator = np.random.default_rng(0)
    true = [torch.from_numpy(generator.normal(size=(SIDE, SIDE)).astype(np.float32)) for _ in range(8)]
    own = [torch.from_numpy(generator.normal(size=(SIDE, SIDE)).astype(np.float32) + i / 4 - 1) for i in range(8)]
    draws = generator.random((8, PROMPT_DRAWS)).astype(np.float32)
    draws[:, 0] = CORRECTION
    (first, *_), _ = sample(true, own, draws.tolist())
    labels = set()
    for span, prompt in first.items():
        pixel, label = expected_click(true[span], own[span], draws[span, 1])
        assert pixel_of(prompt) == pixel and prompt.labels.tolist() == [label]
        assert torch.equal(prompt.mask, own[span]) and prompt.box is None
        labels.add(label)
    assert labels == {0, 1}


def test_clicks_are_uniform_over_the_inner_part_of_the_region():
    draws = [[CLICK, (i + 0.5) / 8, *[0.0] * (PROMPT_DRAWS - 2)] for i in range(8)]
    (first, *_), _ = sample([rectangle(4, 7, 10, 14)] * 8, [rectangle(0, 9, 0, 9)] * 8, draws)
    # Of 6 rows and 8 columns of pixels, without two at each border.
    assert sorted(map(pixel_of, first.values())) == [(row, column) for row in (10, 11) for column in range(22, 26)]
    assert all(prompt.labels.tolist() == [1] and prompt.mask is None for prompt in first.values())


def test_later_rounds_add_clicks_to_the_first_prompt_and_take_the_mask_before():
    true, own = [rectangle(8, 24, 8, 24)] * 3, [rectangle(8, 20, 4, 24)] * 3
    draws = [
        [kind, 0.0, 0.0, 0.999, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, BLIND, OWN] for kind in (CORRECTION, CLICK, BOX)
    ]
    prompted, sampled = sample(true, own, draws, rounds=[3, 1, 2])
    assert [sorted(prompts) for prompts in prompted] == [[0, 1, 2], [0, 2], [0]]
    correction, click, box = prompted[0].values()
    assert correction.form == (1, False, True) and click.form == (1, False, False) and box.form == (0, True, False)
    assert box.box.tolist() == [16.0, 16.0, 48.0, 48.0]  # a draw of 0.5 displaces nothing
    after = rectangle(8, 20, 4, 16)  # left half of the own mask
    for number, prompts in enumerate(prompted[1:], 1):
        assert torch.equal(prompts[0].mask, after) and prompts[0].form == (1 + number, False, True)
        assert torch.equal(prompts[0].points[:number], prompted[number - 1][0].points)
    assert prompted[1][2].form == (1, True, True) and torch.equal(prompted[1][2].box, box.box)
    assert pixel_of(prompted[0][0]) == (42, 18)  # of the missed pixels, equally deep as those in excess, but more
    for number, draw in enumerate([0.0, 0.0, 0.999]):
        found = own[0] if number == 0 else after
        assert (pixel_of(prompted[number][0]), 1) == expected_click(true[0], found, draw)
    labels, sizes = [torch.tensor(i) for i in range(3)], torch.arange(3)
    true, masks, scores, labels, sizes = sampled.with_own(torch.stack(own), torch.ones(3), labels, sizes)
    assert true.tolist() == [0, 1, 2, 1, 0, 2, 0, 2, 0]  # in each round by the form of the prompts
    assert torch.equal(masks[:3], torch.stack(own)) and torch.equal(masks[3:], after.expand(6, -1, -1))
    assert scores.tolist() == [1] * 3 + [0] * 6
    assert labels == true.tolist() == sizes.tolist()


def test_a_part_thinner_than_half_a_pixel_of_sams_input_can_be_clicked():
    label = torch.zeros(256, 128)
    label[40:60, 31] = 1
    sizes = torch.tensor([[256, 128, 64, 32]])
    config = tiny_model().config
    drawn = {"prompt_rounds": torch.ones(1, dtype=torch.long), "prompt_draws": torch.full((1, PROMPT_DRAWS), CLICK)}
    _, sampled = supervise_masks(config, [label], sizes, **drawn)
    pixels = sampled.true_masks[0].nonzero()
    assert set(pixels[:, 1].tolist()) <= {7, 8} and {11, 12, 13} <= set(pixels[:, 0].tolist()) <= set(range(9, 16))


def test_half_of_the_clicks_with_the_own_mask_mean_any_mask_with_the_words_of_their_span():
    true = torch.stack([rectangle(4 * i, 4 * i + 3, 0, 8) for i in range(5)])
    groups = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([0, 1, 0, 1, 0])
    targets = MaskTargets(true, *groups, torch.zeros(5, dtype=torch.bool))
    targets.of_span = torch.tensor([2, 1, 0, 4, 3])
    draws = torch.full((5, PROMPT_DRAWS), CORRECTION)
    meant, expected = [], torch.tensor([[0, 1, 0, 0, 1], [2, 1, 2, 2, 1], [4, 3, 4, 4, 3], [2, 1, 0, 4, 3]])
    for instance in (0.1, 0.24, 0.49, OWN):
        draws[:, -1] = instance
        frames = torch.full((5, 2), IMAGE_SIZE)
        sampled = SampledPrompts(targets, in_frame(true), torch.ones(5, dtype=torch.long), draws, frames, IMAGE_SIZE)
        sampled.dense_prompts = [(torch.arange(5), torch.zeros(5, 1))]
        clicked = []

        def decode(members, dense, prompts, windows, clicked=clicked):
            clicked += [pixel_of(prompt)[0] // 8 for prompt in unbatch(members, prompts).values()]
            return true[members], torch.zeros(5)

        sampled.decode(torch.full_like(true, -GIVEN_MASK_LOGIT), decode)
        meant.append(sampled.meant)
        indices, *_, labels, sizes = sampled.with_own(true, torch.zeros(5), list(range(5)), torch.arange(5))
        assert clicked == sampled.meant.tolist()
        assert indices.tolist() == labels == [*targets.of_span.tolist(), *clicked]
        assert sizes.tolist() == [*range(5), *range(5)]
    assert torch.equal(torch.stack(meant), expected)
    # Without a mask the dense prompt is the feedback of earlier masks, which excludes other instances.
    draws[:, 0], draws[:, -1] = torch.tensor([CLICK, BOX, CLICK, BOX, CLICK]), 0.1
    assert torch.equal(
        SampledPrompts(targets, in_frame(true), torch.ones(5), draws, frames, IMAGE_SIZE).meant, targets.of_span
    )


def test_boxes_are_displaced_by_a_tenth_of_their_sides_and_stay_in_the_image():
    generator = np.random.default_rng(1)
    draws = generator.random((4000, PROMPT_DRAWS)).astype(np.float32)
    draws[:, 0] = BOX
    count = len(draws)
    prompted, _ = sample(
        [rectangle(8, 24, 8, 24)] * count, [rectangle(0, 1, 0, 1)] * count, draws.tolist(), [1] * count
    )
    boxes = torch.stack([prompt.box for prompt in prompted[0].values()])
    noise = boxes - torch.tensor([16.0, 16.0, 48.0, 48.0])
    assert_close(noise.mean(dim=0), torch.zeros(4), rtol=0, atol=0.2)
    assert_close(noise.std(dim=0), torch.full((4,), 3.2), rtol=0.05, atol=0)
    extremes = [[BOX, 0, 0, 0, 0, 0, low, low, high, high, 0.5, BLIND, OWN] for low, high in ((0.0, 1.0), (1.0, 0.0))]
    true = [rectangle(0, 23, 0, 32), rectangle(0, 32, 0, 14)]
    for frame, mask in zip(FRAMES, true, strict=True):
        prompted, _ = sample([mask] * 2, [mask] * 2, extremes, [1, 1], frame.expand(2, 2))
        for prompt in prompted[0].values():
            x0, y0, x1, y1 = prompt.box.tolist()
            assert 0 <= x0 < x1 <= frame[1] and 0 <= y0 < y1 <= frame[0]


def test_clicks_stay_inside_the_image_and_masks_that_are_right_or_absent_have_one():
    everywhere, nothing = rectangle(0, SIDE, 0, SIDE), rectangle(0, 0, 0, 0)
    true = [rectangle(0, 2, 0, 2), nothing, nothing, rectangle(3, 5, 3, 5)]
    own = [everywhere, nothing, rectangle(4, 6, 4, 6), rectangle(3, 5, 3, 5)]
    for draw in (0.0, 0.5, 1.0):
        draws = [[CORRECTION, draw, *[0.5] * (PROMPT_DRAWS - 2)]] * 4
        prompted, _ = sample(true, own, draws, [1] * 4, FRAMES[0].expand(4, 2))
        places = [pixel_of(prompt) for prompt in prompted[0].values()]
        assert [prompt.labels.item() for prompt in prompted[0].values()] == [0, 0, 0, 1]
        assert all(row < 46 for row, _ in places)  # of 64 pixels
        assert {9, 10} >= set(places[2]) and {6, 7, 8, 9} >= set(places[3])
    prompted, _ = sample([nothing], [nothing], [[BOX, *[0.5] * (PROMPT_DRAWS - 1)]], [1], FRAMES[:1])
    assert prompted[0][0].box.tolist() == [0.0, 0.0, 64.0, 46.0]


@torch.no_grad()
def test_prompted_decodes_are_those_of_the_same_prompts_given_and_their_losses_are_averaged_in(batch):
    model, count = tiny_model(), len(batch["spans"])
    draws = torch.rand(count, PROMPT_DRAWS, generator=torch.Generator().manual_seed(3))
    draws[:, 0], draws[:, -2] = torch.tensor([CORRECTION, CLICK, BOX, CORRECTION]), WITH_QUERY
    rounds = torch.tensor([1, 3, 2, 0])
    inputs = {name: value for name, value in batch.items() if name not in ("mask_labels", "span_labels")}
    own = model.segment_spans(**inputs)
    images, _ = model._take_images(batch["input_ids"], batch)
    sizes = images.sizes_of(batch["spans"])
    drawn = {"prompt_rounds": rounds, "prompt_draws": draws}
    targets, sampled = supervise_masks(model.config, batch["mask_labels"], sizes, **drawn)
    given = model.encode_conversations(**batch), batch["spans"], images.sam_embeddings, images.index
    masks, scores = model.decode_masks(*given, targets=targets, sampled=sampled)
    assert_close(masks, own.pred_masks, **EXACT)
    of_own = batch["mask_labels"], sizes
    true, masks, scores, *labelled = sampled.with_own(masks, scores, *of_own)
    assert true.tolist() == [0, 1, 2, 3, 1, 0, 2, 1, 2, 1]

    def decode_alone(members, _, prompts, windows):
        """Each span as inference decodes it, with the same prompts in pixels of its image."""
        found = []
        for span, prompt in unbatch(members, prompts).items():
            scale = sizes[span, [1, 0]] / sizes[span, [3, 2]]
            alone = {"input_labels": prompt.labels, "input_masks": prompt.mask}
            alone["input_points"] = None if prompt.points is None else prompt.points * scale
            alone["input_boxes"] = None if prompt.box is None else prompt.box * scale.repeat(2)
            alone = {name: {span: value} for name, value in alone.items() if value is not None}
            outputs = model.segment_spans(**inputs, **alone)
            found.append((outputs.pred_masks[span], outputs.iou_scores[span]))
        return tuple(map(torch.stack, zip(*found, strict=True)))

    alone = SampledPrompts(targets, sampled.true_masks, rounds, draws, sizes[:, 2:], IMAGE_SIZE)
    alone.dense_prompts = sampled.dense_prompts
    alone.decode(own.pred_masks, decode_alone)
    expected = alone.with_own(own.pred_masks, own.iou_scores, *of_own)
    assert_close((masks, scores), expected[1:3], **EXACT)
    assert not torch.allclose(masks[4:7], masks[true[4:7]], atol=1e-3)

    outputs = model(**batch, prompt_rounds=rounds, prompt_draws=draws)
    labels = [batch["mask_labels"][i] for i in true.tolist()]
    assert all(map(torch.equal, labelled[0], labels)) and torch.equal(labelled[1], sizes[true])
    expected = mask_losses(model.config, masks, scores, *labelled, torch.tensor(float(len(true))))
    assert_close({name: outputs.losses[name] for name in MASK_LOSSES}, expected, **EXACT)
    names = ("labels", "span_labels", "spans", "mask_labels")
    counts = count_loss_items(model.config, *(batch[name] for name in names), rounds)
    assert counts["masks"] == len(true) and counts["spans"] == count
    assert_close(outputs.pred_masks, own.pred_masks, **EXACT)


@torch.no_grad()
def test_half_of_the_spans_are_decoded_from_their_prompts_alone(batch):
    model, count = tiny_model(), len(batch["spans"])
    draws = torch.full((count, PROMPT_DRAWS), CLICK)
    images, _ = model._take_images(batch["input_ids"], batch)
    sizes = images.sizes_of(batch["spans"])
    states = model.encode_conversations(**batch)

    def decode_first(states, draw):
        """A click on the first span, whose dense prompt has no earlier mask."""
        draws[:, -2] = draw
        drawn = {"prompt_rounds": torch.ones(count, dtype=torch.long), "prompt_draws": draws}
        targets, sampled = supervise_masks(model.config, batch["mask_labels"], sizes, **drawn)
        model.decode_masks(
            states, batch["spans"], images.sam_embeddings, images.index, targets=targets, sampled=sampled
        )
        ((_, masks, _, _),) = sampled.decoded
        return masks[0]

    assert torch.equal(decode_first(states, BLIND), decode_first(states.flip(-1), BLIND))
    assert not torch.equal(decode_first(states, WITH_QUERY), decode_first(states.flip(-1), WITH_QUERY))


def test_without_rounds_nothing_changes(batch):
    model = tiny_model()
    count = len(batch["spans"])
    forced = torch.zeros(count, dtype=torch.bool)
    none = {"prompt_rounds": torch.zeros(count, dtype=torch.long), "prompt_draws": torch.rand(count, PROMPT_DRAWS)}
    expected, found = model(**batch, teacher_forced=forced), model(**batch, teacher_forced=forced, **none)
    assert_close(found.losses, expected.losses, rtol=0, atol=0)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name], parameter.grad), name
    with pytest.raises(ValueError, match="prompt_rounds, prompt_draws need the true masks"):
        model(**{**batch, "mask_labels": None}, **none)


def test_prompts_depend_on_the_record_alone_and_come_with_the_probability():
    records = make_records([record(number, 3) for number in range(60)])

    def examples(probability, epoch=0, **options):
        made = ConversationDataset(records, seed=1, prompt_probability=probability, **options)
        made.set_epoch(epoch)
        return [made[i]["conversations"][0] for i in range(len(records))]

    half, other = examples(0.5), examples(0.5, epoch=1)
    rounds = np.concatenate([conversation.prompt_rounds for conversation in half])
    assert not any(conversation.prompt_rounds.any() for conversation in examples(0))
    assert all(conversation.prompt_rounds.all() for conversation in examples(1))
    assert 60 < (rounds > 0).sum() < 120 and set(rounds.tolist()) == set(range(MAX_PROMPT_ROUNDS + 1))
    assert rounds.tolist() != np.concatenate([conversation.prompt_rounds for conversation in other]).tolist()
    alone = ConversationDataset(records, seed=1, prompt_probability=0.5)[41]["conversations"][0]
    assert np.array_equal(alone.prompt_draws, half[41].prompt_draws)
    draws = np.concatenate([conversation.prompt_draws for conversation in half])
    assert draws.shape == (180, PROMPT_DRAWS) and draws.min() >= 0 and len(np.unique(draws)) > 1400
    # All else of an example is as without the option.
    options = {"jitter": 0.1, "crop": 0.2, "max_spans": 2, "teacher_forcing_probability": 0.5}
    for on, off in zip(examples(0.5, **options), examples(0, **options), strict=True):
        assert np.array_equal(on.chosen, off.chosen) and np.array_equal(on.teacher_forced, off.teacher_forced)


def test_a_batch_has_the_numbers_of_its_supervised_spans():
    rows = [record(number, 3) for number in range(4)]
    dataset = ConversationDataset(make_records(rows), seed=1, prompt_probability=0.5, max_spans=2)
    examples = [dataset[i] for i in range(4)]
    batch = Collator(tiny_processor())(examples)
    for row, example in enumerate(examples):
        (conversation,), mine = example["conversations"], batch["spans"][:, 0] == row
        chosen = conversation.chosen.tolist()
        assert batch["prompt_rounds"][mine].tolist() == conversation.prompt_rounds[chosen].tolist()
        assert batch["prompt_draws"][mine].tolist() == conversation.prompt_draws[chosen].tolist()
    spans = batch["spans"]
    most = int(spans[:, 2].max()) - 1
    cut = Collator(tiny_processor(), max_length=most)(examples)
    kept = spans[:, 2] <= most
    assert kept.sum() < len(spans)
    assert torch.equal(cut["prompt_rounds"], batch["prompt_rounds"][kept])
    assert torch.equal(cut["prompt_draws"], batch["prompt_draws"][kept])
