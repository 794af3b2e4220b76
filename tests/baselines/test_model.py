"""Any model under test: what it is asked, what is made of its answers, and what is refused."""

import numpy as np
import pytest

from plum_partonomy.baselines.combined import Combined
from plum_partonomy.baselines.model import Asker, ask, ask_object
from plum_partonomy.baselines.plain_text import find_parts
from plum_partonomy.masks import DataError, decode
from plum_partonomy.scoring.benchmark import Asked
from plum_partonomy.scoring.metrics import evaluate_predictions
from tests.baselines.tiny_models import make_question
from tests.tiny import random_image

KINDS = ("identification", "whole_to_part", "part_to_whole")
QUESTIONS = [make_question(number, question_type=kind) for number, kind in enumerate(KINDS)]
IMAGES = [random_image(60, 84, seed) for seed in range(3)]


class Chooser:
    """Prefers short choices."""

    def choose(self, seen, messages, choices):
        return [-len(choice) for choice in choices]


class Speaker(Chooser):
    def answer(self, seen, messages):
        return "- Left wing\n- the rudder."


class Segmenter:
    """Keeps the size of an image; its masks cover the left half."""

    encodings = 0

    def encode(self, image):
        self.encodings += 1
        return image.height, image.width

    def segment(self, seen, question, parts):
        mask = np.zeros(seen, dtype=bool)
        mask[:, : seen[1] // 2] = True
        return [(mask, 0.5)] * len(parts)


class Speaking(Speaker):
    def encode(self, image):
        return None


def predict(model, questions=QUESTIONS, images=IMAGES, **options):
    asker = Asker(model, **{"mask_source": "gt_answer", "known_parts": ["tail"], **options})
    return asker.predict([Asked(each, image, each.image_id) for each, image in zip(questions, images, strict=True)])


def test_a_model_is_asked_for_what_it_can_do_and_the_rest_has_no_metric():
    (first, *_) = chosen = predict(Chooser())
    assert (first.choice, first.given_spans, first.generated_text, first.named_parts) == (0, None, None, None)
    assert [prediction.object_choice_scores for prediction in chosen] == [None, [13, 14], [13, 14]]
    (first, *_) = spoken = predict(Speaker())
    assert (first.named_parts, first.generated_spans) == (["Left wing", "rudder"], None)
    (first, *_) = segmented = predict(Segmenter())
    assert [span.text for span in first.given_spans] == ["left wing", "tail"] and first.choice_scores is None
    figures = [evaluate_predictions(QUESTIONS, predictions)["overall"] for predictions in (chosen, spoken, segmented)]
    measured = [
        {
            name
            for name in ("choice_accuracy", "generated_part_recall", "strict_macro_giou")
            if name in of and of[name] is not None
        }
        for of in figures
    ]
    assert measured == [
        {"choice_accuracy"},
        {"choice_accuracy", "generated_part_recall"},
        {"strict_macro_giou"},
    ]
    assert figures[1]["generated_part_recall"] == 0.5


def test_both_together_give_every_metric_and_masks_for_the_words_of_the_answer():
    predictions = predict(Combined(Speaking(), Segmenter()))
    for prediction in predictions:
        spans = prediction.generated_spans
        assert [prediction.generated_text[span.start : span.end] for span in spans] == ["Left wing", "rudder"]
    figures = evaluate_predictions(QUESTIONS, predictions)["overall"]
    assert figures["end_to_end_giou"] == pytest.approx((40 / 42 + 0 + 0) / 3)  # left wing, rudder, tail
    assert None not in [figures[name] for name in ("choice_accuracy", "object_choice_accuracy", "strict_macro_giou")]


def test_an_image_is_encoded_once_and_the_mask_of_a_wrong_one_is_stretched_to_the_question():
    model = Segmenter()
    asker = Asker(model, mask_source="gt_answer", known_parts=[], image_cache_size=2)
    images = [random_image(60, 84), random_image(30, 20, seed=1)]
    asked = [Asked(QUESTIONS[0], image, name) for image, name in zip(images, ("right", "wrong"), strict=True)]
    predictions = asker.predict(asked * 2)
    assert (model.encodings, asker.images.summary()["hit_rate"]) == (2, 0.5)
    for prediction in predictions:
        mask = decode(prediction.given_spans[0].rle)
        assert mask.shape == (60, 84) and mask[:, :42].all() and not mask[:, 42:].any()


def test_masks_of_the_chosen_answer_are_asked_for_where_they_are_scored():
    model = Combined(Speaking(), Segmenter())
    (prediction, *_) = predict(model, mask_source="predicted_answer")
    assert [span.text for span in prediction.given_spans] == ["tail"]


def test_part_whole_questions_are_asked_after_the_other_one_and_its_correct_answer():
    _, whole_to_part, part_to_whole = QUESTIONS
    assert [m["content"] for m in ask(whole_to_part)][:2] == ["What is the object in the image?", "It is a plane."]
    assert [m["content"] for m in ask_object(part_to_whole)][1] == "It has a left wing, and tail."
    assert [m["role"] for m in ask_object(part_to_whole)] == ["user", "assistant", "user"]
    assert len(ask(part_to_whole)) == len(ask_object(whole_to_part)) == 1


def returning(method: str, value):
    return type("Broken", (), {method: lambda self, *_: value})()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (returning("choose", [0.0, 1.0]), "'q0': expected 3 finite scores from 'choose'"),
        (returning("choose", [0.0, 1.0, float("nan")]), "'q0': expected 3 finite scores from 'choose', found .*nan"),
        *((returning("choose", bad), "'q0': expected 3 finite scores") for bad in (None, 1, ["a"] * 3, [10**400] * 3)),
        (returning("answer", "\ud800"), "'q0', 'answer': expected text, found half a character"),
        (returning("answer", None), "'q0': expected a text from 'answer', found None"),
        (returning("segment", []), "'q0': expected 2 masks from 'segment', each with its score, found 0"),
        (returning("segment", None), "'q0': expected 2 masks from 'segment', each with its score, found 0: None"),
        (returning("segment", [np.zeros((60, 84), bool)] * 2), "masks from 'segment', each with its score, found 2"),
        (returning("segment", [(np.zeros((60, 84), bool), "high")] * 2), "'q0': expected a finite score"),
        (
            returning("segment", [(np.zeros((84, 60), bool), 1.0)] * 2),
            r"'q0': expected boolean masks of \[height, width\] \[60, 84\] from 'segment', found bool of \[84, 60\]",
        ),
        (returning("segment", [(np.zeros((60, 84)), 1.0)] * 2), "found float64 of"),
        (returning("segment", [(np.zeros((60, 84), bool), np.inf)] * 2), "'q0': expected a finite score"),
    ],
)
def test_what_is_no_answer_is_refused_with_the_id_of_the_question(model, message):
    with pytest.raises(DataError, match=message):
        predict(model)


def test_an_error_of_the_model_itself_names_the_question_and_keeps_its_traceback():
    def fail(*_):
        raise ZeroDivisionError("own")

    with pytest.raises(ZeroDivisionError, match="own") as raised:
        predict(type("Broken", (), {"choose": fail})())
    assert raised.value.__notes__ == ["raised by 'choose' of the model for question 'q0'"]


def test_a_model_without_the_needed_method_is_refused():
    with pytest.raises(DataError, match="Expected a model with some of choose, answer, segment, found object"):
        predict(object())
    with pytest.raises(DataError, match="--mask_source generated needs the method 'answer', which Segmenter"):
        predict(Segmenter(), mask_source="generated")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The object in the image has the following visible parts: hull, and mast.", ["hull", "mast"]),
        ("1. **Hull**\n2. Two masts\n3. a sail", ["Hull", "masts", "sail"]),
        ("hull and mast", ["hull", "mast"]),
        ("Sure! I can see the big hull of a boat here, with an oar.", ["hull", "oar"]),
        ("It shows a boat: it floats on the water under a big white sail of some kind.", ["sail"]),
        ("hull; Hull", ["hull"]),
        ("left wing, wing", ["left wing", "wing"]),
        ("", []),
        ("...", []),
    ],
)
def test_parts_are_read_out_of_plain_text(text, names):
    found = find_parts(text, ["hull", "oar", "sail"])
    assert [name for name, _, _ in found] == names
    assert [text[start:end] for _, start, end in found] == names
