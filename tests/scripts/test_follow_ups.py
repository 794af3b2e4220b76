"""Questions asked second: which one comes before, and that both ways count the same answers."""

import pytest

from plum_partonomy.inference.one_image import Plum, ask, finish
from plum_partonomy.masks import encode
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring.metrics import part_counts, true_parts
from scripts.measure_follow_ups import converse, measure, pair_questions
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor


def question(number: int, image_id: str) -> Question:
    return Question(
        id=str(number),
        image=None,
        image_id=image_id,
        image_label="bird",
        question_type="identification",
        question=f"Which parts, {number}?",
        choices=["It has a wheel.", "It has a <p>tail</p>."],
        correct=1,
        choice_parts=[["wheel"], ["tail"]],
        masks=[PartMask("tail", encode(random_mask(seed=number)))],
    )


def test_each_question_follows_another_one_about_its_image():
    questions = [question(number, image) for number, image in enumerate("aabbbc")]
    pairs = [(before.id, asked.id) for before, asked in pair_questions(questions)]
    assert pairs == [("1", "0"), ("0", "1"), ("4", "2"), ("2", "3"), ("3", "4")]
    contents = [message["content"] for message in converse(questions[0], questions[1])]
    assert contents == ["Which parts, 0?", r"It has a \<p>tail\</p>.", "Which parts, 1?"]
    assert [message["content"] for message in converse(None, questions[1])] == contents[2:]


@pytest.mark.parametrize("second", [False, True])
def test_batched_figures_equal_those_of_asking_one_by_one(second):
    questions = [question(number, "a") for number in range(3)]
    rows = [{"image": random_image(seed=9)}] * 3
    plum = Plum(tiny_model(), tiny_processor())
    found = measure(plum, rows, pair_questions(questions), {q.id: int(q.id) for q in questions}, second=second)
    counts = []
    for before, asked in pair_questions(questions):
        history = converse(before if second else None, asked)[:-1]
        reply = ask(plum, random_image(seed=9), asked.question, history=history, max_new_tokens=96)
        counts.append(part_counts([span.text for span in finish(plum, reply).spans], true_parts(asked)))
    predicted = sum(count.predicted for count in counts)
    assert found["precision"] == pytest.approx(sum(count.hits for count in counts) / max(predicted, 1))
    assert found["recall"] == pytest.approx(sum(count.hits for count in counts) / 3)
