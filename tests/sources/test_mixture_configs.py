"""Every data set of the training mixtures through `load_dataset` and through the command that checks a copy."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.masks import DataError, decode
from plum_partonomy.records import GroundedConversation, PartMask, tagged_phrases
from plum_partonomy.sources.catalogue import SOURCES
from plum_partonomy.sources.llava import LlavaInstruct
from plum_partonomy.sources.referring import RefClef, Referring
from plum_partonomy.sources.validate import validate
from tests.digests import without_image
from tests.sources.test_chats import INSTRUCT, MIXTURE, chat, llava_folder, reasonseg_folder
from tests.sources.test_coco import (
    paco_content,
    paco_folder,
    partimagenet_content,
    pascal_content,
    pascal_folder,
    write,
)
from tests.sources.test_instructpart import instructpart_folder
from tests.sources.test_label_maps import ade20k_folder, coco_stuff_folder, mapillary_folder
from tests.sources.test_official_and_descriptor import official_folder, official_record
from tests.sources.test_partimagenet_pp import partimagenet_pp_folder
from tests.sources.test_referring import DOG, encode, grefcoco_folder, refcoco_folder, reference, referring_folder


def partimagenet_folder(folder: Path) -> Path:
    return write(folder, "train.json", partimagenet_content(), "train/n02071294_1.JPEG", "train/n01440764_2.JPEG")


def stage2_folder(folder: Path) -> Path:
    return official_folder(folder, official_record() | {"question_type": "identification_with_label"})


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "pascal_part": lambda folder: pascal_folder(folder, pascal_content()),
    "paco_lvis": lambda folder: paco_folder(folder, paco_content()),
    "partimagenet": partimagenet_folder,
    "partimagenet_pp": partimagenet_pp_folder,
    "semantic_pascal_part": lambda folder: pascal_folder(folder, pascal_content()),
    "semantic_paco_lvis": lambda folder: paco_folder(folder, paco_content()),
    "semantic_partimagenet": partimagenet_folder,
    "ade20k": ade20k_folder,
    "coco_stuff": coco_stuff_folder,
    "mapillary": mapillary_folder,
    "refclef": lambda folder: referring_folder(folder, RefClef, [reference(0, 1, "dog")], [encode(DOG)]),
    "grefcoco": grefcoco_folder,
    "reasonseg": reasonseg_folder,
    "instructpart": instructpart_folder,
    "instructpart_names": instructpart_folder,
    "llava_instruct_150k": lambda folder: llava_folder(folder, INSTRUCT, LlavaInstruct),
    "llava_v1_5_mix665k": lambda folder: llava_folder(folder, MIXTURE),
    "core_conversations": lambda folder: official_folder(folder, official_record()),
    "core_stage2": stage2_folder,
}
FOLDERS |= {
    name: lambda folder, kind=kind: refcoco_folder(folder, kind)
    for name, kind in SOURCES.items()
    if issubclass(kind, Referring) and name not in FOLDERS
}


def check_row(row: dict) -> None:
    masks = row["masks"] and [PartMask(mask["label"], mask["rle"]) for mask in row["masks"]]
    fields = {field.name: row[field.name] for field in dataclasses.fields(GroundedConversation)}
    GroundedConversation(**fields | {"masks": masks}).validate(where=row["id"])
    for mask in row["masks"] or []:
        assert decode(mask["rle"], expected_size=(row["image"].height, row["image"].width)).any()


def test_every_data_set_of_the_catalogue_is_here_in_miniature_and_in_the_documentation():
    assert set(FOLDERS) == set(SOURCES)
    documented = (Path(__file__).parents[2] / "docs" / "mixtures.md").read_text()
    assert all(f"`{name}`" in documented for name in SOURCES)


def test_data_sets_that_share_images_are_read_from_one_tree(tmp_path):
    """The tree that docs/mixtures.md draws."""
    folder = coco_stuff_folder(tmp_path)
    (folder / "images").rename(folder / "coco")
    (folder / "annotations").rename(folder / "cocostuff")
    (folder / "labels.txt").rename(folder / "cocostuff" / "labels.txt")
    images = ("coco/train2017/000000000001.jpg", "coco/val2017/000000000002.jpg")
    write(folder, "vlpart/paco/annotations/paco_lvis_v1_train.json", paco_content(), *images)
    chats = [chat("<image>\nWhat is it?", "A car.", image="000000000001.jpg")]
    write(folder, "llava_dataset/llava_instruct_150k.json", chats)
    for name in ("coco_stuff", "paco_lvis", "semantic_paco_lvis", "llava_instruct_150k"):
        rows = load_dataset("partonomy", name, data_dir=str(folder), split="train", cache_dir=tmp_path / "cache")
        assert "/coco/" in rows.cast_column("image", datasets.Image(decode=False))[-1]["image"]["path"]


@pytest.mark.parametrize("name", SOURCES)
def test_a_miniature_loads_streamed_and_prepared_alike(tmp_path, name):
    folder = str(FOLDERS[name](tmp_path / "data"))
    splits = load_dataset("partonomy", name, data_dir=folder, cache_dir=tmp_path / "cache")
    assert "train" in splits
    for split, rows in splits.items():
        assert rows.features == GROUNDED_CONVERSATION_FEATURES
        assert len(set(rows["id"])) == len(rows) > 0
        for row in rows:
            check_row(row)
        streamed = load_dataset("partonomy", name, data_dir=folder, split=split, streaming=True)
        assert list(map(without_image, streamed)) == list(map(without_image, rows))


@pytest.mark.parametrize("name", SOURCES)
def test_an_empty_folder_is_refused_by_the_build(tmp_path, name):
    with pytest.raises(Exception, match="no such file|no annotations of"):
        load_dataset("partonomy", name, data_dir=str(tmp_path), cache_dir=tmp_path / "cache")


def test_the_check_counts_what_a_copy_gives_and_compares_it_with_what_was_published(tmp_path):
    report = validate("ade20k", ade20k_folder(tmp_path / "ade20k"))
    assert report.notes == [
        f"{split}: 2 images, of which 0 give nothing to talk about; 2 conversations, 3 questions, 3 spans of 3 masks"
        for split in ("train", "validation")
    ]
    assert len(report.problems) == 2
    assert "2 images, but the publishers count 20210; this is another version or a part of it" in report.problems[0]
    report = validate("llava_v1_5_mix665k", llava_folder(tmp_path / "llava", MIXTURE))
    assert report.problems == []
    assert report.notes == [
        "train: 4 chats, of which 1 give nothing to talk about; 3 conversations, 3 questions, 0 spans of 0 masks"
    ]


def test_a_bad_record_is_left_out_and_named_where_that_is_asked_for(tmp_path):
    folder = ade20k_folder(tmp_path / "data")
    Image.new("RGB", (16, 12)).save(folder / "annotations/training/ADE_training_0.png")
    options = {"data_dir": str(folder), "split": "train", "cache_dir": tmp_path / "cache"}
    with pytest.raises(Exception, match="generating|8 bits a pixel"):
        load_dataset("partonomy", "ade20k", **options)
    rows = load_dataset("partonomy", "ade20k", on_error="report", **options)
    assert {row["image_id"] for row in rows} == {"train-ADE_training_1"}
    (problem,) = partonomy_dataset.left_out(rows)
    assert "ADE_training_0.png" in problem


def bad_refcoco_folder(folder: Path) -> Path:
    """Three of the references are bad: one has no text, one leads to no image, one to no annotation of its image."""
    changes = [{"sentences": [{"raw": "lady"}]}, {"image_id": 3}, {"ann_id": 5}, {}]
    records = [reference(n, 2, f"dog {n}") | change for n, change in enumerate(changes)]
    return referring_folder(folder, SOURCES["refcoco"], records, *[encode(DOG)] * 5)


def bad_core_folder(folder: Path) -> Path:
    good = official_record()
    return official_folder(folder, good | {"image_path": "images/none.png"}, good | {"answer_parts": []}, good)


@pytest.mark.parametrize(
    ("name", "make_folder", "expected"),
    [
        ("refcoco", bad_refcoco_folder, ["field 'sent' is missing", "has no image 3", "has no annotation 5 of image"]),
        ("core_conversations", bad_core_folder, ["record 0, field 'image_path'", "record 1, field 'answer_parts'"]),
    ],
)
def test_records_that_are_bad_when_a_file_is_opened_are_left_out_too(tmp_path, name, make_folder, expected):
    options = {"data_dir": str(make_folder(tmp_path / "data")), "split": "train", "cache_dir": tmp_path / "cache"}
    with pytest.raises(DataError, match=expected[0]):
        load_dataset("partonomy", name, **options)
    rows = load_dataset("partonomy", name, on_error="report", **options)
    assert len(rows) == 1
    problems = partonomy_dataset.left_out(rows)
    assert len(problems) == len(expected)
    for text, problem in zip(expected, problems, strict=True):
        assert text in problem


def test_a_changed_label_map_is_read_again_and_not_served_from_the_cache(tmp_path):
    folder = ade20k_folder(tmp_path / "data")
    load = {"path": "partonomy", "name": "ade20k", "data_dir": str(folder), "cache_dir": tmp_path / "cache"}
    before = load_dataset(**load, split="train")
    Image.fromarray(np.full((12, 16), 7, dtype=np.uint8)).save(folder / "annotations/training/ADE_training_1.png")
    after = load_dataset(**load, split="train")
    labels = [[mask["label"] for row in rows for mask in row["masks"]] for rows in (before, after)]
    assert "class 7" in labels[1] and "class 7" not in labels[0]


def test_a_part_is_tagged_by_its_name_and_that_of_its_object(tmp_path):
    folder = FOLDERS["semantic_pascal_part"](tmp_path / "data")
    rows = load_dataset(
        "partonomy", "semantic_pascal_part", data_dir=str(folder), split="train", cache_dir=tmp_path / "cache"
    )
    phrases = {phrase for row in rows for message in row["messages"] for phrase in tagged_phrases(message["content"])}
    assert len(phrases) == 3
    for part, label in (("wheel", "bus"), ("license plate", "bus"), ("pot", "potted plant")):
        assert phrases & {f"{part} of the {label}", f"{label} {part}"}


def test_records_do_not_depend_on_the_order_of_the_file(tmp_path):
    made = []
    for reverse in (False, True):
        content = pascal_content()
        if reverse:
            content = {name: records[::-1] for name, records in content.items()}
        folder = pascal_folder(tmp_path / str(reverse), content)
        assert json.loads((folder / "train.json").read_text()) == content
        source = SOURCES["semantic_pascal_part"](folder, split="train")
        made.append([item.messages for index in range(len(source)) for item in source.conversations(index, seed=0)])
    assert made[0] == made[1]
