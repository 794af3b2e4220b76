"""The table of published figures and the column that metrics.json files fill."""

import json
import subprocess
import sys
from pathlib import Path

from plum_partonomy.records import QUESTION_TYPES
from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.metrics import evaluate_predictions
from scripts.published_table import PUBLISHED, format_published
from tests.scoring.test_answers import make_question

ROOT = Path(__file__).parents[2]


def cells(table):
    return [line.strip("| ").split(" | ") for line in table.splitlines()]


def test_the_documentation_has_the_table_that_the_script_prints():
    assert format_published({}) in (ROOT / "docs" / "benchmark.md").read_text()
    assert PUBLISHED.keys() <= set(QUESTION_TYPES)


def test_a_run_fills_the_last_column_with_its_reference_figures_in_percent(tmp_path):
    questions = [make_question(number) for number in range(3)]
    for question, question_type in zip(questions, PUBLISHED, strict=False):
        question.question_type = question_type
    metrics = evaluate_predictions(questions, answer_without_model("full_image", questions))
    run = {"dataset": "partonomy", "name": "core", "split": "test", "protocol": {"name": "published"}}
    path = tmp_path / "mine" / "metrics.json"
    path.parent.mkdir()
    path.write_text(json.dumps(metrics | {"run": run}))
    script = [sys.executable, str(ROOT / "scripts" / "published_table.py")]
    done = subprocess.run([*script, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    header, _, first, second, third, fourth = cells(done.stdout)[:6]
    assert header[-1] == f"measured: {path.parent}"
    assert [row[-1] for row in (first, second, third)] == ["40.0 / 40.0"] * 3
    assert fourth[-1] != "40.0 / 40.0"
    assert done.stdout.rstrip().endswith("mine: partonomy core, split test, 3 questions, protocol published")
    path.write_text("{}")
    done = subprocess.run([*script, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "is not a metrics.json of evaluate_plum.py" in done.stderr
