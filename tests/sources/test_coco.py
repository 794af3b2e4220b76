"""Pascal-Part, PACO-LVIS and PartImageNet, each in miniature as published; none of their data is in the repository."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plum_partonomy.masks import DataError, decode, encode
from plum_partonomy.sources.paco_lvis import PacoLvis
from plum_partonomy.sources.partimagenet import PartImageNet
from plum_partonomy.sources.pascal_part import PascalPart
from tests.sources.test_official_and_descriptor import changed

HEIGHT, WIDTH = 40, 60


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def runs(mask: np.ndarray) -> dict:
    """The uncompressed RLE that COCO gives a crowd region: run lengths, column by column."""
    pixels = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, mask.size]).tolist()}


def annotation(id: int, category_id: int, segmentation, **fields) -> dict:
    return {"id": id, "image_id": 1, "category_id": category_id, "segmentation": segmentation, **fields}


def image(id: int, file_name: str) -> dict:
    return {"id": id, "file_name": file_name, "height": HEIGHT, "width": WIDTH}


def write(folder: Path, annotations: str, content: dict, *images: str) -> Path:
    for name in (annotations, *images):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / annotations).write_text(json.dumps(content))
    for name in images:
        Image.new("RGB", (WIDTH, HEIGHT), "white").save(folder / name)
    return folder


LEFT_WHEEL, RIGHT_WHEEL, PLATE = box(2, 20, 8, 30), box(30, 20, 40, 30), box(4, 2, 6, 4)


def pascal_content() -> dict:
    return {
        "categories": [
            {"id": 19, "name": "bus:license plate", "abbr": "bus:liplate"},
            {"id": 24, "name": "bus:wheel"},
            {"id": 84, "name": "potted plant:pot"},
        ],
        "images": [image(1, "2008_000003.jpg"), image(2, "2008_000009.jpg")],
        "annotations": [
            annotation(0, 24, encode(LEFT_WHEEL), iscrowd=0, area=60.0, bbox=[2.0, 20.0, 6.0, 10.0]),
            annotation(1, 24, runs(RIGHT_WHEEL), iscrowd=1),
            annotation(2, 19, [[4, 2, 6, 2, 6, 4, 4, 4]], iscrowd=0),
            annotation(3, 84, encode(PLATE), iscrowd=0),
        ],
    }


VOC = "VOCdevkit/VOC2010/JPEGImages"


def pascal_folder(folder: Path, content: dict) -> Path:
    return write(folder, "train.json", content, f"{VOC}/2008_000003.jpg", f"{VOC}/2008_000009.jpg")


def test_pascal_part_gives_one_example_per_object_label_with_polygons_and_both_kinds_of_rle(tmp_path):
    source = PascalPart(pascal_folder(tmp_path, pascal_content()))
    assert source.part_graph == {"bus": ["license plate", "wheel"], "potted plant": ["pot"]}
    assert source.instance_graph == {"object": ["bus", "potted plant"], "bus": [], "potted plant": []}
    bus, plant = source
    assert (bus.image_label, bus.source, bus.image_id) == ("bus", "pascal_part", "train-1-bus")
    assert bus.image == {"bytes": None, "path": str((tmp_path / VOC / "2008_000003.jpg").resolve())}
    assert source.image_path(0) == source.image_path(1) == f"{VOC}/2008_000003.jpg"
    assert [mask.label for mask in bus.masks] == ["license plate", "wheel"]
    np.testing.assert_array_equal(decode(bus.masks[0].rle), PLATE)
    np.testing.assert_array_equal(decode(bus.masks[1].rle), LEFT_WHEEL | RIGHT_WHEEL)
    assert (plant.image_label, [mask.label for mask in plant.masks]) == ("potted plant", ["pot"])


def paco_content() -> dict:
    attributes = {"attribute_ids": [2, 30], "dom_color_ids": [2], "unknown_color": 0, "unknown_material": 1}
    return {
        "categories": [
            {"id": 98, "name": "car_(automobile)", "supercategory": "OBJECT", "synset": "car.n.01"},
            {"id": 5, "name": "trash_can", "supercategory": "OBJECT"},
            {"id": 301, "name": "car_(automobile):wheel", "supercategory": "PART"},
            {"id": 302, "name": "car_(automobile):taillight", "supercategory": "PART"},
            {"id": 303, "name": "trash_can:inner_side", "supercategory": "PART"},
        ],
        "part_categories": [{"id": 1, "name": "wheel", "supercategory": "PART"}],
        "attributes": [{"id": 2, "name": "blue", "supercategory": "ATTR"}],
        "images": [image(1, "train2017/000000000001.jpg"), image(2, "val2017/000000000002.jpg")],
        "annotations": [
            annotation(6, 301, encode(LEFT_WHEEL), obj_ann_id=5, **attributes),
            annotation(5, 98, [[1, 1, 20, 1, 20, 35, 1, 35]], obj_ann_id=5, **attributes),
            annotation(7, 98, [[28, 1, 58, 1, 58, 35, 28, 35]], obj_ann_id=7, **attributes),
            annotation(8, 301, encode(RIGHT_WHEEL), obj_ann_id=7),
            annotation(9, 98, encode(PLATE), obj_ann_id=9),
            annotation(10, 302, [], obj_ann_id=7),
            annotation(11, 5, encode(PLATE), obj_ann_id=11),
            annotation(12, 303, encode(PLATE), obj_ann_id=11),
        ],
    }


PACO = "annotations/paco_lvis_v1_train.json"


def paco_folder(folder: Path, content: dict) -> Path:
    return write(folder, PACO, content, "coco/train2017/000000000001.jpg", "images/val2017/000000000002.jpg")


def test_paco_is_about_the_largest_of_the_objects_with_the_most_parts_and_draws_a_box_around_it(tmp_path):
    source = PacoLvis(paco_folder(tmp_path, paco_content()))
    assert source.part_graph == {"car": ["taillight", "wheel"], "trash can": ["inner side"]}
    car, trash_can = source
    assert (car.image_label, [mask.label for mask in car.masks]) == ("car", ["wheel"])
    np.testing.assert_array_equal(decode(car.masks[0].rle), RIGHT_WHEEL)
    pixels = np.asarray(Image.open(io.BytesIO(car.image["bytes"]))).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    red = pixels[..., 0] - pixels[..., 1] > 128
    rows, columns = np.nonzero(red)
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (0, 23, HEIGHT - 1, WIDTH - 1)
    assert not red[3:-3, 26:-3].any() and not red[:, :20].any()
    assert trash_can.image["path"].endswith("coco/train2017/000000000001.jpg")


def test_paco_prefers_the_object_with_more_parts_to_a_larger_one(tmp_path):
    content = paco_content()
    content["annotations"].append(annotation(13, 302, encode(PLATE), obj_ann_id=5))
    car, _ = PacoLvis(paco_folder(tmp_path, content))
    assert [mask.label for mask in car.masks] == ["taillight", "wheel"]
    np.testing.assert_array_equal(decode(car.masks[1].rle), LEFT_WHEEL)


def test_annotations_that_cover_nothing_are_counted_and_images_without_parts_give_no_example(tmp_path):
    source = PacoLvis(paco_folder(tmp_path, paco_content()))
    assert source.blank == 1
    assert source.counts == {"images": 2, "objects": 4, "parts": 4}
    assert {source.image_path(index) for index in range(len(source))} == {"coco/train2017/000000000001.jpg"}


def partimagenet_content() -> dict:
    return {
        "images": [image(1, "n02071294_1.JPEG"), image(2, "n01440764_2.JPEG")],
        "annotations": [
            annotation(1, 0, [[2, 20, 8, 20, 8, 30, 2, 30], [5, 5]], iscrowd=0),
            annotation(2, 1, [[5, 5, 6, 6]], iscrowd=0),
            annotation(3, 30, [[30, 20, 40, 20, 40, 30, 30, 30]], iscrowd=0) | {"image_id": 2},
        ],
        "categories": [
            {"id": 0, "name": "Quadruped Head", "supercategory": "Quadruped"},
            {"id": 1, "name": "Quadruped Body", "supercategory": "Quadruped"},
            {"id": 30, "name": "Car Side Mirror", "supercategory": "Car"},
        ],
    }


@pytest.mark.parametrize(
    ("file", "folder"), [("{}.json", "{}/{}"), ("annotations/{0}/{0}.json", "images/{}"), ("{}.json", "{}")]
)
def test_partimagenet_reads_every_split_from_the_layouts_in_use(tmp_path, file, folder):
    for split in ("train", "val"):
        names = ("n02071294", "n02071294_1.JPEG"), ("n01440764", "n01440764_2.JPEG")
        images = [f"{folder.format(split, synset)}/{name}" for synset, name in names]
        write(tmp_path, file.format(split), partimagenet_content(), *images)
    assert PartImageNet.splits(tmp_path) == ["train", "validation"]
    for split in PartImageNet.splits(tmp_path):
        source = PartImageNet(tmp_path, split=split)
        assert source.part_graph == {"car": ["side mirror"], "quadruped": ["body", "head"]}
        quadruped, car = source
        assert (quadruped.image_label, [mask.label for mask in quadruped.masks]) == ("quadruped", ["head"])
        np.testing.assert_array_equal(decode(quadruped.masks[0].rle), LEFT_WHEEL)
        np.testing.assert_array_equal(decode(car.masks[0].rle), RIGHT_WHEEL)
        assert source.blank == 1


BOMB = {"size": [HEIGHT, WIDTH], "counts": encode(np.ones((6000, 6000), dtype=bool))["counts"]}
BAD_PASCAL = [
    (("annotations", 1, "id"), 0, r"record annotations\[1\], field 'id': 0 is also the id of record 0"),
    (("images", 1, "id"), 1, r"record images\[1\], field 'id': 1 is also the id of record 0"),
    (("categories", 1, "id"), 19, r"record categories\[1\], field 'id': 19 is also the id of record 0"),
    (
        ("categories", 1, "name"),
        "bus:license plate",
        r"record categories\[1\]: names .* as does the category of id 19",
    ),
    (("categories", 1, "name"), "bus:License  plate", "differ only in case or spaces"),
    (("categories", 1, "name"), "Bus:wheel", "differ only in case or spaces"),
    (("categories", 1, "name"), "wheel", r"record categories\[1\], field 'name': expected object:part, found 'wheel'"),
    (("annotations", 1, "image_id"), 7, r"record annotations\[1\], field 'image_id': no usable record has the id 7"),
    (
        ("annotations", 1, "category_id"),
        7,
        r"record annotations\[1\], field 'category_id': no usable record has the id 7",
    ),
    (("annotations", 0, "segmentation"), BOMB, r"annotations\[0\], field 'segmentation'.*more than 2400 pixels"),
    (("annotations", 0, "segmentation"), {"size": [60_000, 60_000], "counts": [0]}, r"annotations\[0\].*the limit"),
    (("annotations", 0, "segmentation"), encode(LEFT_WHEEL.T), r"annotations\[0\].*mask has size \[60, 40\]"),
    (("annotations", 0, "segmentation"), [[70, 1, 80, 1, 80, 9]], r"annotations\[0\].*is outside the image"),
    (("annotations", 0, "segmentation"), "kV]", r"annotations\[0\], field 'segmentation': expected list or dict"),
    (
        ("images", 0, "file_name"),
        "none.jpg",
        r"images\[0\], field 'file_name': there is no image VOCdevkit/.*none.jpg",
    ),
    (("images", 0, "file_name"), "../../../../outside.jpg", r"images\[0\].*is outside"),
    (("images", 0, "height"), HEIGHT + 1, r"images\[0\], fields 'height' and 'width'.*size \[41, 60\]"),
    (("annotations",), [], "field 'annotations': expected a non-empty list"),
    (("annotations",), {"0": {}}, "field 'annotations': expected a non-empty list"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD_PASCAL)
def test_a_bad_record_is_refused_naming_file_record_and_field(tmp_path, path, value, message):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.jpg")
    content = changed(pascal_content(), *path, value=value)
    with pytest.raises(DataError, match=f"train.json.*{message}"):
        list(PascalPart(pascal_folder(tmp_path / "data", content)))


def test_an_object_without_a_mask_may_own_parts_unless_its_size_decides(tmp_path):
    content = paco_content()
    content["annotations"] = [
        annotation(5, 98, [], obj_ann_id=5),
        annotation(6, 301, encode(LEFT_WHEEL), obj_ann_id=5),
    ]
    (car,) = PacoLvis(paco_folder(tmp_path / "one", content))
    assert [mask.label for mask in car.masks] == ["wheel"]
    content["annotations"] += [annotation(7, 98, encode(PLATE), obj_ann_id=7)]
    with pytest.raises(DataError, match=r"annotations\[0\], field 'segmentation': expected a list of polygons"):
        list(PacoLvis(paco_folder(tmp_path / "two", content)))


def test_a_part_whose_object_is_not_in_the_image_is_refused(tmp_path):
    content = changed(paco_content(), "annotations", 0, "obj_ann_id", value=11)
    with pytest.raises(DataError, match=r"annotations\[0\], field 'obj_ann_id': 11 is no 'car' in its image"):
        list(PacoLvis(paco_folder(tmp_path, content)))


def test_an_image_that_its_orientation_turns_away_from_its_masks_is_refused(tmp_path):
    folder = pascal_folder(tmp_path, pascal_content())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / VOC / "2008_000003.jpg", exif=exif)
    with pytest.raises(DataError, match=r"images\[0\].*2008_000003.jpg' is turned by its EXIF orientation"):
        list(PascalPart(folder))


def test_a_folder_without_annotations_is_refused_saying_what_it_should_hold(tmp_path):
    with pytest.raises(DataError, match="no annotations of paco_lvis; expected one of annotations/paco_lvis_v1_train"):
        PacoLvis.splits(tmp_path)
    with pytest.raises(DataError, match="val.json: no such file"):
        PascalPart(tmp_path, split="validation")


def test_annotations_of_whole_objects_alone_are_another_version(tmp_path):
    content = changed(paco_content(), "categories", value=[{"id": 98, "name": "car_(automobile)"}])
    with pytest.raises(DataError, match="no category names a part of an object; this is another version of paco_lvis"):
        PacoLvis(paco_folder(tmp_path, content))
