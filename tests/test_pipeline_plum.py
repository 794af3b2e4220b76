"""The pipeline answers as the model does, whatever it is given."""

import numpy as np
import pytest
from transformers import pipeline

from pipeline_plum import PlumPipeline
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


def test_a_conversation_that_is_already_answered_is_refused(pipe):
    with pytest.raises(ValueError, match="must end with the user to be answered, found 2 messages"):
        pipe(conversation(None, "It is red."))


def test_a_saved_model_brings_its_pipeline_as_remote_code(pipe, inputs, answers, tmp_path):
    pipe.model.save_pretrained(tmp_path)
    pipe.processor.save_pretrained(tmp_path)
    loaded = pipeline(model=str(tmp_path), trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules") and loaded.task == "grounded-image-text-to-text"
    assert_equal(loaded(inputs, batch_size=3, **OPTIONS), answers)
