"""eval.yaml of a data set and .eval_results of a model, as the Hub reads them."""

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from plum_partonomy.hub.eval_results import (
    HEADLINES,
    check_eval_yaml,
    eval_results_file,
    make_eval_results,
    make_eval_yaml,
)
from plum_partonomy.masks import DataError

CONFIGS = ["mini", "mini_questions", "core"]


def measured(**run) -> dict:
    """The part of a metrics.json that counts here."""
    overall = {"n": 3, "strict_macro_giou": 0.81239, "choice_accuracy": 0.5, "end_to_end_giou": None}
    described = {"name": "mini_questions", "split": "test", "dataset": "partonomy", "command": "python", "limit": None}
    described |= {"protocol": {"name": "published"}, "date": "2026-11-26T10:00:00+00:00"}
    return {"overall": overall, "run": described | run}


def test_a_benchmark_has_a_task_for_each_configuration_of_questions_and_headline_metric():
    record = yaml.safe_load(make_eval_yaml("PARTONOMY", CONFIGS))
    expected = [(f"{config}_{end}", config, "test") for config in CONFIGS[1:] for end in HEADLINES]
    assert [(task["id"], task["config"], task["split"]) for task in record["tasks"]] == expected
    assert set(record) == {"name", "description", "evaluation_framework", "tasks"}
    with pytest.raises(DataError, match="Expected a configuration with questions for eval.yaml, found mini"):
        make_eval_yaml("PARTONOMY", ["mini"])


def test_results_are_entries_of_the_benchmarks_tasks_without_what_was_not_measured():
    metrics = measured(limit=3)
    assert eval_results_file(metrics) == ".eval_results/mini_questions.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(make_eval_results(metrics, benchmark="user/partonomy")))
    assert [(entry.task_id, entry.value) for entry in entries] == [
        ("mini_questions_giou", 0.8124),
        ("mini_questions_choice_accuracy", 0.5),
    ]
    assert entries[0].notes == "split test, 3 questions, protocol published, the first questions of the split"
    partial = yaml.safe_load(make_eval_results(measured(left_out=2), benchmark="user/partonomy"))
    assert parse_eval_result_entries(partial)[0].notes.startswith(
        "split test, 3 questions, protocol published, left out: 2 q"
    )


def test_results_of_other_tasks_and_without_a_headline_are_refused():
    other = measured()
    del other["run"]["protocol"]
    with pytest.raises(DataError, match="those of other tasks have no benchmark"):
        make_eval_results(other, benchmark="user/partonomy")
    with pytest.raises(DataError, match="Expected one of strict_macro_giou, .* found none"):
        make_eval_results(measured() | {"overall": {"n": 3}}, benchmark="user/partonomy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "expected a list in 'tasks' that is not empty"),
        ({"name": None}, "expected a str in 'name'"),
        ({"tasks": [{"id": "a b", "config": "core"}]}, r"field 'tasks\[0\]': expected an id of letters"),
        ({"tasks": [{"id": "a", "config": "other"}]}, "'other' is none of the configurations mini, mini_questions"),
        ({"tasks": [{"id": "a", "config": "core"}] * 2}, "two tasks have the same id"),
    ],
)
def test_an_eval_yaml_that_the_hub_would_refuse_is_named(changes, message):
    record = yaml.safe_load(make_eval_yaml("PARTONOMY", CONFIGS)) | changes
    with pytest.raises(DataError, match=message):
        check_eval_yaml(yaml.safe_dump(record), configs=CONFIGS)
