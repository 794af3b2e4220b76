import copy
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plum_partonomy.masks import DataError, decode, encode
from plum_partonomy.sources import json_files
from plum_partonomy.sources.descriptor import Descriptor, clean_object_label, clean_part_label
from plum_partonomy.sources.official import QUESTIONS_FILE, read_questions, write_official

HEIGHT, WIDTH = 6, 8
LEFT, RIGHT = np.zeros((HEIGHT, WIDTH), dtype=bool), np.zeros((HEIGHT, WIDTH), dtype=bool)
LEFT[1:3, 1:3], RIGHT[1:3, 5:7] = True, True


def official_record() -> dict:
    return {
        "image_path": "images/bus.png",
        "image_label": "bus",
        "question": "What visible parts does the object in the image have?",
        "question_type": "identification",
        "answer_choices": ["door, and wheel", "door", "wheel"],
        "answer_types": ["correct", "incorrect", "incorrect"],
        "answer_parts": [["door", "wheel"], ["door"], ["wheel"]],
        "segmentations": {"wheel": [encode(LEFT), encode(RIGHT)], "door": [encode(RIGHT)]},
        "object_question": None,
        "object_answer_choices": None,
        "object_answer_types": None,
        "object_answer_classes": None,
    }


def official_folder(folder: Path, *records: dict) -> Path:
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "bus.png")
    (folder / QUESTIONS_FILE).write_text(json.dumps(records))
    return folder


def descriptor_content() -> dict:
    return {
        "dataset_name": "toy",
        "instances": [
            {
                "image_path": "images/bus.png",
                "image_label": "object--bus",
                "segmentations": {
                    "object--bus--part:wheel": [encode(LEFT), encode(RIGHT)],
                    "object--bus--part:door": [encode(RIGHT)],
                },
                "segmentation_labels": ["object--bus--part:door", "object--bus--part:wheel"],
            }
        ],
        "part_graph": {"object--bus": ["object--bus--part:wheel", "object--bus--part:door", "siren"]},
        "instance_graph": {"vehicle": ["object--bus"], "object--bus": []},
    }


def descriptor_folder(folder: Path, content: dict) -> Path:
    official_folder(folder)
    (folder / "descriptor.json").write_text(json.dumps(content))
    return folder


def test_an_official_record_becomes_a_question_with_its_masks_united(tmp_path):
    (question,) = read_questions(official_folder(tmp_path / "data", official_record()))
    assert question.image == {"bytes": None, "path": str((tmp_path / "data" / "images" / "bus.png").resolve())}
    assert (question.image_id, question.image_label) == ("images/bus.png", "bus")
    assert (question.choices[question.correct], set(question.choice_parts[question.correct])) == (
        "door, and wheel",
        {"door", "wheel"},
    )
    assert [mask.label for mask in question.masks] == ["door", "wheel"]
    np.testing.assert_array_equal(decode(question.masks[1].rle), LEFT | RIGHT)


def test_the_shown_order_of_the_choices_depends_on_the_record_and_not_on_the_order_of_the_file(tmp_path):
    record = official_record()
    turned = record | {name: record[name][::-1] for name in ("answer_choices", "answer_types", "answer_parts")}
    (first,) = read_questions(official_folder(tmp_path / "first", record))
    (second,) = read_questions(official_folder(tmp_path / "second", turned))
    assert (first.choices, first.choice_parts, first.correct) == (second.choices, second.choice_parts, second.correct)


def test_a_model_that_always_takes_the_first_shown_choice_is_right_as_often_as_by_chance(tmp_path):
    parts = ["door", "wheel", "hood", "roof", "lamp"]
    record = official_record() | {
        "question_type": "whole_to_part",
        "answer_choices": parts,
        "answer_types": ["correct"] + ["incorrect"] * 4,
        "answer_parts": [[part] for part in parts],
        "object_question": "What is the object in the image?",
        "object_answer_choices": ["a bus", "a car", "a van", "a tram", "a bike"],
        "object_answer_types": ["correct"] + ["incorrect"] * 4,
        "object_answer_classes": ["bus", "car", "van", "tram", "bike"],
    }
    folder = official_folder(tmp_path / "data", *[record | {"question": f"Question {n}?"} for n in range(400)])
    questions = list(read_questions(folder))
    assert {(q.choices[q.correct], q.object_classes[q.object_correct]) for q in questions} == {("door", "bus")}
    for first_is_right in ([q.correct == 0 for q in questions], [q.object_correct == 0 for q in questions]):
        assert abs(np.mean(first_is_right) - 0.2) < 3 * np.sqrt(0.2 * 0.8 / 400)
    assert 0 < np.mean([q.correct == q.object_correct for q in questions]) < 0.5  # two orders, not one


def test_masks_of_another_size_than_their_image_are_resized_and_counted_only_where_that_is_allowed(tmp_path):
    record = official_record()
    record["segmentations"]["wheel"] = [encode(LEFT.repeat(2, 0).repeat(2, 1)), encode(RIGHT)]
    folder = official_folder(tmp_path / "data", record)
    resized = []
    (question,) = read_questions(folder, on_resize=resized.append)
    np.testing.assert_array_equal(decode(question.masks[1].rle), LEFT | RIGHT)
    assert resized == [1]
    with pytest.raises(DataError, match=r"segmentations\['wheel'\]': the mask has size"):
        list(read_questions(folder))


@pytest.mark.parametrize("path", ["./images/bus.png", "images/../images/bus.png", "linked/bus.png"])
def test_one_photograph_has_one_path_however_it_is_written(tmp_path, path):
    content = descriptor_content()
    content["instances"][0]["image_path"] = path
    folder = descriptor_folder(tmp_path / "data", content)
    (folder / "linked").symlink_to(folder / "images")
    source = Descriptor(folder)
    assert (source.image_path(0), source.example(0).image_id) == ("images/bus.png", "images/bus.png#bus")


def test_masks_may_be_nested_polygons_or_uncompressed(tmp_path):
    record = official_record()
    polygon = {"size": [HEIGHT, WIDTH], "polygon": [1, 1, 3, 1, 3, 3, 1, 3]}
    runs = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT + 1, 2, HEIGHT - 2, 2, HEIGHT * WIDTH - 2 * HEIGHT - 3]}
    for piece in ({"segmentation": encode(LEFT)}, polygon, {"segmentation": polygon}, runs):
        record["segmentations"]["wheel"] = [piece]
        folder = official_folder(tmp_path / str(len(list(tmp_path.iterdir()))), record)
        (question,) = read_questions(folder)
        np.testing.assert_array_equal(decode(question.masks[1].rle), LEFT)


def test_masks_are_compared_with_the_upright_image(tmp_path):
    record = official_record()
    folder = official_folder(tmp_path / "data", record)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images" / "bus.jpg", exif=exif)
    record["image_path"] = "images/bus.jpg"
    (folder / QUESTIONS_FILE).write_text(json.dumps([record]))
    assert len(list(read_questions(folder))) == 1


def test_masks_drawn_on_the_unturned_image_are_refused_naming_the_orientation(tmp_path):
    record = official_record() | {"image_path": "images/bus.jpg"}
    folder = official_folder(tmp_path / "data", record)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "bus.jpg", exif=exif)
    with pytest.raises(DataError, match=r"turned by its EXIF orientation to \[height, width\] \[8, 6\].*\[6, 8\]"):
        list(read_questions(folder))


def changed(record: dict, *path: str | int, value) -> dict:
    record = copy.deepcopy(record)
    target = record
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return record


FORGED = {"size": [HEIGHT, WIDTH], "counts": encode(np.ones((64, 64), dtype=bool))["counts"]}
BAD_OFFICIAL = [
    (("image_path",), "images/none.png", "image_path", "there is no image"),
    (("image_path",), "../outside.png", "image_path", "is outside"),
    (("image_path",), "/etc/hostname", "image_path", "is outside"),
    (("image_path",), "a\0b", "image_path", "there is no image|is outside"),
    (("image_path",), 3, "image_path", "expected str"),
    (("segmentations", "door"), [encode(LEFT.T)], "segmentations", "mask has size"),
    (("segmentations", "door"), [FORGED], "segmentations", "more than 48 pixels"),
    (("segmentations", "door"), [], "segmentations", "expected a list of masks"),
    (("segmentations",), {"door": [encode(LEFT)]}, "masks", "wheel"),
    (("segmentations",), [], "segmentations", "expected dict"),
    (("question_type",), "guess", "question_type", "unknown type"),
    (("answer_types",), ["incorrect"] * 3, "answer_types", "found 0"),
    (("answer_types",), ["correct", "correct", "incorrect"], "answer_types", "found 2"),
    (("answer_types",), ["correct", "wrong", "incorrect"], "answer_types", "wrong"),
    (("answer_types",), ["correct"], "answer_types", "3 choices, but 1"),
    (("answer_choices",), ["door", "door", "wheel"], "choices", "more than once"),
    (("answer_parts",), [["door", "wheel"], ["door"], ["door"]], "choice_parts", "the same parts"),
    (("answer_parts",), [["door", 3], ["door"], ["wheel"]], "answer_parts", "part names"),
    (("answer_choices", 1), None, "answer_choices", "expected str"),
    (("object_question",), "What is it?", "object_answer_choices", "expected list"),
]


@pytest.mark.parametrize(("path", "value", "field", "message"), BAD_OFFICIAL)
def test_a_bad_official_record_is_refused_naming_file_record_and_field(tmp_path, path, value, field, message):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.png")
    folder = official_folder(tmp_path / "data", official_record(), changed(official_record(), *path, value=value))
    with pytest.raises(DataError, match=f"{QUESTIONS_FILE}, record 1, field '{field}.*({message})"):
        list(read_questions(folder))


def test_a_missing_field_is_named(tmp_path):
    record = official_record()
    del record["answer_types"]
    with pytest.raises(DataError, match="record 0: field 'answer_types' is missing"):
        list(read_questions(official_folder(tmp_path / "data", record)))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = official_folder(tmp_path / "data", changed(official_record(), "image_path", value="images/link.png"))
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", folder / "images" / "link.png")
    with pytest.raises(DataError, match="record 0, field 'image_path'.*is outside"):
        list(read_questions(folder))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_truncated_image_is_refused(tmp_path, suffix):
    record = changed(official_record(), "image_path", value=f"images/broken.{suffix}")
    folder = official_folder(tmp_path / "data", record)
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT * 8, WIDTH * 8, 3), dtype=np.uint8)
    path = folder / "images" / f"broken.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="record 0, field 'image_path'.*not a readable image"):
        list(read_questions(folder))


def test_an_image_beyond_the_pixel_limit_is_refused_before_it_is_decoded(tmp_path):
    folder = official_folder(tmp_path / "data", official_record())
    Image.new("1", (8001, 8000)).save(folder / official_record()["image_path"])
    with pytest.raises(DataError, match="8001 x 8000 pixels, more than 64 megapixels"):
        list(read_questions(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected JSON"), ("{", "expected JSON"), ("[]", "non-empty list"), ("{}", "non-empty list"),
     ("[" * 100_000, "expected JSON"), ("[3]", "record 0: field 'image_path' is missing"),
     ("\xff", "expected text in UTF-8")],
)  # fmt: skip
def test_a_file_that_holds_no_questions_is_refused(tmp_path, text, message):
    folder = official_folder(tmp_path / "data")
    (folder / QUESTIONS_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        list(read_questions(folder))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_file_that_was_cut_short_is_refused_saying_so(tmp_path, keep):
    official = official_folder(tmp_path / "official", official_record()) / QUESTIONS_FILE
    descriptor = descriptor_folder(tmp_path / "descriptor", descriptor_content()) / "descriptor.json"
    for path, read in ((official, read_questions), (descriptor, Descriptor)):
        text = path.read_bytes()
        path.write_bytes(text[: int(len(text) * keep)])
        with pytest.raises(DataError, match=f"{path.name}: expected JSON; the file is damaged or cut short"):
            list(read(path.parent))


def test_brackets_and_quotes_inside_strings_are_no_nesting(tmp_path):
    record = changed(official_record(), "question", value='\\"[{' * 60_000 + "\\")
    (question,) = read_questions(official_folder(tmp_path / "data", record))
    assert question.question == record["question"]


def test_a_record_that_asks_what_an_earlier_one_asks_is_refused(tmp_path):
    folder = official_folder(tmp_path / "data", official_record(), official_record())
    with pytest.raises(DataError, match="record 1: asks the same question about the same image as record 0"):
        list(read_questions(folder))


def test_bad_records_can_be_reported_instead_and_the_others_are_read(tmp_path):
    bad = changed(official_record(), "image_path", value="images/none.png")
    folder = official_folder(tmp_path / "data", bad, official_record(), bad)
    errors = []
    (question,) = read_questions(folder, on_error=errors.append)
    assert question.id == "core-00001"
    assert [str(error).split(", ")[1] for error in errors] == ["record 0", "record 2"]


@pytest.mark.parametrize("twin", ["Door", "door ", " door"])
def test_labels_that_differ_only_in_case_or_spaces_are_refused(tmp_path, twin):
    record = changed(official_record(), "segmentations", twin, value=[encode(LEFT)])
    with pytest.raises(DataError, match="record 0, fields 'segmentations'.*differ only in case or spaces"):
        list(read_questions(official_folder(tmp_path / "official", record)))
    content = changed(descriptor_content(), "part_graph", "truck", value=["DOOR"])
    with pytest.raises(DataError, match="field 'part_graph'.*'DOOR' and 'door' differ only in case"):
        Descriptor(descriptor_folder(tmp_path / "descriptor", content))


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        ([20, 1, 23, 1, 23, 3], "coordinates near the image"),
        ([9, 1, 12, 1, 12, 3], "is outside the image"),
        ([1, -4, 3, -4, 3, -1], "is outside the image"),
    ],
)
def test_a_polygon_outside_the_image_is_refused(tmp_path, polygon, message):
    piece = {"size": [HEIGHT, WIDTH], "polygon": polygon}
    record = changed(official_record(), "segmentations", "wheel", value=[piece])
    with pytest.raises(DataError, match=rf"record 0, field 'segmentations\['wheel'\].*{message}"):
        list(read_questions(official_folder(tmp_path / "data", record)))


def test_a_file_beyond_the_size_limit_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_JSON_BYTES", 100)
    with pytest.raises(DataError, match="exceed the limit of 100"):
        list(read_questions(official_folder(tmp_path / "data", official_record())))


def test_a_folder_without_the_file_is_refused_saying_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match="no such file; data_dir must be the folder"):
        list(read_questions(tmp_path))


def without_image(questions) -> list:
    return [dataclasses.replace(question, image=None) for question in questions]


def test_the_official_sample_loads_and_round_trips(tmp_path, fixtures_dir):
    questions = list(read_questions(fixtures_dir / "official_layout"))
    assert len(questions) == 420
    assert {question.correct for question in questions} == {0, 1, 2, 3, 4}
    write_official(questions, tmp_path / "copy")
    again = list(read_questions(tmp_path / "copy"))
    assert without_image(again) == without_image(questions)
    for question, other in zip(questions, again, strict=True):
        assert Path(question.image["path"]).read_bytes() == Path(other.image["path"]).read_bytes()


def test_questions_with_embedded_images_are_written_with_the_right_choice_first(tmp_path):
    (question,) = read_questions(official_folder(tmp_path / "data", official_record()))
    content = Path(question.image["path"]).read_bytes()
    question = dataclasses.replace(
        question,
        image={"bytes": content, "path": None},
        image_id="bus-1",
        choices=["wheel", "door", "door, and wheel"],
        choice_parts=[["wheel"], ["door"], ["door", "wheel"]],
        correct=2,
    )
    write_official([question], tmp_path / "copy")
    (again,) = read_questions(tmp_path / "copy")
    assert again.image_id == "images/bus-1.png"
    (record,) = json.loads((tmp_path / "copy" / QUESTIONS_FILE).read_text())
    assert record["answer_choices"] == ["door, and wheel", "wheel", "door"]
    assert again.choices[again.correct] == "door, and wheel"


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path):
    (question,) = read_questions(official_folder(tmp_path / "data", official_record()))
    clash = dataclasses.replace(question, image={"bytes": b"other", "path": None})
    escape = dataclasses.replace(question, image_id="images/../../bus.png")
    for bad, message in ((clash, "two different images"), (escape, "is outside")):
        with pytest.raises(DataError, match=message):
            write_official([question, bad], tmp_path / "copy")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    with pytest.raises(DataError, match="already exists"):
        write_official([question], tmp_path / "data")


def test_a_descriptor_gives_clean_labels_graphs_and_united_masks(tmp_path):
    descriptor = Descriptor(descriptor_folder(tmp_path / "data", descriptor_content()))
    assert descriptor.part_graph == {"bus": ["door", "siren", "wheel"]}
    assert descriptor.instance_graph == {"vehicle": ["bus"], "bus": []}
    (example,) = descriptor
    assert (example.image_id, example.image_label, example.source) == ("images/bus.png#bus", "bus", "toy")
    assert [mask.label for mask in example.masks] == ["door", "wheel"]
    np.testing.assert_array_equal(decode(example.masks[1].rle), LEFT | RIGHT)


def test_the_mask_of_the_whole_object_is_no_part_and_an_instance_without_parts_gives_no_example(tmp_path):
    content = descriptor_content()
    content["instances"][0]["segmentations"]["object--bus"] = [encode(LEFT)]
    content["instances"][0]["segmentation_labels"].append("object--bus")
    whole = {"image_path": "images/none.png", "image_label": "object--bus", "segmentation_labels": ["object--bus"],
             "segmentations": {"object--bus": [encode(LEFT)]}}  # fmt: skip
    content["instances"].insert(0, whole)
    descriptor = Descriptor(descriptor_folder(tmp_path / "data", content))
    (example,) = descriptor
    assert len(descriptor) == 1
    assert [mask.label for mask in example.masks] == ["door", "wheel"]


def test_two_instances_of_one_image_and_label_are_refused(tmp_path):
    content = descriptor_content()
    content["instances"].append(copy.deepcopy(content["instances"][0]))
    with pytest.raises(DataError, match="record 1: has the image and the label of record 0"):
        Descriptor(descriptor_folder(tmp_path / "data", content))


def test_labels_without_prefixes_stay_as_they_are():
    assert clean_object_label("pickup truck") == "pickup truck"
    assert clean_part_label("t-shirt") == "t-shirt"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("instances",), [], "field 'instances': the list is empty"),
        (("instances",), [3], r"field 'instances\[0\]': expected dict"),
        (("part_graph",), None, "field 'part_graph': expected dict"),
        (("part_graph", "object--bus"), "wheel", "field 'object--bus': expected list"),
        (("part_graph",), {"car": []}, "record 0, field 'image_label': 'bus' is not in part_graph"),
        (("part_graph", "object--bus"), ["door"], "record 0, field 'segmentations': .*wheel"),
        (("instances", 0, "segmentation_labels"), ["door"], "record 0, field 'segmentation_labels'"),
        (("instances", 0, "image_path"), "../data2/bus.png", "record 0, field 'image_path'.*is outside"),
        (("instances", 0, "segmentations", "object--bus--part:door"), [FORGED], "record 0, field 'segmentations"),
        (("instances", 0, "segmentations", "object--bus--part:door"), [encode(LEFT.T)], "mask has size"),
    ],
)  # fmt: skip
def test_a_bad_descriptor_is_refused_naming_file_record_and_field(tmp_path, path, value, message):
    folder = descriptor_folder(tmp_path / "data", changed(descriptor_content(), *path, value=value))
    with pytest.raises(DataError, match=f"descriptor.json.*{message}"):
        list(Descriptor(folder))


def test_photographs_of_the_descriptor_sample_load(fixtures_dir):
    descriptor = Descriptor(fixtures_dir / "data" / "real_parts")
    assert len(descriptor) == 1225
    for index in range(0, 1225, 60):
        example = descriptor.example(index)
        assert {mask.label for mask in example.masks} <= set(descriptor.part_graph[example.image_label])
        with Image.open(example.image["path"]) as image:
            assert all(mask.rle["size"] == [image.height, image.width] for mask in example.masks)
