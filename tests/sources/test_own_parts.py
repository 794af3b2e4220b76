"""Folders of one's own: COCO and Labelme files, conversations, and what is said of a bad one."""

import base64
import io
import json
import re
import shutil
import zlib
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image

import partonomy_dataset  # noqa: F401
from plum_partonomy.cli import main
from plum_partonomy.drawn.miniature import DEFAULT_SEED
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.masks import DataError, decode, encode
from plum_partonomy.sources.conversation_file import ConversationFile
from plum_partonomy.sources.descriptor import Descriptor, hold_out
from plum_partonomy.sources.own_parts import OwnParts, open_own_parts
from plum_partonomy.sources.validate import validate
from tests.sources.test_official_and_descriptor import descriptor_content, descriptor_folder

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 2, 8, 2, 8, 8, 2, 8]
INSIDE = np.zeros((HEIGHT, WIDTH), dtype=bool)
INSIDE[2:8, 2:8] = True


def save_images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = zlib.crc32(f"{folder.name}/{name}".encode()).to_bytes(4)  # another for each image
        Image.new("RGB", (WIDTH, HEIGHT), tuple(colour[:3])).save(folder / name)
    return folder


def coco_content(images: int = 1) -> dict:
    """Each image shows a wheel, as polygon, and a door, as run lengths or a list of them."""
    return {
        "info": {"description": "mine"},
        "categories": [
            {"id": 1, "name": "wheel", "supercategory": "car"},
            {"id": 2, "name": "door", "supercategory": "car"},
        ],
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in range(images)
        ],
        "annotations": [
            {"id": 10 * number + part, "image_id": number, "category_id": part, "segmentation": segmentation}
            for number in range(images)
            for part, segmentation in ((1, [SQUARE]), (2, encode(INSIDE) if number % 2 == 0 else [encode(INSIDE)]))
        ],
    }


def coco_folder(folder: Path, content: dict, *, images: str = "") -> Path:
    save_images(folder, *(f"{images}{image['file_name']}" for image in coco_content(len(content["images"]))["images"]))
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))
    return folder


def labelme_content(*shapes: dict, **fields) -> dict:
    size = {"imagePath": "0.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.5.0", "flags": {}, "shapes": list(shapes), **size, "imageData": None} | fields


def shape(kind: str = "polygon", points=((2, 2), (8, 2), (8, 8), (2, 8)), label: str = "wheel", **fields) -> dict:
    points = [list(point) for point in points]
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | fields


def labelme_folder(folder: Path, *contents: dict) -> Path:
    save_images(folder, "0.png")
    for number, content in enumerate(contents):
        (folder / f"{number}.json").write_text(json.dumps(content))
    return folder


def record(id: str = "a", **fields) -> dict:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A <p>wheel</p>."}]
    masks = [{"label": "wheel", "rle": encode(INSIDE)}]
    return {"id": id, "image": "0.png", "messages": messages, "masks": masks} | fields


def conversation_folder(folder: Path, *records) -> Path:
    save_images(folder, "0.png")
    lines = [item if isinstance(item, str) else json.dumps(item) for item in records]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder


# ------------------------------------------------------------------------------------------------ kinds


def test_what_lies_in_the_folder_says_what_it_is(tmp_path):
    folders = {
        "coco": (coco_folder(tmp_path / "coco", coco_content()), OwnParts),
        "labelme": (labelme_folder(tmp_path / "labelme", labelme_content(shape())), OwnParts),
        "conversations": (conversation_folder(tmp_path / "conversations", record()), ConversationFile),
        "descriptor": (descriptor_folder(tmp_path / "descriptor", descriptor_content()), Descriptor),
    }
    assert all(isinstance(open_own_parts(folder), kind) for folder, kind in folders.values())


def test_annotations_two_folders_below_are_named(tmp_path):
    folder = coco_folder(tmp_path / "project" / "task 1", coco_content(), images="images/")
    with pytest.raises(DataError, match=re.escape(f"instances_default.json holds them, give {folder} instead")):
        open_own_parts(folder.parent)


def test_a_folder_of_no_kind_or_of_several_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="no such folder; data_dir must be the folder that holds your annotations"):
        open_own_parts(tmp_path / "none")
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="photos.zip: expected a folder, found a file; unpack it"):
        open_own_parts(tmp_path / "photos.zip")
    (tmp_path / "annotations.xml").write_text("<xml/>")
    (tmp_path / "settings.json").write_text('{"categories": {"label": {}}, "items": []}')  # Datumaro's own format
    with pytest.raises(
        DataError, match=r"no annotations of parts; .* \(1 json files are neither, such as settings.json\).*CVAT"
    ):
        open_own_parts(tmp_path)
    (tmp_path / "a.json").write_text(json.dumps(coco_content()))
    (tmp_path / "b.json").write_text(json.dumps(coco_content()))
    with pytest.raises(DataError, match="found COCO: a.json, b.json; leave one of them in the folder"):
        open_own_parts(tmp_path)
    (tmp_path / "b.json").write_text(json.dumps(labelme_content()))
    with pytest.raises(DataError, match="found COCO: a.json; Labelme: b.json"):
        open_own_parts(tmp_path)


# ------------------------------------------------------------------------------------------------ COCO


@pytest.mark.parametrize("images", ["", "images/", "images/default/", "annotations/"])
def test_a_coco_file_gives_the_parts_of_each_image_wherever_its_images_lie(tmp_path, images):
    source = open_own_parts(coco_folder(tmp_path / "data", coco_content(), images=images))
    (example,) = (source.example(index) for index in range(len(source)))
    assert (example.image_label, [mask.label for mask in example.masks]) == ("car", ["door", "wheel"])
    assert Path(example.image["path"]) == (tmp_path / "data" / images / "0.png").resolve()
    np.testing.assert_array_equal(decode(example.masks[0].rle), INSIDE)
    assert source.part_graph == {"car": ["door", "wheel"]}


@pytest.mark.parametrize(
    ("above", "image_label", "label"),
    [("car", "sedan", "sedan"), ("car", None, "car"), ("", None, "object"), ("none", None, "object"),
     ("wheel", None, "object"), (None, None, "object")],
)  # fmt: skip
def test_the_object_is_that_of_the_image_else_of_the_category_else_unnamed(tmp_path, above, image_label, label):
    content = coco_content()
    content["categories"][0]["supercategory"] = above
    content["annotations"] = content["annotations"][:1]
    if image_label is not None:
        content["images"][0]["image_label"] = image_label
    source = open_own_parts(coco_folder(tmp_path / "data", content))
    assert source.part_graph == {label: ["wheel"]}


def test_an_image_of_two_objects_gives_an_example_of_each_and_masks_of_one_part_are_united(tmp_path):
    content = coco_content()
    content["categories"].append({"id": 3, "name": "wing", "supercategory": "plane"})
    other = [12, 2, 18, 2, 18, 8, 12, 8]
    content["annotations"].append({"id": 3, "image_id": 0, "category_id": 3, "segmentation": [SQUARE]})
    content["annotations"].append({"id": 4, "image_id": 0, "category_id": 1, "segmentation": [other]})
    source = open_own_parts(coco_folder(tmp_path / "data", content))
    car, plane = (source.example(index) for index in range(2))
    assert (car.image_id, plane.image_id) == ("0.png#car", "0.png#plane")
    wheels = np.zeros_like(INSIDE)
    wheels[2:8, 2:8] = wheels[2:8, 12:18] = True
    np.testing.assert_array_equal(decode(car.masks[1].rle), wheels)


@pytest.mark.parametrize(
    ("whole", "image_label"),
    [({"name": "Car", "supercategory": ""}, ""), ({"name": "car", "supercategory": "car"}, ""),
     ({"name": "sedan", "supercategory": "vehicle"}, "sedan"), ({"name": "car"}, "sedan")],
)  # fmt: skip
def test_masks_and_boxes_of_whole_objects_are_no_parts(tmp_path, whole, image_label):
    content = coco_content(images=2)
    content["categories"].append({"id": 3} | whole)
    content["images"][0]["image_label"] = image_label
    content["annotations"] += [
        {"id": 7, "image_id": 0, "category_id": 3, "segmentation": [SQUARE]},
        {"id": 8, "image_id": 0, "category_id": 3, "segmentation": []},
    ]
    source = open_own_parts(coco_folder(tmp_path / "data", content))
    assert source.part_graph == dict.fromkeys(sorted({"car", image_label or "car"}), ["door", "wheel"])
    assert source.whole_objects == {whole["name"]}


def test_a_part_with_parts_of_its_own_stays_a_part(tmp_path):
    content = coco_content()
    content["categories"][0] |= {"name": "spoke", "supercategory": "door"}
    source = open_own_parts(coco_folder(tmp_path / "data", content))
    assert source.part_graph == {"car": ["door"], "door": ["spoke"]}


BAD_COCO = [
    ("annotations", {"image_id": 9}, r"record annotations\[0\], field 'image_id': no usable record has the id 9"),
    (
        "annotations",
        {"category_id": 9},
        r"record annotations\[0\], field 'category_id': no usable record has the id 9",
    ),
    ("annotations", {"segmentation": []}, r"annotations\[0\], field 'segmentation': a box without a mask"),
    ("annotations", {"segmentation": None}, r"annotations\[0\], field 'segmentation': a box without a mask"),
    ("annotations", {"segmentation": [[1, 1, 5, 5]]}, r"annotations\[0\], field 'segmentation'.*three x, y pairs"),
    ("annotations", {"segmentation": [[1, 1, 1, 1, 1, 1]]}, r"annotations\[0\].*the mask of 'wheel' covers no pixel"),
    ("annotations", {"segmentation": encode(INSIDE.T)}, r"annotations\[0\].*the mask has size \[30, 20\]"),
    (
        "images",
        {"file_name": "none.png"},
        r".*field 'file_name': there is no image 'annotations/none.png' nor 'none.png' nor 'images/none.png'",
    ),
    (
        "images",
        {"file_name": "\ud800.png"},
        r"record images\[0\], field 'file_name': there is no image",
    ),
    ("images", {"file_name": "a" * 5000}, r"record images\[0\], field 'file_name': there is no image"),
    (
        "categories",
        {"name": "<image>"},
        r"record categories\[0\], field 'name': the text contains '<image>', a special token",
    ),
    (
        "categories",
        {"supercategory": "a </s>"},
        r"categories\[0\], field 'supercategory': the text contains '</s>'",
    ),
    ("categories", {"supercategory": ["car"]}, r"categories\[0\], field 'supercategory': expected str or NoneType"),
    ("images", {"image_label": "<|im_end|>"}, r"record images\[0\], field 'image_label': the text contains '<.im_end"),
    ("images", {"file_name": "../../0.png"}, r"record images\[0\].*is outside"),
    ("images", {"width": WIDTH + 1}, r"record images\[0\].*size \[20, 31\].*\[20, 30\]"),
    ("images", {"id": None}, r"record images\[0\], field 'id': expected int"),
]


@pytest.mark.parametrize(("field", "changes", "message"), BAD_COCO)
def test_a_bad_coco_record_is_named_and_the_other_images_are_still_checked(tmp_path, field, changes, message):
    content = coco_content(images=2)
    content[field][0] |= changes
    report = validate("own_parts", coco_folder(tmp_path / "data", content))
    assert any(re.search(message, problem) for problem in report.problems), report.problems
    whole_file = field == "categories"
    assert whole_file or any(re.match("train: [12] images", note) for note in report.notes)
    with pytest.raises((DataError, DatasetGenerationError)) as caught:
        load_dataset("partonomy", "own_parts", data_dir=str(tmp_path / "data"), cache_dir=tmp_path / "cache")
    assert re.search(r"record (images|annotations|categories)\[[01]\]", str(caught.value.__cause__ or caught.value))


def test_an_image_too_narrow_to_be_resized_is_named(tmp_path):
    content = coco_content()
    content["images"][0] |= {"width": 2000, "height": 4}
    folder = coco_folder(tmp_path / "data", content)
    Image.new("RGB", (2000, 4)).save(folder / "0.png")
    problems = validate("own_parts", folder).problems
    assert any(
        re.search(r"images\[0\], field 'file_name': .*2000 x 4 pixels, and one side may be", p) for p in problems
    )


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_accents_of_file_names_may_be_stored_either_way(tmp_path, stored):
    content = coco_content()
    content["images"][0]["file_name"] = normalize("NFC" if stored == "NFD" else "NFD", "Rück.png")
    folder = coco_folder(tmp_path / "data", content)
    name = normalize(stored, "Rück.png")
    (folder / "0.png").rename(folder / name)
    assert open_own_parts(folder).example(0).image_id == name


def roboflow_folder(folder: Path, **images: int) -> Path:
    for name, count in images.items():
        content = coco_content(count)
        content["categories"].insert(0, {"id": 0, "name": "car", "supercategory": "none"})
        save_images(folder / name, *(image["file_name"] for image in content["images"]))
        (folder / name / "_annotations.coco.json").write_text(json.dumps(content))
    return folder


def test_the_layout_of_roboflow_keeps_its_splits(tmp_path):
    folder = roboflow_folder(tmp_path / "data", train=4, valid=2, test=3)
    report = validate("own_parts", folder)
    assert not report.problems
    assert [note.split(" conv")[0] for note in report.notes[1:]] == [
        "train: 4 images, 4",
        "validation: 2 images, 2",
        "test: 3 images, 3",
    ]
    rows = load_dataset("partonomy", "own_parts", data_dir=str(folder), cache_dir=tmp_path / "cache")
    assert rows["validation"]["image_id"][:] == ["valid/0.png", "valid/1.png"]
    assert rows["test"]["image_label"][:] == ["car"] * 3


@pytest.mark.parametrize("name", ["annotations/instances_{}.json", "{}2017.json"])
def test_coco_files_named_by_their_splits_keep_them(tmp_path, name):
    for number, (split, count) in enumerate({"Train": 4, "Val": 2}.items()):
        content = coco_content(count)
        for image in content["images"]:
            image["file_name"] = f"{number}{image['file_name']}"
        save_images(tmp_path / "images" / split, *(image["file_name"] for image in content["images"]))
        path = tmp_path / name.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        (tmp_path / "images" / f"{split}").rename(tmp_path / "images" / path.stem.removeprefix("instances_"))
    source = open_own_parts(tmp_path)
    assert {split: len(indices) for split, indices in source.splits(seed=0).items()} == {
        "train": 4, "validation": 2, "test": 0
    }  # fmt: skip
    (tmp_path / name.format("Other")).write_text(json.dumps(coco_content()))
    with pytest.raises(DataError, match="leave one of them in the folder, or COCO files named by their splits"):
        open_own_parts(tmp_path)


def test_labelme_files_in_folders_of_splits_keep_them(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        save_images(tmp_path / split, *(f"{number}.png" for number in range(count)))
        for number in range(count):
            content = labelme_content(shape(), imagePath=f"{number}.png")
            (tmp_path / split / f"{number}.json").write_text(json.dumps(content))
    source = open_own_parts(tmp_path)
    assert source.splits(seed=0) == {"train": [0, 1, 2], "validation": [3, 4], "test": []}
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "val" / "0.json", tmp_path / "other")
    save_images(tmp_path / "other", "0.png")
    assert sorted(index for split in open_own_parts(tmp_path).splits(seed=0).values() for index in split) == [
        *range(6)
    ]


def test_the_layout_of_roboflow_without_a_validation_split_is_a_problem(tmp_path):
    (problem,) = validate("own_parts", roboflow_folder(tmp_path / "data", train=12, test=3)).problems
    assert "the split validation has no image with a part" in problem


def test_one_photograph_in_two_splits_is_said_whatever_its_names(tmp_path):
    folder = roboflow_folder(tmp_path / "roboflow", train=4, valid=2, test=3)
    shutil.copy(folder / "train" / "2.png", folder / "valid" / "0.png")
    shutil.copy(folder / "train" / "1.png", folder / "train" / "0.png")  # in one split
    assert (
        "1 images are in two splits under two names, such as train/2.png (train) and valid/0.png (validation), so"
        in (validate("own_parts", folder).notes[-1])
    )


@pytest.mark.parametrize("kind", ["COCO", "Labelme", "conversations", "descriptor"])
def test_one_photograph_in_two_drawn_splits_is_said_in_every_format(tmp_path, kind):
    names = [f"{number}.png" for number in range(20)]
    if kind == "COCO":
        coco_folder(tmp_path, coco_content(images=20))
    elif kind == "Labelme":
        labelme_folder(tmp_path, *(labelme_content(shape(), imagePath=name) for name in names))
    elif kind == "conversations":
        conversation_folder(tmp_path, *(record(id=name, image=name) for name in names))
    else:
        masks = {"segmentations": {"wheel": [encode(INSIDE)]}, "segmentation_labels": ["wheel"]}
        content = descriptor_content()
        content["instances"] = [{"image_path": name, "image_label": "object--bus"} | masks for name in names]
        descriptor_folder(tmp_path, content)
    save_images(tmp_path, *names)
    source = open_own_parts(tmp_path)
    splits = source.splits(seed=DEFAULT_SEED)
    kept, copy = source.image_path(splits["train"][0]), source.image_path(splits["test"][0])
    assert not [note for note in validate("own_parts", tmp_path).notes if "two splits" in note]
    shutil.copy(tmp_path / kept, tmp_path / copy)
    (note,) = [note for note in validate("own_parts", tmp_path).notes if "two splits" in note]
    assert note.startswith("1 images are in two splits") and f"{kept} (train)" in note and f"{copy} (test)" in note


def test_one_file_that_two_splits_name_is_a_problem(tmp_path):
    folder = roboflow_folder(tmp_path / "data", train=4, valid=2)
    path = folder / "valid" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"file_name": "../train/0.png", "image_label": "van"}
    path.write_text(json.dumps(content))
    (problem,) = validate("own_parts", folder).problems
    assert "'train/0.png' is also in the split train" in problem


# ------------------------------------------------------------------------------------------------ Labelme


def test_older_files_of_labelme_are_read(tmp_path):
    old = labelme_content(shape(), flags=None)
    del old["imageHeight"], old["imageWidth"], old["shapes"][0]["shape_type"], old["shapes"][0]["flags"]
    (example,) = (open_own_parts(labelme_folder(tmp_path / "data", old)).example(0),)
    assert example.image_label == "object"
    np.testing.assert_array_equal(decode(example.masks[0].rle), INSIDE)


@pytest.mark.parametrize("kind", ["PNG", "EPS"])
def test_a_mask_picture_is_measured_before_it_is_decoded(tmp_path, kind):
    picture = io.BytesIO()
    Image.new("L", (4000, 4000)).save(picture, format=kind)
    found = shape("mask", [(2, 2), (7, 7)], mask=base64.b64encode(picture.getvalue()).decode())
    problems = validate("own_parts", labelme_folder(tmp_path / "data", labelme_content(found))).problems
    expected = (
        "field 'mask': the image has 4000 x 4000 pixels" if kind == "PNG" else "field 'mask': not a readable image"
    )
    assert any(expected in problem for problem in problems), problems


def test_shapes_of_labelme_become_masks(tmp_path):
    picture = io.BytesIO()
    Image.new("L", (6, 6), 255).save(picture, format="PNG")
    drawn = base64.b64encode(picture.getvalue()).decode()
    shapes = {
        "polygon": shape(),
        "rectangle": shape("rectangle", [(2, 2), (8, 8)]),
        "corners": shape("rectangle", [(2, 2), (8, 2), (8, 8), (2, 8)]),
        "rotated": shape("rotation", [(2, 2), (8, 2), (8, 8), (2, 8)]),
        "oriented": shape("oriented_rectangle", [(8, 2), (8, 8), (2, 8), (2, 2)]),
        "mask": shape("mask", [(2, 2), (7, 7)], mask=drawn),
        "moved mask": shape("mask", [(1.6, 2.4), (6.6, 7.4)], mask=drawn),
        "moved to a half": shape("mask", [(1.7, 1.5), (6.4, 6.5)], mask=drawn),
    }
    for name, found in shapes.items():
        source = open_own_parts(labelme_folder(tmp_path / name, labelme_content(found)))
        np.testing.assert_array_equal(decode(source.example(0).masks[0].rle), INSIDE)
    circle = open_own_parts(labelme_folder(tmp_path / "circle", labelme_content(shape("circle", [(10, 10), (10, 4)]))))
    area = decode(circle.example(0).masks[0].rle).sum()
    assert area == pytest.approx(np.pi * 36, rel=0.1)


def test_the_flag_that_is_set_names_the_object_and_empty_files_are_counted(tmp_path):
    flags = {"sedan": True, "pickup": False}
    named = labelme_content(shape(), shape(label="Sedan"), flags=flags, imagePath="..\\data\\0.png")
    folder = labelme_folder(tmp_path / "data", named, labelme_content(imagePath="1.png"))
    (folder / ".checkpoints").mkdir()
    (folder / ".checkpoints" / "0.json").write_text((folder / "0.json").read_text())
    source = open_own_parts(folder)
    assert (source.example(0).image_label, source.unannotated) == ("sedan", ["1.png"])
    assert (source.part_graph, source.whole_objects) == ({"sedan": ["wheel"]}, {"Sedan"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            labelme_content(shape("line", [(1, 1), (5, 5)])),
            r"shapes\[0\]'.*expected polygon, rectangle, circle or mask",
        ),
        (
            labelme_content(shape("rectangle", [(1, 1)])),
            r"field 'shapes\[0\]', field 'points': expected 2 or 4 points",
        ),
        (labelme_content(shape("mask", [(0, 0), (3, 3)], mask="AAAA")), "field 'mask': not a readable image"),
        (labelme_content(shape(), flags={"a": True, "b": True}), "field 'flags': the flag that is set names the obj"),
        (labelme_content(shape(), imageHeight=None), "field 'imageHeight': expected int"),
        (labelme_content(shape(), imagePath="none.png"), "field 'imagePath': there is no image 'none.png'"),
        (labelme_content(shape(label="<image>")), r"'shapes\[0\]', field 'label': the text contains '<image>'"),
        (
            labelme_content(shape("mask", [(2, 2), (1e300, 7)], mask="")),
            r"field 'points': the box .* leaves the image",
        ),
        (labelme_content(shape(), imagePath="/etc/0.png"), "is outside"),
        (labelme_content(shape(label="Wheel"), shape()), "'Wheel' and 'wheel' differ only in case"),
    ],
)
def test_a_bad_labelme_file_is_named(tmp_path, content, message):
    problems = validate("own_parts", labelme_folder(tmp_path / "data", content)).problems
    assert any(re.search(message, problem) for problem in problems), problems


def test_two_files_about_one_image_are_refused(tmp_path):
    with pytest.raises(DataError, match="1.json: has the image '0.png', as has .*0.json"):
        open_own_parts(labelme_folder(tmp_path / "data", labelme_content(shape()), labelme_content(shape())))


# ------------------------------------------------------------------------------------------------ conversations


def test_conversations_are_read_as_they_are(tmp_path):
    text = {"image": None, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    folder = conversation_folder(
        tmp_path / "data", record(), record("b", image_label="bus"), record("c", **text, masks=[])
    )
    rows = load_dataset("partonomy", "own_parts", data_dir=str(folder), cache_dir=tmp_path / "cache")
    assert {split: rows[split]["id"][:] for split in rows} == {"train": ["a", "b", "c"]}
    assert rows["train"].features == GROUNDED_CONVERSATION_FEATURES
    first, second, third = rows["train"]
    assert (first["messages"], first["masks"]) == (record()["messages"], record()["masks"])
    assert (first["image"].size, second["image_label"], third["image"]) == ((WIDTH, HEIGHT), "bus", None)
    with pytest.raises(Exception, match="holds conversations, but questions are made about masks"):
        load_dataset("partonomy", "own_parts_questions", data_dir=str(folder), cache_dir=tmp_path / "cache")


BAD_RECORDS = [
    ("{", "line 2: expected JSON"),
    ("[]", "line 2: expected an object"),
    ({"id": "b", "messages": [], "masks": []}, "line 2: field 'image' is missing"),
    (record("b", colour="red"), r"line 2: unknown fields \['colour'\]"),
    (record("a"), "line 2, field 'id': 'a' is also the id of .*line 1"),
    (record("b", masks=[]), "line 2, field 'masks': 1 span tags, but 0 masks"),
    (record("b", messages=record()["messages"][:1]), "line 2.*(ends with the user|1 masks)"),
    (record("b", messages=[{"role": "user", "content": "<p>A wheel</p>?"}]), "line 2.*contains the span tag"),
    (
        record("b", messages=[{"role": "user", "content": "<image>\nWhat?"}, record()["messages"][1]]),
        r"line 2, field 'messages\[0\]', field 'content': the text contains '<image>'",
    ),
    (
        record("b", messages=[record()["messages"][0], {"role": "assistant", "content": "A <p>wheel</p>.</s>"}]),
        r"line 2, field 'messages\[1\]', field 'content': the text contains '</s>'",
    ),
    (
        record(
            "b",
            messages=[record()["messages"][0], {"role": "assistant", "content": "<p>a</p><p>b</p>"}],
            masks=record()["masks"] * 2,
        ),
        r"line 2, field 'messages\[1\]': two span tags need a space",
    ),
    (record("b", image="none.png"), "line 2, field 'image': there is no image 'none.png'"),
    (record("b", image=None), r"line 2, field 'masks\[0\]': a mask, but the field 'image' is null"),
    (record("b", masks=[{"label": "w", "rle": encode(~INSIDE & INSIDE)}]), r"'masks\[0\]': the mask covers no pixel"),
    (record("b", masks=[{"label": "w", "rle": encode(INSIDE.T)}]), r"'masks\[0\]'.*the mask has size \[30, 20\]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS)
def test_a_bad_conversation_is_named_by_its_line(tmp_path, bad, message):
    report = validate("own_parts", conversation_folder(tmp_path / "data", record(), bad))
    assert any(re.search(message, problem) for problem in report.problems), report.problems


# ------------------------------------------------------------------------------------------------ data set and command


def varied_content(images: int = 20) -> dict:
    """Each image shows some of six parts, the first of them always."""
    content = coco_content(images)
    content["categories"] = [{"id": part, "name": f"part {part}", "supercategory": "car"} for part in range(6)]
    content["annotations"] = [
        {"id": 10 * number + part, "image_id": number, "category_id": part, "segmentation": [SQUARE]}
        for number in range(images)
        for part in range(6)
        if part == 0 or number >> part - 1 & 1
    ]
    return content


def test_a_folder_becomes_conversations_and_questions_about_images_held_out(tmp_path):
    content = varied_content()
    folder = coco_folder(tmp_path / "data", content)
    load = {"data_dir": str(folder), "cache_dir": tmp_path / "cache"}
    rows = load_dataset("partonomy", "own_parts", **load)
    assert {split: len(rows[split]) for split in rows} == {"train": 16, "validation": 2, "test": 2}
    questions = load_dataset("partonomy", "own_parts_questions", **load)
    for split in ("validation", "test"):
        assert 0 < len(set(questions[split]["image_id"])) <= 2
        assert set(questions[split]["image_id"]) <= set(rows[split]["image_id"])
    content["categories"][0]["name"] = "wheel"
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))
    changed = load_dataset("partonomy", "own_parts", **load, split="train")
    assert "wheel" in {mask["label"] for masks in changed["masks"] for mask in masks}


def test_an_object_without_a_name_is_not_asked_for_nor_compared_with(tmp_path):
    content = varied_content()
    for category in content["categories"]:
        del category["supercategory"]
    folder = coco_folder(tmp_path / "data", content)
    load = {"data_dir": str(folder), "cache_dir": tmp_path / "cache", "split": "train"}
    rows, questions = (load_dataset("partonomy", name, **load) for name in ("own_parts", "own_parts_questions"))
    texts = [message["content"].lower() for messages in rows["messages"] for message in messages]
    assert len(texts) >= 2 * len(rows) and not [text for text in texts if "an object" in text]
    assert set(questions["question_type"]) == {"identification"}


def test_the_command_takes_the_folder_alone_and_says_what_will_be_trained(tmp_path, capsys):
    content = coco_content(images=20)
    content["images"].append({"id": 99, "file_name": "empty.png", "height": HEIGHT, "width": WIDTH})
    content["categories"].append({"id": 3, "name": "car"})
    content["annotations"].append({"id": 999, "image_id": 0, "category_id": 3, "segmentation": [SQUARE]})
    folder = coco_folder(tmp_path / "data", content)
    assert main(["data", "validate", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"COCO in {folder}/annotations/instances_default.json: car (2 parts)"
    assert lines[1] == "1 images show no part and are left out, such as annotations/empty.png"
    assert lines[2] == "masks and boxes of whole objects are no parts and are left out: car"
    assert lines[3].startswith("train: 16 images, 16 conversations, ") and lines[3].endswith(" spans of 32 masks")
    assert lines[4].startswith("validation: 2 images, 2 conversations, ")
    assert lines[5].startswith("test: 2 images, 2 conversations, ")
    assert lines[6] == "1 images are in no annotation and are left out, such as 20.png"
    assert lines[7] == f"{folder} is complete"


@pytest.mark.parametrize("kind", ["COCO", "Labelme", "conversations"])
def test_what_is_in_no_annotation_is_said(tmp_path, kind):
    names = [f"{number}.png" for number in range(10)]
    if kind == "COCO":
        coco_folder(tmp_path, coco_content(images=10))
    elif kind == "Labelme":
        labelme_folder(tmp_path, *(labelme_content(shape(), imagePath=name) for name in names))
    else:
        conversation_folder(tmp_path, *(record(id=name, image=name) for name in names))
    save_images(tmp_path, *names, "new/photo.JPG", ".cache/hidden.png")
    (tmp_path / "classes.json").write_text('["wheel"]')
    report = validate("own_parts", tmp_path)
    said = [note for note in report.notes if "left out" in note]
    files = [] if kind == "conversations" else ["1 files are no annotations and are left out, such as classes.json"]
    assert not report.problems
    assert said == [*files, "1 images are in no annotation and are left out, such as new/photo.JPG"]


@pytest.mark.parametrize("kind", ["COCO", "Labelme"])
@pytest.mark.parametrize("name", [" ", "wheel"])
def test_an_empty_name_and_a_file_that_was_cut_are_one_line_with_their_place(tmp_path, kind, name):
    if kind == "COCO":
        content, place = coco_content(), "record categories[0], field 'name'"
        content["categories"][0]["name"] = name
        path = coco_folder(tmp_path, content) / "annotations" / "instances_default.json"
    else:
        place = "field 'shapes[0]', field 'label'"
        path = labelme_folder(tmp_path, labelme_content(shape(label=name)), labelme_content(shape())) / "0.json"
    if name == "wheel":
        path.write_bytes(path.read_bytes()[:-9])
    problem = validate("own_parts", tmp_path).problems[0]
    empty, cut = "expected the name of a part, found an empty text; write it", "the file is damaged or cut short"
    assert (cut if name == "wheel" else f"{place}: {empty}") in problem
    assert problem.startswith(str(path)) and "\n" not in problem


def test_too_few_images_to_hold_one_out_are_a_problem(tmp_path):
    (problem,) = validate("own_parts", coco_folder(tmp_path / "data", coco_content(images=9))).problems
    assert problem == f"{tmp_path}/data: at least 10 images are needed; one in 10 is held out to select a checkpoint"


def test_splits_are_about_tenths_and_stay_when_images_are_added():
    paths = [f"images/{number}.jpg" for number in range(2000)]
    few, many = (hold_out(paths[:count], seed=1) for count in (1000, 2000))
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert set(few[split]) == {index for index in many[split] if index < 1000}
        assert len(many[split]) / 2000 == pytest.approx(share, abs=0.02)
    assert hold_out(paths[:1000][::-1], seed=1)["test"] == sorted(999 - index for index in few["test"])


@pytest.mark.parametrize("count", range(1, 60))
def test_a_small_folder_has_images_in_every_split_once_it_has_ten(count):
    objects = [f"{number // 2}.jpg" for number in range(2 * count)]
    splits = hold_out(objects, seed=0)
    images = {split: {objects[index] for index in indices} for split, indices in splits.items()}
    assert sorted(index for indices in splits.values() for index in indices) == list(range(2 * count))
    assert sum(map(len, images.values())) == count
    for split in ("validation", "test"):
        assert len(images[split]) >= min(2, count // 10)
        assert count >= 10 or not images[split]
