import numpy as np
import pytest
from PIL import Image

from partkit.baselines import answer_without_model
from partkit.comparison import compare, write_comparison
from partkit.metrics import evaluate_predictions
from tests.test_answers import QUESTIONS, make_question


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


def test_the_page_stands_alone_and_escapes_the_names_of_models(tmp_path):
    models = {name: answer_without_model("full_image", QUESTIONS) for name in ("<b>one", "two")}
    grey = Image.fromarray(np.full((4, 5, 3), 128, np.uint8))
    write_comparison(tmp_path / "c.html", questions=QUESTIONS, models=models, load_image=lambda question: grey)
    text = (tmp_path / "c.html").read_text()
    assert "&lt;b&gt;one" in text and "<b>one" not in text
    assert text.count('<img src="data:image/jpeg') == 3 * len(QUESTIONS)
    assert "http" not in text and text.count("0.400") >= 2
