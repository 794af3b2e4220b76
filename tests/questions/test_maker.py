import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plum_partonomy.drawn import miniature
from plum_partonomy.masks import encode
from plum_partonomy.questions.distractors import DISTRACTORS, TOGGLES, toggled_distractors
from plum_partonomy.questions.maker import filter_parts, make_questions
from plum_partonomy.questions.spans import join_parts
from plum_partonomy.questions.wording import (
    OBJECT_QUESTION,
    object_answer,
    official_answer,
    official_question,
    with_article,
)
from plum_partonomy.records import QUESTION_TYPES, DataError, PartExample, PartMask
from plum_partonomy.sources.official import read_questions

GRAPH = miniature.part_graph()
REQUIRED = miniature.required_parts()
RLE = encode(np.eye(4, dtype=bool))


def example(image_id: str, label: str, parts: list[str]) -> PartExample:
    return PartExample(None, image_id, label, [PartMask(part, RLE) for part in sorted(parts)], "test", "none")


@st.composite
def examples(draw):
    label = draw(st.sampled_from(sorted(GRAPH)))
    optional = sorted(set(GRAPH[label]) - set(REQUIRED[label]))
    present = draw(st.lists(st.sampled_from(optional), unique=True))
    return example(draw(st.text(max_size=8)), label, [*REQUIRED[label], *present])


ONE_COMPARED = QUESTION_TYPES[:6]
"""Types that compare with one object at most."""


def questions_about(record: PartExample, *, seed: int = 0, question_types=ONE_COMPARED):
    return make_questions(
        record,
        part_graph=GRAPH,
        instance_graph={},
        presence=miniature.presence(),
        question_types=question_types,
        seed=seed,
    )


def compared_objects(question) -> tuple[str | None, str | None]:
    found = re.search(
        r"(?:in common with|which) an? (.+?)(?: but not with an? (.+?))?(?: does not have)?\?$", question.question
    )
    return found.groups() if found else (None, None)


def partner_of(question) -> str | None:
    return compared_objects(question)[0]


@given(examples(), st.integers(0, 3))
@settings(deadline=None, max_examples=80)
def test_every_question_has_one_right_answer_and_only_possible_wrong_ones(record, seed):
    visible = {mask.label for mask in record.masks}
    for question in questions_about(record, seed=seed):
        kind = question.question_type.removesuffix("_with_label")
        truth = question.choice_parts[question.correct]
        partner = partner_of(question)
        assert (partner is None) == (kind == "identification")
        assert truth == filter_parts(kind, sorted(visible), partner=partner, part_graph=GRAPH)
        optional = sorted(set(GRAPH[record.image_label]) - set(REQUIRED[record.image_label]))
        eligible = set(filter_parts(kind, optional, partner=partner, part_graph=GRAPH))
        toggled = set()
        for position, parts in enumerate(question.choice_parts):
            assert parts == sorted(set(parts))
            assert parts
            if position != question.correct:
                assert 1 <= len(set(truth) ^ set(parts)) <= TOGGLES
                toggled |= set(truth) ^ set(parts)
        assert toggled <= eligible
        assert len(toggled) <= TOGGLES
        assert len({frozenset(parts) for parts in question.choice_parts}) == DISTRACTORS + 1
        assert len(set(question.choices)) == DISTRACTORS + 1


@given(examples())
@settings(deadline=None, max_examples=40)
def test_a_negative_question_shares_a_part_with_another_object(record):
    visible = {mask.label for mask in record.masks}
    for question in questions_about(record, question_types=["negative"]):
        partner = partner_of(question)
        assert partner != record.image_label
        assert visible & set(GRAPH[partner])


@given(st.lists(examples(), min_size=2, max_size=4, unique_by=lambda record: record.image_id))
@settings(deadline=None, max_examples=20)
def test_questions_do_not_depend_on_the_order_of_images_or_types(records):
    forward = [question for record in records for question in questions_about(record, question_types=QUESTION_TYPES)]
    backward = [
        question
        for record in reversed(records)
        for question in questions_about(record, question_types=QUESTION_TYPES[::-1])
    ]
    assert {question.id: question for question in forward} == {question.id: question for question in backward}


def test_an_example_without_masks_gets_no_comparison_and_no_right_answer():
    bare = example("bare", "bus", [])
    assert questions_about(bare, question_types=["positive", "negative"]) == []


def test_a_type_with_too_few_optional_parts_is_not_asked():
    graph, presence = {"stool": ["leg", "seat", "cushion"]}, {"stool": {"leg": 0.5, "seat": 1.0, "cushion": 0.5}}
    record = example("stool", "stool", ["seat", "leg"])
    assert make_questions(record, part_graph=graph, instance_graph={}, presence=presence, seed=0) == []


def test_objects_and_parts_outside_the_graphs_are_refused_by_name():
    with pytest.raises(DataError, match="example one, field 'image_label'.*'spoon'"):
        questions_about(example("one", "spoon", ["door"]))
    with pytest.raises(DataError, match="example one, field 'masks'.*'propeller'"):
        questions_about(example("one", "bus", ["body", "propeller"]))


def test_the_wording_is_that_of_the_official_release(fixtures_dir):
    compared = Counter()
    for question in read_questions(fixtures_dir / "official_layout"):
        partner, contrast = compared_objects(question)
        words = {"image_label": question.image_label, "partner": partner, "contrast": contrast}
        assert official_question(question.question_type, **words) == question.question
        for parts, choice in zip(question.choice_parts, question.choices, strict=True):
            assert official_answer(question.question_type, join_parts(parts), **words) == choice
        if question.object_question is not None:
            assert question.object_question == OBJECT_QUESTION
            assert question.object_choices == list(map(object_answer, question.object_classes))
        compared[question.question_type] += 1
    assert compared == dict.fromkeys(QUESTION_TYPES, 42)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("engine", "an engine"), ("bus", "a bus"), ("SUV parked to the left", "a SUV parked to the left")],
)
def test_articles_follow_the_whole_phrase(phrase, expected):
    assert with_article(phrase) == expected


def test_toggling_makes_every_choice_equally_likely_to_be_the_truth():
    """Over all truths on three optional parts, each list is the truth as often as it is a given distractor."""
    eligible = ["a", "b", "c"]
    subsets = [[*chosen, "z"] for size in range(4) for chosen in combinations(eligible, size)]
    as_truth, as_distractor = Counter(), Counter()
    rng = np.random.default_rng(0)
    for _ in range(300):
        for truth in subsets:
            as_truth[tuple(truth)] += 1
            as_distractor.update(map(tuple, toggled_distractors(truth, eligible=eligible, rng=rng)))
    assert set(as_distractor) == set(as_truth)
    shares = np.array([as_distractor[key] / as_truth[key] for key in as_truth])
    np.testing.assert_allclose(shares, DISTRACTORS, atol=0.35)
