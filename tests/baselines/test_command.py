"""Models of others from the command line: scored, resumed, refused."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plum_partonomy.evaluation import options, run
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.answers import read_answers
from plum_partonomy.scoring.baselines import BASELINES
from plum_partonomy.scoring.benchmark import load_questions
from plum_partonomy.scoring.predictions import read_predictions
from tests.baselines.tiny_models import tiny_gemma3, tiny_sam3
from tests.runs import approximately, read_lines

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "baselines"
# the stored questions: reading them takes less time than drawing them
ASKED = ["--dataset", "parquet", "--name", "default", "--data_dir", str(ROOT / "partonomy" / "mini_questions")]
ASKED += ["--limit", "11"]
BREAKS = """        self.asked = getattr(self, "asked", 0) + 1
        if self.asked > 2:
            return [float("nan")] * 5
"""
OWN_MODEL = EXAMPLES / "own_model.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Options that name saved tiny models."""
    folder = tmp_path_factory.mktemp("models")
    for name, (model, processor) in {"vlm": tiny_gemma3(), "sam3": tiny_sam3()}.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {
        "vlm": ["--vlm", str(folder / "vlm"), "--max_new_tokens", "3"],
        "sam3": ["--sam3", str(folder / "sam3"), "--sam3_threshold", "0.2"],
    }


def evaluate(output_dir, *options: str) -> dict:
    run.main([*ASKED, "--output_dir", str(output_dir), *options])
    return json.loads((output_dir / "metrics.json").read_text())


def test_an_answering_and_a_segmenting_model_make_a_complete_row_that_resumes(folders, tmp_path):
    options = ["--baseline", "vlm+sam3", *folders["vlm"], *folders["sam3"], "--batch_size", "2"]
    metrics = evaluate(tmp_path / "run", *options)
    for name in ("choice_accuracy", "strict_macro_giou", "generated_part_recall", "end_to_end_giou"):
        assert metrics["overall"][name] is not None and metrics["overall"][f"{name}_wrong_image"] is not None
    assert metrics["run"]["vlm"]["choices_by"] == "likelihood" and metrics["run"]["sam3"]["threshold"] == 0.2
    assert metrics["run"]["protocol"]["name"] == "published"
    path = tmp_path / "run" / "predictions.jsonl"
    lines = path.read_text()
    path.write_text("".join(lines.splitlines(keepends=True)[:3])[:-40])
    assert evaluate(tmp_path / "run", *options)["run"]["predictions_found"] == 2
    assert read_lines(path.read_text()) == approximately(read_lines(lines))
    with pytest.raises(DataError, match="contains another run, with .*sam3"):
        evaluate(tmp_path / "run", *options, "--sam3_threshold", "0.5")


def test_each_alone_has_the_metrics_that_it_can_have(folders, tmp_path):
    vlm = evaluate(tmp_path / "vlm", "--baseline", "vlm", *folders["vlm"], "--choices_by", "letter")
    assert vlm["overall"]["generated_part_precision"] is not None and vlm["overall"]["strict_macro_giou"] is None
    assert vlm["run"]["protocol"]["choice_reduction"] == "letter"
    sam3 = evaluate(tmp_path / "sam3", "--baseline", "sam3", *folders["sam3"], "--control", "none")
    assert sam3["overall"]["strict_macro_giou"] is not None and sam3["overall"]["choice_accuracy"] is None


def test_a_model_of_ones_own_in_a_python_file_is_scored(tmp_path):
    metrics = evaluate(tmp_path / "run", "--baseline", str(OWN_MODEL))
    assert metrics["overall"]["strict_macro_giou"] > 0 and 0 <= metrics["overall"]["choice_accuracy"] <= 1
    assert metrics["run"]["protocol"]["choice_reduction"] == "as given"


@pytest.mark.slow
def test_two_processes_answer_as_one(folders, tmp_path):
    options = ["--baseline", "vlm+sam3", *folders["vlm"], *folders["sam3"], "--batch_size", "2", "--device", "cpu"]
    evaluate(tmp_path / "one", *options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [*launcher, "evaluate_plum.py", *ASKED, "--output_dir", str(tmp_path / "two"), *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["run"]["processes"] == 2
    one, two = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert one == two


def test_what_was_answered_before_a_model_fails_is_kept(tmp_path):
    broken = OWN_MODEL.read_text().replace("        return [choice.count", BREAKS + "        return [choice.count")
    (tmp_path / "mine.py").write_text(broken)
    options = ["--baseline", str(tmp_path / "mine.py"), "--batch_size", "1", "--control", "none"]
    with pytest.raises(DataError, match="Question 'mini-test-00000-positive': expected 5 finite scores from 'choose'"):
        evaluate(tmp_path / "run", *options)
    (kept,) = (tmp_path / "run").glob("predictions.rank0.jsonl")
    assert len(read_predictions(kept)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "sam3"], "--baseline sam3 needs --sam3: a folder or a name on the Hub"),
        (["--baseline", "vlm+sam3"], r"--baseline vlm\+sam3 needs --vlm"),
        (["--baseline", "absent.py"], "absent.py: there is no such file"),
        (["--baseline", "evaluate_plum.py"], "evaluate_plum.py: expected a class Model"),
    ],
)
def test_a_baseline_that_cannot_be_made_is_refused(options, message, tmp_path):
    with pytest.raises(DataError, match=message):
        evaluate(tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_the_helper_of_foreign_environments_writes_a_file_that_is_scored_and_goes_on_with_it(tmp_path):
    spec = importlib.util.spec_from_file_location("predictions_file", EXAMPLES / "predictions_file.py")
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    shards = sorted((EXAMPLES.parents[1] / "partonomy" / "mini_questions").glob("validation-*.parquet"))
    asked = []

    def segment(image, part):
        asked.append(part)
        return np.ones((image.height, image.width), dtype=bool) if len(asked) % 2 else None

    path = tmp_path / "answers.jsonl"
    helper.write_answers(shards, path, segment)
    _, questions = load_questions("parquet", name="default", split="validation", data_dir=ASKED[5])
    predictions, problems = read_answers(path, questions)
    assert not problems and len(asked) == sum(len(q.choice_parts[q.correct]) for q in questions)
    lines, before = path.read_text(), len(asked)
    path.write_text(lines[:-40])
    helper.write_answers(shards, path, segment)
    assert len(asked) - before == len(questions[-1].choice_parts[questions[-1].correct])
    assert read_answers(path, questions)[1] == []


def test_the_command_knows_the_baselines_without_a_model():
    assert options.BASELINES == BASELINES
