"""What a model answered to one question, and the file such answers are kept in.

One line of predictions.jsonl, shortened (spans are characters of the answer, tags are tokens of it):

    {"question_id": "mini-test-3/positive", "image_id": "mini-test-3", "choice_scores": [0.31, 0.12, 0.4, 0.9, 0.77],
     "given_spans": [{"text": "hull", "start": 57, "end": 61, "rle": {"size": [128, 128], "counts": "Pm2..."},
                      "score": 0.97}],
     "true_tags": [[12, 13]], "predicted_tags": [[12, 13]],
     "generated_text": "The object in the image has ...: hull, and mast.", "generated_spans": [...],
     "object_choice_scores": null, "wrong_image": {the same fields for the image of another record} or null}
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partkit.masks import RLE, DataError, validate_rle

__all__ = [
    "Prediction",
    "SpanMask",
    "append_predictions",
    "check_run",
    "merge_predictions",
    "read_predictions",
    "write_predictions",
    "write_whole",
]


@dataclass(frozen=True, kw_only=True)
class SpanMask:
    """A span of an answer and its mask.

    Attributes:
        text: the characters [start, end) of the answer.
        rle: COCO RLE in the pixel frame of the question's image.
        score: confidence in [0, 1].
    """

    text: str
    start: int
    end: int
    rle: RLE
    score: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Everything one model run says about one question; None for what this kind of model does not say.

    Attributes:
        image_id: the image the model saw; another record's in the wrong-image control.
        choice_scores: negative log-likelihood of each choice, the smallest is chosen.
        given_spans: masks of the parts of an answer that was given: the correct one, or the one the model chose.
        true_tags, predicted_tags: [start, end) of the part spans in the given answer, as its tokens were labelled and
            as the model tags them, counted from the answer's first token.
        generated_text, generated_spans: the freely generated answer and its masks.
        object_choice_scores: the same as choice_scores for the object question of the part-whole types, else None.
        wrong_image: the prediction for the same question with the image of another record, if that control ran.
    """

    question_id: str
    image_id: str
    choice_scores: list[float] | None
    given_spans: list[SpanMask] | None
    true_tags: list[tuple[int, int]] | None
    predicted_tags: list[tuple[int, int]] | None
    generated_text: str | None
    generated_spans: list[SpanMask] | None
    object_choice_scores: list[float] | None = None
    wrong_image: "Prediction | None" = None

    def __post_init__(self) -> None:
        for name in ("choice_scores", "object_choice_scores"):
            scores = getattr(self, name)
            if scores is not None and (not scores or not all(math.isfinite(score) for score in scores)):
                raise DataError(f"Question {self.question_id!r}: {name} must be finite numbers, found {scores}.")

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
        """A prediction from its JSON form.

        Raises:
            DataError: a field is missing, unknown or of another type, or a mask is no valid RLE; names `where`.
        """
        try:
            fields = dict(record)
            for name in ("given_spans", "generated_spans"):
                if fields[name] is not None:
                    fields[name] = [SpanMask(**span) for span in fields[name]]
                    for span in fields[name]:
                        validate_rle(span.rle, where=f"{where}, {name}")
            for name in ("true_tags", "predicted_tags"):
                if fields[name] is not None:
                    fields[name] = [(int(start), int(end)) for start, end in fields[name]]
            if fields.get("wrong_image") is not None:
                fields["wrong_image"] = cls.from_dict(fields["wrong_image"], where=f"{where}, wrong_image")
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{where}: expected the fields of a prediction, found something else ({error})."
            ) from error


def _line(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False, allow_nan=False) + "\n"


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes a predictions file, whole or not at all."""
    write_whole(path, map(_line, predictions))


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Adds lines to a file and has them on the disk before it returns."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, predictions))
        file.flush()
        os.fsync(file.fileno())


def read_predictions(path: Path) -> list[Prediction]:
    """All complete lines of a predictions file.

    A last line without its line end was cut off when a run was interrupted, and is left out.

    Raises:
        DataError: any other line is not a prediction; names file and line.
    """
    predictions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: expected one JSON object, found no valid JSON ({error}).") from error
            predictions.append(Prediction.from_dict(record, where=where))
    return predictions


# ---------------------------------------------------------------- the folder of a run


def write_whole(path: Path, pieces: Iterable[str]) -> None:
    """Writes a text file at once: a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
    os.replace(temporary, path)


def check_run(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a folder that holds another run than the one of these settings; changes nothing.

    Raises:
        DataError: run.json differs, naming the settings, or there are predictions without a run.json.
    """
    path = folder / "run.json"
    if not path.exists():
        if any(folder.glob("predictions*.jsonl")):
            raise DataError(f"{folder} holds predictions but no run.json to tell whose: give another folder.")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON ({error}): give another folder.") from error
    differing = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if differing:
        listed = ", ".join(f"{name} {found.get(name)!r} (now {settings.get(name)!r})" for name in differing)
        raise DataError(f"{folder} holds another run, with {listed}: give another folder.")


def merge_predictions(folder: Path, question_ids: Sequence[str]) -> None:
    """Gathers predictions.jsonl and what each process wrote beside it into predictions.jsonl, in question order.

    Raises:
        DataError: a line is damaged or answers none of the questions.
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
        raise DataError(f"{folder} holds predictions for questions that were not asked, such as {min(unknown)!r}.")
    write_predictions(merged, (by_id[question_id] for question_id in question_ids if question_id in by_id))
    for path in paths:
        path.unlink()
