"""Answers of any model from a file, and of the baselines."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plum_partonomy.masks import DataError, encode
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring.answers import FIELDS, MASK_FIELDS, read_answers
from plum_partonomy.scoring.baselines import BASELINES, answer_without_model
from plum_partonomy.scoring.metrics import evaluate_predictions
from plum_partonomy.scoring.predictions import append_predictions
from plum_partonomy.scoring.results import leave_out
from plum_partonomy.scoring.tasks import FIELDS as TASK_FIELDS
from plum_partonomy.sources.problems import read_problems

SIZE = (4, 5)
FULL = encode(np.ones(SIZE, bool))
LEFT = encode(np.arange(20).reshape(SIZE) % 5 < 2)


def make_question(number, *, label="boat", parts=("hull", "mast"), others=(("hull",), ("oar",)), correct=0):
    choices = [list(parts), *map(list, others)]
    choices = choices[-correct:] + choices[:-correct] if correct else choices
    return Question(
        id=f"q{number}",
        image=None,
        image_id=f"i{number}",
        image_label=label,
        question_type="identification",
        question="What visible parts does the object in the image have?",
        choices=[", ".join(choice) for choice in choices],
        correct=correct,
        choice_parts=choices,
        masks=[PartMask(label=part, rle=LEFT) for part in parts],
    )


QUESTIONS = [make_question(number, correct=number) for number in range(3)]


def answer(number, **fields):
    masks = [{"part": "hull", "rle": FULL, "confidence": 0.5}, {"part": " Mast", "rle": LEFT}]
    return {"id": f"q{number}", "choice_scores": [-1.0, -0.5, -3], "masks": masks, **fields}


def test_the_predictions_of_evaluate_plum_are_read_with_the_same_checks(tmp_path):
    path = tmp_path / "predictions.jsonl"
    append_predictions(path, answer_without_model("ground_truth", [*QUESTIONS, make_question(9)]))
    predictions, problems = read_answers(path, QUESTIONS)
    assert predictions == answer_without_model("ground_truth", QUESTIONS)
    (problem,) = problems
    assert problem.startswith(f"{path}, line 4, field 'question_id': 'q9' is none of the 3 questions of the data set;")
    text = path.read_text()
    path.write_text(text.replace('"choice_scores": [0.0', '"choice_scores": [NaN', 1)[:-40])
    _, problems = read_answers(path, QUESTIONS)
    assert f"{path}, line 1, field 'choice_scores[0]' must be a finite number, found nan" in problems[0]
    assert f"{path}, line 4: expected JSON, found no valid JSON" in problems[1]
    path.write_text(text.replace("[4, 5]", "[5, 4]"))
    assert f"{path}, line 1: Question 'q0' has an image" in read_answers(path, QUESTIONS)[1][0]


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_answers_are_read_in_question_order_with_the_largest_score_chosen(tmp_path):
    records = [answer(2), answer(0), "", {**answer(1, choice=2), "choice_scores": None}]
    predictions, problems = read_answers(write(tmp_path / "a.jsonl", records), QUESTIONS)
    assert problems == []
    assert [prediction.question_id for prediction in predictions] == ["q0", "q1", "q2"]
    assert [prediction.choice for prediction in predictions] == [1, 2, 1]
    figures = evaluate_predictions(QUESTIONS, predictions)["overall"]
    assert figures["strict_macro_giou"] == pytest.approx((0.4 + 1) / 2)
    assert figures["choice_accuracy"] == 0.0
    assert figures["end_to_end_giou"] is None


def test_masks_of_a_generated_answer_give_the_figures_of_generated_parts(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"id": q.id, "masks": [{"part": "hull", "rle": LEFT}]} for q in QUESTIONS])
    predictions, problems = read_answers(path, QUESTIONS, mask_source="generated")
    assert problems == []
    figures = evaluate_predictions(QUESTIONS, predictions, mask_source="generated")["overall"]
    assert (figures["generated_part_precision"], figures["generated_part_recall"]) == (1.0, 0.5)
    assert figures["strict_macro_giou"] == figures["end_to_end_giou"] == 0.5
    assert figures["choice_accuracy"] is None


def mask_with(**fields):
    return answer(1, masks=[{"part": "hull", "rle": FULL, **fields}])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "q1", ', "line 2: expected JSON, found no valid JSON"),
        ("[1]", r"line 2: expected one JSON object, found \[1\]"),
        (
            '{"id": "q1", "choice_scores": [NaN, 0, 0]}',
            "line 2, field 'choice_scores.0.' must be a finite number, found nan",
        ),
        (answer(1, choice_scores=[10**400, 0, 0]), "line 2, field 'choice_scores.0.' must be a finite number"),
        (answer(1, choice_scores=[True, 0, 0]), "line 2, field 'choice_scores.0.' .*found True"),
        (answer(1, choice_scores=[0, 1]), "line 2, field 'choice_scores': expected 3 numbers"),
        (answer(1, choice=0), "line 2: both 'choice' and 'choice_scores'"),
        (answer(1, choice=3, choice_scores=None), "line 2, field 'choice': expected an index into 3 choices, found 3"),
        (
            answer(1, choice="none of these", choice_scores=None),
            "line 2, field 'choice': expected an index or the text of one of 3 choices, found 'none of these'",
        ),
        (answer(1, surplus=1), "line 2: unknown field 'surplus'"),
        (answer(1, id=7), "line 2, field 'id': expected the id of a question, found 7"),
        (answer(9), "line 2, field 'id': 'q9' is none of the 3 questions"),
        (answer(0), r"line 2: 'q0' was answered before, in .*line 1"),
        (answer(1, masks={}), "line 2, field 'masks': expected a list"),
        (mask_with(part="\ud800"), r"line 2, field 'masks\[0\]', field 'part': expected text, found half a character"),
        (mask_with(part=" "), r"line 2, field 'masks\[0\]', field 'part'"),
        (mask_with(confidence=float("inf")), r"line 2, field 'masks\[0\]', field 'confidence' must be a finite"),
        (mask_with(rle={"size": [4, 6], "counts": "0"}), r"line 2, field 'masks\[0\]', field 'rle': .*\[4, 6\]"),
        (mask_with(rle={"size": [4, 5], "counts": "0" * 9}), r"line 2, field 'masks\[0\]', field 'rle'"),
        (mask_with(rle=None), r"line 2, field 'masks\[0\]', field 'rle': expected an RLE"),
        ({"id": "q1", "choice": 1}, "line 2: 'masks' is missing, though 2 of 3 lines have it"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_refuses_the_file(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", [answer(0), line, answer(2)])
    predictions, problems = read_answers(path, QUESTIONS)
    with pytest.raises(DataError, match=message):
        leave_out(QUESTIONS, predictions, problems, report_to=None)


@pytest.mark.parametrize(
    ("fields", "mask_source", "message"),
    [
        ({"choice_scores": None, "masks": None}, "gt_answer", "a.jsonl: expected 'choice', .* found none of them"),
        ({"masks": None}, "generated", "a.jsonl: --mask_source generated needs the masks of a generated answer"),
    ],
)
def test_a_file_with_nothing_to_score_is_refused(tmp_path, fields, mask_source, message):
    path = write(tmp_path / "a.jsonl", [answer(number, **fields) for number in range(3)])
    with pytest.raises(DataError, match=message):
        read_answers(path, QUESTIONS, mask_source=mask_source)


@pytest.mark.parametrize("field", ["given_spans", "generated_spans", "generated_parts", "true_tags"])
def test_a_field_that_some_predictions_of_evaluate_plum_lack_is_named(tmp_path, field):
    truth = answer_without_model("ground_truth", QUESTIONS)
    extra = {"generated_parts": ["hull"], "true_tags": [(0, 1)], "predicted_tags": [(0, 1)]}
    whole = [replace(prediction, generated_spans=prediction.given_spans, **extra) for prediction in truth]
    without = {"true_tags": None, "predicted_tags": None} if field == "true_tags" else {field: None}
    append_predictions(tmp_path / "p.jsonl", [whole[0], replace(whole[1], **without), whole[2]])
    _, (problem,) = read_answers(tmp_path / "p.jsonl", QUESTIONS)
    assert f"line 2: {field!r} is missing, though 2 of 3 lines have it" in problem


def test_a_choice_may_be_named_by_its_text(tmp_path):
    by_index = [answer(n, choice=n, choice_scores=None) for n in range(3)]
    by_text = [line | {"choice": q.choices[n]} for n, (line, q) in enumerate(zip(by_index, QUESTIONS, strict=True))]
    indices, _ = read_answers(write(tmp_path / "indices.jsonl", by_index), QUESTIONS)
    texts, problems = read_answers(write(tmp_path / "texts.jsonl", by_text), QUESTIONS)
    assert texts == indices and not problems


def test_a_question_without_a_line_is_named(tmp_path):
    _, problems = read_answers(write(tmp_path / "a.jsonl", [answer(0), answer(2)]), QUESTIONS)
    assert problems == [f"{tmp_path / 'a.jsonl'}: question 'q1' has no answer."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl is empty: expected an answer to each question"),
        (b"\n \r\n", "a.jsonl is empty: expected an answer to each question"),
        (gzip.compress(b"{}", mtime=0), "a.jsonl: expected text, found a gzip file; unpack it with gunzip"),
        (b"[{}]", "a.jsonl, line 1: expected one JSON object, .*; write one object per line"),
    ],
)
def test_a_file_without_answers_says_what_it_is(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        leave_out(QUESTIONS, *read_answers(tmp_path / "a.jsonl", QUESTIONS), report_to=None)


def test_what_cannot_be_used_is_left_out_and_listed_when_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [answer(0), answer(0), "{", answer(2)])
    predictions, problems = read_answers(path, QUESTIONS)
    scored = leave_out(QUESTIONS, predictions, problems, report_to=tmp_path / "out" / "errors.jsonl")
    assert [question.id for question in scored] == ["q2"]
    assert read_problems(tmp_path / "out" / "errors.jsonl") == problems and len(problems) == 3


def test_a_file_without_any_usable_line_is_refused_however_errors_are_handled(tmp_path):
    predictions, problems = read_answers(write(tmp_path / "a.jsonl", ["x"]), QUESTIONS)
    with pytest.raises(DataError, match="None of 3 questions"):
        leave_out(QUESTIONS, predictions, problems, report_to=tmp_path / "errors.jsonl")
    with pytest.raises(DataError, match="absent.jsonl does not exist"):
        read_answers(tmp_path / "absent.jsonl", QUESTIONS)


def test_the_json_schema_names_the_fields_that_are_read():
    schema = json.loads((Path(__file__).parents[2] / "docs" / "predictions.schema.json").read_text())
    assert tuple(schema["properties"]) == FIELDS
    assert tuple(schema["properties"]["masks"]["items"]["properties"]) == MASK_FIELDS
    assert tuple(schema["$defs"]["task_answer"]["properties"]) == TASK_FIELDS


# ---------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_answers_every_question_and_does_not_depend_on_their_order(name):
    predictions = answer_without_model(name, QUESTIONS)
    assert evaluate_predictions(QUESTIONS, predictions)["overall"]["n"] == 3
    assert sorted(answer_without_model(name, QUESTIONS[::-1]), key=lambda p: p.question_id) == predictions


def test_the_ground_truth_has_the_figure_one_everywhere():
    figures = evaluate_predictions(QUESTIONS, answer_without_model("ground_truth", QUESTIONS))["overall"]
    scored = {name for name in figures if not name.endswith("_random")} - {
        "n",
        "photographs",
        "object_choice_accuracy",
    }
    assert {figures[name] for name in scored} == {1.0}


def test_the_full_image_has_the_share_of_the_part_in_the_image_as_its_iou():
    figures = evaluate_predictions(QUESTIONS, answer_without_model("full_image", QUESTIONS))["overall"]
    assert figures["strict_macro_giou"] == pytest.approx(0.4)
    assert figures["choice_accuracy"] is None


def test_the_majority_is_that_of_the_other_images_with_the_same_label():
    parts = [("hull",), ("mast",), ("mast",), ("hull",)]
    questions = [make_question(n, parts=p, others=(("oar",), ("mast", "flag"))) for n, p in enumerate(parts[:3])]
    questions.append(make_question(3, label="car", parts=parts[3], others=(("oar",), ("mast",))))
    predictions = answer_without_model("majority", questions)
    # q0: the others show a mast; q1: one hull and one mast, half of two each; q3: no other car
    assert [prediction.choice for prediction in predictions][0] == 2
    assert all(prediction.given_spans is None for prediction in predictions)


def test_the_majority_is_counted_over_the_training_questions_where_they_are_given():
    questions = [make_question(number) for number in range(2)]  # both show a hull and a mast
    training = [make_question(number, parts=("hull",), others=(("oar",), ("mast",))) for number in range(5, 8)]
    assert [prediction.choice for prediction in answer_without_model("majority", questions)] == [0, 0]
    predictions = answer_without_model("majority", questions, training=training)
    assert [prediction.choice for prediction in predictions] == [1, 1]


def test_random_choices_are_right_about_as_often_as_chance_says():
    questions = [make_question(number, correct=number % 3) for number in range(300)]
    figures = evaluate_predictions(questions, answer_without_model("random", questions))["overall"]
    assert figures["choice_accuracy"] == pytest.approx(1 / 3, abs=0.09)
    assert 0 < figures["strict_macro_giou"] < 0.4
