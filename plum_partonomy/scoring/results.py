"""Write the outputs of an evaluation from its predictions: metrics.json, report.html and a printed table."""

import hashlib
import json
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets

from plum_partonomy.files import write_whole
from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.scoring.benchmark import load_image
from plum_partonomy.scoring.bootstrap import BOOTSTRAP_SEED, LEVEL, RESAMPLES
from plum_partonomy.scoring.metrics import MaskSource, evaluate_predictions, iou_per_part
from plum_partonomy.scoring.predictions import Prediction
from plum_partonomy.scoring.report import FIGURES, write_report
from plum_partonomy.sources.problems import write_problems

__all__ = [
    "PUBLISHED_PROTOCOL",
    "describe_command",
    "describe_left_out",
    "describe_protocol",
    "fingerprint_files",
    "fingerprint_model",
    "format_table",
    "leave_out",
    "score",
]


PUBLISHED_PROTOCOL = {"choice_reduction": "sequence_mean", "mask_source": "gt_answer", "match": "exact"}
"""Option -> value in the published protocol."""


def describe_protocol(*, choice_reduction: str, mask_source: MaskSource, match: str) -> dict[str, Any]:
    """Return the protocol of the metrics with its name: `published`, or `custom` with the differences.

    >>> describe_protocol(choice_reduction="answer_sum", mask_source="gt_answer", match="exact")["name"]
    'custom: choice_reduction answer_sum'
    """
    rules = {"choice_reduction": choice_reduction, "mask_source": mask_source, "match": match}
    differing = [f"{name} {rules[name]}" for name in rules if rules[name] != PUBLISHED_PROTOCOL[name]]
    return {
        "name": f"custom: {', '.join(differing)}" if differing else "published",
        **rules,
        "intervals": f"{LEVEL:.0%} bootstrap over images, {RESAMPLES} resamples, seed {BOOTSTRAP_SEED}",
    }


def describe_command() -> dict[str, Any]:
    """Return the command line, the time and the versions of the libraries."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy", "scipy", "pycocotools")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def fingerprint_model(folder: Path) -> str:
    """Return a hash of the weights, configuration, processor and code of a checkpoint, independent of its path."""
    return fingerprint_files(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".py")
    )


def fingerprint_files(paths: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files, independent of their folder."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def leave_out(
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    problems: Sequence[str],
    *,
    report_to: Path | None,
) -> list[Question]:
    """Return the questions to score when some predictions cannot be used.

    Args:
        questions, predictions: All questions and the usable predictions.
        problems: One sentence for each prediction that cannot be used.
        report_to: File for the problems, one JSON object per line; None raises an error instead.

    Raises:
        DataError: There are problems but no file for them, or no prediction is left.
    """
    if problems and report_to is None:
        more = f" (and {len(problems) - 1} more; evaluate_plum.py --on_error report lists them)"
        raise DataError(problems[0] + more * (len(problems) > 1))
    answered = {prediction.question_id for prediction in predictions}
    if problems and not answered:
        raise DataError(
            f"None of {len(questions)} questions has a usable prediction; the first problem: {problems[0]}"
        )
    if problems:
        report_to.parent.mkdir(parents=True, exist_ok=True)
        write_problems(report_to, problems)
        return [question for question in questions if question.id in answered]
    return list(questions)


def score(
    rows: datasets.Dataset,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    *,
    output_dir: Path,
    run: dict[str, Any],
    mask_source: MaskSource,
    training_curves: Path | None = None,
) -> dict[str, Any]:
    """Write report.html and metrics.json from questions and predictions; return the metrics.

    Args:
        rows: The data set, whose records contain the images of the questions.
        questions, predictions: One prediction per question.
        output_dir: An existing folder.
        run: Settings of the run, for both files.
        mask_source: The source of the scored masks.
        training_curves: CSV for the report, if the file exists.
    """
    metrics = evaluate_predictions(questions, predictions, mask_source=mask_source, intervals=True)
    metrics |= {"by_part": iou_per_part(questions, predictions, mask_source=mask_source), "run": run}
    row_of_question = {name: index for index, name in enumerate(rows["id"])}
    write_report(
        output_dir / "report.html",
        metrics=metrics,
        questions=questions,
        predictions=predictions,
        load_image=lambda question: load_image(rows, row_of_question[question.id], question),
        training_curves=training_curves if training_curves is not None and training_curves.is_file() else None,
    )
    # last, because the report raises an error for an image of another size than its masks
    write_whole(output_dir / "metrics.json", [json.dumps(metrics, indent=2, allow_nan=False), "\n"])
    return metrics


def describe_left_out(run: dict[str, Any]) -> list[str]:
    """Return the lines of a printed table about skipped records and resized masks."""
    questions, records = run.get("left_out", 0), run.get("records_left_out", 0)
    lines = []
    if questions or records:
        lines = [f"left out: {questions} questions, {records} records of the data set, listed in errors.jsonl"]
    if resized := run.get("masks_resized", 0):
        lines.append(f"resized: {resized} true masks that had another size than their image")
    return lines


def format_table(metrics: dict[str, Any]) -> str:
    """Return the metrics with intervals, wrong-image control and chance level as a table."""
    overall, intervals = metrics["overall"], metrics["intervals"]["overall"]
    lines = [f"protocol: {metrics['run']['protocol']['name']}", *describe_left_out(metrics["run"])]
    lines += [f"{'':34}{'model':>9}{'95 % interval':>18}{'wrong image':>13}{'random':>9}"]
    for name, title in FIGURES.items():
        cells = [overall.get(name + suffix) for suffix in ("", "_wrong_image", "_random")]
        texts = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        limits = "[{:.3f}, {:.3f}]".format(*intervals[name]) if name in intervals else "-"
        lines.append(f"{title:34}{texts[0]:>9}{limits:>18}{texts[1]:>13}{texts[2]:>9}")
    return "\n".join(lines)
