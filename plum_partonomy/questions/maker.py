"""Make benchmark questions from part examples: official wording, distractors, shuffled choices. Pure and seeded.

    visible parts --filter by compared objects--> true parts --scheme--> distractors --shuffle--> Question

A question depends only on (seed, image_id, question_type), the labels of the image and the statistics of the whole
data set; not on the order of images or types, the process, or Python's hash seed. Objects to compare with are drawn
from all matching labels, including the object's own if it matches. distractors.py explains the two schemes.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from plum_partonomy.questions.distractors import (
    WrongObjects,
    balanced_distractors,
    can_balance,
    edited_distractors,
)
from plum_partonomy.questions.part_statistics import PartGraph, PartKnowledge, check_known
from plum_partonomy.questions.spans import join_parts
from plum_partonomy.questions.wording import (
    OBJECT_QUESTION,
    Comparison,
    object_answer,
    official_answer,
    official_question,
    question_kind,
)
from plum_partonomy.records import QUESTION_TYPES, TWO_STEP_TYPES, DataError, PartExample, Question
from plum_partonomy.seeding import seeded_generator

SCHEMES = ("official", "balanced")
Graph = Mapping[str, frozenset[str]]


class _SharedParts:
    """Attributes:
    graph: Object -> the parts of one label that it can have as well.
    partners: The objects with at least one such part.
    objects_with: Groups of objects with the same such parts, so that each group is checked once.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.partners = {other: parts for other, parts in graph.items() if parts}
        self.objects_with: dict[frozenset[str], list[str]] = {}
        for other, parts in graph.items():
            self.objects_with.setdefault(parts, []).append(other)


class QuestionMaker:
    """Makes the questions of one data set.

    Args:
        scheme: One of SCHEMES.

    Raises:
        ValueError: The scheme is unknown, or "official" is requested without co-occurrence counts.
    """

    def __init__(self, knowledge: PartKnowledge, *, scheme: str, seed: int) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"unknown scheme {scheme!r}; known are {', '.join(SCHEMES)}")
        if scheme == "official" and knowledge.together is None:
            raise ValueError('scheme="official" needs to know which parts occur together: see collect_knowledge')
        self.knowledge, self.scheme, self.seed = knowledge, scheme, seed
        self.objects = WrongObjects(knowledge, scheme=scheme)
        self._shared: dict[str, _SharedParts] = {}

    def questions(self, example: PartExample, question_types: Sequence[str] = QUESTION_TYPES) -> list[Question]:
        """Return the questions of an example, at most one per type, in the order of `question_types`.

        A type is skipped if nothing is visible, no object to compare with matches, or the scheme finds no four
        distractors. Raises DataError if the part graph does not contain the object or one of its parts.
        """
        label, visible = example.image_label, sorted({mask.label for mask in example.masks})
        check_known(label, visible, part_graph=self.knowledge.part_graph, where=f"example {example.image_id}")
        if not visible:
            return []
        questions = [self._question(example, visible, question_type) for question_type in question_types]
        return [question for question in questions if question is not None]

    def _question(self, example: PartExample, visible: list[str], question_type: str) -> Question | None:
        rng = seeded_generator(self.seed, "question", example.image_id, question_type)
        label = example.image_label
        drawn = self._draw_parts(question_type, label=label, visible=visible, rng=rng)
        if drawn is None:
            return None
        comparison, choice_parts = drawn
        order = rng.permutation(len(choice_parts)).tolist()
        choice_parts = [choice_parts[position] for position in order]
        object_fields = {}
        if question_type in TWO_STEP_TYPES:
            object_fields = self._object_fields(label, rng=rng)
            if object_fields is None:
                return None
        words = {"image_label": label, "partner": comparison.partner, "contrast": comparison.contrast}
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
            **object_fields,
        )
        question.validate(where=f"question {question.id}")
        return question

    def _draw_parts(
        self, question_type: str, *, label: str, visible: list[str], rng: np.random.Generator
    ) -> tuple[Comparison, list[list[str]]] | None:
        """Return the comparison and the part lists of the choices, the true one first; None if it cannot be asked."""
        kind = question_kind(question_type)
        shared = self._shared_parts(label)
        presence = self._presence(label, visible)

        @cache
        def can_ask(passing: frozenset[str]) -> bool:
            truth = [part for part in visible if part in passing]
            if not truth or self.scheme == "official":
                return bool(truth)
            return can_balance(truth, presence=_restricted(presence, passing))

        comparison = _draw_comparison(kind, label=label, visible=visible, shared=shared, can_ask=can_ask, rng=rng)
        if comparison is None:
            return None
        passing = passing_parts(kind, label, comparison, graph=shared.graph)
        truth = [part for part in visible if part in passing]
        if self.scheme == "balanced":
            wrong = balanced_distractors(truth, presence=_restricted(presence, passing), rng=rng)
        else:
            involved = {label, comparison.partner, comparison.contrast} - {None}
            related = set().union(*(self.knowledge.part_graph[name] for name in involved))
            if question_type in TWO_STEP_TYPES:
                related = set()
            wrong = edited_distractors(truth, related=sorted(related), knowledge=self.knowledge, rng=rng)
        return wrong and (comparison, [truth, *wrong])

    def _object_fields(self, label: str, *, rng: np.random.Generator) -> dict[str, Any] | None:
        wrong = self.objects.draw(label, rng=rng)
        if wrong is None:
            return None
        classes = [label, *wrong]
        order = rng.permutation(len(classes)).tolist()
        classes = [classes[position] for position in order]
        return {
            "object_question": OBJECT_QUESTION,
            "object_choices": [object_answer(name) for name in classes],
            "object_classes": classes,
            "object_correct": order.index(0),
        }

    def _shared_parts(self, label: str) -> _SharedParts:
        if label not in self._shared:
            self._shared[label] = _SharedParts(self.knowledge.shared_parts(label))
        return self._shared[label]

    def _presence(self, label: str, visible: list[str]) -> dict[str, float]:
        """Return the share of images of the parts that a balanced list may add or remove."""
        presence = self.knowledge.presence[label]
        parts = sorted({*visible, *self.knowledge.part_graph[label]})
        return {part: presence[part] for part in parts if 0 < presence[part] < 1}


def _restricted(presence: Mapping[str, float], passing: Collection[str]) -> dict[str, float]:
    return {part: share for part, share in presence.items() if part in passing}


def passing_parts(kind: str, label: str, comparison: Comparison, *, graph: Graph) -> frozenset[str]:
    """Return the parts of `label` that answer a `kind` question if they are visible.

    `graph` maps every object to those of these parts that it can have.
    """
    if kind == "identification":
        return graph[label]
    if kind == "positive":
        return graph[comparison.partner]
    if kind == "negative":
        return graph[label] - graph[comparison.partner]
    return graph[comparison.partner] - graph[comparison.contrast]


def _draw_comparison(
    kind: str,
    *,
    label: str,
    visible: list[str],
    shared: _SharedParts,
    can_ask: Callable[[frozenset[str]], bool],
    rng: np.random.Generator,
) -> Comparison | None:
    """Draw uniformly from the partners that leave a question, then, for difference, from the contrasts that do."""
    if kind != "difference":
        partners = possible_partners(kind, label=label, visible=visible, part_graph=shared.partners)
        comparisons = map(Comparison, partners)
        fitting = [found for found in comparisons if can_ask(passing_parts(kind, label, found, graph=shared.graph))]
        return fitting[rng.integers(len(fitting))] if fitting else None
    partners = possible_partners("positive", label=label, visible=visible, part_graph=shared.partners)
    fruitless: set[frozenset[str]] = set()
    for position in rng.permutation(len(partners)):
        parts = shared.graph[partners[position]]
        if parts not in fruitless:
            groups = [objects for lacking, objects in shared.objects_with.items() if can_ask(parts - lacking)]
            contrasts = [name for objects in groups for name in objects]
            if contrasts:
                return Comparison(partners[position], contrasts[rng.integers(len(contrasts))])
            fruitless.add(parts)
    return None


def possible_partners(
    kind: str, *, label: str, visible: Sequence[str], part_graph: Mapping[str, Collection[str]]
) -> list[str] | list[None]:
    """Return the objects that a `kind` question can compare with: [None] if it compares with none, [] if it cannot be
    asked.

    positive: each label that shares a visible part, including the object's own. negative: each other label that shares
    some but not all visible parts.
    """
    if kind == "identification":
        return [None]
    seen = set(visible)
    shared = {partner: len(seen.intersection(parts)) for partner, parts in sorted(part_graph.items())}
    if kind == "positive":
        return [partner for partner, count in shared.items() if count]
    return [partner for partner, count in shared.items() if 0 < count < len(visible) and partner != label]


def filter_parts(kind: str, parts: Sequence[str], *, partner: str | None, part_graph: PartGraph) -> list[str]:
    """Return the parts that answer a `kind` question: all, those the partner can have, or those it cannot have."""
    if kind == "identification":
        return list(parts)
    return [part for part in parts if (part in part_graph[partner]) == (kind == "positive")]


def make_questions(
    example: PartExample,
    *,
    part_graph: PartGraph,
    instance_graph: Mapping[str, Sequence[str]],
    presence: Mapping[str, Mapping[str, float]],
    question_types: Sequence[str] = QUESTION_TYPES,
    seed: int,
) -> list[Question]:
    """Return balanced questions about a drawn object.

    Args:
        presence: Share of the drawings of a label that have each part. No distractor omits a part that all drawings
            have.
    """
    if example.image_label not in presence:
        raise DataError(
            f"example {example.image_id}, field 'image_label': the part graphs do not know {example.image_label!r}"
        )
    knowledge = PartKnowledge(part_graph, instance_graph, presence)
    return QuestionMaker(knowledge, scheme="balanced", seed=seed).questions(example, question_types)
