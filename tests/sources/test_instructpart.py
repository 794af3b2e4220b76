"""InstructPart: instructions and names of parts, masks of both file types, and bad records by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image

import partonomy_dataset
from plum_partonomy.masks import DataError, decode
from plum_partonomy.sources.instructpart import InstructPart, InstructPartNames
from plum_partonomy.sources.validate import validate

HANDLE = np.zeros((40, 60), dtype=bool)
HANDLE[10:20, 40:55] = True
TEXTS = ["If I want to lift the cup, what do I hold?", "Rewritten.", "Where is the handle of the coffee cup?"]
TEXTS += ["Where is the handle that can be held?", "handle of the coffee cup", "handle that can be held"]
ENTRY = {"object": "coffee cup", "part": "handle", "affordance": "hold", "action": "lift", "instruction": TEXTS}
STEM = "cup1-coffee_cup-handle"


def instructpart_folder(folder: Path, *, suffix: str = "png", **changes) -> Path:
    """A split for training and one for testing, each of one image with one part."""
    for place, name in (("train/train1800", "data_train.json"), ("test", "data_test.json")):
        (folder / place / "images").mkdir(parents=True)
        (folder / place / "masks").mkdir()
        Image.new("RGB", (60, 40)).save(folder / place / "images" / f"{STEM}.jpg")
        mask = Image.fromarray(HANDLE.astype(np.uint8) * 255)
        mask.save(folder / place / "masks" / f"{STEM}.{suffix}", **({"quality": 60} if suffix == "jpg" else {}))
        record = {"image_path": "cup1.jpg", "part_list": [ENTRY | changes]}
        (folder / place / name).write_text(json.dumps([record]))
    return folder


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(("kind", "asked"), [(InstructPart, TEXTS[0]), (InstructPartNames, TEXTS[4])])
def test_an_entry_becomes_a_conversation_whose_answer_names_the_part(tmp_path, suffix, kind, asked):
    folder = instructpart_folder(tmp_path, suffix=suffix)
    assert kind.splits(folder) == ["train", "test"]
    (found,) = kind(folder, split="test").conversations(0, seed=0)
    question, answer = (message["content"] for message in found.messages)
    assert question == asked and "<p>handle of the coffee cup</p>" in answer
    np.testing.assert_array_equal(decode(found.masks[0].rle), HANDLE)
    assert found.image["path"].endswith(f"test/images/{STEM}.jpg")


def test_blanks_in_the_name_of_an_image_are_kept(tmp_path):
    folder = instructpart_folder(tmp_path)
    records = json.loads((folder / "test" / "data_test.json").read_text())
    records[0]["image_path"] = "my cup.jpg"
    (folder / "test" / "data_test.json").write_text(json.dumps(records))
    for path in list((folder / "test").glob(f"*/{STEM}.*")):
        path.rename(path.with_stem(STEM.replace("cup1", "my cup")))
    (found,) = InstructPart(folder, split="test").conversations(0, seed=0)
    np.testing.assert_array_equal(decode(found.masks[0].rle), HANDLE)


def test_an_image_may_lie_under_its_own_name_and_an_empty_mask_asks_nothing(tmp_path):
    folder = instructpart_folder(tmp_path)
    (folder / "test" / "images" / f"{STEM}.jpg").rename(folder / "test" / "images" / "cup1.jpg")
    source = InstructPart(folder, split="test")
    assert len(list(source.conversations(0, seed=0))) == 1
    Image.new("L", (60, 40)).save(folder / "test" / "masks" / f"{STEM}.png")
    assert not list(source.conversations(0, seed=0)) and source.blank == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": TEXTS[:5]}, r"record 0, part_list\[0\], field 'instruction': expected 6 texts"),
        ({"part": "spout"}, r"record 0, part_list\[0\]: there is no test/images/cup1-coffee_cup-spout.jpg nor"),
        ({"object": None}, "field 'object': expected str, found None"),
        ({"instruction": ["</s>", *TEXTS[1:]]}, "a special token of models"),
    ],
)
def test_a_bad_entry_is_refused_naming_file_record_and_field(tmp_path, changes, message):
    source = InstructPart(instructpart_folder(tmp_path, **changes), split="test")
    with pytest.raises(DataError, match=message):
        list(source.conversations(0, seed=0))


def test_a_mask_of_another_size_and_a_folder_of_something_else_are_refused(tmp_path):
    folder = instructpart_folder(tmp_path / "data")
    Image.new("L", (61, 40), 255).save(folder / "test" / "masks" / f"{STEM}.png")
    with pytest.raises(DataError, match="mask has size .40, 61"):
        list(InstructPart(folder, split="test").conversations(0, seed=0))
    (folder / "test" / "data_test.json").write_text("{}")
    with pytest.raises(DataError, match="expected a list of records, found dict"):
        InstructPart(folder, split="test")
    with pytest.raises(DataError, match="no such files of instructpart; expected train/train1800/data_train.json"):
        InstructPart.splits(tmp_path)


def test_a_record_without_its_fields_is_left_out_where_that_is_asked_for(tmp_path):
    folder = instructpart_folder(tmp_path / "data")
    path = folder / "test" / "data_test.json"
    path.write_text(json.dumps([{"image_path": "cup2.jpg"}, *json.loads(path.read_text())]))
    options = {"data_dir": str(folder), "split": "test", "cache_dir": tmp_path / "cache"}
    with pytest.raises(DatasetGenerationError) as caught:
        load_dataset("partonomy", "instructpart", **options)
    assert "record 0: field 'part_list' is missing" in str(caught.value.__cause__)
    rows = load_dataset("partonomy", "instructpart", on_error="report", **options)
    assert len(rows) == len(partonomy_dataset.left_out(rows)) == 1


def test_validate_compares_with_the_published_counts(tmp_path):
    report = validate("instructpart", instructpart_folder(tmp_path))
    assert [problem.split(": ")[1].split(",")[0] for problem in report.problems] == ["1 samples"] * 2
    assert report.notes[1].startswith("test: 1 samples, of which 0 give nothing to talk about; 1 conversations")
