"""Make the wrong choices of a question: part lists and objects. There are two schemes.

official (as published): a wrong list is the correct one after 1 or 2 edits, so 1 to 4 parts differ. An edit adds,
deletes or replaces a part. In nine of ten cases an added part comes from the parts of the objects involved, otherwise
from parts that are often visible together with the correct ones. A removed part is not added again. This scheme is
simple but leaks the answer: the correct list is in the middle of the five, and impossible parts reveal wrong lists.

balanced: the five lists differ only in parts that the object may have or lack, and each list is about equally likely
to be correct. Parts that are visible in about half of the images are added and removed freely (1 to TOGGLES of them
differ, from the same TOGGLES parts for all five lists). Other parts are exchanged for parts that are visible about as
often, so that all lists have the same length. If there are too few such parts, no question is asked.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from math import comb

import numpy as np

from plum_partonomy.questions.part_statistics import PartKnowledge

DISTRACTORS = 4

MAX_EDITS = 2
RELATED_SHARE = 0.9
_MAX_DRAWS = 100

TOGGLES = 3
EVEN = 0.05
"""A part counts as visible in half of the images if its share differs from one half by at most this value."""
ODDS_RATIO = 1.5
"""Maximum ratio of the odds of being visible for parts that are exchanged."""
EXCHANGED = range(4, 9)
"""Sizes of the pool of parts to exchange."""

_LEAST_SIMILARITY = 0.05


def edited_distractors(
    truth: Sequence[str], *, related: Collection[str], knowledge: PartKnowledge, rng: np.random.Generator
) -> list[list[str]] | None:
    """Return four wrong lists of the official scheme, or None if the edits give fewer.

    Args:
        related: Parts of the objects involved. If none is left to add, only co-occurrence decides.
    """
    cumulative = _addition_weights(truth, related=related, knowledge=knowledge).cumsum()
    found: dict[frozenset[str], list[str]] = {}
    for _ in range(_MAX_DRAWS):
        parts = list(truth)
        for _ in range(rng.integers(1, MAX_EDITS + 1)):
            _edit(parts, cumulative=cumulative, knowledge=knowledge, rng=rng)
        if set(parts) != set(truth):
            found.setdefault(frozenset(parts), sorted(parts))
        if len(found) == DISTRACTORS:
            return list(found.values())
    return None


def _addition_weights(truth: Sequence[str], *, related: Collection[str], knowledge: PartKnowledge) -> np.ndarray:
    """Return the probability weight of adding each part of the knowledge; zero for the correct ones."""
    weights = knowledge.conditional[[knowledge.position[part] for part in truth]].mean(0)
    weights[[knowledge.position[part] for part in truth]] = 0
    weights /= weights.sum() or 1
    spare = [knowledge.position[part] for part in related if part not in truth]
    if spare:
        weights *= 1 - RELATED_SHARE
        weights[spare] += RELATED_SHARE / len(spare)
    return weights


def _edit(parts: list[str], *, cumulative: np.ndarray, knowledge: PartKnowledge, rng: np.random.Generator) -> None:
    """Add, delete or replace one part in place. Does nothing if the list would be empty or there is nothing to add."""
    edit = rng.integers(3)
    deletes, adds = edit > 0, edit != 1
    added = None
    if adds and cumulative[-1] > 0:
        drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        added = knowledge.parts[min(drawn, len(cumulative) - 1)]
    if deletes and (len(parts) > 1 or added):
        parts.pop(rng.integers(len(parts)))
    if added and added not in parts:
        parts.append(added)


def toggled_distractors(truth: Sequence[str], *, eligible: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """Return four wrong lists: TOGGLES eligible parts are drawn, and each list adds or removes some of them.

    If eligible parts are visible independently in half of the images, all five lists are equally likely to be correct.
    """
    toggles = rng.choice(eligible, TOGGLES, replace=False).tolist()
    subsets = [subset for size in range(1, TOGGLES + 1) for subset in combinations(toggles, size)]
    wrong = [sorted(set(truth) ^ set(subset)) for subset in subsets]
    wrong = [parts for parts in wrong if parts]
    return [wrong[position] for position in rng.choice(len(wrong), DISTRACTORS, replace=False)]


def exchanged_distractors(truth: Sequence[str], *, pool: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """Return four wrong lists as long as the correct one: other members of the pool replace those in it."""
    fixed = sorted(set(truth) - set(pool))
    kept = tuple(part for part in pool if part in truth)
    others = [subset for subset in combinations(pool, len(kept)) if subset != kept]
    return [sorted([*fixed, *others[index]]) for index in rng.choice(len(others), DISTRACTORS, replace=False)]


def balanced_distractors(
    truth: Sequence[str], *, presence: Mapping[str, float], rng: np.random.Generator
) -> list[list[str]] | None:
    """Return four wrong lists of the balanced scheme, or None if too few parts are uncertain.

    Args:
        presence: Share of the object's images that show the part, for each part that passes the filter of the
            question.
    """
    even = _even_parts(presence)
    if len(even) >= TOGGLES:
        return toggled_distractors(truth, eligible=even, rng=rng)
    pools = list(_exchange_pools(truth, presence))
    return exchanged_distractors(truth, pool=pools[rng.integers(len(pools))], rng=rng) if pools else None


def can_balance(truth: Sequence[str], *, presence: Mapping[str, float]) -> bool:
    """Return whether `balanced_distractors` finds four."""
    return len(_even_parts(presence)) >= TOGGLES or next(_exchange_pools(truth, presence), None) is not None


def _even_parts(presence: Mapping[str, float]) -> list[str]:
    return sorted(part for part, share in presence.items() if abs(share - 0.5) <= EVEN)


def _exchange_pools(truth: Sequence[str], presence: Mapping[str, float]) -> Iterator[list[str]]:
    """Yield pools of neighbours by odds, with enough parts inside and outside the truth for five different lists."""
    ranked = sorted((share / (1 - share), part) for part, share in presence.items() if 0 < share < 1)
    for size in EXCHANGED:
        for start in range(len(ranked) - size + 1):
            neighbours = ranked[start : start + size]
            pool = [part for _, part in neighbours]
            if (
                neighbours[-1][0] <= ODDS_RATIO * neighbours[0][0]
                and comb(size, len(set(truth).intersection(pool))) > DISTRACTORS
            ):
                yield sorted(pool)


class WrongObjects:
    """Draws four wrong objects that resemble the correct one, by shared parts among its siblings."""

    def __init__(self, knowledge: PartKnowledge, *, scheme: str):
        self.knowledge, self.scheme = knowledge, scheme
        self.labels = sorted(knowledge.part_graph)
        self.row = {label: row for row, label in enumerate(self.labels)}
        self.similarity = knowledge.part_overlap(self.labels)
        self._rivals: dict[str, list[str]] = {}
        self._groups: dict[str, list[list[str]]] = {}

    def draw(self, label: str, *, rng: np.random.Generator) -> list[str] | None:
        """Return four wrong objects, or None if fewer than four others are known.

        official: drawn without replacement, weighted by similarity to `label`. balanced: one of the groups that
        contain `label`, where a group is an object with those most similar to it; being most similar to the others
        then reveals nothing.
        """
        if label not in self._rivals:
            self._rivals[label] = self.knowledge.rivals(label, at_least=DISTRACTORS)
        rivals = self._rivals[label]
        if len(rivals) < DISTRACTORS:
            return None
        if self.scheme == "balanced":
            if label not in self._groups:
                self._groups[label] = self._groups_with(label, rivals)
            group = self._groups[label][rng.integers(len(self._groups[label]))]
            return [other for other in group if other != label]
        weights = self.similarity[self.row[label], [self.row[rival] for rival in rivals]] + _LEAST_SIMILARITY
        drawn = rng.choice(len(rivals), DISTRACTORS, replace=False, p=weights / weights.sum())
        return [rivals[position] for position in drawn]

    def _groups_with(self, label: str, rivals: list[str]) -> list[list[str]]:
        """Return the group of each candidate with its four most similar objects, if `label` is among the five."""
        members = sorted([label, *rivals])
        rows = [self.row[member] for member in members]
        similarity = self.similarity[np.ix_(rows, rows)].copy()
        np.fill_diagonal(similarity, np.inf)
        nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : DISTRACTORS + 1]
        groups = [[members[position] for position in group] for group in nearest.tolist()]
        return [group for group in groups if label in group]
