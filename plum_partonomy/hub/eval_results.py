"""Write results for the Hub: `eval.yaml` of a benchmark data set, and `.eval_results/NAME.yaml` of a model.

eval.yaml defines one task for each question configuration and headline metric, because a leaderboard of the Hub ranks
one number. A file in a model's repository contains its values for the tasks of one configuration:

    - dataset: {id: user/partonomy, task_id: mini_questions_choice_accuracy}
      value: 0.74
      date: "2026-11-26T10:00:00+00:00"
      notes: "split test, protocol published"

Formats: huggingface.co/docs/hub/eval-results. huggingface_hub makes the entries.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from plum_partonomy.masks import DataError
from plum_partonomy.scoring.results import describe_left_out

__all__ = ["FRAMEWORK", "HEADLINES", "check_eval_yaml", "eval_results_file", "make_eval_results", "make_eval_yaml"]

FRAMEWORK = "partonomy"
HEADLINES = {
    "giou": "strict_macro_giou",
    "choice_accuracy": "choice_accuracy",
    "part_f1": "generated_part_f1",
    "generated_giou": "end_to_end_giou",
}
"""Suffix of a task id -> metric of metrics.json; all are shares, larger is better."""

FIELDS = {"name": str, "description": str, "evaluation_framework": str, "tasks": list}


def make_eval_yaml(name: str, configs: Sequence[str], *, split: str = "test") -> str:
    """Return the content of eval.yaml for the question configurations of a data set.

    Raises DataError if there are none.

    Args:
        name: display name of the benchmark.
        configs: names of all its configurations.
        split: the split that is scored.
    """
    asked = [config for config in configs if config == "core" or config.endswith("_questions")]
    if not asked:
        raise DataError(f"Expected a configuration with questions for eval.yaml, found {', '.join(configs)}.")
    record = {
        "name": name,
        "description": "Questions about the visible parts of objects: which parts, and where. giou: masks of the "
        "correct answer; choice_accuracy: five choices; part_f1, generated_giou: parts and masks of the model's own "
        "answer. Scored by evaluate_plum.py or in lmms-eval.",
        "evaluation_framework": FRAMEWORK,
        "tasks": [
            {"id": f"{config}_{headline}", "config": config, "split": split}
            for config in asked
            for headline in HEADLINES
        ],
    }
    text = yaml.safe_dump(record, sort_keys=False, width=100)
    check_eval_yaml(text, configs=configs)
    return text


def check_eval_yaml(text: str, *, configs: Sequence[str]) -> None:
    """Raise DataError unless a text is an eval.yaml with tasks of these configurations and unique ids."""
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"eval.yaml: expected YAML ({error}).") from error
    for field, kind in FIELDS.items():
        if not isinstance(record, dict) or not isinstance(record.get(field), kind) or not record[field]:
            raise DataError(f"eval.yaml: expected a {kind.__name__} in {field!r} that is not empty.")
    ids = []
    for index, task in enumerate(record["tasks"]):
        where = f"eval.yaml, field 'tasks[{index}]'"
        if not isinstance(task, dict) or not re.fullmatch(r"[\w.-]+", str(task.get("id", ""))):
            raise DataError(f"{where}: expected an id of letters, digits, '_', '-' and '.', found {task!r:.100}.")
        if task.get("config") not in configs:
            raise DataError(f"{where}: {task.get('config')!r} is none of the configurations {', '.join(configs)}.")
        ids.append(task["id"])
    if len(set(ids)) < len(ids):
        raise DataError("eval.yaml: two tasks have the same id.")


def eval_results_file(metrics: dict[str, Any]) -> str:
    """Return the path of a model's results within its repository, one file for each configuration."""
    return f".eval_results/{metrics['run']['name']}.yaml"


def make_eval_results(metrics: dict[str, Any], *, benchmark: str) -> str:
    """Return the content of that file.

    Args:
        metrics: content of the metrics.json of an evaluation.
        benchmark: name of the data set on the Hub whose eval.yaml has the tasks.

    Raises:
        DataError: The evaluation is not one of PARTONOMY's questions, or has none of the headline metrics.
    """
    overall, run = metrics["overall"], metrics["run"]
    if "protocol" not in run:
        raise DataError("Expected the metrics.json of PARTONOMY's questions; those of other tasks have no benchmark.")
    notes = f"split {run['split']}, {overall['n']} questions, protocol {run['protocol']['name']}"
    if run.get("limit") is not None:
        notes += ", the first questions of the split"
    notes += "".join(f", {line}" for line in describe_left_out(run))
    entries = [
        EvalResultEntry(
            dataset_id=benchmark,
            task_id=f"{run['name']}_{headline}",
            value=round(overall[metric], 4),
            date=run["date"],
            notes=notes,
        )
        for headline, metric in HEADLINES.items()
        if overall.get(metric) is not None
    ]
    if not entries:
        raise DataError(f"Expected one of {', '.join(HEADLINES.values())} in metrics.json, found none.")
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    assert parse_eval_result_entries(yaml.safe_load(text)) == entries
    return text
