"""PLUM as a model of lmms-eval."""

import importlib.util
import json

import pytest

from inputs_plum import DataError
from plum_partonomy.baselines.model import ask as messages_up_to
from plum_partonomy.inference.one_image import ask, finish
from plum_partonomy.lmms import questions
from plum_partonomy.masks import encode
from plum_partonomy.records import as_row
from tests.baselines.tiny_models import make_question
from tests.tiny import count_calls, random_image, tiny_model, tiny_processor

if importlib.util.find_spec("lmms_eval") is not None:
    from lmms_eval.api.instance import Instance

    from plum_partonomy.lmms.models import PlumChat, PlumSimple

pytestmark = [
    pytest.mark.slow,  # lmms-eval is installed for the slow tests alone
    pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="pip install .[lmms_eval]"),
]

GREEDY = {"max_new_tokens": 6, "do_sample": False, "temperature": 0}
IMAGES = [random_image(60, 84, seed=seed) for seed in (0, 1)]
TYPES = ("identification", "whole_to_part", "identification_with_label", "identification")
DOCS = [
    as_row(make_question(question_type=kind)) | {"image": IMAGES[number == 3].copy()}  # three about one image
    for number, kind in enumerate(TYPES)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plum")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


def request(kind: str, *arguments, doc: int) -> "Instance":
    return Instance(kind, (*arguments, doc, "t", "test"), 0, metadata={"task": "t", "doc_id": doc, "repeats": 1})


def chat_requests(doc_to_messages, **options) -> "list[Instance]":
    options = {**GREEDY, **options}
    return [request("generate_until", "", doc_to_messages, options, doc=doc) for doc in range(len(DOCS))]


@pytest.fixture(scope="module")
def chat(folder) -> "PlumChat":
    model = PlumChat(folder)
    model.task_dict["t"] = {"test": DOCS}
    return model


def test_an_image_is_encoded_once_for_the_questions_about_it_and_answers_are_those_asked_alone(chat):
    with count_calls("SamVisionEncoder") as encoded:
        replies = chat.generate_until(chat_requests(questions.messages_of))
    assert len(encoded) == 2
    for doc, reply in zip(DOCS, map(json.loads, replies), strict=True):
        *history, last = messages_up_to(questions.as_question(doc))
        alone = finish(chat.plum, ask(chat.plum, doc["image"], last["content"], history=history, max_new_tokens=6))
        assert reply["answer"] == alone.text and reply["labels"] == [span.text for span in alone.spans]
        assert reply["masks"] == [encode(span.mask) for span in alone.spans]


def test_a_given_answer_is_segmented_where_its_tags_are(chat):
    replies = chat.generate_until(chat_requests(questions.messages_with_answer))
    assert [json.loads(reply)["labels"] for reply in replies] == [["left wing", "tail"]] * 4
    assert all(json.loads(reply)["answer"] == "It has a left wing, and tail." for reply in replies)


def test_the_loss_of_a_choice_does_not_depend_on_the_questions_before(folder):
    model = PlumSimple(folder, choice_reduction="answer_mean")
    model.task_dict["t"] = {"test": DOCS}
    requests = [
        request("loglikelihood", questions.text_of(doc), choice, questions.image_of, doc=number)
        for number, doc in enumerate(DOCS)
        for choice in doc["choices"]
    ]
    with count_calls("SamVisionEncoder") as encoded:
        losses = model.loglikelihood(requests)
    assert len(encoded) == 2
    alone = [PlumSimple.loglikelihood(fresh(model), [one])[0] for one in requests[-3:]]
    assert alone == losses[-3:]


def fresh(model: "PlumSimple") -> "PlumSimple":
    """Forget the encoded image."""
    model.recent = type(model.recent)(model.plum.model, model.plum.processor)
    return model


@pytest.mark.parametrize(
    "options", [{"do_sample": True}, {"do_sample": None, "temperature": 0.7}, {"num_beams": 3}, {"max_new_tokens": 0}]
)
def test_options_that_would_have_no_effect_are_an_error(chat, options):
    with pytest.raises(ValueError, match="decodes greedily|max_new_tokens"):
        chat.generate_until(chat_requests(questions.messages_of, **options)[:1])


@pytest.mark.parametrize("images", [[], [None], IMAGES])
def test_a_question_about_no_image_or_two_names_its_task(chat, images):
    content = [{"type": "image", "url": image} for image in images] + [{"type": "text", "text": "Which?"}]
    requests = chat_requests(lambda doc: [{"role": "user", "content": content}])
    with pytest.raises(DataError, match="--tasks t: PLUM answers questions about one image, found"):
        chat.generate_until(requests[:1])


def test_unknown_options_of_the_model_are_named(folder):
    for options, message in (
        ({"outputs": "text"}, "unknown option 'outputs'"),
        ({"output": "xml"}, "output=xml: expected json or text"),
        ({"choice_reduction": "mean"}, "choice_reduction=mean: expected sequence_mean or answer_mean or answer_sum"),
    ):
        with pytest.raises(DataError, match=f"--model_args:? {message}"):
            PlumChat(folder, **options)


def test_a_question_of_another_benchmark_is_asked_in_its_own_words(folder):
    model = PlumSimple(folder)
    model.task_dict["t"] = {"test": [{"question_type": "multiple-choice", "image": IMAGES[0]}]}
    asked = request("loglikelihood", "Which?", "A wing", lambda doc: [doc["image"]], doc=0)
    ((loss, is_greedy),) = model.loglikelihood([asked])
    assert loss > 0 and is_greedy is False
