"""
What outside files may make the readers do: give a result, or raise the documented error. Nothing else.

Each target takes bytes, reads them as one kind of file and says whether they were accepted. test_fuzz.py feeds
them mutated valid files, and `make fuzz` runs them under atheris, which looks for inputs that reach new code.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from chats_plum import parse_span_tags
from inputs_plum import read_image, to_binary_mask
from plum_partonomy.masks import DataError, decode
from plum_partonomy.records import tagged_phrases
from plum_partonomy.scoring.predictions import read_predictions
from plum_partonomy.sources.descriptor import Descriptor
from plum_partonomy.sources.json_files import parse_json
from plum_partonomy.sources.own_parts import open_own_parts
from tests.fuzz.programs import app_request, checkpoint_folder

MAX_SIDE = 512
"""Pixels of a side of the masks that are decoded here; larger valid ones only cost time."""


def span_tags(data: bytes) -> bool:
    """An assistant's text with span tags: the parser and the schema agree on what is well formed."""
    text = data.decode("utf-8", errors="replace")
    try:
        phrases = tagged_phrases(text)
    except DataError:
        return False
    plain, spans = parse_span_tags(text)
    assert len(spans) == len(phrases)
    assert all(0 <= start < end <= len(plain) for start, end in spans)
    return True


def run_length_encoding(data: bytes) -> bool:
    """Two bytes of size, then the counts of a compressed RLE."""
    if len(data) < 4:
        return False
    height, width = (1 + int.from_bytes(data[i : i + 2], "big") % MAX_SIDE for i in (0, 2))
    try:
        mask = decode({"size": [height, width], "counts": data[4:].decode("latin-1")})
    except DataError:
        return False
    assert mask.shape == (height, width)
    return True


def predictions_file(data: bytes) -> bool:
    """A predictions file as evaluate_plum.py reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        path.write_bytes(data)
        try:
            predictions = read_predictions(path)
        except DataError:
            return False
        assert len(predictions) <= data.count(b"\n")
    return True


def descriptor(data: bytes) -> bool:
    """A descriptor.json beside one image."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "descriptor.json").write_bytes(data)
        Image.new("RGB", (4, 4)).save(Path(folder) / "1.png")
        try:
            examples = list(Descriptor(folder))
        except DataError:
            return False
        assert all(example.masks for example in examples)
    return True


def given_mask(data: bytes) -> bool:
    """A mask given to the processor, as JSON: run lengths, polygons or nested lists, of an image of 4 x 6."""
    try:
        mask = to_binary_mask(parse_json(data, where="mask"), (4, 6))
    except ValueError:
        return False
    assert mask.shape == (4, 6) and mask.dtype == bool
    return True


def image_file(data: bytes) -> bool:
    """An image file of any format."""
    try:
        image = read_image(data, max_pixels=MAX_SIDE**2)
    except DataError:
        return False
    assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_SIDE**2
    return True


def _own_parts(file_name: str) -> Callable[[bytes], bool]:
    """A folder of one's own with this file beside one image: all records and splits are read."""

    def read(data: bytes) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / file_name).write_bytes(data)
            Image.new("RGB", (6, 4)).save(Path(folder) / "1.png")
            try:
                source = open_own_parts(folder)
                examples = [source.example(index) for index in range(len(source))]
                conversations = [list(source.conversations(index, seed=0)) for index in range(len(source))]
            except DataError:
                return False
            assert len(examples) == len(conversations) == sum(map(len, source.splits(seed=0).values()))
        return True

    return read


coco_folder = _own_parts("instances_default.json")
labelme_folder = _own_parts("1.json")
conversation_file = _own_parts("mine.jsonl")

TARGETS = {
    "span_tags": span_tags,
    "run_length_encoding": run_length_encoding,
    "predictions_file": predictions_file,
    "descriptor": descriptor,
    "given_mask": given_mask,
    "image_file": image_file,
    "coco_folder": coco_folder,
    "labelme_folder": labelme_folder,
    "conversation_file": conversation_file,
    "checkpoint_folder": checkpoint_folder,
    "app_request": app_request,
}
SLOW = ("checkpoint_folder", "app_request")
"""Targets that take a tenth of a second and more for an input."""
