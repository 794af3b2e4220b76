import json
import re

import numpy as np
import pytest

from plum_partonomy.files import write_whole
from plum_partonomy.masks import DataError, encode
from plum_partonomy.scoring.predictions import (
    Prediction,
    SpanMask,
    append_predictions,
    check_run,
    merge_predictions,
    read_predictions,
)


def make_prediction(number, *, text="flügel \u2028 <p>", wrong_image=None):
    span = SpanMask(text=text, start=0, end=3, rle=encode(np.eye(4, 5, dtype=bool)), score=0.25)
    return Prediction(
        question_id=f"q{number}",
        image_id="image",
        choice_scores=[0.5, 0.25],
        given_spans=[span],
        true_tags=[(1, 3)],
        predicted_tags=[],
        generated_text=text,
        generated_spans=[span, span],
        wrong_image=wrong_image,
    )


PREDICTIONS = [make_prediction(0, wrong_image=make_prediction(0, text="")), make_prediction(1), make_prediction(2)]


def test_predictions_read_back_equal_whatever_characters_they_hold(tmp_path):
    append_predictions(tmp_path / "p.jsonl", PREDICTIONS[:1])
    append_predictions(tmp_path / "p.jsonl", PREDICTIONS[1:])
    assert read_predictions(tmp_path / "p.jsonl") == PREDICTIONS


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_last_line_that_was_cut_off_is_left_out_and_the_file_mended_by_merging(tmp_path, kept):
    append_predictions(tmp_path / "predictions.jsonl", PREDICTIONS)
    lines = (tmp_path / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "predictions.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    assert read_predictions(tmp_path / "predictions.jsonl") == PREDICTIONS[:2]
    merge_predictions(tmp_path, ["q0", "q1", "q2"])
    append_predictions(tmp_path / "predictions.jsonl", PREDICTIONS[2:])
    assert read_predictions(tmp_path / "predictions.jsonl") == PREDICTIONS


def changed(**fields):
    return lambda record: json.dumps({**record, **fields})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: "not json", "line 2: expected JSON"),
        (lambda record: "[1]", "line 2: expected an object"),
        (lambda record: json.dumps({**record, "surplus": 1}), "line 2: unknown field 'surplus'"),
        (
            lambda record: json.dumps({key: record[key] for key in record if key != "true_tags"}),
            "line 2: field 'true_tags' is missing",
        ),
        (
            lambda record: json.dumps({**record, "choice_scores": [1e999]}),
            "line 2, field .choice_scores.0.*finite number, found inf",
        ),
        (changed(choice_scores=["a"]), r"line 2, field 'choice_scores\[0\]' must be a finite number, found 'a'"),
        (changed(choice_scores=[10**400]), r"field 'choice_scores\[0\]' must be a finite number"),
        (changed(choice_scores=0.5), "field 'choice_scores': expected list, found 0.5"),
        (changed(true_tags=[[0, 1.5]]), r"field 'true_tags\[0\]': expected \[start, end\) of two integers"),
        (changed(true_tags=[7]), r"field 'true_tags\[0\]': expected \[start, end\) of two integers"),
        (changed(question_id=["q"]), "field 'question_id': expected str"),
        (changed(generated_text="\ud800"), "field 'generated_text': .*half a character"),
        (changed(generated_parts=["\ud800"]), r"field 'generated_parts\[0\]': .*half a character"),
        (changed(given_spans=[3]), r"field 'given_spans\[0\]': expected an object"),
        (changed(wrong_image=[]), "field 'wrong_image': expected dict"),
        (lambda record: "[" * 900 + "]" * 900, "more than 100 levels"),
        (
            lambda record: re.sub(r'"score": [0-9.]+', '"score": NaN', json.dumps(record), count=1),
            "field 'score' must be a finite number, found nan",
        ),
        (
            lambda record: re.sub(r'"score": [0-9.]+', '"score": "0.5"', json.dumps(record), count=1),
            r"field 'given_spans\[0\]', field 'score' must be a finite number, found '0.5'",
        ),
        (lambda record: json.dumps({**record, "choice_scores": []}), "'q1': choice_scores must be finite"),
        (changed(predicted_tags=None), "'q1': expected both true_tags and predicted_tags, found one"),
        (
            lambda record: json.dumps(record).replace('"size": [4, 5]', '"size": [4, 6]', 1),
            r"field 'given_spans\[0\]', field 'rle': the counts decode to 20 pixels",
        ),
    ],
)
def test_a_damaged_line_is_named_with_file_and_line(tmp_path, change, message):
    path = tmp_path / "p.jsonl"
    append_predictions(path, PREDICTIONS)
    lines = path.read_text().split("\n")
    lines[1] = change(json.loads(lines[1]))
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        read_predictions(path)


def test_merging_gathers_the_files_of_all_processes_in_question_order_and_removes_them(tmp_path):
    append_predictions(tmp_path / "predictions.rank0.jsonl", [PREDICTIONS[2]])
    append_predictions(tmp_path / "predictions.rank1.jsonl", [PREDICTIONS[0]])
    append_predictions(tmp_path / "predictions.jsonl", [PREDICTIONS[1]])
    merge_predictions(tmp_path, ["q0", "q1", "q2", "q3"])
    assert read_predictions(tmp_path / "predictions.jsonl") == PREDICTIONS
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_prediction_for_a_question_that_was_not_asked_is_an_error_and_nothing_is_lost(tmp_path):
    append_predictions(tmp_path / "predictions.rank0.jsonl", PREDICTIONS)
    with pytest.raises(DataError, match="such as 'q1'"):
        merge_predictions(tmp_path, ["q0", "q2"])
    assert read_predictions(tmp_path / "predictions.rank0.jsonl") == PREDICTIONS


def test_a_folder_is_accepted_by_the_run_it_belongs_to_and_refused_to_any_other(tmp_path):
    check_run(tmp_path / "new", {"split": "test"})
    write_whole(tmp_path / "run.json", ['{"split": "test", "limit": null}'])
    check_run(tmp_path, {"split": "test", "limit": None})
    with pytest.raises(DataError, match=r"contains another run, with split 'test' \(now 'train'\)"):
        check_run(tmp_path, {"split": "train", "limit": None})


@pytest.mark.parametrize("content", [b"[]", b"3", b"", b'{"split": ', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_run_whose_settings_cannot_be_read_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DataError, match=r"run.json: expected .*; give another folder\.$"):
        check_run(tmp_path, {"split": "test"})


def test_predictions_of_an_unknown_run_are_refused(tmp_path):
    append_predictions(tmp_path / "predictions.jsonl", PREDICTIONS)
    with pytest.raises(DataError, match="no run.json"):
        check_run(tmp_path, {})


def test_a_file_is_left_as_it_was_if_its_new_content_fails_half_way(tmp_path):
    def pieces():
        yield "new"
        raise RuntimeError("half way")

    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        write_whole(path, pieces())
    assert path.read_text() == "old"


def test_the_smallest_score_is_chosen_and_the_first_of_equal_ones():
    assert make_prediction(0).choice == 1
    tied = Prediction(**{**vars(make_prediction(0)), "choice_scores": [0.2, 0.2]})
    assert tied.choice == 0
