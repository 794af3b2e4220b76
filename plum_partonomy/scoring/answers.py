"""Read the answers of any model from a file with one JSON object per question:

    {"id": "mini-test-00000-positive", "choice_scores": [-3.1, -1.2, -4.0, -9.5, -7.7],
     "masks": [{"part": "hull", "rle": {"size": [128, 128], "counts": "Pm2..."}, "confidence": 0.97}]}

docs/predictions.schema.json is the JSON schema. `choice` (the index of the chosen answer in the order of the data set,
or its text) may replace `choice_scores` (larger is better). The part-whole types also have `object_choice` or
`object_choice_scores`. A model that only segments omits the choices on every line, and a model that only chooses omits
`masks`. Masks have the size of the question's image; masks of one part are merged; `confidence` ranks masks for
average precision.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from inputs_plum import check_number
from plum_partonomy.masks import DataError, validate_rle
from plum_partonomy.records import Question
from plum_partonomy.scoring.metrics import MaskSource, check_fit
from plum_partonomy.scoring.official_answers import QuestionFinder, as_answer, read_records
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from plum_partonomy.sources.json_files import json_lines, parse_json
from plum_partonomy.sources.untrusted import check_unicode

AnswerFormat = Literal["jsonl", "official"]

__all__ = [
    "FIELDS",
    "MASK_FIELDS",
    "AnswerFormat",
    "LineReader",
    "answer_files",
    "check_fields",
    "collect_answers",
    "make_prediction",
    "read_answers",
    "read_span",
]

FIELDS = ("id", "choice", "choice_scores", "object_choice", "object_choice_scores", "masks")
MASK_FIELDS = ("part", "rle", "confidence")
SCORED = ("choice_scores", "object_choice_scores", "given_spans", "generated_spans", "generated_parts", "true_tags")
"""Fields of a prediction that metrics are computed from."""
WORDS = {
    "choice_scores": "'choice' or 'choice_scores'",
    "object_choice_scores": "'object_choice' or 'object_choice_scores'",
    "given_spans": "'masks'",
    "generated_spans": "'masks'",
}
"""Field of a prediction -> its fields in an answers file."""


def read_answers(
    path: Path,
    questions: Sequence[Question],
    *,
    mask_source: MaskSource = "gt_answer",
    format: AnswerFormat = "jsonl",
) -> tuple[list[Prediction], list[str]]:
    """Return the usable predictions in question order, and one sentence for each problem in the file.

    A question whose answer is missing, damaged or repeated has no prediction. `predictions.jsonl` of evaluate_plum.py
    is accepted as well.

    Args:
        path: The file; with `official`, a file or a folder of files as described in official_answers.py.
        questions: The questions that it answers.
        mask_source: Whether the masks are those of a given answer or (`generated`) of one that the model wrote.
        format: The format above, or that of the authors' scripts.

    Raises:
        DataError: The file does not exist, has nothing to score, or does not contain the requested masks.
    """
    if format == "official" and mask_source != "gt_answer":
        raise DataError(
            f"Files of the format official hold the masks of the correct answer, not those of {mask_source!r}: "
            "use --mask_source gt_answer."
        )
    if format == "official":
        reader = _OfficialReader(path, questions)
    else:
        reader = LineReader(path, questions, mask_source=mask_source)
    predictions, problems, place_of = collect_answers(reader, questions, path=path)
    scored = {field for field in SCORED for prediction in predictions if getattr(prediction, field) is not None}
    if predictions and not scored:
        raise DataError(f"{path}: expected 'choice', 'choice_scores' or 'masks' on every line, found none of them.")
    if predictions and mask_source == "generated" and "generated_spans" not in scored:
        raise DataError(f"{path}: --mask_source generated needs the masks of a generated answer, found none.")
    words = {} if reader.is_predictions_file else WORDS
    return predictions, problems + _differing(predictions, {q.id: q for q in questions}, place_of, words)


def collect_answers(
    reader: Any, questions: Sequence[Any], *, path: Path
) -> tuple[list[Prediction], list[str], dict[str, str]]:
    """Return the usable predictions in question order, a sentence for each problem, and the place of each question's
    answer.

    Args:
        reader: Returns the records of a file, the question of a record, and its prediction; see `LineReader`.
        questions: Objects with an `id`.
        path: The file, for error messages.
    """
    answers: dict[str, Prediction] = {}
    place_of: dict[str, str] = {}
    repeated, problems, where = set(), [], None
    try:
        for where, raw in reader.records():
            try:
                record = reader.parse(raw, where=where)
                question = reader.question(record, where=where)
                if question.id in place_of:
                    repeated.add(question.id)
                    first = place_of[question.id]
                    raise DataError(f"{where}: {question.id!r} was answered before, in {first}; delete one of them.")
                place_of[question.id] = where
                answers[question.id] = reader.prediction(record, question, where=where)
            except DataError as error:
                problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
    except DataError as error:  # the file cannot be read any further
        problems.append(str(error))
    if where is None and not problems:
        problems.append(f"{path} is empty: expected an answer to each question.")
    ids = [question.id for question in questions]
    problems += [f"{path}: question {name!r} has no answer." for name in ids if name not in place_of]
    return [answers[name] for name in ids if name in answers and name not in repeated], problems, place_of


def answer_files(path: Path, *, format: AnswerFormat = "jsonl") -> list[Path]:
    """Return the files that `read_answers` reads. Raises DataError if there are none."""
    files = [path]
    if format == "official" and path.is_dir():
        files = sorted(path.glob("*.json"))
    if not files or not all(file.is_file() for file in files):
        expected = "a predictions json, or a folder of them" if format == "official" else "a file of one object a line"
        problem = "holds no answers" if path.exists() else "does not exist"
        raise DataError(f"{path} {problem}: expected {expected}.")
    return files


def make_prediction(
    record: dict[str, Any], question: Question, *, mask_source: MaskSource = "gt_answer", where: str
) -> Prediction:
    """Return the prediction of a record in the format above.

    Raises:
        DataError: A field is unknown or has another type, a score is not finite, an index or the number of scores does
            not match the question, or a mask is not a valid RLE of the image's size. Names `where` and the field.
    """
    check_fields(record, FIELDS, where=where)
    masks = record.get("masks")
    if masks is not None:
        if not isinstance(masks, list):
            raise DataError(f"{where}, field 'masks': expected a list, found {masks!r:.80}.")
        size = tuple(question.masks[0].rle["size"])
        masks = [read_span(mask, size, where=f"{where}, field 'masks[{i}]'") for i, mask in enumerate(masks)]
    generated = mask_source == "generated"
    return Prediction(
        question_id=question.id,
        image_id=question.image_id,
        choice_scores=_scores(record, "choice", question.choices, where=where),
        object_choice_scores=_scores(record, "object_choice", question.object_choices or (), where=where),
        given_spans=None if generated else masks,
        true_tags=None,
        predicted_tags=None,
        generated_text=None,
        generated_spans=masks if generated else None,
    )


class LineReader:
    """Reads one JSON object per line, in the format above or as written by evaluate_plum.py."""

    def __init__(self, path: Path, questions: Sequence[Any], *, mask_source: MaskSource = "gt_answer"):
        (self.path,) = answer_files(path)
        self.questions = {question.id: question for question in questions}
        self.mask_source = mask_source
        _, first = next(json_lines(path), ("", b""))
        self.is_predictions_file = b'"question_id"' in first[:1000]

    def records(self) -> Iterator[tuple[str, bytes]]:
        """Yield (place, line) for each line that is not blank."""
        return json_lines(self.path)

    def parse(self, line: bytes, *, where: str) -> dict[str, Any]:
        record = parse_json(line, where=where)
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected one JSON object, found {record!r:.80}; write one object per line.")
        return record

    def question(self, record: dict[str, Any], *, where: str) -> Question:
        field = "question_id" if self.is_predictions_file else "id"
        name = record.get(field)
        if not isinstance(name, str):
            raise DataError(f"{where}, field {field!r}: expected the id of a question, found {name!r:.80}.")
        if name not in self.questions:
            known = len(self.questions)
            raise DataError(
                f"{where}, field {field!r}: {name!r:.80} is none of the {known} questions of the data set; check the "
                "name and the split of the data set."
            )
        return self.questions[name]

    def prediction(self, record: dict[str, Any], question: Question, *, where: str) -> Prediction:
        if not self.is_predictions_file:
            return make_prediction(record, question, mask_source=self.mask_source, where=where)
        prediction = Prediction.from_dict(record, where=where)
        check_fit(question, prediction)
        return prediction


class _OfficialReader:
    """Reads the authors' predictions json."""

    is_predictions_file = False

    def __init__(self, path: Path, questions: Sequence[Question]):
        self.files = answer_files(path, format="official")
        self.question = QuestionFinder(questions)

    def parse(self, record: Any, *, where: str) -> Any:
        return record

    def records(self) -> Iterator[tuple[str, Any]]:
        return read_records(self.files)

    def prediction(self, record: dict[str, Any], question: Question, *, where: str) -> Prediction:
        return make_prediction(as_answer(record, question, where=where), question, where=where)


def check_fields(record: dict[str, Any], known: Sequence[str], *, where: str) -> None:
    """Raise DataError that names the first unknown field."""
    unknown = sorted(set(record) - set(known))
    if unknown:
        raise DataError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(known)}.")


def _scores(record: dict[str, Any], name: str, choices: Sequence[str], *, where: str) -> list[float] | None:
    """Return scores as in `Prediction` (smaller is better); for an index or a text, 0 for the chosen and 1 for the
    others.
    """
    count = len(choices)
    index, scores = record.get(name), record.get(f"{name}_scores")
    if index is not None and scores is not None:
        raise DataError(f"{where}: both {name!r} and '{name}_scores' are given; keep one.")
    if isinstance(index, str):
        if index not in choices:
            raise DataError(
                f"{where}, field {name!r}: expected an index or the text of one of {count} choices, found "
                f"{index!r:.200}."
            )
        index = list(choices).index(index)
    if index is not None:
        if type(index) is not int or not 0 <= index < count:
            raise DataError(f"{where}, field {name!r}: expected an index into {count} choices, found {index!r:.80}.")
        return [float(i != index) for i in range(count)]
    if scores is None:
        return None
    if not isinstance(scores, list) or len(scores) != count:
        raise DataError(f"{where}, field '{name}_scores': expected {count} numbers, found {scores!r:.80}.")
    for i, score in enumerate(scores):
        check_number(score, name=f"{where}, field '{name}_scores[{i}]'")
    return [-float(score) for score in scores]


def read_span(mask: Any, size: tuple[int, int] | None, *, where: str) -> SpanMask:
    """Return a mask of an answers file, which must have the (height, width) `size` if given. Raises DataError."""
    if not isinstance(mask, dict):
        raise DataError(f"{where}: expected an object with a part and its rle, found {mask!r:.80}.")
    check_fields(mask, MASK_FIELDS, where=where)
    part, confidence = mask.get("part"), mask.get("confidence", 1.0)
    if not isinstance(part, str) or not part.strip():
        raise DataError(f"{where}, field 'part': expected the name of a part, found {part!r:.80}.")
    check_unicode(part, where=f"{where}, field 'part'")
    check_number(confidence, name=f"{where}, field 'confidence'")
    rle = validate_rle(mask.get("rle"), expected_size=size, where=f"{where}, field 'rle'")
    return SpanMask(text=part, start=0, end=0, rle=rle, score=float(confidence))


def _differing(
    predictions: Sequence[Prediction], by_id: dict[str, Question], place_of: dict[str, str], words: dict[str, str]
) -> list[str]:
    """Return a sentence for each field that some lines lack, because a mean over the other lines would be biased."""
    problems = []
    for field in SCORED:
        applies = predictions
        if field == "object_choice_scores":
            applies = [p for p in predictions if by_id[p.question_id].object_question is not None]
        given = [getattr(prediction, field) is not None for prediction in applies]
        if any(given) and not all(given):
            problems.append(
                f"{place_of[applies[given.index(False)].question_id]}: {words.get(field, repr(field))} is missing, "
                f"though {sum(given)} of {len(given)} lines have it; give it on every line or on none."
            )
    return problems
