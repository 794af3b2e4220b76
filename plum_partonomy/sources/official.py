"""Read and write the official release: `partonomy_qa_pairs.json` and `images/` <-> questions.

One record of the JSON list, shortened (licence: that of the images, not stated per record):

    {"image_path": "images/train108.jpg", "image_label": "pickup truck",
     "question_type": "identification", "question": "What visible parts does the object in the image have?",
     "answer_choices": ["The object in the image has the following visible parts: hood, and wheel.", ...],
     "answer_types": ["correct", "incorrect", "incorrect", "incorrect", "incorrect"],
     "answer_parts": [["hood", "wheel"], ...],
     "segmentations": {"hood": [{"size": [512, 512], "counts": "kV]12k?3N3L..."}], "wheel": [...]},
     "object_question": null, "object_answer_choices": null, "object_answer_types": null,
     "object_answer_classes": null}

`segmentations` contains all visible parts of the image. Only whole_to_part and part_to_whole have the object fields.

In the file the correct choice is always the first, so a model that always picks the first choice would score 1.0. The
reader therefore shuffles the choices of each question, seeded by its id: the order is the same for every copy of the
file and does not depend on the order in the file.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from plum_partonomy.images import open_image
from plum_partonomy.masks import RLE, resize
from plum_partonomy.records import DataError, PartMask, Question
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.json_files import stream_records
from plum_partonomy.sources.untrusted import (
    ImageFiles,
    OnError,
    check_labels,
    read_part_masks,
    refuse,
    typed,
    typed_list,
)

QUESTIONS_FILE = "partonomy_qa_pairs.json"
SOURCE = "core"
LICENCE = "not stated"
ORDER_SEED = 0
"""Seed of the shuffled order of choices."""

OnResize = Callable[[int], None]
"""Receives the number of masks of one record that were resized to their image."""


def read_questions(
    folder: str | Path, *, on_error: OnError = refuse, on_resize: OnResize | None = None
) -> Iterator[Question]:
    """Yield each record of the folder as a question, with its choices shuffled by its id.

    `image_id` is the image path; `image` is the absolute path. The file is streamed.

    Args:
        on_error: Receives a DataError that names file, record and field, for each record that cannot be used or
            repeats the question of an earlier one. The record is skipped.
        on_resize: Receives the number of masks that were resized to their image, as in the authors' loader. Without
            it, a record with a mask of another size than its image is an error.

    Raises:
        DataError: The file is truncated (the lost records are unknown), missing, or has no question.
    """
    folder = Path(folder)
    path = folder / QUESTIONS_FILE
    images = ImageFiles(folder)
    asked: dict[tuple[str, ...], int] = {}
    index = -1
    for index, record in enumerate(stream_records(path)):
        where = f"{path}, record {index}"
        try:
            fields = {"id": f"{SOURCE}-{index:05d}", "images": images, "on_resize": on_resize}
            question = _read_question(record, **fields, where=where)
            question.validate(where=where)
            identity = (question.image_id, question.image_label, question.question_type, question.question)
            if asked.setdefault(identity, index) != index:
                raise DataError(f"{where}: asks the same question about the same image as record {asked[identity]}")
        except DataError as error:
            on_error(error)
        else:
            yield question
    if index < 0:
        raise DataError(f"{path}: expected a non-empty list of questions, found none")


def write_official(questions: Iterable[Question], folder: str | Path) -> None:
    """Write questions in the official layout. Reading the new folder returns equal records.

    The correct choice comes first, as in the released file; the others keep their shown order. Images are copied
    unchanged. An incomplete folder is never left behind.

    Raises:
        DataError: The folder exists, or two images have one name.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: already exists; name a new folder")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        records = [_write_question(question, unfinished) for question in questions]
        (unfinished / QUESTIONS_FILE).write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def shown_order(choices: Sequence[str], *key: str) -> list[int]:
    """Return the indices of the choices in shown order, which depends on the key but not on the order in the file.

    >>> [["b", "a", "c"][index] for index in shown_order(["b", "a", "c"], "core-00000")]
    ['b', 'a', 'c']
    >>> [["a", "b", "c"][index] for index in shown_order(["a", "b", "c"], "core-00000")]
    ['b', 'a', 'c']
    """
    by_text = sorted(range(len(choices)), key=choices.__getitem__)
    return [by_text[position] for position in seeded_generator(ORDER_SEED, "order", *key).permutation(len(choices))]


def _in_order(values: list[Any], order: list[int], *, where: str) -> list[Any]:
    if len(values) != len(order):
        raise DataError(f"{where}: expected one for each of the {len(order)} choices, found {len(values)}")
    return [values[index] for index in order]


def _read_masks(
    segmentations: dict[str, Any], image_path: str, *, images: ImageFiles, on_resize: OnResize | None, where: str
) -> list[PartMask]:
    """Return the masks of a record at the size of its image."""
    size, resized = images.size(image_path, where=where), 0

    def fit(rle: RLE) -> RLE:
        nonlocal resized
        images.check_turn(image_path, rle["size"], where=f"{where}, field 'segmentations'")
        resized += tuple(rle["size"]) != size
        return resize(rle, size)

    masks = read_part_masks(segmentations, resize=None if on_resize is None else fit, where=where)
    if masks:
        images.check_frame(image_path, masks[0].rle["size"], where=f"{where}, field 'segmentations'")
    if resized:
        on_resize(resized)
    return masks


def _read_question(record: Any, *, id: str, images: ImageFiles, on_resize: OnResize | None, where: str) -> Question:
    image_path = typed(record, "image_path", str, where=where)
    images.size(image_path, where=where)
    answer_types = typed_list(record, "answer_types", str, where=where)
    choices = typed_list(record, "answer_choices", str, where=where)
    object_fields: dict[str, Any] = {}
    if typed(record, "object_question", (str, type(None)), where=where) is not None:
        object_fields = _read_object_choices(record, id=id, where=where)
    choice_parts = typed_list(record, "answer_parts", list, where=where)
    if not all(isinstance(part, str) for parts in choice_parts for part in parts):
        raise DataError(f"{where}, field 'answer_parts': expected lists of part names, found {choice_parts!r:.80}")
    segmentations = typed(record, "segmentations", dict, where=where)
    check_labels([*segmentations, *chain(*choice_parts)], where=f"{where}, fields 'segmentations' and 'answer_parts'")
    correct = _correct(answer_types, choices, where=f"{where}, field 'answer_types'")
    order = shown_order(choices, id)
    return Question(
        id=id,
        image={"bytes": None, "path": str(images.locate(image_path, where=where))},
        image_id=image_path,
        image_label=typed(record, "image_label", str, where=where),
        question_type=typed(record, "question_type", str, where=where),
        question=typed(record, "question", str, where=where),
        choices=_in_order(choices, order, where=f"{where}, field 'answer_choices'"),
        correct=order.index(correct),
        choice_parts=_in_order(choice_parts, order, where=f"{where}, field 'answer_parts'"),
        masks=_read_masks(segmentations, image_path, images=images, on_resize=on_resize, where=where),
        source=SOURCE,
        licence=LICENCE,
        **object_fields,
    )


def _read_object_choices(record: dict[str, Any], *, id: str, where: str) -> dict[str, Any]:
    choices = typed_list(record, "object_answer_choices", str, where=where)
    types = typed_list(record, "object_answer_types", str, where=where)
    classes = typed_list(record, "object_answer_classes", str, where=where)
    correct = _correct(types, choices, where=f"{where}, field 'object_answer_types'")
    order = shown_order(choices, id, "object")
    return {
        "object_question": record["object_question"],
        "object_choices": _in_order(choices, order, where=f"{where}, field 'object_answer_choices'"),
        "object_classes": _in_order(classes, order, where=f"{where}, field 'object_answer_classes'"),
        "object_correct": order.index(correct),
    }


def _correct(answer_types: list[str], choices: list[str], *, where: str) -> int:
    if len(answer_types) != len(choices):
        raise DataError(f"{where}: {len(choices)} choices, but {len(answer_types)} types")
    unknown = sorted(set(answer_types) - {"correct", "incorrect"})
    if unknown:
        raise DataError(f"{where}: expected 'correct' or 'incorrect', found {unknown}")
    if answer_types.count("correct") != 1:
        raise DataError(f"{where}: expected exactly one 'correct', found {answer_types.count('correct')}")
    return answer_types.index("correct")


def _write_question(question: Question, folder: Path) -> dict[str, Any]:
    order = _correct_first(question.correct, len(question.choices))
    record = {
        "image_path": _write_image(question, folder),
        "image_label": question.image_label,
        "question": question.question,
        "question_type": question.question_type,
        "answer_choices": [question.choices[position] for position in order],
        "answer_types": _answer_types(len(order)),
        "answer_parts": [question.choice_parts[position] for position in order],
        "segmentations": {mask.label: [mask.rle] for mask in question.masks},
        "object_question": question.object_question,
        "object_answer_choices": None,
        "object_answer_types": None,
        "object_answer_classes": None,
    }
    if question.object_question is not None:
        order = _correct_first(question.object_correct, len(question.object_choices))
        record["object_answer_choices"] = [question.object_choices[position] for position in order]
        record["object_answer_types"] = _answer_types(len(order))
        record["object_answer_classes"] = [question.object_classes[position] for position in order]
    return record


def _write_image(question: Question, folder: Path) -> str:
    """Copy the image into the folder and return its relative path: the image id, with a file ending if it has none."""
    content = question.image["bytes"]
    if content is None:
        content = Path(question.image["path"]).read_bytes()
    image_path = question.image_id
    if not image_path.startswith("images/") or Path(image_path).suffix.lower() not in Image.registered_extensions():
        file_format = open_image(content, where=f"question {question.id}, field 'image'").format
        image_path = f"images/{image_path}.{file_format.lower()}"
    target = folder / image_path
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"question {question.id}, field 'image_id': {question.image_id!r} is outside the folder")
    if target.exists() and target.read_bytes() != content:
        raise DataError(f"question {question.id}, field 'image_id': {question.image_id!r} names two different images")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return image_path


def _correct_first(correct: int, count: int) -> list[int]:
    return [correct, *[position for position in range(count) if position != correct]]


def _answer_types(count: int) -> list[str]:
    return ["correct"] + ["incorrect"] * (count - 1)
