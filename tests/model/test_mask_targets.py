"""Teacher forcing of the mask feedback, and targets of spans that may take their masks in any order."""

import re

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from plum_partonomy.masks import encode
from plum_partonomy.training.examples import Collator, ConversationDataset, group_masks
from segmenters_plum import downscale_masks
from supervision_plum import MaskTargets
from tests.runs import make_records, record
from tests.tiny import (
    IMAGE_SIZE,
    conversation,
    mixed_conversations,
    random_image,
    random_mask,
    tiny_model,
    tiny_processor,
)

EXACT = {"rtol": 1e-5, "atol": 1e-5}
WHEELS = "I can see a <p>wheel</p>, another <p>wheel</p>, a <p>tail</p> and a third <p>wheel</p>."


def mixed_batch() -> dict:
    conversations, masks = mixed_conversations()
    return dict(tiny_processor().apply_chat_template(conversations, masks=masks, tokenize=True, return_dict=True))


def wheels_batch(order=(0, 1, 2, 3)) -> dict:
    """One answer with three wheels and a tail; `order` says which random mask each phrase has."""
    masks = [random_mask(40, 60, seed=20 + number) for number in order]
    chat = conversation(random_image(40, 60, seed=1), WHEELS)
    batch = tiny_processor().apply_chat_template([chat], masks=[masks], tokenize=True, return_dict=True)
    groups = torch.tensor(group_masks([[{"content": "?"}, {"content": WHEELS}]]))
    return {**batch, "span_groups": groups, "mask_groups": groups}


def without_groups(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if not name.endswith("_groups")}


def soft_dice(logits: torch.Tensor, low_res_mask: torch.Tensor) -> float:
    predicted, target = logits.sigmoid(), low_res_mask.sigmoid()
    return float(2 * (predicted * target).sum() / (predicted + target).sum())


# ------------------------------------------------------------------------------------------------ forcing


def test_masks_after_forced_ones_are_those_decoded_from_given_masks():
    model, batch = tiny_model(), wheels_batch()
    groups = {name: torch.arange(4) for name in ("span_groups", "mask_groups")}
    with torch.no_grad():
        forced = model(**{**batch, **groups}, teacher_forced=torch.ones(4, dtype=torch.bool))
        own = model(**{**batch, **groups})
        for span in range(4):
            given = {earlier: batch["mask_labels"][earlier] for earlier in range(span)}
            expected = model.segment_spans(**without_groups(batch), given_masks=given)
            assert_close(forced.pred_masks[span], expected.pred_masks[span], **EXACT)
    assert not torch.allclose(forced.pred_masks[1:], own.pred_masks[1:], atol=1e-3)
    assert_close(forced.pred_masks[0], own.pred_masks[0], **EXACT)  # nothing was forced before it


def test_without_forcing_and_with_masks_in_their_order_nothing_changes():
    model, batch = tiny_model(), mixed_batch()
    free = torch.zeros(len(batch["spans"]), dtype=torch.bool)
    expected, found = model(**batch), model(**batch, teacher_forced=free)
    assert found.mask_targets.tolist() == [0, 1, 2, 3] and expected.mask_targets is None
    assert_close(found.losses, expected.losses, rtol=0, atol=0)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name], parameter.grad, **EXACT)


def test_how_often_a_span_is_forced_follows_the_probability_and_its_own_record_alone():
    records = make_records([record(number, 3) for number in range(60)])

    def draws(probability, epoch=0):
        examples = ConversationDataset(records, seed=1, teacher_forcing_probability=probability)
        examples.set_epoch(epoch)
        return [examples[i]["conversations"][0].teacher_forced.tolist() for i in range(len(records))]

    assert not np.any(draws(0)) and np.all(draws(1))
    half = draws(0.5)
    assert half == draws(0.5) and half != draws(0.5, epoch=1)
    assert 60 < np.sum(half) < 120
    alone = ConversationDataset(records, seed=1, teacher_forcing_probability=0.5)[41]
    assert alone["conversations"][0].teacher_forced.tolist() == half[41]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mask_labels": None}, "span_groups, teacher_forced need the true masks: pass mask_labels"),
        ({"spans": None}, "mask_labels need spans, original_sizes and reshaped_input_sizes; pass them as well."),
        ({"reshaped_input_sizes": None}, "true masks: pass mask_labels, original_sizes and reshaped_input_sizes"),
        ({"mask_groups": None}, "pass span_groups with mask_groups, and prompt_rounds with prompt_draws."),
        ({"prompt_rounds": torch.ones(4, dtype=torch.long)}, "and prompt_rounds with prompt_draws."),
        ({"teacher_forced": torch.ones(3, dtype=torch.bool)}, "Found 3 teacher_forced for 4 spans; give one each."),
        ({"mask_groups": torch.zeros(2, dtype=torch.long)}, "Found 2 mask_groups for 4 mask_labels; give one each."),
        (
            {"mask_groups": torch.tensor([0, 0, 0, 1]), "span_groups": torch.tensor([0, 0, 0, 0])},
            "Group 0 has 1 spans more than mask_labels; give each a mask.",
        ),
    ],
)
def test_inputs_of_spans_and_masks_that_do_not_match_are_refused_by_name(change, message):
    batch = {**wheels_batch(), "teacher_forced": torch.ones(4, dtype=torch.bool), "span_groups": torch.arange(4)}
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model()(**{**batch, "mask_groups": torch.arange(4), **change})


@pytest.mark.parametrize("absent", ["spans", "original_sizes", "reshaped_input_sizes"])
def test_true_masks_without_the_inputs_that_they_need_are_refused(absent):
    with pytest.raises(ValueError, match="mask_labels need spans, original_sizes and reshaped_input_sizes"):
        tiny_model()(**{**wheels_batch(), "span_groups": None, "mask_groups": None, absent: None})


# ------------------------------------------------------------------------------------------------ targets


def test_each_span_takes_the_free_mask_of_its_words_that_it_overlaps_best():
    batch = wheels_batch()
    outputs = tiny_model()(**batch)
    labels = torch.stack(batch["mask_labels"])
    low_res = downscale_masks(labels, IMAGE_SIZE, batch["reshaped_input_sizes"][0].tolist(), IMAGE_SIZE // 2)
    free = [0, 1, 3]
    for span in (0, 1, 3):
        best = max(free, key=lambda mask, span=span: soft_dice(outputs.pred_masks[span].detach(), low_res[mask]))
        assert outputs.mask_targets[span] == best
        free.remove(best)
    assert outputs.mask_targets[2] == 2
    assert outputs.mask_targets.tolist() != [0, 1, 2, 3]  # or this would tell nothing


@pytest.mark.parametrize("forced", [False, True])
def test_losses_do_not_depend_on_the_order_in_which_equal_words_are_listed(forced):
    model = tiny_model()
    losses, taken, listed = [], [], []
    for order in ((0, 1, 2, 3), (3, 0, 2, 1), (1, 3, 2, 0)):
        outputs = model(**wheels_batch(order), teacher_forced=torch.full((4,), forced))
        losses.append(outputs.losses)
        taken.append([order[mask] for mask in outputs.mask_targets.tolist()])
        listed.append(float(model(**without_groups(wheels_batch(order))).losses["mask_bce"].detach()))
    for other in losses[1:]:
        assert_close(other, losses[0], **EXACT)
    assert taken[0] == taken[1] == taken[2]
    assert len(set(listed)) == 3


def test_groups_are_the_spans_of_one_answer_in_the_same_words():
    twice = [{"content": "?"}, {"content": "A <p>wheel</p> and a <p>wheel</p>."}] * 2
    one = [{"content": "?"}, {"content": "A <p>tail</p>, a <p>wheel</p>."}]
    assert group_masks([twice, one]) == [0, 0, 1, 1, 2, 3]


def test_masks_that_are_not_supervised_stay_candidates_for_the_spans_of_their_words():
    row = record(0, 2)
    row["messages"][1]["content"] = "A <p>wheel</p>, a <p>tail</p>, a <p>wheel</p> and a <p>wheel</p>."
    height, width = row["image"].height, row["image"].width
    row["masks"] = [{"label": "part", "rle": encode(random_mask(height, width, seed=n))} for n in range(4)]
    processor = tiny_processor()
    example = ConversationDataset(make_records([row]), max_spans=1)[0]
    (chosen,) = example["conversations"][0].chosen.tolist()
    batch = Collator(processor, order_free_targets=True)([example])
    assert len(batch["spans"]) == 1
    assert len(batch["mask_labels"]) == (1 if chosen == 1 else 3)
    in_order = Collator(processor)([example])
    assert len(in_order["mask_labels"]) == 1
    # the divisor of the mask losses is the number of spans, not of candidates
    model = tiny_model()
    inputs = {name: value for name, value in batch.items() if not name.startswith("record_")}
    assert model(**inputs).losses["mask_bce"] < 5


def test_a_mask_is_taken_once_and_a_forced_span_shows_the_mask_it_took():
    masks = torch.full((3, 8, 8), -10.0)
    masks[0, :4], masks[1, 4:], masks[2, :, :4] = 10, 10, 10
    targets = MaskTargets(masks, torch.tensor([0, 0]), torch.tensor([0, 0, 1]), torch.tensor([True, False]))
    near_second = masks[1] / 5
    targets.assign(torch.tensor([0]), near_second[None])
    assert torch.equal(targets.feed_back(torch.tensor([0]), near_second[None])[0], masks[1])
    targets.assign(torch.tensor([1]), near_second[None])  # the second mask is taken, the third is of another group
    assert targets.of_span.tolist() == [1, 0]
    assert torch.equal(targets.feed_back(torch.tensor([1]), near_second[None])[0], near_second)
