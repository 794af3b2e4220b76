import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from plum_partonomy.masks import DataError
from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.comparison import compare, write_comparison
from plum_partonomy.scoring.metrics import evaluate_predictions
from plum_partonomy.scoring.predictions import write_predictions
from scripts import compare_predictions
from tests.scoring.test_answers import QUESTIONS, make_question
from tests.scoring.test_benchmark import save


def cells(group, figure):
    (row,) = [row for row in group if row["figure"] == figure]
    return row["cells"]


def test_values_and_intervals_are_those_of_each_model_alone():
    models = {name: answer_without_model(name, QUESTIONS) for name in ("random", "ground_truth")}
    groups = compare(QUESTIONS, models)
    for index, predictions in enumerate(models.values()):
        alone = evaluate_predictions(QUESTIONS, predictions, intervals=True)
        for row in groups["overall"]:
            assert row["cells"][index]["value"] == alone["overall"][row["figure"]]
            assert row["cells"][index]["interval"] == alone["intervals"]["overall"].get(row["figure"])
    assert list(groups) == ["overall", "identification"]


def test_a_constant_difference_is_certain_however_uncertain_both_values_are():
    questions = [make_question(number, correct=number % 3) for number in range(40)]
    models = {name: answer_without_model("random", questions) for name in ("one", "same")}
    first, second = cells(compare(questions, models)["overall"], "choice_accuracy")
    assert first["interval"][0] < first["interval"][1] and first["difference"] is None
    assert second["difference"] == (0.0, 0.0)
    models["same"] = answer_without_model("ground_truth", questions)
    _, second = cells(compare(questions, models)["overall"], "choice_accuracy")
    low, high = second["interval"][0] - first["interval"][1], second["interval"][1] - first["interval"][0]
    assert second["difference"] == pytest.approx((low, high))
    assert second["gain"] == pytest.approx(second["value"] - first["value"]) and first["gain"] is None


def test_the_page_stands_alone_and_escapes_the_names_of_models(tmp_path):
    models = {name: answer_without_model("full_image", QUESTIONS) for name in ("<b>one", "two")}
    grey = Image.fromarray(np.full((4, 5, 3), 128, np.uint8))
    write_comparison(tmp_path / "c.html", questions=QUESTIONS, models=models, load_image=lambda question: grey)
    text = (tmp_path / "c.html").read_text()
    assert "&lt;b&gt;one" in text and "<b>one" not in text
    assert text.count('<img src="data:image/jpeg') == 3 * len(QUESTIONS)
    assert "http" not in text and text.count("0.400") >= 2
    assert "the difference from &lt;b&gt;one" in text and "+0.000 (+0.000 to +0.000)" in text


def test_of_each_type_the_questions_on_which_the_models_differ_most_are_shown(tmp_path):
    types = ["identification"] * 10 + ["positive"]
    questions = [replace(make_question(number), question_type=name) for number, name in enumerate(types)]
    models = {name: answer_without_model("ground_truth", questions) for name in ("one", "two")}
    for index in (3, 10):
        models["two"][index] = replace(models["two"][index], given_spans=[])
    grey = Image.fromarray(np.full((4, 5, 3), 128, np.uint8))
    write_comparison(tmp_path / "c.html", questions=questions, models=models, load_image=lambda question: grey)
    text = (tmp_path / "c.html").read_text()
    shown = re.findall(r'<div class="box example" data-type="(\w+)">\n<h3>What .*?· (q\d+)</p>', text, re.DOTALL)
    assert [name for _, name in shown] == ["q3", "q10", "q0", "q1", "q2", "q4", "q5"]
    assert [kind for kind, _ in shown].count("positive") == 1
    assert re.findall(r'<option value="(\w+)">[^(]*\((\d+)\)', text) == [
        ("overall", "11"),
        ("identification", "10"),
        ("positive", "1"),
    ]
    assert "two: mean IoU 0.00, choice right" in text


def run_script(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["compare_predictions.py", *map(str, options)])
    compare_predictions.main()


def test_the_script_compares_files_and_refuses_one_that_lacks_an_answer(tmp_path, monkeypatch):
    grey = Image.fromarray(np.full((4, 5, 3), 128, np.uint8))
    questions = [replace(question, image=grey) for question in QUESTIONS]
    dataset = save(questions, tmp_path)
    for name in ("full_image", "ground_truth"):
        write_predictions(tmp_path / f"{name}.jsonl", answer_without_model(name, questions))
    options = ["--dataset", dataset, "--name", "default", "--output", tmp_path / "c.html"]
    files = [f"one={tmp_path / 'full_image.jsonl'}", tmp_path / "ground_truth.jsonl"]
    run_script(monkeypatch, *files, *options)
    assert "<th>one</th><th>" in (tmp_path / "c.html").read_text()
    write_predictions(tmp_path / "full_image.jsonl", answer_without_model("full_image", questions[1:]))
    with pytest.raises(DataError, match="full_image.jsonl: question 'q0' has no answer.$"):
        run_script(monkeypatch, *files, *options)


def test_a_file_may_have_an_equals_sign_in_its_path(tmp_path):
    (tmp_path / "lr=1").mkdir()
    path = tmp_path / "lr=1" / "p.jsonl"
    path.touch()
    expected = {str(path): path, "ours": path}
    assert compare_predictions.parse_models([str(path), f"ours={path}"]) == expected


def test_two_models_of_one_name_are_refused(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="Two models are called 'same': give each its own name, as NAME=FILE.$"):
        run_script(monkeypatch, "same=a.jsonl", "same=b.jsonl", "--output", tmp_path / "c.html")
