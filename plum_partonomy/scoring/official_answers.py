"""Read the predictions json of the authors' evaluation scripts, one file for each question type.

The format is that of src/evaluation/prediction.py of github.com/AnselBlume/partonomy. One file, shortened:

    {"metrics": {...}, "predictions": [
      {"image_path": "images/train108.jpg", "question_type": "identification",
       "questions": ["What visible parts does the object in the image have?"],
       "parts_answer_choices": ["The object in the image has ...: hood, and wheel.", ...],
       "gt_parts_answer": "The object in the image has ...: hood, and wheel.",
       "predicted_parts_answer": "The object in the image has ...: hood.",
       "gt_parts": ["hood", "wheel"], "predicted_parts": ["hood"], "gt_masks": [...],
       "predicted_masks": [{"size": [512, 512], "counts": "kV]12k?3N3L...", "label": "hood"}, ...],
       "mask_confidences": null, "object_answer_choices": null, "gt_object_answer": null,
       "predicted_object_answer": null, "gt_object": null, "predicted_object": null, "metrics": {...}}, ...]}

`predicted_masks` are those of the correct answer's parts. A record has no id: image, type, question and choices
identify its question. Its metrics are not read but computed again.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.sources.json_files import stream_records
from plum_partonomy.sources.untrusted import typed, typed_list

__all__ = ["QuestionFinder", "as_answer", "read_records"]


def read_records(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each prediction. Raises DataError where the damage of a file is reached."""
    for path in files:
        index = -1
        for index, record in enumerate(stream_records(path, field="predictions")):
            yield f"{path}, prediction {index}", record
        if index < 0:
            raise DataError(f"{path}: expected an object with a non-empty list 'predictions', found none.")


class QuestionFinder:
    """Finds the question that a record answers."""

    def __init__(self, questions: Sequence[Question]):
        self._asked: dict[tuple[str, str, str], list[Question]] = defaultdict(list)
        for question in questions:
            self._asked[question.image_id, question.question_type, question.question].append(question)

    def __call__(self, record: Any, *, where: str) -> Question:
        """Return the only question with the record's image, type, text, choices and answer; raises DataError
        otherwise.
        """
        image_path = typed(record, "image_path", str, where=where)
        question_type = typed(record, "question_type", str, where=where)
        texts = typed_list(record, "questions", str, where=where)
        choices = typed_list(record, "parts_answer_choices", str, where=where)
        asked = [question for text in texts for question in self._asked.get((image_path, question_type, text), ())]
        fitting = [question for question in asked if sorted(question.choices) == sorted(choices)]
        if len(fitting) != 1:
            raise DataError(
                f"{where}: expected one question of the data set with this image, type, text and these choices, found "
                f"{len(fitting)} ({len(asked)} without regard to the choices): {question_type} about {image_path!r}."
            )
        (question,) = fitting
        answer, correct = record.get("gt_parts_answer"), question.choices[question.correct]
        if answer != correct:
            raise DataError(
                f"{where}, field 'gt_parts_answer': the correct answer of question {question.id!r} is {correct!r}, "
                f"found {answer!r:.200}."
            )
        return question


def as_answer(record: dict[str, Any], question: Question, *, where: str) -> dict[str, Any]:
    """Return the record in the format of docs/predictions.schema.json. Raises DataError that names `where` and the
    field.
    """
    answer: dict[str, Any] = {
        "id": question.id,
        "choice": _index(record, "predicted_parts_answer", question.choices, where=where),
    }
    if question.object_question is not None:
        choices = question.object_choices
        answer["object_choice"] = _index(record, "predicted_object_answer", choices, where=where)
    if record.get("predicted_masks") is not None:
        answer["masks"] = _masks(record, where=where)
    return answer


def _index(record: dict[str, Any], field: str, choices: Sequence[str], *, where: str) -> int | None:
    value = record.get(field)
    if value is not None and value not in choices:
        raise DataError(f"{where}, field {field!r}: expected one of the {len(choices)} choices, found {value!r:.200}.")
    return None if value is None else choices.index(value)


def _masks(record: dict[str, Any], *, where: str) -> list[dict[str, Any]]:
    masks = typed_list(record, "predicted_masks", dict, where=where)
    confidences = record.get("mask_confidences")
    if confidences is None:
        confidences = [1.0] * len(masks)
    if not isinstance(confidences, list) or len(confidences) != len(masks):
        raise DataError(
            f"{where}, field 'mask_confidences': expected null or {len(masks)} numbers, found {confidences!r:.80}."
        )
    return [
        {
            "part": mask.get("label"),
            "rle": {"size": mask.get("size"), "counts": mask.get("counts")},
            "confidence": confidence,
        }
        for mask, confidence in zip(masks, confidences, strict=True)
    ]
