"""Training records that are made when they are read."""

import json

import numpy as np
import pytest

import partonomy_dataset
from inputs_plum import read_image
from plum_partonomy.masks import decode, encode
from plum_partonomy.records import PartExample, PartMask, check_turns, tagged_phrases
from plum_partonomy.training.examples import FreshConversationDataset
from plum_partonomy.training.fresh import mirror_example, open_fresh
from plum_partonomy.training.mixture import Source, mix
from tests.runs import make_records, record
from tests.tiny import random_image, random_mask


def pixels(record: dict) -> bytes:
    return np.asarray(read_image(record["image"])).tobytes()


@pytest.fixture
def photographs(tmp_path) -> Source:
    """Twelve photographs of cars with doors on both sides, as COCO."""
    names = ["left door", "right door", "wheel"]
    content = {
        "categories": [{"id": i, "name": name, "supercategory": "car"} for i, name in enumerate(names)],
        "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in range(12)],
        "annotations": [],
    }
    for i in range(12):
        random_image(40, 60, seed=i).save(tmp_path / f"{i}.png")
        for part in range(3 if i % 2 else 2):
            left = 20 * part
            polygon = [left, 5, left + 15, 5, left + 15, 30]
            annotation = {"id": 3 * i + part, "image_id": i, "category_id": part, "segmentation": [polygon]}
            content["annotations"].append(annotation)
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return Source("partonomy", "own_parts", str(tmp_path))


@pytest.mark.parametrize("name, side", [("mini", 128), ("mini_instances", 128), ("mini_hard", 256)])
def test_every_number_is_another_drawing_and_none_is_stored(name, side):
    draw = open_fresh(Source("partonomy", name), None, mirror=False)
    records = [draw(0, number) for number in range(4)]
    stored = partonomy_dataset.DRAWING_SIZES[name]["train"]
    assert [drawn["id"] for drawn in records] == [
        f"{name}-train-{stored + number:05d}-conversation" for number in range(4)
    ]
    assert len({pixels(drawn) for drawn in records}) == 4
    assert draw(7, 2) == records[2]
    for drawn in records:
        check_turns(drawn["messages"], len(drawn["masks"]), where="here")
        assert all(decode(mask["rle"]).shape == (side, side) for mask in drawn["masks"])


def test_a_photograph_is_talked_about_in_new_words_each_time(photographs):
    make = open_fresh(photographs, None, mirror=False)
    first, again, other = make(3, 0), make(3, 0), make(3, 1)
    assert first == again and first["id"] == other["id"] and first["messages"] != other["messages"]
    assert pixels(first) == pixels(other)
    words = {str(make(3, number)["messages"]) for number in range(20)}
    assert len(words) > 15


def test_a_mirrored_photograph_has_mirrored_masks_and_the_names_of_the_other_side():
    image, masks = random_image(40, 60), [random_mask(40, 60, seed=seed) for seed in range(2)]
    named = [PartMask(name, encode(mask)) for name, mask in zip(("left door", "wheel"), masks, strict=True)]
    example = PartExample(image, "a", "car", named, "random", "CC0-1.0")
    graph = {"car": ["left door", "right door", "wheel"]}
    mirrored = mirror_example(example, part_graph=graph)
    assert [mask.label for mask in mirrored.masks] == ["right door", "wheel"]
    assert np.array_equal(np.asarray(mirrored.image), np.asarray(image)[:, ::-1])
    for found, mask in zip(mirrored.masks, masks, strict=True):
        assert np.array_equal(decode(found.rle), mask[:, ::-1])
    assert mirror_example(mirrored, part_graph=graph).masks == named
    assert mirror_example(example, part_graph={"car": ["left door", "wheel"]}) is example


def test_half_of_the_photographs_are_mirrored(photographs):
    plain, make = open_fresh(photographs, None, mirror=False), open_fresh(photographs, None, mirror=True)
    turned = [pixels(make(2, number)) != pixels(plain(2, number)) for number in range(60)]
    assert 15 < sum(turned) < 45


def test_a_mixture_of_fresh_records_depends_on_seed_epoch_and_index_alone(photographs):
    makers = [open_fresh(Source("partonomy", "mini"), None, mirror=False), open_fresh(photographs, None, mirror=True)]
    places = [partonomy_dataset.datasets.Dataset.from_dict({"part": [i] * 6, "row": range(6)}) for i in range(2)]

    def ids(epoch, indices):
        examples = FreshConversationDataset(mix(places, [1, 1], seed=0), makers, seed=3, turns_per_record=2)
        examples.set_epoch(epoch)
        return {i: (examples[i]["id"], str(examples[i]["conversations"][0].messages)) for i in indices}

    indices = range(10)
    first = ids(0, indices)
    assert first == {**ids(0, list(indices)[::-1])}
    drawn = [i for i in indices if first[i][0].startswith("mini")]
    assert 0 < len(drawn) < 10
    assert not {first[i][0] for i in drawn} & {ids(1, drawn)[i][0] for i in drawn}


def test_a_follow_up_is_a_turn_after_another_one_of_its_record_with_the_masks_of_both():
    makers = [open_fresh(Source("partonomy", "mini"), None, mirror=False)]
    places = partonomy_dataset.datasets.Dataset.from_dict({"part": [0] * 30, "row": range(30)})
    examples = FreshConversationDataset(places, makers, turns_per_record=3, follow_up_probability=0.5)
    lengths = []
    for i in range(30):
        conversations = examples[i]["conversations"]
        assert len(conversations) == 3 and len({c.messages[-2]["content"] for c in conversations}) == 3
        for conversation in conversations:
            answers = conversation.messages[1::2]
            tagged = [phrase for answer in answers for phrase in tagged_phrases(answer["content"])]
            assert len(conversation.masks) == len(tagged) == len(conversation.teacher_forced)
            lengths.append(len(answers))
    assert set(lengths) == {1, 2} and 25 < lengths.count(2) < 65


def test_conversations_in_words_of_their_own_are_read_as_they_are_stored(tmp_path):
    stored = make_records([record(number, 2) for number in range(3)])
    make = open_fresh(Source("somebody/conversations"), stored, mirror=True)
    assert [make(row, 7)["messages"] for row in range(3)] == stored["messages"][:]
    (tmp_path / "chats.jsonl").write_text(
        json.dumps(
            {
                "id": "1",
                "image": "1.png",
                "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is red."}],
                "masks": [],
            }
        )
        + "\n"
    )
    random_image(40, 60).save(tmp_path / "1.png")
    own = Source("partonomy", "own_parts", str(tmp_path))
    assert open_fresh(own, stored, mirror=True)(1, 5)["id"] == "record-1"
