"""The authors' predictions json: what they write of a question gives the prediction that the same answer gives."""

import json
from dataclasses import replace

import pytest

from plum_partonomy.masks import DataError
from plum_partonomy.scoring.answers import read_answers
from plum_partonomy.scoring.metrics import evaluate_predictions
from tests.scoring.test_answers import FULL, LEFT, QUESTIONS, make_question

WHOLE = replace(
    make_question(3, correct=1),
    question_type="whole_to_part",
    object_question="What is the object in the image?",
    object_choices=["It is a boat.", "It is a car."],
    object_classes=["boat", "car"],
    object_correct=0,
)
ASKED = [*QUESTIONS, WHOLE]


def record(question, *, choice=0, **changes):
    """What the authors' scripts write; choices in another order than the question's, as theirs are not shuffled."""
    fields = {
        "image_path": question.image_id,
        "question_type": question.question_type,
        "questions": [question.question],
        "parts_answer_choices": sorted(question.choices),
        "gt_parts_answer": question.choices[question.correct],
        "predicted_parts_answer": question.choices[choice],
        "gt_parts": question.choice_parts[question.correct],
        "predicted_parts": question.choice_parts[choice],
        "gt_masks": [{**mask.rle, "label": mask.label} for mask in question.masks],
        "predicted_masks": [{**rle, "label": part} for part, rle in (("hull", FULL), ("mast", LEFT))],
        "mask_confidences": None,
        "object_answer_choices": None,
        "gt_object_answer": None,
        "predicted_object_answer": None,
        "gt_object": None,
        "predicted_object": None,
        "metrics": {"mask_macro": {"gmIoU-paired": 0.5}},
    }
    if question.object_question is not None:
        fields["questions"] = [question.object_question, question.question]
        fields |= {"object_answer_choices": question.object_choices, "predicted_object_answer": "It is a car."}
    return fields | changes


def write(path, records):
    path.write_text(json.dumps({"metrics": {"mask_macro": {}}, "predictions": records}, indent=4))
    return path


def read(path, questions=ASKED):
    return read_answers(path, questions, format="official")


def test_choices_masks_and_object_are_read_from_files_of_one_type_each(tmp_path):
    write(tmp_path / "identification.json", [record(q, choice=2) for q in reversed(QUESTIONS)])
    write(tmp_path / "whole_to_part.json", [record(WHOLE, choice=WHOLE.correct, mask_confidences=[0.5, 0.25])])
    (tmp_path / "config.yaml").write_text("")
    predictions, problems = read(tmp_path)
    assert problems == []
    assert [prediction.question_id for prediction in predictions] == [question.id for question in ASKED]
    assert [prediction.choice for prediction in predictions] == [2, 2, 2, WHOLE.correct]
    assert predictions[3].object_choice == 1
    assert [[span.score for span in prediction.given_spans] for prediction in predictions] == [[1, 1]] * 3 + [
        [0.5, 0.25]
    ]
    figures = evaluate_predictions(ASKED, predictions)["overall"]
    assert figures["reference_macro_giou"] == pytest.approx((0.4 + 1) / 2)
    assert (figures["choice_accuracy"], figures["object_choice_accuracy"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_path": "elsewhere"}, r"prediction 1: expected one question .*found 0 \(0 without.*about 'elsewhere'"),
        ({"question_type": "positive"}, r"prediction 1: expected one question .*found 0 \(0"),
        ({"questions": ["What is this object?"]}, r"prediction 1: expected one question .*found 0 \(0"),
        ({"parts_answer_choices": ["hull"]}, r"prediction 1: expected one question .*found 0 \(1 without"),
        ({"image_path": 3}, "prediction 1, field 'image_path': expected str, found 3"),
        ({"gt_parts_answer": "oar"}, "prediction 1, field 'gt_parts_answer': the correct answer of question 'q1' is"),
        ({"predicted_parts_answer": "flag"}, "prediction 1, field 'predicted_parts_answer': expected one of the 3"),
        ({"mask_confidences": [1.0]}, "prediction 1, field 'mask_confidences': expected null or 2 numbers"),
        ({"mask_confidences": [1.0, "high"]}, r"prediction 1, field 'masks\[1\]', field 'confidence'"),
        ({"predicted_masks": [{"label": "hull"}]}, r"prediction 1, field 'masks\[0\]', field 'rle'"),
        ({"predicted_masks": ["hull"]}, r"prediction 1, field 'predicted_masks\[0\]': expected dict"),
        ({"predicted_masks": None}, "prediction 1: 'masks' is missing, though 3 of 4 lines have it"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_by_file_and_number(tmp_path, changes, message):
    records = [record(question) for question in ASKED]
    records[1] |= changes
    _, problems = read(write(tmp_path / "p.json", records))
    with pytest.raises(DataError, match=message):
        raise DataError(problems[0])


def test_a_repeated_a_missing_and_a_truncated_record_are_named(tmp_path):
    path = write(tmp_path / "p.json", [record(QUESTIONS[0]), record(QUESTIONS[0]), record(QUESTIONS[1])])
    predictions, problems = read(path, QUESTIONS)
    assert [prediction.question_id for prediction in predictions] == ["q1"]
    assert problems == [
        f"{path}, prediction 1: 'q0' was answered before, in {path}, prediction 0; delete one of them.",
        f"{path}: question 'q2' has no answer.",
    ]
    path.write_text(path.read_text()[:-300])
    predictions, problems = read(path, QUESTIONS)
    assert predictions == [] and "the file is damaged or cut short" in problems[1]


def test_a_file_without_predictions_is_refused_and_masks_of_other_answers_are_not_in_it(tmp_path):
    path = tmp_path / "p.json"
    path.write_text("[]")
    assert "expected an object with a non-empty list 'predictions'" in read(path)[1][0]
    with pytest.raises(DataError, match="hold the masks of the correct answer, not those of 'generated'"):
        read_answers(path, ASKED, format="official", mask_source="generated")
    path.unlink()
    with pytest.raises(DataError, match="holds no answers: expected a predictions json, or a folder of them"):
        read(tmp_path)
