"""RefCOCO and its relatives in miniature as published, and pickles that are none; none of their data is here."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plum_partonomy.masks import DataError, decode, encode
from plum_partonomy.questions.grounding import PHRASINGS
from plum_partonomy.records import tagged_phrases
from plum_partonomy.sources.plain_pickle import read_plain_pickle
from plum_partonomy.sources.referring import GRefCoco, RefClef, RefCoco, RefCocoG, RefCocoPlus, Referring

HEIGHT, WIDTH = 20, 30


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


LADY, DOG, BALL = box(1, 2, 9, 18), box(12, 5, 25, 15), box(26, 1, 29, 4)


def reference(ref_id: int, ann_id, *expressions: str, split: str = "train", image_id: int = 581857) -> dict:
    sentences = [
        {"tokens": text.split(), "raw": text.upper(), "sent_id": ref_id * 10 + number, "sent": text}
        for number, text in enumerate(expressions)
    ]
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "category_id": 1,
    }


def refs() -> list[dict]:
    return [
        reference(0, 1, "the lady with the blue shirt", "left  lady "),
        reference(1, 2, "dog"),
        reference(2, 2, "dog", split="testA", image_id=25),
        reference(3, 3, "<p>ball</p>", ""),
        reference(4, 4, "nothing drawn"),
    ]


def instances(*segmentations) -> dict:
    return {
        "info": {"description": "This is a miniature."},
        "licenses": [],
        "images": [
            {"id": id, "file_name": f"COCO_train2014_{id:012d}.jpg", "height": HEIGHT, "width": WIDTH, "license": 1}
            for id in (581857, 25)
        ],
        "annotations": [
            {"id": id, "image_id": 25 if id == 5 else 581857, "segmentation": item, "iscrowd": 0, "category_id": 1}
            for id, item in enumerate(segmentations, start=1)
        ],
        "categories": [{"id": 1, "name": "thing", "supercategory": "thing"}],
    }


POLYGON = [[1, 2, 9, 2, 9, 18, 1, 18]]


def referring_folder(
    folder: Path, kind: type[Referring], records: list[dict], *segmentations, protocol: int = 2
) -> Path:
    """A folder as the publishers' archives unpack to; the pickles are of the time of Python 2."""
    path = folder / kind.refs_file
    path.parent.mkdir(parents=True)
    content = json.dumps(records).encode() if path.suffix == ".json" else pickle.dumps(records, protocol)
    path.write_bytes(content)
    (path.parent / "instances.json").write_text(json.dumps(instances(*segmentations)))
    images = folder / kind.image_folders[0]
    images.mkdir(parents=True)
    for id in (581857, 25):
        Image.new("RGB", (WIDTH, HEIGHT), "white").save(images / f"COCO_train2014_{id:012d}.jpg")
    return folder


def refcoco_folder(folder: Path, kind: type[Referring] = RefCoco, *, protocol: int = 2) -> Path:
    records = refs()
    records[2]["ann_id"] = 5
    segmentations = (POLYGON, encode(DOG), encode(BALL), [], encode(DOG))
    return referring_folder(folder, kind, records, *segmentations, protocol=protocol)


def grefcoco_folder(folder: Path) -> Path:
    records = [
        reference(0, [1, 2], "the lady and the dog"),
        reference(1, [-1], "two cats") | {"no_target": True, "category_id": [-1]},
        reference(2, [2], "the dog"),
        reference(3, [5], "the dog", split="val", image_id=25),
    ]
    return referring_folder(folder, GRefCoco, records, POLYGON, encode(DOG), encode(BALL), [], encode(DOG))


def answers(source: Referring, index: int = 0) -> dict[str, np.ndarray]:
    """What is tagged in the conversations about an image -> its mask."""
    found = {}
    for conversation in source.conversations(index, seed=0):
        phrases = [phrase for message in conversation.messages for phrase in tagged_phrases(message["content"])]
        assert [mask.label for mask in conversation.masks] == phrases
        found |= {mask.label: decode(mask.rle) for mask in conversation.masks}
    return found


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [RefCoco, RefCocoPlus, RefCocoG])
def test_every_expression_is_asked_for_with_the_mask_of_its_object(tmp_path, kind, protocol):
    folder = refcoco_folder(tmp_path, kind, protocol=protocol)
    assert kind.splits(folder) == ["testA", "train"]
    found = answers(source := kind(folder))
    assert set(found) == {"the lady with the blue shirt", "left lady", "dog", "<p>ball</p>"}
    for expression, mask in (("left lady", LADY), ("dog", DOG), ("<p>ball</p>", BALL)):
        np.testing.assert_array_equal(found[expression], mask)
    assert source.blank == 2
    assert source.counts == {"images": 1, "references": 4}
    assert set(answers(kind(folder, split="testA"))) == {"dog"}


def test_refclef_has_lists_of_compressed_masks(tmp_path):
    masks = [[encode(LADY), encode(BALL)], [encode(DOG)]]
    folder = referring_folder(tmp_path, RefClef, [reference(0, 1, "lady"), reference(1, 2, "dog")], *masks)
    found = answers(RefClef(folder))
    np.testing.assert_array_equal(found["lady"], LADY | BALL)
    np.testing.assert_array_equal(found["dog"], DOG)


def test_grefcoco_unites_several_objects_and_answers_without_a_tag_where_there_is_none(tmp_path):
    folder = grefcoco_folder(tmp_path)
    assert GRefCoco.splits(folder) == ["train", "validation"]
    source = GRefCoco(folder)
    found = answers(source)
    assert set(found) == {"the lady and the dog", "the dog"}
    np.testing.assert_array_equal(found["the lady and the dog"], LADY | DOG)
    (conversation,) = source.conversations(0, seed=0)
    texts = [message["content"] for message in conversation.messages]
    (empty,) = [text for question, text in zip(texts[::2], texts[1::2], strict=True) if "two cats" in question]
    assert empty in {absence for _, _, absence in PHRASINGS}
    assert source.blank == 0


class Malicious:
    """Pickled, it is an order to make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, protocol):
    folder, victim = refcoco_folder(tmp_path / "data"), tmp_path / "victim"
    content = pickle.dumps([*refs(), Malicious(victim)], protocol)
    (folder / RefCoco.refs_file).write_bytes(content)
    for read in (RefCoco, RefCoco.splits):
        with pytest.raises(DataError, match=r"refs\(unc\).p: expected a pickle of plain lists.*instruction [A-Z_]+,"):
            read(folder)
    assert not victim.exists()
    pickle.loads(content)
    assert victim.exists()  # it would have run


INSTRUCTIONS = {
    "a class by name": (b"cbuiltins\nset\n.", "GLOBAL"),
    "an instance": (b"(ibuiltins\nset\n.", "INST"),
    "an extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "a persistent id": (b"Pid\n.", "PERSID"),
    "a set": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "a state": (b"\x80\x02]}b.", "BUILD"),
}


@pytest.mark.parametrize("what", INSTRUCTIONS)
def test_instructions_beyond_plain_data_are_refused_by_name(tmp_path, what):
    content, name = INSTRUCTIONS[what]
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(DataError, match=f"instruction {name}, which can run code"):
        read_plain_pickle(tmp_path / "refs.p")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or cut short"),
        (b"]", "damaged or cut short"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "found the index 2147483647"),
        (b"Np99999999999\n.", "found the index 99999999999"),
        (b"\x80\x04B\xff\xff\xff\xffabc.", "damaged or cut short"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "damaged or cut short"),
        (b"h\x07.", "damaged or cut short"),
        (b"\x80\x63N.", "damaged or cut short"),
        (b"U\x02\xff\xfe.", "damaged or cut short"),
    ],
)
def test_a_damaged_pickle_is_refused(tmp_path, content, message):
    (tmp_path / "refs.p").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_plain_pickle(tmp_path / "refs.p")


def test_text_of_python_2_is_read_as_utf_8(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"]q\x00(U\x05caf\xc3\xa9q\x01X\x05\x00\x00\x00caf\xc3\xa9q\x02e.")
    assert read_plain_pickle(tmp_path / "refs.p") == ["café", "café"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ann_id": 99}, r"record 0, field 'ann_id': .*instances.json has no annotation 99 of image 581857"),
        ({"ann_id": 5}, "has no annotation 5 of image 581857"),
        ({"image_id": 3}, r"record 0, field 'image_id': .*instances.json has no image 3"),
        ({"ann_id": [1, -1]}, r"record 0, field 'ann_id': expected ids of annotations or \[-1\]"),
        ({"ann_id": "1"}, "record 0, field 'ann_id': expected int or list"),
        ({"split": "../train"}, "record 0, field 'split': expected the name of a split"),
        ({"sentences": [{"raw": "lady"}]}, r"record 0, record sentences\[0\]: field 'sent' is missing"),
        ({"sentences": "lady"}, "record 0, field 'sentences': expected list"),
    ],
)
def test_a_bad_reference_is_refused_naming_file_record_and_field(tmp_path, change, message):
    folder = refcoco_folder(tmp_path)
    records = refs()
    records[0] |= change
    (folder / RefCoco.refs_file).write_bytes(pickle.dumps(records))
    with pytest.raises(DataError, match=message):
        RefCoco(folder)


@pytest.mark.parametrize("name", ["../../../../outside.jpg", "a\0b", "none.jpg"])
def test_an_image_outside_the_folder_is_refused(tmp_path, name):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.jpg")
    folder = refcoco_folder(tmp_path / "data")
    content = json.loads((folder / "refcoco" / "instances.json").read_text())
    content["images"][0]["file_name"] = name
    (folder / "refcoco" / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="image 581857.*(is outside|expected images/mscoco)"):
        list(RefCoco(folder).conversations(0, seed=0))


def test_an_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such file for the expressions; expected refcoco/refs\(unc\).p"):
        RefCoco.splits(tmp_path)
    folder = refcoco_folder(tmp_path / "data")
    with pytest.raises(DataError, match="no record of the split 'testC'"):
        RefCoco(folder, split="testC")
    next((folder / RefCoco.image_folders[0]).glob("*857.jpg")).unlink()
    with pytest.raises(DataError, match="no such file for the image of .*image 581857; expected images/mscoco"):
        list(RefCoco(folder).conversations(0, seed=0))
    (folder / "refcoco" / "instances.json").unlink()
    with pytest.raises(DataError, match="instances.json: no such file"):
        RefCoco(folder)
