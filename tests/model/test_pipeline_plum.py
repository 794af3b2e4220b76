"""The pipeline answers as the model does, whatever it is given."""

import re
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from processing_plum import PlumPipeline
from tests.tiny import conversation, random_image, tiny_model, tiny_processor

QUESTION = "Which parts can you see?"
OPTIONS = {"max_new_tokens": 6, "mask_threshold": 0.1}


@pytest.fixture(scope="module")
def pipe():
    model = tiny_model()
    model.span_tagger.classifier[-1].bias.data[1] += 10  # every token is a span
    return PlumPipeline(model, processor=tiny_processor())


@pytest.fixture(scope="module")
def inputs() -> list[dict]:
    images = [random_image(50, 70, seed=1), None, random_image(90, 40, seed=2)]
    return [{"image": image, "text": QUESTION} for image in images]


def as_plain(answer: dict) -> dict:
    return {
        "text": answer["generated_text"],
        "segments": [segment | {"mask": np.asarray(segment["mask"]).tobytes()} for segment in answer["segments"]],
    }


def assert_equal(answers: list[dict], expected: list[dict]):
    assert [as_plain(answer) for answer in answers] == [
        {
            **as_plain(answer),
            "segments": [s | {"score": pytest.approx(s["score"], rel=1e-4)} for s in as_plain(answer)["segments"]],
        }
        for answer in expected
    ]


@pytest.fixture(scope="module")
def answers(pipe, inputs) -> list[dict]:
    """One at a time, by the model itself."""
    found = []
    for item in inputs:
        chat = conversation(item["image"], None)
        batch = pipe.processor.apply_chat_template([chat], add_generation_prompt=True, tokenize=True, return_dict=True)
        outputs = pipe.model.segment(**batch, max_new_tokens=6)
        (answer,) = pipe.processor.post_process_segmentation(outputs, mask_threshold=0.1)
        found.append(pipe.postprocess(answer))
    return found


def test_segments_are_masks_of_the_size_of_the_image_with_the_words_they_belong_to(answers, inputs):
    assert answers[0]["segments"] and answers[1]["segments"] == []
    for answer, item in zip(answers, inputs, strict=True):
        for segment in answer["segments"]:
            assert segment["mask"].size == item["image"].size and segment["mask"].mode == "L"
            assert answer["generated_text"][segment["start"] : segment["end"]] == segment["label"]
            assert set(np.unique(segment["mask"])) <= {0, 255}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_a_list_has_the_answers_of_its_items_whatever_the_batch_size(pipe, inputs, answers, batch_size):
    assert_equal(pipe(inputs, batch_size=batch_size, **OPTIONS), answers)


def test_one_input_and_a_conversation_are_answered_alike(pipe, inputs, answers):
    assert_equal(
        [pipe(inputs[0], **OPTIONS), pipe(conversation(inputs[0]["image"], None), **OPTIONS)], answers[:1] * 2
    )


def test_a_generator_is_read_no_further_than_its_answers_are_asked_for(pipe, inputs, answers):
    read = []

    def stream():
        for i, item in enumerate(inputs * 10):
            read.append(i)
            yield item

    stream = pipe(stream(), batch_size=2, **OPTIONS)
    assert_equal([next(stream), next(stream)], answers[:2])
    assert read == [0, 1]


class Rows(torch.utils.data.Dataset):
    """A data set that says how long it is and does not stop by itself."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_data_set_of_any_kind_has_the_answers_of_its_rows(pipe, inputs, answers):
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = datasets.Dataset.from_list([{"id": i, **row} for i, row in enumerate(inputs)], features=features)
    for data_set in (
        Rows(inputs),
        Stream(inputs),
        rows,
        rows.to_iterable_dataset(),
        KeyDataset(Rows([{"x": i} for i in inputs]), "x"),
    ):
        assert_equal(list(islice(pipe(data_set, batch_size=2, **OPTIONS), 5)), answers)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": None, "question": QUESTION}, r"found the fields \['image', 'question'\]"),
        ({"images": None, "text": QUESTION}, r"found the fields \['images', 'text'\]"),
        ({"image": None, "text": 3}, "needs a question as its 'text'"),
        ("image.png", "a list of messages, found str 'image.png'"),
        (None, "a list of messages, found NoneType"),
        ([[{"content": QUESTION}]], "must end with the user"),
    ],
)
def test_what_is_no_question_about_an_image_is_refused_with_what_was_found(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(given)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, found 0."),
        ({"batch_size": -1}, "batch_size must be an integer of at least 1, found -1."),
        ({"batch_size": 1.5}, "batch_size must be an integer of at least 1, found 1.5."),
        ({"mask_threshold": "0.1"}, "mask_threshold must be a finite number, found '0.1'."),
        ({"mask_threshold": float("nan")}, "mask_threshold must be a finite number, found nan."),
    ],
)
def test_a_number_that_cannot_be_used_is_refused_before_any_answer(pipe, inputs, option, message):
    for given in ([], inputs[1], inputs):
        with pytest.raises(ValueError, match=re.escape(message)):
            pipe(given, **option)


def test_a_threshold_that_is_no_number_is_refused_without_spans_too(pipe):
    batch = pipe.processor.apply_chat_template(conversation(None, None), add_generation_prompt=True, tokenize=True,
                                               return_dict=True)  # fmt: skip
    outputs = pipe.model.segment(**batch, max_new_tokens=1)
    assert not len(outputs.spans)
    with pytest.raises(ValueError, match="mask_threshold must be a finite number, found '0.1'."):
        pipe.processor.post_process_segmentation(outputs, mask_threshold="0.1")


def test_no_inputs_have_no_answers(pipe):
    assert pipe([]) == [] and list(pipe(Rows([]))) == []


def test_a_conversation_with_history_is_continued_and_leaves_other_rows_alone(pipe, inputs, answers):
    old = "It has a wheel."
    later = conversation(random_image(seed=5), old) + conversation(None, None, question="Where is the tail?")
    alone = pipe(later, **OPTIONS)
    assert alone["generated_text"] and alone["generated_text"] != old
    first = conversation(inputs[0]["image"], None)
    assert_equal(pipe([first, later], batch_size=2, **OPTIONS), [answers[0], alone])


def test_an_answer_that_was_cut_off_says_so(pipe, inputs):
    stop = pipe.model.generation_config.eos_token_id
    assert pipe(inputs[0], **OPTIONS)["is_truncated"]
    batch = pipe.processor.apply_chat_template(conversation(inputs[0]["image"], None), add_generation_prompt=True,
                                               tokenize=True, return_dict=True)  # fmt: skip
    last = pipe.model.generate(**batch, max_new_tokens=6, do_sample=False)[0, -1]
    answer = pipe(inputs[0], eos_token_id=int(last), **OPTIONS)
    assert not answer["is_truncated"] and pipe.model.generation_config.eos_token_id == stop


def test_a_conversation_that_is_already_answered_is_refused(pipe):
    with pytest.raises(ValueError, match="must end with the user to be answered, found 2 messages"):
        pipe(conversation(None, "It is red."))


def test_a_saved_pipeline_loads_as_remote_code(pipe, inputs, answers, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = pipeline(model=str(tmp_path), trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules") and loaded.task == "grounded-image-text-to-text"
    assert_equal(loaded(inputs, batch_size=3, **OPTIONS), answers)
