"""Score answers to PARTONOMY's questions from a file, or of a baseline without a model; needs no torch.

`arguments` are those of evaluate_plum.py.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

import partonomy_dataset
from plum_partonomy.evaluation.names import match_names
from plum_partonomy.files import write_whole
from plum_partonomy.records import Question
from plum_partonomy.scoring.answers import answer_files, read_answers
from plum_partonomy.scoring.baselines import SEED as BASELINE_SEED
from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.benchmark import data_folder, fingerprint, load_questions
from plum_partonomy.scoring.metrics import pair_by_id
from plum_partonomy.scoring.predictions import Prediction, check_run, write_predictions
from plum_partonomy.scoring.results import (
    describe_command,
    describe_protocol,
    fingerprint_files,
    format_table,
    leave_out,
    score,
)
from plum_partonomy.sources.problems import ERRORS_FILE


def dataset_options(arguments: Any) -> dict[str, str]:
    """Return the arguments of load_dataset besides the names."""
    options = {"data_dir": arguments.data_dir, "scheme": arguments.scheme}
    if arguments.dataset == partonomy_dataset.DATASET_NAME:
        options["on_error"] = arguments.on_error
    return {name: value for name, value in options.items() if value is not None}


def load(arguments: Any) -> tuple[datasets.Dataset, list[Question], list[str]]:
    """Return the rows, their questions, and one sentence for each skipped record."""
    rows, questions = load_questions(
        arguments.dataset,
        name=arguments.name,
        split=arguments.split,
        limit=arguments.limit,
        **dataset_options(arguments),
    )
    return rows, questions, partonomy_dataset.left_out(rows)


def describe_run(arguments: Any, settings: dict[str, Any], *, choice_reduction: str, started: float) -> dict[str, Any]:
    """Return the description of a run for metrics.json."""
    protocol = describe_protocol(
        choice_reduction=choice_reduction,
        mask_source=arguments.mask_source,
        match=arguments.match if arguments.match_model is None else f"{arguments.match} by {arguments.match_model}",
    )
    return {
        **settings,
        "protocol": protocol,
        "scheme": arguments.scheme,
        **describe_command(),
        "wall_seconds": round(time.perf_counter() - started, 1),
    }


def finish(
    arguments: Any,
    rows: datasets.Dataset,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    *,
    run: dict[str, Any],
    training_curves: Path | None = None,
) -> None:
    """Write the outputs of the run and print their paths."""
    predictions = match_names(questions, predictions, match=arguments.match, model=arguments.match_model)
    metrics = score(
        rows,
        questions,
        predictions,
        output_dir=Path(arguments.output_dir),
        run=run,
        mask_source=arguments.mask_source,
        training_curves=training_curves,
    )
    print(format_table(metrics))
    print(f"report: {Path(arguments.output_dir) / 'report.html'}")


def answer_by_baseline(arguments: Any, questions: Sequence[Question]) -> tuple[list[Prediction], dict[str, Any]]:
    """Return the predictions of a baseline, and its settings for run.json."""
    settings = {"baseline": arguments.baseline, "baseline_seed": BASELINE_SEED}
    if arguments.baseline != "majority":
        return answer_without_model(arguments.baseline, questions), settings
    splits = datasets.get_dataset_split_names(arguments.dataset, arguments.name, **dataset_options(arguments))
    if arguments.split.startswith("train") or "train" not in splits:
        settings["counted_over"] = f"the other images of {arguments.split}"
        return answer_without_model("majority", questions), settings
    _, training, _ = load(replace(arguments, split="train", limit=None))
    settings["counted_over"] = "train"
    return answer_without_model("majority", questions, training=training), settings


def evaluate_answers(arguments: Any) -> None:
    """Score a predictions file or a baseline. Raises DataError before anything is written."""
    started = time.perf_counter()
    rows, questions, unusable = load(arguments)
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("dataset", "name", "split", "limit")}
    settings |= {"data_dir": data_folder(arguments.data_dir), "questions": len(questions)}
    settings |= {"questions_fingerprint": fingerprint(questions)}
    settings |= {"mask_source": arguments.mask_source}
    if arguments.baseline is not None:
        predictions, baseline = answer_by_baseline(arguments, questions)
        problems, settings = [], settings | baseline
    else:
        path, form = Path(arguments.predictions), arguments.format
        predictions, problems = read_answers(path, questions, mask_source=arguments.mask_source, format=form)
        settings["predictions_fingerprint"] = fingerprint_files(answer_files(path, format=form))
    output_dir = Path(arguments.output_dir)
    check_run(output_dir, settings)
    report_to = output_dir / ERRORS_FILE if arguments.on_error == "report" else None
    scored = leave_out(questions, predictions, unusable + problems, report_to=report_to)
    pair_by_id(scored, predictions)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "run.json", [json.dumps(settings, indent=2), "\n"])
    if arguments.baseline is not None:
        write_predictions(output_dir / "predictions.jsonl", predictions)
    # the author of the file decided how choices were scored
    described = describe_run(arguments, settings, choice_reduction="as given", started=started)
    run = {"predictions": arguments.predictions, **described}
    run |= {"left_out": len(questions) - len(scored), "records_left_out": len(unusable)}
    run["questions_fingerprint"] = fingerprint(scored)  # results of other questions are not compared with these
    run["masks_resized"] = partonomy_dataset.masks_resized(rows)
    finish(arguments, rows, scored, predictions, run=run)
