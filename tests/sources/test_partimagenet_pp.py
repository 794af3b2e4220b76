"""PartImageNet++: many class files as one data set, names of classes, the split of each class, bad records."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plum_partonomy.masks import DataError, decode
from plum_partonomy.sources.partimagenet_pp import PartImageNetPP
from plum_partonomy.sources.validate import validate
from tests.sources.test_coco import HEIGHT, LEFT_WHEEL, RIGHT_WHEEL, WIDTH

POLYGON = [[2, 20, 8, 20, 8, 30, 2, 30]]
OTHER = [[30, 20, 40, 20, 40, 30, 30, 30]]
CLASSES = {"n01443537": ["head", "Tail fin"], "n02012849": ["beak", "wing"], "n03126707": ["hook", "boom"]}
NAMES = {"n01443537": "goldfish, Carassius auratus", "n02012849": ["crane"], "n03126707": "crane"}
IMAGES = 10


def class_content(synset: str) -> dict:
    """Ten images of a class; every class counts its ids from 1."""
    parts = CLASSES[synset]
    annotations = [
        {"id": 2 * number + part + 1, "image_id": number + 1, "category_id": part + 1, "segmentation": segmentation}
        for number in range(IMAGES)
        for part, segmentation in enumerate((POLYGON, OTHER))
    ]
    return {
        "categories": [{"id": part + 1, "name": name, "supercategory": ""} for part, name in enumerate(parts)],
        "images": [
            {"id": number + 1, "file_name": f"{synset}_{number}.JPEG", "height": HEIGHT, "width": WIDTH}
            for number in range(IMAGES)
        ],
        "annotations": annotations,
    }


def partimagenet_pp_folder(folder: Path, *, names: dict | None = NAMES) -> Path:
    (folder / "json").mkdir(parents=True)
    for synset in CLASSES:
        (folder / "json" / f"{synset}.json").write_text(json.dumps(class_content(synset)))
        (folder / "images" / synset).mkdir(parents=True)
        for number in range(IMAGES):
            Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / synset / f"{synset}_{number}.JPEG")
    if names is not None:
        (folder / "category_name.json").write_text(json.dumps(names))
    return folder


def test_class_files_are_one_data_set_and_the_last_tenth_of_each_class_is_the_test(tmp_path):
    folder = partimagenet_pp_folder(tmp_path)
    assert PartImageNetPP.splits(folder) == ["train", "test"]
    train, test = (PartImageNetPP(folder, split=split) for split in ("train", "test"))
    assert (train.counts["images"], test.counts["images"]) == (27, 3)
    assert test.part_graph == {
        "goldfish": ["head", "tail fin"],
        "crane n02012849": ["beak", "wing"],
        "crane n03126707": ["boom", "hook"],
    }
    assert {Path(test.image_path(index)).name for index in range(3)} == {f"{synset}_9.JPEG" for synset in CLASSES}
    assert not {train.image_path(i) for i in range(len(train))} & {test.image_path(i) for i in range(len(test))}
    fish = next(example for example in test if example.image_label == "goldfish")
    np.testing.assert_array_equal(decode(fish.masks[0].rle), LEFT_WHEEL)
    np.testing.assert_array_equal(decode(fish.masks[1].rle), RIGHT_WHEEL)


def test_without_the_file_of_names_a_class_is_called_by_its_supercategory(tmp_path):
    folder = partimagenet_pp_folder(tmp_path, names=None)
    with pytest.raises(DataError, match=r"n01443537.json, record categories\[0\]: expected the name of the class"):
        PartImageNetPP(folder, split="test")
    for synset, label in zip(CLASSES, ("Goldfish", "crane", "tower crane"), strict=True):
        content = class_content(synset)
        content["categories"] = [category | {"supercategory": label} for category in content["categories"]]
        (folder / "json" / f"{synset}.json").write_text(json.dumps(content))
    assert sorted(PartImageNetPP(folder, split="test").part_graph) == ["crane", "goldfish", "tower crane"]


def test_bad_records_are_named_by_class_file_and_place_and_can_be_left_out(tmp_path):
    folder = partimagenet_pp_folder(tmp_path)
    path = folder / "json" / "n02012849.json"
    content = class_content("n02012849")
    content["annotations"][0]["image_id"] = 77
    content["annotations"][3]["category_id"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"n02012849.json, record annotations\[0\], field 'image_id'"):
        PartImageNetPP(folder, split="train")
    errors = []
    source = PartImageNetPP(folder, split="train", on_error=errors.append)
    assert [str(error).split("/")[-1].split(":")[0] for error in errors] == [
        "n02012849.json, record annotations[0], field 'image_id'",
        "n02012849.json, record annotations[3], field 'category_id'",
    ]
    assert len(source) == 27 - 1  # an image of which a part is missing is left out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected an object of class numbers"),
        ({"n01443537": 3}, "field 'n01443537': expected the name of a class"),
    ],
)
def test_a_file_of_names_of_another_form_is_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=f"category_name.json.*{message}"):
        PartImageNetPP(partimagenet_pp_folder(tmp_path, names=names), split="test")


def test_a_folder_of_something_else_is_refused_and_validate_counts(tmp_path):
    with pytest.raises(DataError, match="no annotations of partimagenet_pp; expected json/n01443537.json and others"):
        PartImageNetPP.splits(tmp_path)
    report = validate("partimagenet_pp", partimagenet_pp_folder(tmp_path / "data"))
    assert any("27 images, but the publishers count 90000" in problem for problem in report.problems)
