"""Commands print progress bars and their own sentences on the standard error, and no warnings of libraries."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import forks
from tests.evaluation.test_evaluate_plum import question_set  # noqa: F401
from tests.runs import base_options
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
PROGRESS = re.compile(r"\d+%\||\d+ examples \[|^\s*$")
TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def without_progress(errors: str) -> list[str]:
    """The lines of a standard error that are no state of a progress bar."""
    return [line for line in re.split(r"[\r\n]+", TERMINAL.sub("", errors)) if not PROGRESS.search(line)]


def run(*words) -> str:
    """The standard error of a process that imports its libraries itself."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def trained_in_a_process(data_folder, tmp_path_factory):
    """A model that train.py made from scratch, and what it printed on the standard error."""
    folder = tmp_path_factory.mktemp("quiet")
    changes = {"model_config": tiny_config().to_dict(), "tokenizer_vocab_size": 300, "max_steps": 1}
    options = base_options(data_folder, folder / "out") | changes | {"eval_strategy": "steps", "disable_tqdm": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(options))))
    return folder / "out", run("train.py", folder / "recipe.yaml")


def test_a_training_from_scratch_prints_progress_alone(trained_in_a_process):
    _, errors = trained_in_a_process
    assert "1/1" in errors and without_progress(errors) == []


def test_a_training_from_a_checkpoint_prints_its_figures_and_progress_alone(
    trained_in_a_process, data_folder, tmp_path
):
    model, _ = trained_in_a_process
    options = base_options(data_folder, tmp_path) | {"model": model, "max_steps": 2, "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    done = forks.run("train.py", *(word for name, value in options.items() for word in (f"--{name}", value)))
    assert done.returncode == 0 and without_progress(done.stderr) == []
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    table = [line for line in lines if line.startswith("|")]
    assert lines[: len(table)] == table and len(table) == 3
    assert [line.startswith("{") for line in lines[len(table) :]] == [True, True, True, False]
    assert lines[-1] == f"The trained model, its processor and its curves are in {tmp_path}"


def test_an_evaluation_prints_progress_alone(trained_in_a_process, question_set, tmp_path):  # noqa: F811
    model, _ = trained_in_a_process
    questions = ["--dataset", question_set, "--name", "default", "--limit", 3, "--max_new_tokens", 4]
    errors = run("evaluate_plum.py", "--model", model, *questions, "--output_dir", tmp_path / "run")
    assert "predicting" in errors and without_progress(errors) == []


def test_loading_a_checkpoint_warns_of_nothing(trained_in_a_process, tmp_path):
    """As the app loads it, with the verbosity of transformers left as it is."""
    model, _ = trained_in_a_process
    code = "import sys; from plum_partonomy.inference.one_image import load_model; load_model(sys.argv[1])"
    done = forks.run("-c", code, model)
    assert done.returncode == 0 and without_progress(done.stderr) == []
