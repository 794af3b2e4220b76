"""The page that a folder of results becomes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plum_partonomy.masks import DataError
from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.leaderboard import make_leaderboard, read_results
from plum_partonomy.scoring.metrics import evaluate_predictions
from plum_partonomy.scoring.published import METHODS
from tests.scoring.test_answers import make_question

ROOT = Path(__file__).parents[2]
QUESTIONS = [make_question(number, correct=number) for number in range(3)]


def results_folder(folder: Path) -> Path:
    """Runs of two baselines on the same questions, of one on others, and of another task."""
    runs = {"low": ("random", "a"), "high/seed0": ("ground_truth", "a"), "other": ("full_image", "b")}
    for name, (baseline, questions) in runs.items():
        metrics = evaluate_predictions(QUESTIONS, answer_without_model(baseline, QUESTIONS), intervals=True)
        run = {"dataset": "partonomy", "name": f"set_{questions}", "split": "test", "baseline": baseline}
        run |= {"questions_fingerprint": questions, "protocol": {"name": "published"}}
        (folder / name).mkdir(parents=True)
        (folder / name / "metrics.json").write_text(json.dumps(metrics | {"run": run}))
    (folder / "words").mkdir()
    (folder / "words" / "metrics.json").write_text(json.dumps({"overall": {}, "run": {"task": "pope"}}))
    return folder


def test_models_share_a_table_only_if_they_answered_the_same_questions_best_first(tmp_path):
    results, others = read_results(results_folder(tmp_path))
    assert [result.name for result in results] == ["high/seed0", "low", "other"]
    assert others == ["words: task 'pope', not PARTONOMY's questions"]
    page = make_leaderboard(results)
    first, second, published = re.split(r"<h2>", page)[1:]
    assert first.startswith("partonomy set_a, split test") and second.startswith("partonomy set_b, split test")
    overall = first[first.index('data-type="overall"') : first.index('data-type="identification"')]
    assert overall.index("ground_truth") < overall.index("random") and "1.000 to 1.000" in overall
    assert "full_image" in second and "random" not in second and "ground_truth" not in second
    assert published.startswith("Published, not measured here")
    assert all(f"{method} (published)" in published for method in METHODS)
    assert not re.search(r'(src|href)="(?!https://wjdghks950)', page), "the page loads nothing from elsewhere"


def test_a_folder_without_results_and_a_damaged_file_are_refused(tmp_path):
    with pytest.raises(
        DataError, match="expected metrics.json of runs of evaluate_plum.py in its folders, found none"
    ):
        read_results(tmp_path)
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(DataError, match="metrics.json: expected the metrics.json of evaluate_plum.py"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metrics: metrics.pop("intervals"), "field 'intervals' is missing"),
        (lambda metrics: metrics.update(overall=None), "field 'overall': expected dict, found None"),
        (
            lambda metrics: metrics["overall"].update(choice_accuracy="1"),
            "field 'choice_accuracy': expected int or",
        ),
        (lambda metrics: metrics["run"].pop("questions_fingerprint"), "field 'questions_fingerprint' is missing"),
    ],
)
def test_a_field_that_the_page_shows_is_named_if_it_is_missing_or_of_another_type(tmp_path, change, message):
    path = results_folder(tmp_path) / "low" / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))
    with pytest.raises(DataError, match=f"low/metrics.json.*{message}"):
        read_results(tmp_path)


def test_the_command_writes_a_static_space(tmp_path):
    folder = results_folder(tmp_path / "runs")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "leaderboard.py"),
        str(folder),
        "--output_dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "left out: words" in done.stdout and "3 runs" in done.stdout
    assert "sdk: static" in (tmp_path / "site" / "README.md").read_text()
    assert (tmp_path / "site" / "index.html").read_text() == make_leaderboard(read_results(folder)[0])


@pytest.mark.slow
def test_a_click_on_a_heading_sorts_and_a_question_type_is_chosen(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install plum-partonomy[browser]")
    if shutil.which("chromium") is None:
        pytest.skip("apt-get install chromium")
    (tmp_path / "index.html").write_text(make_leaderboard(read_results(results_folder(tmp_path / "runs"))[0]))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "index.html").as_uri())
        table = page.locator("[data-type=overall] table").first
        assert table.locator("tbody b").all_inner_texts() == ["ground_truth", "random"]
        table.locator("th").first.click()
        table.locator("th").nth(2).click()
        assert table.locator("tbody b").all_inner_texts()[0] == "ground_truth"
        page.locator("select").first.select_option("identification")
        assert not table.is_visible() and page.locator("[data-type=identification]").first.is_visible()
        browser.close()
