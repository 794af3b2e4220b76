"""Questions about copies of raw data sets: what a build depends on, and what it does with records that are bad."""

import json
import random
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from partonomy_dataset import left_out
from plum_partonomy.evaluation.run import main as evaluate_plum
from plum_partonomy.features import QUESTION_FEATURES
from plum_partonomy.masks import encode
from plum_partonomy.records import QUESTION_TYPES, DataError
from plum_partonomy.scoring.benchmark import load_questions
from plum_partonomy.sources.official import QUESTIONS_FILE
from tests.digests import without_image
from tests.sources.test_coco import (
    BOMB,
    annotation,
    image,
    paco_content,
    paco_folder,
    partimagenet_content,
    pascal_content,
    pascal_folder,
    write,
)
from tests.sources.test_official_and_descriptor import changed, official_folder, official_record
from tests.sources.test_partimagenet_pp import partimagenet_pp_folder

IMAGES, HEIGHT, WIDTH = 80, 12, 16  # more images than one shard holds, so that two processes share them
PARTS = {
    "bike": ["bell", "frame", "pedal", "saddle", "wheel"],
    "boat": ["anchor", "cabin", "hull", "mast", "rudder"],
    "bus": ["door", "frame", "mirror", "wheel", "window"],
    "car": ["bonnet", "door", "mirror", "wheel", "window"],
    "plane": ["cabin", "door", "rudder", "wheel", "window"],
    "tram": ["bell", "cabin", "door", "mast", "window"],
}
CORRUPT = {"size": [HEIGHT, WIDTH], "counts": encode(np.ones((600, 600), dtype=bool))["counts"]}


def mask(position: int) -> dict:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=bool)
    pixels[2:9, 3 * position : 3 * position + 2] = True
    return encode(pixels)


def small_descriptor(folder: Path, *, order: int = 0, bad: dict[int, dict] | None = None) -> Path:
    """IMAGES of one object each, the records shuffled by `order`; `bad` replaces fields of records."""
    rng = random.Random(0)
    instances = []
    (folder / "images").mkdir(parents=True)
    for number in range(IMAGES):
        label = list(PARTS)[number % len(PARTS)]
        shown = [part for part in PARTS[label] if rng.random() < 0.6] or PARTS[label][:1]
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        masks = {part: [mask(PARTS[label].index(part))] for part in shown}
        record = {"image_path": f"images/{number}.png", "image_label": label, "segmentations": masks}
        record |= {"segmentation_labels": shown} | (bad or {}).get(number, {})
        instances.append(record)
    random.Random(order).shuffle(instances)
    content = {"dataset_name": "made up", "instances": instances, "part_graph": PARTS}
    (folder / "descriptor.json").write_text(json.dumps(content | {"instance_graph": {"vehicle": list(PARTS)}}))
    return folder


def load(name: str, folder: Path, **options):
    return load_dataset("partonomy", name, data_dir=str(folder), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_descriptor(tmp_path_factory.mktemp("made_up") / "data")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    """What is made of `folder` is made once."""
    return tmp_path_factory.mktemp("cache")


# ---------------------------------------------------------------- what a build depends on


@pytest.mark.parametrize("scheme", ["official", "balanced"])
def test_a_descriptor_gives_questions_of_all_ten_types_in_the_splits_of_its_conversations(folder, cache_dir, scheme):
    options = {"data_dir": str(folder), "scheme": scheme, "cache_dir": cache_dir}
    splits = load_dataset("partonomy", "descriptor_questions", **options)
    talked = load("descriptor", folder, cache_dir=cache_dir)
    assert splits["train"].features == QUESTION_FEATURES
    assert set(splits["train"]["question_type"]) == set(QUESTION_TYPES)
    image_ids = {split: set(rows["image_id"]) for split, rows in talked.items()}
    assert list(image_ids) == ["train", "validation", "test"]
    assert sum(map(len, image_ids.values())) == len(set().union(*image_ids.values())) == IMAGES
    for split, rows in splits.items():
        assert set(rows["image_id"]) <= image_ids[split]
        load_questions("partonomy", name="descriptor_questions", split=split, **options)  # validates them


def test_questions_do_not_depend_on_the_order_of_records(folder, tmp_path, cache_dir):
    rows = load("descriptor_questions", folder, split="train", cache_dir=cache_dir)
    shuffled = small_descriptor(tmp_path / "shuffled", order=1)
    assert (shuffled / "descriptor.json").read_text() != (folder / "descriptor.json").read_text()
    streamed = load("descriptor_questions", shuffled, split="train", streaming=True)
    assert [without_image(row) for row in streamed] == list(rows.remove_columns("image"))


def test_the_order_of_coco_records_does_not_matter(tmp_path):
    forward = pascal_folder(tmp_path / "forward", pascal_content())
    turned = {field: records[::-1] for field, records in pascal_content().items()}
    backward = pascal_folder(tmp_path / "backward", turned)
    for name in ("pascal_part", "pascal_part_questions"):
        rows = [load(name, folder, cache_dir=tmp_path / "cache")["train"] for folder in (forward, backward)]
        assert rows[0].remove_columns("image")[:] == rows[1].remove_columns("image")[:]


def test_published_splits_of_part_annotations_are_the_splits_of_their_questions(tmp_path):
    for split in ("train", "val"):
        names = f"{split}/n02071294_1.JPEG", f"{split}/n01440764_2.JPEG"
        write(tmp_path / "partimagenet", f"{split}.json", partimagenet_content(), *names)
    folders = {
        "pascal_part": (pascal_folder(tmp_path / "pascal", pascal_content()), ["train"]),
        "paco_lvis": (paco_folder(tmp_path / "paco", paco_content()), ["train"]),
        "partimagenet": (tmp_path / "partimagenet", ["train", "validation"]),
        "partimagenet_pp": (partimagenet_pp_folder(tmp_path / "partimagenet_pp"), ["train", "test"]),
    }
    for name, (folder, expected) in folders.items():
        splits = load(f"{name}_questions", folder, cache_dir=tmp_path / "cache")
        assert list(splits) == expected
        for split, rows in splits.items():
            assert {row.split("-")[0] for row in rows["image_id"]} == {split}
            assert {row["image"].size for row in rows} == {(60, 40)}
            assert "identification" in rows["question_type"]


def test_an_image_that_two_published_splits_share_is_refused(tmp_path):
    folder = pascal_folder(tmp_path, pascal_content())
    (folder / "val.json").write_text((folder / "train.json").read_text())
    with pytest.raises(DataError, match=r"val.json: '.*2008_000003.jpg' is also in the split train"):
        load("pascal_part", folder, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("descriptor_questions", {"scheme": "fair"}, "unknown scheme 'fair'; known are official, balanced"),
        ("descriptor", {"scheme": "balanced"}, '"descriptor" makes no questions about your files: leave out scheme'),
        ("core", {"scheme": "balanced"}, '"core" makes no questions about your files: leave out scheme'),
        ("core", {"on_error": "ignore"}, 'on_error is "refuse" or "report", found \'ignore\''),
    ],
)
def test_an_option_that_is_unknown_or_of_no_use_is_refused(folder, name, options, message):
    with pytest.raises(DataError, match=message):
        load(name, folder, **options)


def test_a_split_about_which_nothing_can_be_asked_is_one_clear_error(tmp_path):
    """A part of every image shows; none of them may be missing, and so no balanced question can be made."""
    whole = {n: {"segmentations": {"door": [mask(0)]}, "segmentation_labels": ["door"]} for n in range(IMAGES)}
    whole = {n: record | {"image_label": "car"} for n, record in whole.items()}
    options = {"scheme": "balanced", "cache_dir": tmp_path / "cache"}
    folder = small_descriptor(tmp_path / "data", bad=whole)
    for split in (None, "validation"):
        with pytest.raises(
            DataError, match=r'makes no record of the split (train|validation) \(scheme="balanced" finds'
        ):
            load("descriptor_questions", folder, split=split, **options)


# ---------------------------------------------------------------- bad records


def bad_descriptor(tmp_path: Path) -> tuple[Path, list[str]]:
    outside = {"size": [HEIGHT, WIDTH], "polygon": [20, 2, 24, 2, 24, 8]}
    bad = {
        3: {"segmentations": {"door": [CORRUPT]}, "segmentation_labels": ["door"]},
        8: {"segmentations": {"door": [outside]}, "segmentation_labels": ["door"]},
        13: {"image_path": "images/none.png"},
        14: {"segmentations": {"door": [mask(0)], "Door": [mask(1)]}, "segmentation_labels": ["door", "Door"]},
        17: {"image_path": "images/5.png", "image_label": "tram"},
        22: {"segmentations": {"hull": [mask(0)]}, "segmentation_labels": ["hull"], "image_label": "plane"},
    }
    folder = small_descriptor(tmp_path / "data", bad=bad)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "30.png", exif=exif)
    content = json.loads((folder / "descriptor.json").read_text())
    content["instances"].sort(key=lambda record: int(Path(record["image_path"]).stem.replace("none", "13")))
    (folder / "descriptor.json").write_text(json.dumps(content))
    return folder, [
        "record 6: has the image and the label of record 5",
        "field 'image_path': there is no image 'images/none.png'",
        "the counts decode to more than 192 pixels",
        "turned by its EXIF orientation",
        "a polygon is outside the image",
        "differ only in case or spaces",
        "does not have ['hull']",
    ]


@pytest.mark.parametrize("name", ["descriptor", "descriptor_questions"])
def test_bad_instances_are_refused_as_a_whole_or_left_out_and_named(tmp_path, name):
    folder, expected = bad_descriptor(tmp_path)
    with pytest.raises(DataError, match="descriptor.json, record 6: has the image and the label of record 5"):
        load(name, folder, cache_dir=tmp_path / "cache")
    splits = load(name, folder, on_error="report", num_proc=2, cache_dir=tmp_path / "cache")
    problems = left_out(splits["train"])
    assert len(problems) == len(expected)
    assert all("descriptor.json, record " in problem for problem in problems)
    for text in expected:
        assert any(text in problem for problem in problems), text
    assert splits["train"].info.description.endswith(f" {len(expected)} bad records were skipped.")
    used = {image_id.split("#")[0] for rows in splits.values() for image_id in rows["image_id"]}
    assert not used & {f"images/{number}.png" for number in (3, 5, 8, 14, 22, 30)}
    assert len(used) == IMAGES - 8


def test_a_stream_warns_of_each_bad_record(tmp_path, caplog):
    folder, expected = bad_descriptor(tmp_path)
    datasets.logging.enable_propagation()
    rows = list(load("descriptor", folder, on_error="report", split="train", streaming=True))
    datasets.logging.disable_propagation()
    assert len([record for record in caplog.records if "skipped: " in record.message]) == len(expected)
    assert rows


def test_bad_coco_records_leave_out_the_whole_image_and_nothing_else(tmp_path):
    content = paco_content()
    content["annotations"] += [
        annotation(12, 303, encode(np.eye(40, 60, dtype=bool)), obj_ann_id=11) | {"image_id": 2},
        annotation(20, 98, [[1, 1, 20, 1, 20, 35, 1, 35]], obj_ann_id=20) | {"image_id": 3},
        annotation(21, 301, BOMB, obj_ann_id=20) | {"image_id": 3},
        annotation(22, 999, [], obj_ann_id=20) | {"image_id": 4},
        annotation(23, 301, [], obj_ann_id=20) | {"image_id": 5},
    ]
    content["images"] += [image(3, "train2017/000000000001.jpg"), image(4, "train2017/000000000004.jpg")]
    content["images"] += [image(5, "train2017/000000000004.jpg"), image(5, "train2017/000000000005.jpg")]
    folder = paco_folder(tmp_path / "data", content)
    with pytest.raises(DataError, match=r"record images\[5\], field 'id': 5 is also the id of record 4"):
        load("paco_lvis", folder, cache_dir=tmp_path / "cache")
    rows = load("paco_lvis", folder, split="train", on_error="report", cache_dir=tmp_path / "cache")
    assert rows["image_id"][:] == ["train-1-car", "train-1-trash can"]
    places = ["images[5], field 'id'", "annotations[8], field 'id'", "annotations[11], field 'category_id'"]
    places += ["annotations[12], field 'image_id'", "annotations[10], field 'segmentation'"]
    problems = left_out(rows)
    assert len(problems) == len(places)
    for place, problem in zip(places, problems, strict=True):
        assert f"paco_lvis_v1_train.json, record {place}" in problem


OTHER = {"question": "Which parts does it have?"}


def core_folder(folder: Path) -> Path:
    records = [official_record() | {"question": f"Question {number}?"} for number in range(6)]
    records[1] = changed(records[1], "segmentations", "door", value=[CORRUPT])
    records[3] = records[2]
    records[4] = changed(records[4], "segmentations", "Door ", value=[encode(np.ones((6, 8), dtype=bool))])
    return official_folder(folder, *records)


def test_bad_records_of_the_official_release_are_left_out_and_the_others_keep_their_ids(tmp_path):
    folder = core_folder(tmp_path / "data")
    rows = load("core", folder, split="test", on_error="report", cache_dir=tmp_path / "cache")
    assert rows["id"][:] == ["core-00000", "core-00002", "core-00005"]
    problems = left_out(rows)
    assert [problem.split(QUESTIONS_FILE)[1].split(":")[0].split(",")[1] for problem in problems] == [
        " record 1",
        " record 3",
        " record 4",
    ]
    loaded_again = load("core", folder, split="test", on_error="report", cache_dir=tmp_path / "cache")
    assert left_out(loaded_again) == problems


def test_resized_masks_of_the_official_release_are_counted_in_table_and_metrics(tmp_path, monkeypatch, capsys):
    other = {"door": [encode(np.ones((3, 4), dtype=bool))], "wheel": [encode(np.ones((12, 16), dtype=bool))]}
    folder = official_folder(
        tmp_path / "data", official_record(), official_record() | OTHER | {"segmentations": other}
    )
    options = ["--name", "core", "--data_dir", folder, "--output_dir", tmp_path / "run"]
    with pytest.raises(DataError, match="record 1, .*the mask has size"):
        score(monkeypatch, *options, "--on_error", "refuse")
    score(monkeypatch, *options)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["run"]["masks_resized"] == 2
    assert "resized: 2 true masks that had another size than their image" in capsys.readouterr().out
    (stream,) = load("core", folder, streaming=True).values()
    assert [row["masks"][0]["rle"]["size"] for row in stream] == [[6, 8]] * 2


def test_a_file_that_was_cut_short_is_refused_either_way_saying_after_how_many_records(tmp_path):
    official = official_folder(tmp_path / "core", *[official_record() | {"question": f"{n}?"} for n in range(3)])
    descriptor = small_descriptor(tmp_path / "descriptor")
    paco = paco_folder(tmp_path / "paco", paco_content())
    for path in (official / QUESTIONS_FILE, descriptor / "descriptor.json", *paco.rglob("*.json")):
        path.write_text(path.read_text()[:-20])
    for on_error in ("refuse", "report"):
        with pytest.raises(DataError, match="cut short after 2 records; fetch it again"):
            load_questions("partonomy", name="core", split="test", data_dir=str(official), on_error=on_error)
        with pytest.raises(DataError, match="descriptor.json: expected JSON; the file is damaged or cut short"):
            load("descriptor", descriptor, on_error=on_error, cache_dir=tmp_path / "cache")
        with pytest.raises(DataError, match="cut short after 5 records of 'categories'"):
            load("paco_lvis_questions", paco, on_error=on_error, cache_dir=tmp_path / "cache")


def test_files_without_one_good_record_are_refused(tmp_path):
    folder = small_descriptor(tmp_path / "descriptor")
    shutil.rmtree(folder / "images")
    with pytest.raises(DataError, match="not one example of descriptor can be used"):
        load("descriptor_questions", folder, on_error="report", cache_dir=tmp_path / "cache")
    record = official_record() | {"image_path": "images/none.png"}
    folder = official_folder(tmp_path / "core", record)
    with pytest.raises(DataError, match="not one question can be used; the first problem: .*record 0"):
        load("core", folder, on_error="report", cache_dir=tmp_path / "cache")


# ---------------------------------------------------------------- scored from the command line


def score(monkeypatch, *options: str | Path) -> None:
    arguments = ["--dataset", "partonomy", "--baseline", "ground_truth", *map(str, options)]
    monkeypatch.setattr(sys, "argv", ["evaluate_plum.py", *arguments])
    evaluate_plum()


def test_the_command_scores_questions_about_a_folder_and_says_what_was_left_out_of_it(tmp_path, monkeypatch, capsys):
    folder, expected = bad_descriptor(tmp_path)
    options = ["--name", "descriptor_questions", "--data_dir", folder, "--split", "validation"]
    options += ["--scheme", "official", "--output_dir", tmp_path / "run"]
    with pytest.raises(DataError, match="record 6: has the image and the label of record 5"):
        score(monkeypatch, *options)
    assert not (tmp_path / "run").exists()
    score(monkeypatch, *options, "--on_error", "report")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["overall"]["choice_accuracy"] == metrics["overall"]["strict_macro_giou"] == 1.0
    assert (metrics["run"]["scheme"], metrics["run"]["records_left_out"]) == ("official", len(expected))
    assert len((tmp_path / "run" / "errors.jsonl").read_text().splitlines()) == len(expected)
    assert f"left out: 0 questions, {len(expected)} records of the data set" in capsys.readouterr().out
