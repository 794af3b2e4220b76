"""Training examples and batches: what random changes do, and records that are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from plum_partonomy.masks import DataError, area, decode, encode
from plum_partonomy.training.examples import Collator, ConversationDataset, stream_examples
from tests.runs import batch_of, make_records, record
from tests.tiny import random_image, random_mask, tiny_processor


def chosen_masks(example: dict) -> list[list[int]]:
    return [conversation.chosen.tolist() for conversation in example["conversations"]]


def test_an_example_depends_on_seed_epoch_and_index_alone():
    records = make_records([record(number, 3) for number in range(6)])

    def pixels(seed, epoch, indices=range(6)):
        examples = ConversationDataset(records, seed=seed, jitter=0.2, crop=0.2, max_spans=2)
        examples.set_epoch(epoch)
        return {i: (np.asarray(examples[i]["image"]).tobytes(), chosen_masks(examples[i])[0]) for i in indices}

    first = pixels(0, 0)
    assert first == pixels(0, 0, [5, 3, 1, 0, 2, 4])
    assert all(first[i] != pixels(0, 1)[i] and first[i] != pixels(1, 0)[i] for i in range(6))
    assert all(len(chosen) == 2 and chosen == sorted(chosen) for _, chosen in first.values())
    assert len({tuple(chosen) for _, chosen in first.values()}) > 1


def test_workers_that_live_on_augment_anew_in_every_epoch():
    examples = ConversationDataset(make_records([record(0, 3)]), crop=0.5)
    workers = DataLoader(examples, num_workers=1, persistent_workers=True, collate_fn=lambda rows: rows[0]["image"])
    sizes = set()
    for epoch in range(3):
        examples.set_epoch(epoch)
        (image,) = workers
        assert np.array_equal(image, examples[0]["image"])
        sizes.add(image.size)
    assert len(sizes) > 1


def test_a_random_crop_cuts_image_and_masks_alike_and_keeps_half_of_each_mask():
    record_of_stripes = record(0, 2)
    stripes = [np.zeros((40, 70), dtype=bool) for _ in range(2)]
    stripes[0][:, :35], stripes[1][30:] = True, True
    record_of_stripes["image"] = Image.fromarray(np.stack([*stripes, stripes[0] | stripes[1]], 2) * np.uint8(255))
    record_of_stripes["masks"] = [{"label": "wheel", "rle": encode(stripe)} for stripe in stripes]
    examples = ConversationDataset(make_records([record_of_stripes]), crop=0.6)
    sizes = set()
    for epoch in range(30):
        examples.set_epoch(epoch)
        image, masks = examples[0]["image"], examples[0]["conversations"][0].masks
        sizes.add(image.size)
        for channel, (mask, stripe) in enumerate(zip(masks, stripes, strict=True)):
            assert np.array_equal(np.asarray(image)[..., channel] > 0, decode(mask))
            assert 2 * area(mask) >= stripe.sum()
    assert len(sizes) > 10
    assert min(width for width, _ in sizes) >= 28 and min(height for _, height in sizes) >= 16


def test_a_random_affine_map_moves_image_and_masks_alike_and_keeps_them_in_sight():
    row = record(0, 2)
    blocks = [np.zeros((80, 120), dtype=bool) for _ in range(2)]
    blocks[0][10:50, 20:60], blocks[1][40:80, 80:120] = True, True
    row["image"] = Image.fromarray(np.stack([*blocks, blocks[0]], 2) * np.uint8(255))
    row["masks"] = [{"label": "wheel", "rle": encode(block)} for block in blocks]
    examples = ConversationDataset(make_records([row]), affine=0.3)
    areas = set()
    for epoch in range(20):
        examples.set_epoch(epoch)
        image, masks = examples[0]["image"], [decode(mask) for mask in examples[0]["conversations"][0].masks]
        assert image.size == (120, 80)
        for channel, mask in enumerate(masks):
            seen = np.asarray(image)[..., channel] > 127
            assert (seen & mask).sum() > 0.9 * (seen | mask).sum()
            assert mask.sum() > 1600 / (2 * 1.3**2 + 2 * 0.3**2)
        areas.add(masks[0].sum())
    assert min(areas) < 1500 and max(areas) > 1700


@pytest.mark.parametrize("crop", [0.0, 0.5])
def test_masks_of_a_photograph_stay_run_lengths_and_give_the_labels_of_their_pixels(crop):
    photograph, masks = random_image(600, 900), [random_mask(600, 900, seed) for seed in (1, 2)]
    row = record(0, 2) | {"image": photograph, "masks": [{"label": "wheel", "rle": encode(mask)} for mask in masks]}
    example, processor = ConversationDataset(make_records([row]), crop=crop)[0], tiny_processor()
    (made,) = example["conversations"]
    assert all(isinstance(mask["counts"], str) for mask in made.masks)
    as_pixels = {**example, "conversations": [replace(made, masks=[decode(mask) for mask in made.masks])]}
    found, expected = (Collator(processor)([each])["mask_labels"] for each in (example, as_pixels))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)) and len(found) == 2
    assert example["image"].size == (900, 600) or crop
    assert found[0].numel() < example["image"].width * example["image"].height


def test_masks_beyond_the_largest_number_are_left_out_of_the_batch_with_their_spans():
    rows, processor = [record(0, 3), record(1, 0), record(2, 3)], tiny_processor()
    everything = batch_of(rows, processor)
    examples = [ConversationDataset(make_records(rows), max_spans=2)[i] for i in range(3)]
    batch = Collator(processor)(examples)
    kept = [*chosen_masks(examples[0])[0], *(3 + i for i in chosen_masks(examples[2])[0])]
    assert torch.equal(batch["spans"], everything["spans"][kept]) and len(kept) == 4
    assert all(torch.equal(batch["mask_labels"][i], everything["mask_labels"][k]) for i, k in enumerate(kept))
    assert torch.equal(batch["span_labels"], everything["span_labels"])


def test_split_turns_are_rows_of_their_own_with_their_own_masks_and_the_image_they_share():
    rows, processor = [record(0, 3), record(1, 2)], tiny_processor()
    together = batch_of(rows, processor)
    examples = ConversationDataset(make_records(rows), turns_per_record=0)
    batch = Collator(processor)([examples[0], examples[1]])
    assert batch["record_index"].tolist() == [0, 0, 1] and together["record_index"].tolist() == [0, 1]
    assert batch["sam_image_index"].tolist() == [0, 0, 1] and len(batch["sam_pixel_values"]) == 2
    words = [processor.decode(batch["input_ids"][row, start:end]) for row, start, end in batch["spans"].tolist()]
    assert [word.strip() for word in words] == ["wheel", "left wing", "tail", "wheel", "left wing"]
    assert batch["spans"][:, 0].tolist() == [0, 0, 1, 2, 2]
    for found, expected in zip(batch["mask_labels"], together["mask_labels"], strict=True):
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------ bad records


def changed_record(**changes) -> dict:
    return {**record(7, 2), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"masks": record(7, 3)["masks"]},
            "record record-7, field 'masks': 2 span tags, but 3 masks; give each tag one mask",
        ),
        ({"image": None}, "record record-7, field 'image': expected an image for 2 masks, found none"),
        (
            {"image": {"bytes": b"no image", "path": None}},
            "record record-7, field 'image': not a readable image",
        ),
        (
            {"masks": [{"label": "wheel", "rle": {"size": [50, 60], "counts": "0"}}] * 2},
            r"record record-7, field 'masks\[0\]': the counts decode to 0 pixels, but size \[50, 60\] has 3000",
        ),
        (
            {"masks": [{"label": "wheel", "rle": encode(random_mask(9, 9))}] * 2},
            r"record record-7, field 'masks\[0\]': the mask has size \[9, 9\], but its image .* \[50, 60\]",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A <p>wheel."}]},
            r"record record-7, field 'messages\[1\]': Unbalanced span tag in a text with",
        ),
        ({"masks": record(7, 1)["masks"]}, "record record-7, field 'masks': 2 span tags, but 1 masks"),
        (
            {"messages": [*record(7, 2)["messages"], {"role": "user", "content": "And?"}]},
            r"record record-7, field 'messages\[2\]': the conversation ends with the user; add the answer",
        ),
    ],
    ids=[
        "mask_without_phrase",
        "no_image",
        "corrupt_image",
        "corrupt_rle",
        "mask_of_another_size",
        "open_tag",
        "phrase_without_mask",
        "ends_with_the_user",
    ],
)
def test_a_bad_record_is_named_with_its_field(changes, message):
    examples = ConversationDataset(make_records([record(0, 1), changed_record(**changes)]))
    assert examples[0]["id"] == "record-0"
    with pytest.raises(DataError, match=message):
        examples[1]
    if "image" not in changes:
        stream = stream_examples(make_records([changed_record(**changes)]).to_iterable_dataset())
        with pytest.raises(DataError, match=message):
            next(iter(stream))
