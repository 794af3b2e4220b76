"""Whole runs of evaluate_plum.py --task on answers from a file."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image

from plum_partonomy.evaluation.options import EvaluationArguments
from plum_partonomy.evaluation.tasks import answer_line, evaluate_task
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.inference.one_image import Plum, ask
from plum_partonomy.masks import DataError, encode
from plum_partonomy.scoring.tasks import TEXT_FEATURES, load_task_image, load_task_questions, read_task_answers
from tests.runs import approximately, read_lines
from tests.sources.test_instructpart import HANDLE, instructpart_folder
from tests.tiny import count_calls, tiny_model, tiny_processor

SIZE = (4, 6)
LEFT, FULL = np.zeros(SIZE, bool), np.ones(SIZE, bool)
LEFT[:, :3] = True


@pytest.fixture
def conversations(tmp_path):
    """Two records: one with two turns, of which the second means nothing, and one with one."""
    turns = [
        ("Show me the dog.", "Here is the <p>dog</p>."),
        ("Show me the cat.", "I see none."),
        ("Show me both cups.", "Here: <p>a cup</p> and <p>a cup</p>."),
    ]
    messages = [
        [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
        for turn in turns
    ]
    masks = (
        [{"label": "dog", "rle": encode(LEFT)}],
        [{"label": "a cup", "rle": encode(mask)} for mask in (LEFT, ~LEFT)],
    )
    shared = {"image": Image.new("RGB", SIZE[::-1]), "image_label": "", "source": "", "licence": ""}
    records = [
        {"id": "r0", "image_id": "i0", "messages": messages[0] + messages[1], "masks": masks[0], **shared},
        {"id": "r1", "image_id": "i1", "messages": messages[2], "masks": masks[1], **shared},
    ]
    folder = tmp_path / "conversations"
    folder.mkdir()
    rows = datasets.Dataset.from_list(records, features=GROUNDED_CONVERSATION_FEATURES)
    rows.to_parquet(folder / "test.parquet")
    return str(folder)


def found(name, *masks):
    return {"id": name, "masks": [{"part": "it", "rle": encode(mask)} for mask in masks]}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def arguments(tmp_path, task, dataset, records, **options):
    path = write(tmp_path / "answers.jsonl", records)
    fields = {"task": task, "dataset": dataset, "name": "default", "predictions": str(path)}
    return EvaluationArguments(output_dir=str(tmp_path / "run"), **fields, **options)


def run(*args, **options):
    run = arguments(*args, **options)
    evaluate_task(run)
    return json.loads((args[0] / "run" / "metrics.json").read_text())


def test_each_turn_of_a_conversation_is_a_question_and_its_masks_are_united(conversations, tmp_path, capsys):
    records = [found("r1", LEFT), found("r0/0", FULL), found("r0/1")]
    metrics = run(tmp_path, "generalized_referring", conversations, records)
    assert metrics["overall"] == {
        "n": 3,
        "photographs": 2,
        "giou": pytest.approx(2 / 3),
        "ciou": 0.5,
        "n_acc": 1.0,
        "t_acc": 1.0,
    }
    assert metrics["run"]["task"] == "generalized_referring" and metrics["run"]["left_out"] == 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("<figure>") == 6 and "Show me the dog." in report
    assert "n acc" in capsys.readouterr().out


def test_words_are_scored_without_any_image(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    write(
        folder / "test.jsonl",
        [{"id": f"q{n}", "question": "A dog?", "answers": [a]} for n, a in enumerate(["yes", "no"])],
    )
    records = [{"id": "q0", "answer": "Yes."}, {"id": "q1", "answer": "<b>Yes</b>"}]
    metrics = run(tmp_path, "pope", str(folder), records)
    assert metrics["overall"]["accuracy"] == 0.5 and metrics["overall"]["yes_rate"] == 1.0
    assert "&lt;b&gt;" in (tmp_path / "run" / "report.html").read_text()
    write(folder / "test.jsonl", [{"id": "q0", "question": "A dog?", "answers": ["maybe"]}])
    with pytest.raises(DataError, match="'q0': the answer to a question of pope is yes or no"):
        load_task_questions("pope", str(folder), name="default", split="test")


def test_a_model_answers_each_question_once_and_goes_on_where_it_was_interrupted(conversations, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    fields = {"task": "referring", "dataset": conversations, "name": "default", "max_new_tokens": 4}
    run = EvaluationArguments(output_dir=str(tmp_path / "run"), model=str(tmp_path / "model"), device="cpu", **fields)
    with count_calls("SamVisionEncoder") as encoded:
        evaluate_task(run)
    assert len(encoded) == 1  # the images of both records are equal
    answers, metrics = (tmp_path / "run" / name for name in ("predictions.jsonl", "metrics.json"))
    expected, figures = answers.read_bytes(), json.loads(metrics.read_text())["overall"]
    assert [json.loads(line)["id"] for line in expected.splitlines()] == ["r0/0", "r0/1", "r1"]
    assert figures["n"] == 3 and 0 <= figures["giou"] <= 1
    plum = Plum(tiny_model().eval(), tiny_processor())
    rows, questions = load_task_questions("referring", conversations, name="default", split="test")
    alone = [ask(plum, load_task_image(rows, question), question.text, max_new_tokens=4) for question in questions]
    written = read_lines(expected)
    assert [answer_line(plum, reply) for reply in alone] == approximately(
        [{name: line[name] for name in ("answer", "masks")} for line in written]
    )
    answers.write_bytes(expected[:-20])
    evaluate_task(run)
    assert read_lines(answers.read_bytes()) == approximately(written)
    assert json.loads(metrics.read_text())["overall"] == approximately(figures)
    with pytest.raises(DataError, match="contains another run, with max_new_tokens 4"):
        evaluate_task(replace(run, max_new_tokens=5))
    with pytest.raises(DataError, match=r"contains another run, with dtype 'float32' \(now 'bfloat16'\)"):
        evaluate_task(replace(run, dtype="bfloat16"))
    with pytest.raises(DataError, match=rf"contains another run, with data_dir None \(now '{tmp_path}'\)"):
        evaluate_task(replace(run, data_dir=str(tmp_path)))
    rows = datasets.Dataset.from_parquet(f"{conversations}/test.parquet")
    rows = rows.map(lambda row: {"messages": [{**row["messages"][0], "content": "Which?"}, *row["messages"][1:]]})
    rows.to_parquet(f"{conversations}/test.parquet")
    with pytest.raises(DataError, match="contains another run, with questions_fingerprint"):
        evaluate_task(run)
    assert answers.read_bytes() == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"id": "r1"}, "line 3: field 'masks' is missing"),
        ({"id": "r1", "masks": 1}, "line 3, field 'masks': expected a list"),
        ({"id": "r1", "masks": [], "answer": 1}, "line 3, field 'answer': expected a text"),
        (
            {"id": "r1", "masks": [], "answer": "\ud800"},
            "line 3, field 'answer': expected text, found half a character",
        ),
        ({"id": "r1", "masks": [], "choice": 1}, "line 3: unknown field 'choice'"),
        (found("r1", np.ones((6, 4), bool)), r"line 3, field 'masks\[0\]', field 'rle': .*\[6, 4\]"),
        (found("r0/1", LEFT, np.ones((6, 4), bool)), r"line 3: 'r0/1' was answered before"),
        (found("r2"), "line 3, field 'id': 'r2' is none of the 3 questions"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_and_left_out_when_asked_for(
    conversations, tmp_path, record, message, capsys
):
    task = arguments(tmp_path, "reasoning", conversations, [found("r0/0", LEFT), found("r0/1"), record])
    with pytest.raises(DataError, match=message):
        evaluate_task(task)
    assert not (tmp_path / "run").exists()
    evaluate_task(replace(task, on_error="report"))
    left_out = 2 if record["id"] == "r0/1" else 1
    assert f"left out: {left_out} questions" in capsys.readouterr().out
    assert f"<b>Left out: {left_out} questions" in (tmp_path / "run" / "report.html").read_text()


def test_masks_of_two_sizes_for_a_question_that_means_nothing_are_refused(conversations, tmp_path):
    _, questions = load_task_questions("referring", conversations, name="default", split="test")
    path = write(tmp_path / "a.jsonl", [found("r0/1", LEFT, np.ones((6, 4), bool))])
    assert r"masks[1]" in read_task_answers(path, questions, task="referring")[1][0]


def test_a_question_that_means_parts_of_several_names_is_no_semantic_part(conversations, tmp_path):
    rows = datasets.load_dataset(conversations, split="test").to_list()
    rows[1]["masks"][1]["label"] = "saucer"
    (tmp_path / "several").mkdir()
    features = GROUNDED_CONVERSATION_FEATURES
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "several" / "test.parquet")
    for task, dataset in (("semantic_parts", conversations), ("referring", str(tmp_path / "several"))):
        assert len(load_task_questions(task, dataset, name="default", split="test")[1]) == 3
    with pytest.raises(DataError, match="Question 'r1' means parts of several names"):
        load_task_questions("semantic_parts", str(tmp_path / "several"), name="default", split="test")


def test_a_record_whose_masks_do_not_fit_its_answers_is_named(conversations, tmp_path):
    rows = datasets.load_dataset(conversations, split="test").to_list()
    rows[1]["masks"].pop()
    folder = tmp_path / "lacking"
    folder.mkdir()
    datasets.Dataset.from_list(rows, features=GROUNDED_CONVERSATION_FEATURES).to_parquet(folder / "test.parquet")
    with pytest.raises(DataError, match="lacking', record 1, field 'masks': 2 span tags, but 1 masks"):
        load_task_questions("referring", str(folder), name="default", split="test")


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("gqa", {"id": None}, "record 0, field 'id': expected str, found None"),
        ("gqa", {"question": None}, "record 0, field 'question': expected str, found None"),
        ("gqa", {"answers": [None]}, r"record 0, field 'answers\[0\]': expected str, found None"),
        ("gqa", {"answers": []}, "record 0, field 'answers': expected at least one answer"),
        ("textvqa", {"answers": ["red"] * 3}, "Question 'q': textvqa needs the answers of 4 or more annotators"),
    ],
)
def test_a_text_question_that_cannot_be_scored_is_named(tmp_path, task, changes, message):
    record = {"id": "q", "question": "Which colour?", "answers": ["red"] * 4, **changes}
    datasets.Dataset.from_list([record], features=datasets.Features(TEXT_FEATURES)).to_parquet(
        tmp_path / "test.parquet"
    )
    with pytest.raises(DataError, match=message):
        load_task_questions(task, str(tmp_path), name="default", split="test")


def test_records_of_another_kind_are_refused(conversations, tmp_path):
    with pytest.raises(
        DataError, match=r"task 'gqa' have \['id', 'question', 'answers'\]; .*lack \['answers', 'question'\]"
    ):
        load_task_questions("gqa", conversations, name="default", split="test")


def test_instructed_parts_are_scored_from_the_folder_of_their_publishers(tmp_path):
    folder = instructpart_folder(tmp_path / "data")
    name = "test-cup1-coffee_cup-handle-0"
    records = [{"id": name, "masks": [{"part": "handle", "rle": encode(HANDLE[:, ::-1] | HANDLE)}]}]
    path = write(tmp_path / "answers.jsonl", records)
    options = {"name": "instructpart", "split": "test", "data_dir": str(folder), "predictions": str(path)}
    asked = EvaluationArguments(output_dir=str(tmp_path / "run"), task="instructed_parts", **options)
    evaluate_task(asked, data_dir=str(folder))
    overall = json.loads((tmp_path / "run" / "metrics.json").read_text())["overall"]
    assert overall == {"n": 1, "photographs": 1, "giou": 0.5, "ciou": 0.5, "p50": 1.0}
