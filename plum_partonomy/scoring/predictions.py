"""The prediction of a model for one question, and the file of predictions.

One line of predictions.jsonl, shortened (spans are characters of the answer, tags are tokens of it):

    {"question_id": "mini-test-00000-positive", "image_id": "mini-test-00000", "choice_scores": [0.31, 0.12, 0.9],
     "given_spans": [{"text": "hull", "start": 57, "end": 61, "rle": {"size": [128, 128], "counts": "Pm2..."},
                      "score": 0.97}],
     "true_tags": [[12, 13]], "predicted_tags": [[12, 13]],
     "generated_text": "The object in the image has ...: hull, and mast.", "generated_spans": [...],
     "object_choice_scores": null, "wrong_image": {the same fields for the image of another record} or null}
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inputs_plum import check_number
from plum_partonomy.files import write_whole
from plum_partonomy.masks import RLE, DataError, validate_rle
from plum_partonomy.sources.json_files import json_lines, parse_json
from plum_partonomy.sources.untrusted import check_unicode, typed

__all__ = [
    "Prediction",
    "SpanMask",
    "append_predictions",
    "check_run",
    "merge_predictions",
    "read_predictions",
    "write_predictions",
]


@dataclass(frozen=True, kw_only=True)
class SpanMask:
    """A span of an answer and its mask.

    Attributes:
        text: The characters [start, end) of the answer.
        rle: COCO RLE of the size of the question's image.
        score: Confidence in [0, 1].
    """

    text: str
    start: int
    end: int
    rle: RLE
    score: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one model run on one question. Fields that a kind of model does not have are None.

    Attributes:
        image_id: The image that the model saw; another record's image in the wrong-image control.
        choice_scores: Negative log-likelihood of each choice; the smallest is chosen.
        given_spans: Masks of the parts of the given answer: the correct one, or the one that the model chose.
        true_tags, predicted_tags: [start, end) of the part spans in the given answer, as labelled and as tagged by the
            model, in tokens from the start of the answer.
        generated_text, generated_spans: The generated answer and its masks.
        generated_parts: The parts that the generated answer names, for a model without masks; else None.
        object_choice_scores: As choice_scores, for the object question of the part-whole types; else None.
        wrong_image: The prediction for the same question with the image of another record, if that control ran.
    """

    question_id: str
    image_id: str
    choice_scores: list[float] | None
    given_spans: list[SpanMask] | None
    true_tags: list[tuple[int, int]] | None
    predicted_tags: list[tuple[int, int]] | None
    generated_text: str | None
    generated_spans: list[SpanMask] | None
    generated_parts: list[str] | None = None
    object_choice_scores: list[float] | None = None
    wrong_image: "Prediction | None" = None

    def __post_init__(self) -> None:
        for name in ("choice_scores", "object_choice_scores"):
            scores = getattr(self, name)
            if scores is not None and (not scores or not all(math.isfinite(score) for score in scores)):
                raise DataError(f"Question {self.question_id!r}: {name} must be finite numbers, found {scores}.")
        if (self.true_tags is None) != (self.predicted_tags is None):
            raise DataError(
                f"Question {self.question_id!r}: expected both true_tags and predicted_tags, found one; give both or "
                "null for both."
            )

    @property
    def named_parts(self) -> list[str] | None:
        """Parts that the generated answer names, or None without such an answer."""
        if self.generated_spans is not None:
            return [span.text for span in self.generated_spans]
        return self.generated_parts

    @property
    def choice(self) -> int:
        """Index of the most likely choice."""
        return min(range(len(self.choice_scores)), key=self.choice_scores.__getitem__)

    @property
    def object_choice(self) -> int:
        """Index of the most likely object choice."""
        return min(range(len(self.object_choice_scores)), key=self.object_choice_scores.__getitem__)

    @classmethod
    def from_dict(cls, record: dict[str, Any], *, where: str) -> "Prediction":
        """Return a prediction from its JSON form.

        Raises:
            DataError: A field is missing, unknown or has another type, a number is not finite, or a mask is not a
                valid RLE. Names `where` and the field.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        optional = ("generated_parts", "object_choice_scores", "wrong_image")
        fields = _known_fields(record, known, optional=optional, where=where)
        for name in ("question_id", "image_id"):
            typed(fields, name, str, where=where)
        typed(fields, "generated_text", (str, type(None)), where=where)
        for name in ("choice_scores", "object_choice_scores"):
            _optional_list(fields, name, _number, where=where)
        for name in ("given_spans", "generated_spans"):
            _optional_list(fields, name, _span, where=where)
        for name in ("true_tags", "predicted_tags"):
            _optional_list(fields, name, _tag, where=where)
        _optional_list(fields, "generated_parts", _name, where=where)
        if fields.get("wrong_image") is not None:
            place = f"{where}, field 'wrong_image'"
            fields["wrong_image"] = cls.from_dict(typed(fields, "wrong_image", dict, where=where), where=place)
        return cls(**fields)


def _known_fields(record: Any, known: Sequence[str], *, optional: Sequence[str] = (), where: str) -> dict[str, Any]:
    """Return a copy of an object with exactly these fields. Raises DataError."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {record!r:.80}")
    if unknown := sorted(record.keys() - set(known)):
        raise DataError(f"{where}: unknown field {unknown[0]!r:.80}; known are {', '.join(known)}")
    if missing := [name for name in known if name not in record and name not in optional]:
        raise DataError(f"{where}: field {missing[0]!r} is missing")
    return dict(record)


def _optional_list(fields: dict[str, Any], name: str, read: Callable[..., Any], *, where: str) -> None:
    """Convert the items of a list field, unless it is null, with `read`. Raises DataError."""
    if fields.get(name) is not None:
        items = typed(fields, name, list, where=where)
        fields[name] = [read(item, where=f"{where}, field '{name}[{i}]'") for i, item in enumerate(items)]


def _number(value: Any, *, where: str) -> float:
    check_number(value, name=where)
    return value


def _name(value: Any, *, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: expected the name of a part, found {value!r:.80}")
    check_unicode(value, where=where)
    return value


def _tag(value: Any, *, where: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or any(type(item) is not int for item in value):
        raise DataError(f"{where}: expected [start, end) of two integers, found {value!r:.80}")
    return tuple(value)


def _span(value: Any, *, where: str) -> SpanMask:
    fields = _known_fields(value, [item.name for item in dataclasses.fields(SpanMask)], where=where)
    for name, kind in (("text", str), ("start", int), ("end", int)):
        typed(fields, name, kind, where=where)
    check_number(fields["score"], name=f"{where}, field 'score'")
    fields["rle"] = validate_rle(fields["rle"], where=f"{where}, field 'rle'")
    return SpanMask(**fields)


def _line(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False, allow_nan=False) + "\n"


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write a predictions file, completely or not at all."""
    write_whole(path, map(_line, predictions))


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append lines to a file and flush them to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, predictions))
        file.flush()
        os.fsync(file.fileno())


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions of all complete lines of a file.

    A last line without its line end was truncated by an interruption and is skipped.

    Raises:
        DataError: Another line is not a prediction; names file and line.
    """
    lines = ((where, line) for where, line in json_lines(path) if line.endswith(b"\n"))
    return [Prediction.from_dict(parse_json(line, where=where), where=where) for where, line in lines]


# ---------------------------------------------------------------- the folder of a run


def check_run(folder: Path, settings: dict[str, Any]) -> None:
    """Raise an error if a folder contains a run with other settings; changes nothing.

    Raises:
        DataError: run.json differs, with the names of the settings, or there are predictions without a run.json.
    """
    path = folder / "run.json"
    if not path.exists():
        if any(folder.glob("predictions*.jsonl")):
            raise DataError(f"{folder} contains predictions but no run.json: give another folder.")
        return
    try:
        found = parse_json(path.read_bytes(), where=str(path))
    except DataError as error:
        raise DataError(f"{error}; give another folder.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected the settings of a run, found {found!r:.80}; give another folder.")
    differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if differing:
        listed = ", ".join(f"{name} {found.get(name)!r} (now {settings.get(name)!r})" for name in differing)
        raise DataError(f"{folder} contains another run, with {listed}: give another folder.")


def merge_predictions(folder: Path, question_ids: Sequence[str]) -> None:
    """Merge predictions.jsonl and the files of all processes into predictions.jsonl, in question order.

    Raises:
        DataError: A line is damaged or matches no question.
    """
    merged, paths = folder / "predictions.jsonl", sorted(folder.glob("predictions.rank*.jsonl"))
    by_id = {
        prediction.question_id: prediction
        for path in [merged, *paths]
        if path.exists()
        for prediction in read_predictions(path)
    }
    unknown = by_id.keys() - set(question_ids)
    if unknown:
        raise DataError(f"{folder} contains predictions for questions that were not asked, such as {min(unknown)!r}.")
    write_predictions(merged, (by_id[question_id] for question_id in question_ids if question_id in by_id))
    for path in paths:
        path.unlink()
