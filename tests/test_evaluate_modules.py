"""The metrics of `metrics/`, loaded by path from a folder that has nothing of this repository beside it."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml

from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.metrics import evaluate_predictions, part_counts, pool, true_masks
from tests import forks
from tests.scoring.test_answers import QUESTIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(ROOT / "metrics", tmp_path_factory.mktemp("alone") / "metrics")


@pytest.fixture
def masks():
    """Predictions and references of three images, and the figures of the library."""
    answers = answer_without_model("random", QUESTIONS)
    predictions = [
        [{"label": span.text, "rle": span.rle, "score": span.score} for span in answer.given_spans]
        for answer in answers
    ]
    references = [[{"label": mask.label, "rle": mask.rle} for mask in true_masks(question)] for question in QUESTIONS]
    return predictions, references, evaluate_predictions(QUESTIONS, answers)["overall"]


def load(path, tmp_path, **options):
    return evaluate.load(str(path), cache_dir=str(tmp_path / "cache"), **options)


def test_masks_added_in_batches_have_the_figures_of_the_library(folder, tmp_path, masks):
    predictions, references, expected = masks
    metric = load(folder / "partonomy_masks", tmp_path)
    metric.add_batch(predictions=predictions[:2], references=references[:2])
    metric.add_batch(predictions=predictions[2:], references=references[2:])
    figures = metric.compute()
    assert len(figures) == 12 and expected["strict_macro_giou"] > 0
    assert figures == {name: pytest.approx(expected[name]) for name in figures}


def test_part_names_have_the_counts_of_the_library_in_both_protocols(folder, tmp_path):
    predictions, references = [["hull", "Hull ", "flag"], ["mast"]], [["hull", "mast"], ["mast"]]
    metric = load(folder / "partonomy_parts", tmp_path)
    for protocol in ("strict", "reference"):
        pairs = zip(predictions, references, strict=True)
        counts = pool(part_counts(*pair, protocol=protocol) for pair in pairs)
        found = metric.compute(predictions=predictions, references=references, protocol=protocol)
        assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(
            (counts.precision, counts.recall, counts.f1)
        )
        assert found["exact"] == 0.5


def test_both_metrics_combine(folder, tmp_path):
    names = [["hull"], ["mast"]]
    metric = evaluate.combine([load(folder / "partonomy_parts", tmp_path), load(folder / "partonomy_parts", tmp_path)])
    assert set(metric.compute(predictions=names, references=names).values()) == {1.0}
    for name in names:
        metric.add(prediction=name, reference=name)
    assert set(metric.compute().values()) == {1.0}


PROCESS = """
import json, sys, evaluate
path, cache, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
metric = evaluate.load(path, cache_dir=cache, num_process=2, process_id=rank, experiment_id="two")
names = [["hull"], ["mast"], ["oar"], ["flag"]]
truth = [["hull"], ["mast"], ["oar"], ["sail"]]
figures = metric.compute(predictions=names[rank::2], references=truth[rank::2])
print(json.dumps(figures))
"""


def test_two_processes_give_the_figures_of_all(folder, tmp_path):
    command = ["-c", PROCESS, folder / "partonomy_parts", tmp_path / "cache"]
    load(folder / "partonomy_parts", tmp_path)  # so that the two do not copy the module at the same time
    first, second = forks.run_together([[*command, rank] for rank in (0, 1)])
    assert '"precision": 0.75' in first.stdout and second.stdout.strip() == "null"


def test_choices_have_the_accuracy_of_the_library_and_indices_beyond_the_choices_are_refused(folder, tmp_path):
    metric = load(folder / "partonomy_choices", tmp_path)
    answers = answer_without_model("random", QUESTIONS)
    predictions, references = [answer.choice for answer in answers], [question.correct for question in QUESTIONS]
    for pair in zip(predictions, references, strict=True):
        metric.add(prediction=pair[0], reference=pair[1])
    overall = evaluate_predictions(QUESTIONS, answers)["overall"]
    assert metric.compute(num_choices=3) == {
        name: pytest.approx(overall[name]) for name in ("choice_accuracy", "choice_accuracy_random")
    }
    metric.add_batch(predictions=torch.tensor(predictions[1:]), references=np.array(references[1:]))
    metric.add(predictions=torch.tensor(predictions[0]), references=references[0])
    assert metric.compute(num_choices=3)["choice_accuracy"] == pytest.approx(overall["choice_accuracy"])
    with pytest.raises(ValueError, match="Expected indices into 2 choices, found 2"):
        metric.compute(predictions=[2], references=[0], num_choices=2)


# ---------------------------------------------------------------- as Spaces


@pytest.mark.parametrize("name", ["partonomy_choices", "partonomy_masks", "partonomy_parts"])
def test_each_folder_is_a_whole_space_whose_example_has_figures(folder, name):
    space = folder / name
    front_matter = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "gradio" and front_matter["app_file"] == "app.py"
    assert "evaluate>=0.4.6" in (space / "requirements.txt").read_text().split()
    assert (space / "app.py").read_bytes() == (folder / "partonomy_parts" / "app.py").read_bytes()
    app = runpy.run_path(str(space / "app.py"))
    example = json.loads((space / "example.json").read_text())
    figures = app["compute"](*(json.dumps(example[field]) for field in ("predictions", "references")))
    assert 0.5 in figures.values() or 0.75 in figures.values()


class SpaceFiles(SimpleHTTPRequestHandler):
    """Serves FOLDER/NAME/FILE where the Hub serves a file of the Space any/NAME, at any revision."""

    def translate_path(self, path):
        _, _, name, _, _, file = path.strip("/").split("/")  # spaces/any/NAME/resolve/REVISION/FILE
        return str(Path(self.directory) / name / file)

    def log_message(self, *args):
        pass


def test_a_metric_loads_by_the_name_of_its_space(folder, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SpaceFiles, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }
        code = "import evaluate; print(evaluate.load('any/partonomy_masks').features)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "rle" in done.stdout


HULL = {"label": "hull", "rle": {"size": [1, 4], "counts": "022"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rle": {"size": [1, 4], "counts": ""}}, "decode to 0 pixels"),
        ({"rle": {"size": [1, 4], "counts": "02"}}, "decode to 2 pixels"),
        ({"rle": {"size": [1, 4], "counts": "zz~~"}}, "which no RLE has"),
        ({"rle": {"size": [2, 2], "counts": "022"}}, r"has size \[2, 2\]"),
        (
            {"rle": {"size": [1.5, 4], "counts": "022"}},
            r"of two positive integers, found \[1.5, 4\]",
        ),
        ({"score": float("nan")}, "a score must be a finite number, found nan"),
        ({"score": np.float32("inf")}, "a score must be a finite number, found .*inf"),
        ({"score": 10**400}, "a score must be a finite number, found 1000"),
        ({"score": "high"}, "a score must be a finite number, found 'high'"),
        ({"score": None}, "a score must be a finite number, found None"),
        ({"label": None}, "expected the name of a part as label, found None"),
        ({"label": " "}, "expected the name of a part as label, found ' '"),
        ({"box": [1, 2]}, r"expected a dict of label, rle, score, found \['box', 'label'"),
        ({"rle": {"size": [1, 4], "counts": b"022"}}, r"and counts as text, found .*b'022'.*\.decode\('ascii'\)"),
        ({"rle": np.ones((1, 4))}, r"expected an RLE of size \[height, width\] and counts as text, found array"),
    ],
)
def test_a_damaged_mask_or_score_is_refused_naming_image_and_mask(folder, tmp_path, changes, message):
    predictions = [[HULL | {"score": 0.5}], [HULL | {"score": 0.5}, HULL | {"score": 0.9} | changes]]
    with pytest.raises(ValueError, match=f"image 1, prediction 1: .*{message}"):
        load(folder / "partonomy_masks", tmp_path).compute(predictions=predictions, references=[[HULL]] * 2)


@pytest.mark.parametrize(
    ("name", "prediction", "message"),
    [
        ("masks", None, "image 0: expected a list with each prediction, found None"),
        ("masks", HULL, "image 0: expected a list with each prediction, found {'label'"),
        ("masks", [np.ones((1, 4))], "image 0, prediction 0: expected a dict of label, rle, score, found ndarray"),
        ("choices", 0.7, r"predictions\[0\]: expected the index of a choice, found 0.7"),
        ("choices", float("nan"), "expected the index of a choice, found nan"),
        ("choices", True, "expected the index of a choice, found True"),
        ("choices", 10**30, "expected the index of a choice, found 1000"),
        ("parts", "hull, mast", r"predictions\[0\]: expected a list of part names, found 'hull, mast'"),
        ("parts", ["hull", None], r"expected a list of part names, found \['hull', None\]"),
    ],
)
def test_a_prediction_of_another_form_is_one_sentence_that_names_it(folder, tmp_path, name, prediction, message):
    metric = load(folder / f"partonomy_{name}", tmp_path)
    reference = {"masks": [HULL], "choices": 0, "parts": ["hull"]}[name]
    with pytest.raises(ValueError, match=message) as whole:
        metric.compute(predictions=[prediction], references=[reference])
    with pytest.raises(ValueError, match=message):
        metric.add(prediction=prediction, reference=reference)
    assert "\n" not in str(whole.value)


@pytest.mark.parametrize("name", ["choices", "masks", "parts"])
def test_metrics_of_nothing_or_of_one_side_are_refused(folder, tmp_path, name):
    metric = load(folder / f"partonomy_{name}", tmp_path)
    with pytest.raises(ValueError, match="Expected at least one"):
        metric.compute(predictions=[], references=[])
    one = {"masks": [HULL | {"score": 0.5}], "choices": 0, "parts": ["hull"]}[name]
    with pytest.raises(ValueError, match="xpected a list .* references, found None"):
        metric.compute(predictions=[one])


def test_the_apps_of_the_metrics_are_one_file():
    assert len({path.read_bytes() for path in (ROOT / "metrics").glob("*/app.py")}) == 1
