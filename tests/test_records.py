import dataclasses
import re

import numpy as np
import pytest
from datasets import Dataset

from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES, QUESTION_FEATURES
from plum_partonomy.masks import encode
from plum_partonomy.records import (
    QUESTION_TYPES,
    DataError,
    GroundedConversation,
    PartMask,
    Question,
    as_row,
    escape_tags,
    tagged_phrases,
)

RLE = encode(np.eye(4, dtype=bool))
WHERE = "questions.json, record 7"


def conversation(**changes) -> GroundedConversation:
    record = GroundedConversation(
        id="one",
        image=None,
        image_id="image",
        image_label="bus",
        messages=[
            {"role": "user", "content": r"Is \<p> a tag?"},
            {"role": "assistant", "content": "No, but the <p>door</p> is a <p>door</p>."},
        ],
        masks=[PartMask("door", RLE), PartMask("door", RLE)],
        source="test",
        licence="none",
    )
    return dataclasses.replace(record, **changes)


def question(**changes) -> Question:
    record = Question(
        id="one",
        image=None,
        image_id="image",
        image_label="bus",
        question_type="identification",
        question="What visible parts does the object in the image have?",
        choices=["door", "door, and wheel"],
        correct=1,
        choice_parts=[["door"], ["door", "wheel"]],
        masks=[PartMask("door", RLE), PartMask("wheel", RLE)],
    )
    return dataclasses.replace(record, **changes)


OBJECT_FIELDS = {
    "question_type": "whole_to_part",
    "object_question": "What is the object in the image?",
    "object_choices": ["It is a bus.", "It is a car."],
    "object_classes": ["bus", "car"],
    "object_correct": 0,
}


def test_good_records_pass_and_survive_the_features_unchanged():
    records = [
        (conversation(), GROUNDED_CONVERSATION_FEATURES),
        (question(), QUESTION_FEATURES),
        (question(**OBJECT_FIELDS), QUESTION_FEATURES),
    ]
    for record, features in records:
        row = as_row(record)
        assert set(row) == set(features)
        assert Dataset.from_list([row], features=features)[0] == row
    conversation().validate(where=WHERE)
    question().validate(where=WHERE)
    question(**OBJECT_FIELDS).validate(where=WHERE)


def test_there_are_the_ten_question_types_of_the_benchmark():
    assert len(set(QUESTION_TYPES)) == 10


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"question_type": "guess"}, "question_type"),
        ({"choices": ["door", "door"]}, "choices"),
        ({"choices": ["door"], "choice_parts": [["door"]], "correct": 0}, "choices"),
        ({"correct": 2}, "correct"),
        ({"correct": -1}, "correct"),
        ({"choice_parts": [["door"]]}, "choice_parts"),
        ({"choice_parts": [["wheel", "door"], ["door", "wheel"]]}, "choice_parts"),
        ({"choice_parts": [[], ["door", "wheel"]]}, "choice_parts"),
        ({"masks": [PartMask("door", RLE)]}, "masks"),
        ({"object_question": "What is it?"}, "object_question"),
        ({"question_type": "part_to_whole"}, "object_question"),
        (OBJECT_FIELDS | {"object_correct": 5}, "correct"),
        (OBJECT_FIELDS | {"object_classes": ["bus", "bus"]}, "object_classes"),
        (OBJECT_FIELDS | {"object_choices": ["It is a bus.", "It is a bus."]}, "object_choices"),
    ],
)
def test_a_bad_question_is_refused_naming_the_record_and_the_field(changes, field):
    with pytest.raises(DataError, match=f"^{re.escape(WHERE)}, field '{field}'"):
        question(**changes).validate(where=WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "is empty"),
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, "expected the role 'user'"),
        ({"messages": [{"role": "user", "content": None}]}, "expected a text, found None"),
        ({"messages": [{"role": "user", "content": "The <p>door</p>?"}]}, "a user message contains"),
        ({"masks": [PartMask("door", RLE)]}, "2 span tags, but 1 masks"),
    ],
)
def test_a_bad_conversation_is_refused_naming_the_record(changes, message):
    with pytest.raises(DataError, match=f"^{re.escape(WHERE)}, .*{message}"):
        conversation(**changes).validate(where=WHERE)


@pytest.mark.parametrize("text", ["<p>door", "door</p>", "</p>door<p>", "<p>a <p>b</p></p>", "<p> </p>", "<p></p>"])
def test_unbalanced_nested_and_empty_tags_are_refused(text):
    with pytest.raises(DataError, match="span tag"):
        tagged_phrases(text)


def test_escaped_tags_are_text_and_real_ones_are_phrases():
    assert tagged_phrases(escape_tags("<p>odd</p> label") + " has a <p>left wing</p>.") == ["left wing"]
