"""ADE20K, COCO-Stuff and Mapillary Vistas, each in miniature as published; none of their data is in the repository."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plum_partonomy.masks import DataError, decode
from plum_partonomy.records import tagged_phrases
from plum_partonomy.sources.label_maps import Ade20k, CocoStuff, LabelMaps, Mapillary

HEIGHT, WIDTH = 12, 16
KINDS = (Ade20k, CocoStuff, Mapillary)


def values(left: int, right: int, corner: int) -> np.ndarray:
    labels = np.full((HEIGHT, WIDTH), left, dtype=np.uint8)
    labels[:, WIDTH // 2 :], labels[:2, :2] = right, corner
    return labels


def write_map(folder: Path, maps: str, images: str, stem: str, labels: np.ndarray, *, palette: bool = False) -> None:
    for name in (maps, images):
        (folder / name).mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette([7] * 768)
    image.save(folder / maps / f"{stem}.png")
    Image.new("RGB", labels.shape[::-1], "white").save(folder / images / f"{stem}.jpg")


def ade20k_folder(folder: Path) -> Path:
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t10\t1\tclass {i}, other name {i}" for i in range(1, 151))]
    for split in ("training", "validation"):
        for number, labels in enumerate([values(1, 150, 0), values(3, 3, 3)]):
            write_map(folder, f"annotations/{split}", f"images/{split}", f"ADE_{split}_{number}", labels)
    (folder / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return folder


def coco_stuff_folder(folder: Path) -> Path:
    names = {0: "unlabeled", 1: "person", 96: "building-other", 182: "wood"}
    write_map(folder, "annotations/train2017", "images/train2017", "000000000009", values(0, 181, 255))
    write_map(folder, "annotations/train2017", "images/train2017", "000000000025", values(95, 95, 255))
    (folder / "labels.txt").write_text("".join(f"{i}: {names.get(i, f'class {i}')}\n" for i in range(183)))
    return folder


def mapillary_folder(folder: Path) -> Path:
    labels = [
        {
            "name": f"object--kind-{i}",
            "readable": f"Kind {i}",
            "color": [i, i, i],
            "instances": True,
            "evaluate": i < 120,
        }
        for i in range(124)
    ]
    write_map(folder, "training/v2.0/labels", "training/images", "0035fkbj-g", values(0, 119, 123), palette=True)
    (folder / "config_v2.0.json").write_text(json.dumps({"labels": labels, "version": "2.0", "mapping": "public"}))
    return folder


FOLDERS = {Ade20k: ade20k_folder, CocoStuff: coco_stuff_folder, Mapillary: mapillary_folder}
SHOWN = {Ade20k: ["class 1", "class 150"], CocoStuff: ["person", "wood"], Mapillary: ["kind 0", "kind 119"]}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def opened(request, tmp_path) -> LabelMaps:
    return request.param(FOLDERS[request.param](tmp_path), split="train")


def test_each_class_that_is_asked_for_gets_the_pixels_of_its_value(opened):
    example = opened.example(0)
    assert [mask.label for mask in example.masks] == SHOWN[type(opened)]
    left, right = (decode(mask.rle) for mask in example.masks)
    right_half = np.arange(WIDTH) >= WIDTH // 2
    expected = np.tile(~right_half, (HEIGHT, 1))
    expected[:2, :2] = False
    np.testing.assert_array_equal(left, expected)
    np.testing.assert_array_equal(right, np.tile(right_half, (HEIGHT, 1)))
    assert Path(example.image["path"]).name.endswith(".jpg")


def test_a_conversation_asks_for_every_class_once(opened):
    (conversation,) = opened.conversations(0, seed=0)
    phrases = [phrase for message in conversation.messages for phrase in tagged_phrases(message["content"])]
    assert sorted(phrases) == SHOWN[type(opened)]
    assert [mask.label for mask in conversation.masks] == phrases
    assert Counter(message["role"] for message in conversation.messages) == {"user": 2, "assistant": 2}
    for question, phrase in zip(conversation.messages[::2], phrases, strict=True):
        assert f"the {phrase}" in question["content"]
    assert list(opened.conversations(0, seed=0)) == [conversation]


def test_splits_are_those_that_lie_in_the_folder(tmp_path):
    assert Ade20k.splits(ade20k_folder(tmp_path / "ade")) == ["train", "validation"]
    assert CocoStuff.splits(coco_stuff_folder(tmp_path / "stuff")) == ["train"]
    assert Mapillary.splits(mapillary_folder(tmp_path / "mapillary")) == ["train"]


def test_label_maps_may_lie_beside_the_images_of_other_data_sets(tmp_path):
    folder = coco_stuff_folder(tmp_path)
    (folder / "cocostuff").mkdir()
    (folder / "images").rename(folder / "coco")
    (folder / "annotations" / "train2017").rename(folder / "cocostuff" / "train2017")
    (folder / "labels.txt").rename(folder / "cocostuff" / "labels.txt")
    assert [mask.label for mask in CocoStuff(folder).example(0).masks] == ["person", "wood"]


def test_an_image_without_a_class_to_ask_for_gives_nothing_and_is_counted(tmp_path):
    source = CocoStuff(coco_stuff_folder(tmp_path))
    assert list(source.conversations(1, seed=0)) == []
    assert source.blank == 1


def test_a_folder_of_something_else_is_refused_saying_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match="no such files of ade20k; expected the folders annotations/training and"):
        Ade20k.splits(tmp_path)
    folder = mapillary_folder(tmp_path)
    (folder / "config_v2.0.json").unlink()
    with pytest.raises(DataError, match="no such file for the classes of mapillary; expected config_v2.0.json"):
        Mapillary(folder)


@pytest.mark.parametrize(
    ("kind", "name", "old", "new", "message"),
    [
        (Ade20k, "objectInfo150.txt", "150\t0.1", "151\t0.1", "151 classes|no class has the pixel values"),
        (Ade20k, "objectInfo150.txt", "149\t0.1", "x\t0.1", "line 150: expected Idx, Ratio"),
        (CocoStuff, "labels.txt", "182: wood\n", "", "182 classes, but .* has 183; this is another version"),
        (CocoStuff, "labels.txt", "182: wood", "wood", "line 183: expected a number and a name"),
        (Mapillary, "config_v2.0.json", '"evaluate": false', '"evaluate": 0', r"labels\[120\], field 'evaluate'"),
        (Mapillary, "config_v2.0.json", '"Kind 7"', "7", r"labels\[7\], field 'readable': expected str"),
    ],
)
def test_classes_of_another_version_are_refused(tmp_path, kind, name, old, new, message):
    folder = FOLDERS[kind](tmp_path)
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        kind(folder).example(0)


def test_a_label_map_that_is_none_is_refused_naming_it(tmp_path):
    folder = ade20k_folder(tmp_path)
    path = folder / "annotations/training/ADE_training_0.png"
    for image, message in (
        (Image.fromarray(values(1, 200, 0)), r"no class has the pixel values \[200\]"),
        (Image.new("RGB", (WIDTH, HEIGHT)), "8 bits a pixel, found .*mode 'RGB'"),
        (Image.fromarray(values(1, 2, 0)[:, 1:].copy()), "mask has size"),
    ):
        image.save(path)
        with pytest.raises(DataError, match=f"ADE_training_0.png.*{message}"):
            Ade20k(folder).example(0)
    (folder / "images/training/ADE_training_1.jpg").unlink()
    with pytest.raises(DataError, match="ADE_training_1.png.*there is no image"):
        Ade20k(folder).example(1)
