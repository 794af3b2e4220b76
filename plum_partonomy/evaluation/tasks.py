"""Evaluate other benchmarks than PARTONOMY (`--task`), for a PLUM model or a file of answers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from tqdm import tqdm

import partonomy_dataset
from plum_partonomy.evaluation.processes import open_state
from plum_partonomy.files import write_whole
from plum_partonomy.inference.encoded import RecentImage
from plum_partonomy.inference.one_image import Plum, Reply, ask, finish, load_model
from plum_partonomy.masks import encode
from plum_partonomy.scoring.answers import answer_files
from plum_partonomy.scoring.benchmark import data_folder, fingerprint_rows
from plum_partonomy.scoring.predictions import check_run
from plum_partonomy.scoring.results import describe_command, fingerprint_files, fingerprint_model, leave_out
from plum_partonomy.scoring.tasks import (
    TaskQuestion,
    cut_off_unfinished,
    format_task_table,
    load_task_image,
    load_task_questions,
    read_task_answers,
    score_task,
)
from plum_partonomy.sources.problems import ERRORS_FILE


def answer_line(plum: Plum, reply: Reply) -> dict[str, Any]:
    """Return an answer as a record of an answers file (scoring/tasks.py)."""
    answer = finish(plum, reply)
    masks = [
        # a span of blanks has a mask, but a part needs a name
        {"part": span.text.strip() or "blank", "rle": encode(np.asarray(span.mask)), "confidence": span.score}
        for span in answer.spans
    ]
    return {"answer": answer.text, "masks": masks}


def answer_task(
    arguments: Any, rows: datasets.Dataset, questions: Sequence[TaskQuestion], *, settings: dict[str, Any]
) -> Path:
    """Write a model's answers to a file, one by one, and return it; a run can resume. Completes `settings`."""
    folder, plum = load_model(arguments.model, dtype=arguments.dtype, device=open_state(arguments).device)
    settings |= {"model_fingerprint": fingerprint_model(folder), "dtype": arguments.dtype}
    settings |= {"max_new_tokens": arguments.max_new_tokens}
    output_dir = Path(arguments.output_dir)
    check_run(output_dir, settings)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "run.json", [json.dumps(settings, indent=2), "\n"])
    path = output_dir / "predictions.jsonl"
    path.touch()
    done = cut_off_unfinished(path)
    recent = RecentImage(plum.model, plum.processor)
    options = {"max_new_tokens": arguments.max_new_tokens}
    for question in tqdm(questions, desc="answering", unit="question"):
        if question.id not in done:
            image = load_task_image(rows, question)
            line = answer_line(plum, ask(plum, image, question.text, encoded=recent.encode(image), **options))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": question.id, **line}, ensure_ascii=False) + "\n")
    return path


def evaluate_task(arguments: Any, **options: Any) -> None:
    """Score a model or a file of answers. Raises DataError before anything is written.

    Args:
        arguments: Arguments of evaluate_plum.py.
        options: Options of the data set's builder, such as data_dir.
    """
    names = ("task", "dataset", "name", "split", "limit")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    place = {name: getattr(arguments, name) for name in ("name", "split", "limit")}
    rows, questions = load_task_questions(arguments.task, arguments.dataset, **place, **options)
    unusable = partonomy_dataset.left_out(rows)
    settings |= {"data_dir": data_folder(arguments.data_dir), "questions": len(questions)}
    settings["questions_fingerprint"] = fingerprint_rows(map(dataclasses.asdict, questions))
    output_dir = Path(arguments.output_dir)
    if arguments.model is not None:
        path = answer_task(arguments, rows, questions, settings=settings)
    else:
        path = Path(arguments.predictions)
        settings["predictions_fingerprint"] = fingerprint_files(answer_files(path))
        check_run(output_dir, settings)
    predictions, problems = read_task_answers(path, questions, task=arguments.task)
    report_to = output_dir / ERRORS_FILE if arguments.on_error == "report" else None
    scored = leave_out(questions, predictions, unusable + problems, report_to=report_to)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "run.json", [json.dumps(settings, indent=2), "\n"])
    run = {"model": arguments.model, "predictions": str(path), **settings, **describe_command()}
    run |= {"left_out": len(questions) - len(scored), "records_left_out": len(unusable)}
    metrics = score_task(arguments.task, rows, scored, predictions, output_dir=output_dir, run=run)
    print(format_task_table(metrics))
    print(f"report: {output_dir / 'report.html'}")
