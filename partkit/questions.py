"""Benchmark questions from part examples: official wording, distractors, shuffled choices. Pure and seeded.

    visible parts --filter by partner object--> true parts --toggle possible parts--> distractors --shuffle--> Question

A question depends on (seed, image_id, question_type) alone. Distractors differ from the truth only in optional parts
the object could have, each as likely there as not, so the choices cannot be told apart without looking at the image.
"""

from collections.abc import Sequence
from functools import cache
from itertools import combinations

import inflect
import numpy as np

from partkit.schema import DataError, PartExample, Question
from partkit.seeding import seeded_generator
from partkit.spans import join_parts

PartGraph = dict[str, list[str]]

MADE_QUESTION_TYPES = (
    "identification",
    "identification_with_label",
    "positive",
    "positive_with_label",
    "negative",
    "negative_with_label",
)
TOGGLES = 3
DISTRACTORS = 4

_WITH_LABEL = "_with_label"

# The wording of the official release, word for word.
QUESTION_TEMPLATES = {
    "identification": "What visible parts does the {name} in the image have?",
    "positive": "What visible parts does the {name} in the image have in common with {partner}?",
    "negative": "What visible parts does the {name} in the image have which {partner} does not have?",
}
ANSWER_TEMPLATES = {
    "identification": "The {name} in the image has the following visible parts: {parts}.",
    "positive": "The {name} in the image has the following visible parts in common with {partner}: {parts}.",
    "negative": "The {name} in the image has the following visible parts which {partner} does not: {parts}.",
}


def make_questions(
    example: PartExample,
    *,
    part_graph: PartGraph,
    required_parts: PartGraph,
    question_types: Sequence[str] = MADE_QUESTION_TYPES,
    seed: int,
) -> list[Question]:
    """The questions this example allows, at most one per type, in the order of `question_types`.

    Args:
        part_graph: all parts an object of each label can have.
        required_parts: those of them that every object of a label has; no distractor ever leaves them out.

    A type is not asked where fewer than TOGGLES optional parts pass its filter, or where no partner object fits.
    Raises DataError if the graphs do not know the object or one of its parts.
    """
    label = example.image_label
    if label not in part_graph or label not in required_parts:
        raise DataError(f"example {example.image_id}, field 'image_label': the part graphs do not know {label!r}")
    unknown = sorted({mask.label for mask in example.masks} - set(part_graph[label]))
    if unknown:
        raise DataError(f"example {example.image_id}, field 'masks': part_graph[{label!r}] does not have {unknown}")
    questions = [
        _make_question(example, part_graph=part_graph, required_parts=required_parts, question_type=kind, seed=seed)
        for kind in question_types
    ]
    return [question for question in questions if question is not None]


def _make_question(
    example: PartExample, *, part_graph: PartGraph, required_parts: PartGraph, question_type: str, seed: int
) -> Question | None:
    rng = seeded_generator(seed, "question", example.image_id, question_type)
    kind = question_type.removesuffix(_WITH_LABEL)
    label = example.image_label
    optional = sorted(set(part_graph[label]) - set(required_parts[label]))
    visible = sorted(mask.label for mask in example.masks)
    askable = [
        partner
        for partner in possible_partners(kind, label=label, visible=visible, part_graph=part_graph)
        if len(filter_parts(kind, optional, partner=partner, part_graph=part_graph)) >= TOGGLES
    ]
    if not askable:
        return None
    partner = askable[rng.integers(len(askable))]
    truth = filter_parts(kind, visible, partner=partner, part_graph=part_graph)
    eligible = filter_parts(kind, optional, partner=partner, part_graph=part_graph)
    choice_parts = [truth, *toggled_distractors(truth, eligible=eligible, rng=rng)]
    order = rng.permutation(len(choice_parts)).tolist()
    choice_parts = [choice_parts[position] for position in order]
    words = {"image_label": label, "partner": partner}
    question = Question(
        id=f"{example.image_id}-{question_type}",
        image=example.image,
        image_id=example.image_id,
        image_label=label,
        question_type=question_type,
        question=official_question(question_type, **words),
        choices=[official_answer(question_type, join_parts(parts), **words) for parts in choice_parts],
        correct=order.index(0),
        choice_parts=choice_parts,
        masks=example.masks,
        source=example.source,
        licence=example.licence,
    )
    question.validate(where=f"question {question.id}")
    return question


def possible_partners(
    kind: str, *, label: str, visible: Sequence[str], part_graph: PartGraph
) -> list[str] | list[None]:
    """The objects a `kind` question can compare with: [None] if it compares with none, [] if it cannot be asked.

    positive: every label that shares a visible part, the own one included. negative: every other label that shares
    some but not all visible parts.
    """
    if kind == "identification":
        return [None]
    shared = {partner: len(set(visible) & set(parts)) for partner, parts in sorted(part_graph.items())}
    if kind == "positive":
        return [partner for partner, count in shared.items() if count]
    return [partner for partner, count in shared.items() if 0 < count < len(visible) and partner != label]


def filter_parts(kind: str, parts: Sequence[str], *, partner: str | None, part_graph: PartGraph) -> list[str]:
    """Those of the parts that answer a `kind` question: all, those the partner can have, or those it cannot."""
    if kind == "identification":
        return list(parts)
    return [part for part in parts if (part in part_graph[partner]) == (kind == "positive")]


def toggled_distractors(truth: Sequence[str], *, eligible: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """Four wrong part lists: TOGGLES of the eligible parts are drawn, and each list adds or removes some of them.

    Where eligible parts are present about every second time, independently, all five lists are equally likely to be
    the true one.
    """
    toggles = rng.choice(eligible, TOGGLES, replace=False).tolist()
    subsets = [subset for size in range(1, TOGGLES + 1) for subset in combinations(toggles, size)]
    wrong = [sorted(set(truth) ^ set(subset)) for subset in subsets]
    wrong = [parts for parts in wrong if parts]
    return [wrong[position] for position in rng.choice(len(wrong), DISTRACTORS, replace=False)]


def official_question(question_type: str, *, image_label: str, partner: str | None) -> str:
    kind, name = _kind_and_name(question_type, image_label)
    return QUESTION_TEMPLATES[kind].format(name=name, partner=partner and with_article(partner))


def official_answer(question_type: str, parts: str, *, image_label: str, partner: str | None) -> str:
    """`parts` is the list as text, as `join_parts` writes it."""
    kind, name = _kind_and_name(question_type, image_label)
    return ANSWER_TEMPLATES[kind].format(name=name, partner=partner and with_article(partner), parts=parts)


def _kind_and_name(question_type: str, image_label: str) -> tuple[str, str]:
    kind = question_type.removesuffix(_WITH_LABEL)
    return kind, "object" if kind == question_type else image_label


@cache
def with_article(phrase: str) -> str:
    """The phrase after "a" or "an", as `inflect` chooses for the whole phrase."""
    return inflect_engine().a(phrase)


@cache
def inflect_engine() -> inflect.engine:
    return inflect.engine()
