"""Load the questions of a benchmark split, make its batches and assign its wrong images."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from inputs_plum import check_number
from plum_partonomy import images
from plum_partonomy.features import QUESTION_FEATURES
from plum_partonomy.loading import load_split
from plum_partonomy.masks import DataError, validate_rle
from plum_partonomy.records import PartMask, Question, as_row
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.untrusted import typed

__all__ = [
    "CONTROL_SEED",
    "Asked",
    "data_folder",
    "fingerprint",
    "fingerprint_rows",
    "load_image",
    "load_questions",
    "load_rows",
    "make_batches",
    "pick_wrong_images",
    "read_image",
    "read_masks",
    "select_fields",
]

CONTROL_SEED = 0
REQUIRED = [item.name for item in fields(Question) if item.default is MISSING and item.name != "image"]


@dataclass(frozen=True)
class Asked:
    """A question about an image.

    Attributes:
        image: RGB image of the question, or of another record in the wrong-image control.
        image_id: Id of this image; equal ids mean equal images.
    """

    question: Question
    image: Image.Image
    image_id: str


def load_questions(
    dataset: str, *, name: str, split: str, limit: int | None = None, **options: Any
) -> tuple[datasets.Dataset, list[Question]]:
    """Return a split and its questions, in order and without their images.

    Args:
        dataset, name, split: As in `datasets.load_dataset`.
        limit: Number of questions, from the start; None for all.
        options: Options of the data set's builder, such as data_dir.

    Raises:
        DataError: The data set, configuration or split does not exist, is empty or contains no questions, or a record
            is not valid.
    """
    asked = f"data set {dataset!r}, name {name!r}, split {split!r}"
    rows = load_rows(dataset, name=name, split=split, limit=limit, **options)
    missing = sorted(QUESTION_FEATURES.keys() - set(rows.column_names))
    if missing:
        raise DataError(f"The {asked} has no questions, its records lack {missing}: give another name.")
    features = {name: feature for name, feature in QUESTION_FEATURES.items() if name != "image"}
    questions, ids, valid = [], set(), set()
    for index, record in enumerate(select_fields(rows, features, where=f"The {asked}")):
        where = f"{asked}, record {index}"
        for name in REQUIRED:
            if record[name] is None:
                raise DataError(f"{where}, field {name!r}: expected a value, found null")
        masks = read_masks(record["masks"], where=where, valid=valid)
        question = Question(image=None, **{**record, "masks": masks})
        question.validate(where=where)
        if question.id in ids:
            raise DataError(f"{where}, field 'id': {question.id!r} occurs more than once")
        ids.add(question.id)
        questions.append(question)
    return rows, questions


def load_rows(dataset: str, *, name: str, split: str, limit: int | None = None, **options: Any) -> datasets.Dataset:
    """Return the records of a split, or the first of them, with images as stored; arguments and errors as in
    `load_questions`.
    """
    if limit is not None:
        check_number(limit, name="limit", least=1, whole=True)
    rows = load_split(dataset, name, split=split, **options)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    return images.undecoded(rows)


def select_fields(rows: datasets.Dataset, features: dict[str, Any], *, where: str) -> datasets.Dataset:
    """Return these fields of the records, with these types.

    Raises:
        DataError: Starting with `where`, if a field has another type that cannot be converted.
    """
    rows, wanted = rows.select_columns(list(features)), datasets.Features(features)
    differing = [name for name in features if rows.features[name] != wanted[name]]
    if not differing:
        return rows
    try:
        return rows.cast(wanted)
    except (TypeError, ValueError, NotImplementedError) as error:  # those of datasets and of pyarrow
        listed = "; ".join(f"{name!r} is {rows.features[name]}, expected {wanted[name]}" for name in differing)
        raise DataError(f"{where} has fields of other types than its task needs: {listed}.") from error


def read_masks(masks: list[dict] | None, *, where: str, valid: set[str]) -> list[PartMask]:
    """Return the masks of a record.

    Args:
        masks: {"label", "rle"} each.
        valid: The RLEs that were found valid before, to which those of the record are added; the questions about one
            image have the same.

    Raises:
        DataError: Starting with `where`, if a mask has no name or no valid RLE, or their sizes differ.
    """
    found: list[PartMask] = []
    for number, mask in enumerate(masks or ()):
        place = f"{where}, field 'masks[{number}]'"
        label, rle = typed(mask, "label", str, where=place), typed(mask, "rle", dict, where=place)
        if repr(rle) not in valid:
            validate_rle(rle, where=place)
            valid.add(repr(rle))
        if found and found[0].rle["size"] != rle["size"]:
            raise DataError(f"{place}: has size {rle['size']}, but the first mask {found[0].rle['size']}")
        found.append(PartMask(label, rle))
    return found


def load_image(rows: datasets.Dataset, index: int, question: Question) -> Image.Image:
    """Return the image of a record as RGB. Raises DataError if it cannot be read or differs in size from its masks."""
    image = read_image(rows, index, where=f"Question {question.id!r}, image {question.image_id!r}")
    size, expected = [image.height, image.width], list(question.masks[0].rle["size"])
    if size != expected:
        raise DataError(f"Question {question.id!r}: its image has [height, width] {size}, its masks {expected}.")
    return image


def read_image(rows: datasets.Dataset, index: int, *, where: str) -> Image.Image:
    """Return the image of a record as RGB. Raises DataError, starting with `where`, if it cannot be read."""
    return images.read_image(rows[index]["image"], where=where)


def fingerprint(questions: Sequence[Question]) -> str:
    """Return a hash of the texts, masks and image ids of the questions and of their order, equal on every machine."""
    return fingerprint_rows({**as_row(question), "image": None} for question in questions)


def fingerprint_rows(rows: Iterable[dict]) -> str:
    """Return a hash of the values of the rows, which must be JSON values, and of their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def data_folder(data_dir: str | None) -> str | None:
    """Return the absolute path of the raw data for the settings of a run, from any working folder."""
    return None if data_dir is None else str(Path(data_dir).resolve())


def make_batches(questions: Sequence[Question], batch_size: int) -> list[list[list[int]]]:
    """
    Return groups of batches of question indices. All questions about an image are in one group, next to each other, so
    that processes which share the groups encode no image twice; a group has several batches only if one image has more
    than `batch_size` questions.
    """
    by_image: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_image.setdefault(question.image_id, []).append(index)
    groups: list[list[list[int]]] = []
    for indices in by_image.values():
        last = groups[-1] if groups else []
        if len(last) == 1 and len(last[0]) + len(indices) <= batch_size:
            last[0].extend(indices)
        else:
            groups.append([indices[start : start + batch_size] for start in range(0, len(indices), batch_size)])
    return groups


def pick_wrong_images(questions: Sequence[Question]) -> dict[str, str]:
    """Return for each image id the id of another photograph's image, of another label where possible.

    Each image is used once, unless half of all are objects of one photograph.

    Raises:
        DataError: All questions are about one photograph.
    """
    labels = {question.image_id: question.image_label for question in questions}
    photographs = {question.image_id: question.photograph for question in questions}
    if len(set(photographs.values())) < 2:
        raise DataError("The wrong-image control needs at least two images, found one: use --control none.")
    shuffled = seeded_generator(CONTROL_SEED, "wrong_image").permutation(sorted(labels)).tolist()
    by_label = sorted(shuffled, key=labels.__getitem__)
    # Rotation by the size of the largest label pairs no image with its own label, unless one has over half of them.
    largest = max(len(list(group)) for _, group in itertools.groupby(by_label, labels.__getitem__))
    turn = min(largest, len(by_label) - 1)
    wrong = dict(zip(by_label, by_label[turn:] + by_label[:turn], strict=True))
    for image in by_label:
        if photographs[image] == photographs[wrong[image]]:
            _exchange(image, wrong, labels, photographs)
    return wrong


def _exchange(image: str, wrong: dict[str, str], labels: dict[str, str], photographs: dict[str, str]) -> None:
    """Swap the wrong images of two images, so that both are of other photographs, and of other labels if possible."""

    def differ(names: dict[str, str], other: str) -> bool:
        return names[image] != names[wrong[other]] and names[other] != names[wrong[image]]

    fitting = [other for other in wrong if differ(photographs, other)]
    if fitting:
        other = next((other for other in fitting if differ(labels, other)), fitting[0])
        wrong[image], wrong[other] = wrong[other], wrong[image]
    else:
        wrong[image] = next(other for other in wrong if photographs[other] != photographs[image])
