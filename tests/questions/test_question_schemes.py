"""Both schemes of distractors, all ten question types, on small made-up data sets and on the miniature."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plum_partonomy.drawn import miniature
from plum_partonomy.masks import encode
from plum_partonomy.questions.distractors import DISTRACTORS, MAX_EDITS, TOGGLES
from plum_partonomy.questions.maker import SCHEMES, QuestionMaker
from plum_partonomy.questions.part_statistics import PartKnowledge, collect_knowledge
from plum_partonomy.records import QUESTION_TYPES, PartExample, PartMask
from plum_partonomy.scoring.blind_baselines import compare_schemes, fit_bag_of_parts

ROOT = Path(__file__).parents[2]
RLE = encode(np.eye(4, dtype=bool))
PARTS = ["arm", "belt", "cap", "door", "ear", "fin", "grip", "hook"]
LABELS = ["bike", "boat", "bus", "car", "kite", "ship"]
FAMILIES = {"vehicle": ["bike", "bus", "car"], "vessel": ["boat", "ship"], "toy": ["kite"]}


def example(image_id: str, label: str, parts: list[str]) -> PartExample:
    return PartExample(None, image_id, label, [PartMask(part, RLE) for part in sorted(parts)], "test", "none")


@st.composite
def data_sets(draw) -> list[PartExample]:
    images = draw(
        st.lists(
            st.tuples(st.sampled_from(LABELS), st.sets(st.sampled_from(PARTS), min_size=1)), min_size=6, max_size=24
        )
    )
    return [example(f"image {index}", label, parts) for index, (label, parts) in enumerate(images)]


def maker_for(examples: list[PartExample], *, scheme: str, seed: int = 0) -> QuestionMaker:
    part_graph = {}
    for record in examples:
        part_graph.setdefault(record.image_label, set()).update(mask.label for mask in record.masks)
    knowledge = collect_knowledge(
        [(record.image_label, [mask.label for mask in record.masks]) for record in examples],
        part_graph={label: sorted(parts) for label, parts in part_graph.items()},
        instance_graph=FAMILIES,
    )
    return QuestionMaker(knowledge, scheme=scheme, seed=seed)


def compared_objects(question) -> list[str]:
    return re.findall(r"(?:in common with|not with|which) an? (\w+)", question.question)


def naive_truth(question, part_graph) -> set[str]:
    visible = {mask.label for mask in question.masks}
    others = [set(part_graph[other]) for other in compared_objects(question)]
    kind = question.question_type.removesuffix("_with_label")
    if kind == "positive":
        return visible & others[0]
    if kind == "negative":
        return visible - others[0]
    if kind == "difference":
        return visible & others[0] - others[1]
    return visible


@pytest.mark.parametrize("scheme", SCHEMES)
@given(examples=data_sets(), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_the_truth_is_right_and_masked_and_the_four_others_are_wrong_distinct_and_within_bounds(
    scheme, examples, seed
):
    maker = maker_for(examples, scheme=scheme, seed=seed)
    part_graph = maker.knowledge.part_graph
    for record in examples:
        for question in maker.questions(record):
            truth = set(question.choice_parts[question.correct])
            assert truth == naive_truth(question, part_graph)
            assert truth <= {mask.label for mask in question.masks}
            wrong = [set(parts) for index, parts in enumerate(question.choice_parts) if index != question.correct]
            assert len({frozenset(parts) for parts in wrong} - {frozenset(truth)}) == DISTRACTORS
            for parts in wrong:
                if scheme == "official":
                    assert 1 <= len(truth ^ parts) <= 2 * MAX_EDITS
                else:
                    assert parts <= set(part_graph[record.image_label])
                    assert len(parts) == len(truth) or len(truth ^ parts) <= TOGGLES


@pytest.mark.parametrize("scheme", SCHEMES)
@given(examples=data_sets())
@settings(deadline=None, max_examples=15)
def test_wrong_objects_are_four_others_of_the_data_set(scheme, examples):
    maker = maker_for(examples, scheme=scheme)
    for record in examples:
        for question in maker.questions(record, ["whole_to_part", "part_to_whole"]):
            assert question.object_classes[question.object_correct] == record.image_label
            assert len(set(question.object_classes)) == DISTRACTORS + 1
            assert set(question.object_classes) <= set(maker.knowledge.part_graph)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(examples=data_sets())
@settings(deadline=None, max_examples=15)
def test_questions_depend_on_neither_the_order_of_images_nor_of_types(scheme, examples):
    forward = [question for record in examples for question in maker_for(examples, scheme=scheme).questions(record)]
    turned = examples[::-1]
    maker = maker_for(turned, scheme=scheme)
    backward = [question for record in turned for question in maker.questions(record, QUESTION_TYPES[::-1])]
    assert {question.id: question for question in forward} == {question.id: question for question in backward}


def test_over_many_images_every_partner_that_fits_is_drawn():
    parts = {"bike": "arm belt", "boat": "belt cap", "bus": "arm belt cap", "car": "door", "kite": "arm door"}
    examples = [example(f"{label}", label, listed.split()) for label, listed in parts.items()]
    maker = maker_for(examples, scheme="official")
    drawn = {"positive": set(), "negative": set(), "difference": set()}
    for number in range(300):
        for question in maker.questions(example(f"number {number}", "bus", ["arm", "belt", "cap"]), list(drawn)):
            drawn[question.question_type].add(tuple(compared_objects(question)))
    assert drawn["positive"] == {("bike",), ("boat",), ("bus",), ("kite",)}
    assert drawn["negative"] == {("bike",), ("boat",), ("kite",)}
    has = {label: set(listed.split()) & {"arm", "belt", "cap"} for label, listed in parts.items()}
    assert drawn["difference"] == {(c, d) for c in has for d in has if has[c] - has[d]}


def test_a_wrong_object_is_a_sibling_and_never_a_kind_of_the_right_one():
    graph = {label: ["arm"] for label in [*LABELS, "vehicle", "sedan"]}
    families = {"vehicle": ["bike", "boat", "bus", "car", "kite"], "car": ["sedan"]}
    knowledge = PartKnowledge(graph, families, {})
    assert knowledge.rivals("car", at_least=4) == ["bike", "boat", "bus", "kite"]
    assert knowledge.rivals("ship", at_least=4) == sorted(set(graph) - {"ship"})
    assert knowledge.rivals("sedan", at_least=4) == ["bike", "boat", "bus", "kite", "ship"]


def test_similar_objects_are_drawn_more_often():
    parts = {"bus": "arm belt", "car": "arm belt", "bike": "cap", "boat": "door", "kite": "ear", "ship": "fin"}
    maker = maker_for([example(label, label, listed.split()) for label, listed in parts.items()], scheme="official")
    rng = np.random.default_rng(0)
    drawn = [rival for _ in range(200) for rival in maker.objects.draw("bus", rng=rng)]
    assert drawn.count("car") > max(drawn.count(other) for other in parts if other not in ("bus", "car"))


def test_blind_heuristics_tell_nothing_from_balanced_questions_and_the_middle_of_official_ones():
    train, test = ([miniature.draw_example(split, n) for n in range(150)] for split in ("train", "test"))
    graphs = {"part_graph": miniature.part_graph(), "instance_graph": miniature.instance_graph()}
    counted = collect_knowledge(
        [(record.image_label, [mask.label for mask in record.masks]) for record in train + test], **graphs
    )
    even = PartKnowledge(**graphs, presence=miniature.presence())
    leak = compare_schemes(train, test, knowledge={"official": counted, "balanced": even}, seed=0)
    for name, accuracy in leak["balanced"].items():
        assert accuracy == pytest.approx(0.2, abs=0.05), name
    assert leak["official"]["middle"] > 0.5


def test_the_bag_of_parts_learns_which_parts_are_never_right():
    graph = {"bus": ["arm", "belt", "cap"], "car": ["door", "ear", "fin"]}
    examples = [example(f"{n}", "bus", graph["bus"][: 1 + n % 3]) for n in range(30)] + [
        example("car", "car", graph["car"])
    ]
    questions = [q for record in examples[:30] for q in maker_for(examples, scheme="official").questions(record)]
    questions[0] = replace(questions[0], choice_parts=questions[0].choice_parts[: questions[0].correct + 1])
    weights = fit_bag_of_parts(questions)  # not all of them have equally many choices
    assert weights["arm"] > max((weights[part] for part in graph["car"] if part in weights), default=-np.inf)
