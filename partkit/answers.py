"""Answers of any model, from a file of one JSON object per question:

    {"id": "mini-test-3/positive", "choice_scores": [-3.1, -1.2, -4.0, -9.5, -7.7],
     "masks": [{"part": "hull", "rle": {"size": [128, 128], "counts": "Pm2..."}, "confidence": 0.97}]}

docs/predictions.schema.json is the form as a JSON schema. `choice` (the index of the chosen answer) may stand in place
of `choice_scores` (larger is better), the part-whole types have `object_choice` or `object_choice_scores` as well. A
model that only segments leaves the choices out, one that only chooses leaves out `masks`, on every line. A mask is in
the frame of the question's image; masks of one part are united; `confidence` ranks masks for average precision.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from partkit.masks import DataError, validate_rle
from partkit.metrics import MaskSource
from partkit.predictions import Prediction, SpanMask, read_predictions
from partkit.schema import Question

__all__ = ["FIELDS", "MASK_FIELDS", "make_prediction", "read_answers"]

FIELDS = ("id", "choice", "choice_scores", "object_choice", "object_choice_scores", "masks")
MASK_FIELDS = ("part", "rle", "confidence")

MAX_LINE = 64_000_000
"""Longest line read, in bytes."""


def read_answers(
    path: Path, questions: Sequence[Question], *, mask_source: MaskSource = "gt_answer"
) -> tuple[list[Prediction], list[str]]:
    """The answers that can be used, in question order, and one sentence for everything in the file that cannot.

    A question whose answer is missing, damaged or repeated has no prediction. `predictions.jsonl` of evaluate_plum.py
    is read as well.

    Args:
        path: the file.
        questions: the questions it answers.
        mask_source: whether the masks are those of a given answer or (`generated`) of one that the model wrote.

    Raises:
        DataError: the file cannot be read, or is a damaged or incomplete predictions.jsonl of evaluate_plum.py.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file: give a file with one JSON object per question.")
    with path.open("rb") as file:
        if b'"question_id"' in file.readline(1000):
            return read_predictions(path), []
    by_id = {question.id: question for question in questions}
    answers: dict[str, Prediction] = {}
    line_of: dict[str, str] = {}
    repeated, problems = set(), []
    for where, line in _lines(path):
        try:
            record = _parse(line, where=where)
            question = _question(record, by_id, where=where)
            if question.id in line_of:
                repeated.add(question.id)
                raise DataError(f"{where}: id {question.id!r} was answered before, in {line_of[question.id]}.")
            line_of[question.id] = where
            answers[question.id] = make_prediction(record, question, mask_source=mask_source, where=where)
        except DataError as error:
            problems.append(str(error))
    problems += [f"{path}: question {name!r} has no line." for name in by_id if name not in line_of]
    predictions = [answers[name] for name in by_id if name in answers and name not in repeated]
    return predictions, problems + _differing(predictions, by_id, line_of)


def make_prediction(
    record: dict[str, Any], question: Question, *, mask_source: MaskSource = "gt_answer", where: str
) -> Prediction:
    """The prediction that a record of the form above describes.

    Raises:
        DataError: a field is unknown or of another type, a score is not finite, an index or the number of scores does
            not fit the question, or a mask is no valid RLE of the image's size; names `where` and the field.
    """
    _check_fields(record, FIELDS, where=where)
    masks = record.get("masks")
    if masks is not None:
        if not isinstance(masks, list):
            raise DataError(f"{where}, field 'masks': expected a list, found {masks!r:.80}.")
        size = tuple(question.masks[0].rle["size"])
        masks = [_span(mask, size, where=f"{where}, field 'masks[{i}]'") for i, mask in enumerate(masks)]
    generated = mask_source == "generated"
    return Prediction(
        question_id=question.id,
        image_id=question.image_id,
        choice_scores=_scores(record, "choice", len(question.choices), where=where),
        object_choice_scores=_scores(record, "object_choice", len(question.object_choices or ()), where=where),
        given_spans=None if generated else masks,
        true_tags=None,
        predicted_tags=None,
        generated_text=None,
        generated_spans=masks if generated else None,
    )


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of every line that is not blank."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise DataError(f"{path}, line {number}: longer than {MAX_LINE} bytes; write one object per line.")
            if line.strip():
                yield f"{path}, line {number}", line


def _parse(line: bytes, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object, found no valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected one JSON object, found {record!r:.80}.")
    return record


def _question(record: dict[str, Any], by_id: dict[str, Question], *, where: str) -> Question:
    name = record.get("id")
    if not isinstance(name, str):
        raise DataError(f"{where}, field 'id': expected the id of a question, found {name!r:.80}.")
    if name not in by_id:
        raise DataError(f"{where}, field 'id': {name!r:.80} is none of the {len(by_id)} questions of the data set.")
    return by_id[name]


def _check_fields(record: dict[str, Any], known: Sequence[str], *, where: str) -> None:
    unknown = sorted(set(record) - set(known))
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(known)}.")


def _scores(record: dict[str, Any], name: str, count: int, *, where: str) -> list[float] | None:
    """What `Prediction` holds, smaller being better; an index becomes 0 for the chosen and 1 for all others."""
    index, scores = record.get(name), record.get(f"{name}_scores")
    if index is not None and scores is not None:
        raise DataError(f"{where}: both {name!r} and '{name}_scores' are given; keep one.")
    if index is not None:
        if type(index) is not int or not 0 <= index < count:
            raise DataError(f"{where}, field {name!r}: expected an index into {count} choices, found {index!r:.80}.")
        return [float(i != index) for i in range(count)]
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != count:
        raise DataError(f"{where}, field '{name}_scores': expected {count} numbers, found {scores!r:.80}.")
    bad = [score for score in scores if not _is_number(score)]
    if bad:
        raise DataError(f"{where}, field '{name}_scores': expected finite numbers, found {bad[0]!r:.80}.")
    return [-float(score) for score in scores]


def _span(mask: Any, size: tuple[int, int], *, where: str) -> SpanMask:
    if not isinstance(mask, dict):
        raise DataError(f"{where}: expected an object with a part and its rle, found {mask!r:.80}.")
    _check_fields(mask, MASK_FIELDS, where=where)
    part, confidence = mask.get("part"), mask.get("confidence", 1.0)
    if not isinstance(part, str) or not part.strip():
        raise DataError(f"{where}, field 'part': expected the name of a part, found {part!r:.80}.")
    if not _is_number(confidence):
        raise DataError(f"{where}, field 'confidence': expected a finite number, found {confidence!r:.80}.")
    rle = validate_rle(mask.get("rle"), expected_size=size, where=f"{where}, field 'rle'")
    return SpanMask(text=part, start=0, end=0, rle=rle, score=float(confidence))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _differing(predictions: Sequence[Prediction], by_id: dict[str, Question], line_of: dict[str, str]) -> list[str]:
    """A sentence for each field that some lines lack, for no mean could be taken over the others alone."""
    with_object = [p for p in predictions if by_id[p.question_id].object_question is not None]
    groups = {
        "'choice' or 'choice_scores'": ([p.choice_scores is not None for p in predictions], predictions),
        "'object_choice' or 'object_choice_scores'": (
            [p.object_choice_scores is not None for p in with_object],
            with_object,
        ),
        "'masks'": (
            [p.given_spans is not None or p.generated_spans is not None for p in predictions],
            predictions,
        ),
    }
    return [
        f"{line_of[asked[given.index(False)].question_id]}: {field} is missing, though {sum(given)} of {len(given)} "
        "lines have it; give it on every line or on none."
        for field, (given, asked) in groups.items()
        if any(given) and not all(given)
    ]
