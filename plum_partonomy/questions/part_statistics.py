"""Statistics of objects and parts over a data set: graphs, how often parts are visible, and which occur together.

(label, visible parts) of all images --collect_knowledge--> PartKnowledge --> questions, distractors
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plum_partonomy.records import DataError

PartGraph = Mapping[str, Sequence[str]]


@dataclass
class PartKnowledge:
    """
    Statistics of a data set.

    Args:
        part_graph: Label -> all parts that the object can have.
        instance_graph: Parent -> children; parents need not be labels.
        presence: Label -> part -> share of the label's images that show the part.
        together: Number of images that show both of two parts: float (parts, parts), in the order of `parts`. The
            diagonal counts the images that show the part.
        images: Number of images.
    """

    part_graph: PartGraph
    instance_graph: Mapping[str, Sequence[str]]
    presence: Mapping[str, Mapping[str, float]]
    together: np.ndarray | None = None
    images: int = 0

    @cached_property
    def parts(self) -> list[str]:
        return sorted({part for parts in self.part_graph.values() for part in parts})

    @cached_property
    def position(self) -> dict[str, int]:
        return {part: position for position, part in enumerate(self.parts)}

    @cached_property
    def conditional(self) -> np.ndarray:
        """Return the probability of the column's part where the row's part is visible: float (parts, parts).

        One pseudo-image shrinks it towards the column's overall frequency, so that rare parts give no certain values.
        Raises ValueError if the statistics do not come from images.
        """
        if self.together is None:
            raise ValueError("which parts occur together is not known: make the knowledge with collect_knowledge")
        frequency = self.together.diagonal() / max(self.images, 1)
        return (self.together + frequency) / (self.together.diagonal()[:, None] + 1)

    def shared_parts(self, label: str) -> dict[str, frozenset[str]]:
        """Return each label, sorted -> the parts of `label`, under its own names, that it can have as well."""
        shared: dict[str, set[str]] = {other: set() for other in sorted(self.part_graph)}
        for part in self.part_graph[label]:
            for other in self._labels_of_part[part]:
                shared[other].add(part)
        return {other: frozenset(parts) for other, parts in shared.items()}

    @cached_property
    def _labels_of_part(self) -> dict[str, set[str]]:
        labels: dict[str, set[str]] = {}
        for label, parts in self.part_graph.items():
            for part in parts:
                labels.setdefault(part, set()).add(label)
        return labels

    def part_overlap(self, labels: Sequence[str]) -> np.ndarray:
        """Return the similarity of any two labels in [0, 1]: parts of both over parts of either."""
        has = np.zeros((len(labels), len(self.parts)))
        for row, label in enumerate(labels):
            has[row, [self.position[part] for part in self.part_graph[label]]] = 1
        shared = has @ has.T
        either = has.sum(1)[:, None] + has.sum(1) - shared
        return shared / np.maximum(either, 1)

    def relatives(self, label: str, *, up: bool) -> set[str]:
        """Return all ancestors, or all descendants, of a label in the instance graph, which may have cycles."""
        found: set[str] = set()
        frontier = {label}
        while frontier:
            found |= frontier
            if up:
                frontier = {parent for parent, children in self.instance_graph.items() if frontier & set(children)}
            else:
                frontier = {child for parent in frontier for child in self.instance_graph.get(parent, ())}
            frontier -= found
        return found - {label}

    def rivals(self, label: str, *, at_least: int) -> list[str]:
        """Return labels that may be confused with `label`: its siblings, or all others if it has fewer than
        `at_least`.

        Ancestors and descendants are never included, because they would be correct as well.
        """
        related = self.relatives(label, up=True) | self.relatives(label, up=False) | {label}
        others = set(self.part_graph) - related
        siblings = {child for children in self.instance_graph.values() if label in children for child in children}
        return sorted(siblings & others if len(siblings & others) >= at_least else others)


def collect_knowledge(
    annotated: Iterable[tuple[str, Iterable[str]]],
    *,
    part_graph: PartGraph,
    instance_graph: Mapping[str, Sequence[str]],
) -> PartKnowledge:
    """Return the statistics of (label, visible parts) of all images; their order does not matter.

    Raises DataError if the part graph does not contain a label or one of its parts.
    """
    knowledge = PartKnowledge(part_graph, instance_graph, {})
    together = np.zeros((len(knowledge.parts), len(knowledge.parts)))
    images = dict.fromkeys(part_graph, 0)
    visible_in = {label: dict.fromkeys(parts, 0) for label, parts in part_graph.items()}
    for label, parts in annotated:
        visible = sorted(set(parts))
        check_known(label, visible, part_graph=part_graph, where="annotated images")
        images[label] += 1
        for part in visible:
            visible_in[label][part] += 1
        positions = [knowledge.position[part] for part in visible]
        together[np.ix_(positions, positions)] += 1
    knowledge.presence = {
        label: {part: count / max(images[label], 1) for part, count in counts.items()}
        for label, counts in visible_in.items()
    }
    knowledge.together, knowledge.images = together, sum(images.values())
    return knowledge


def check_known(label: str, parts: Iterable[str], *, part_graph: PartGraph, where: str) -> None:
    """Raise DataError if the part graph does not contain the label, or one of its parts."""
    if label not in part_graph:
        raise DataError(f"{where}, field 'image_label': the part graphs do not know {label!r}")
    unknown = sorted(set(parts) - set(part_graph[label]))
    if unknown:
        raise DataError(f"{where}, field 'masks': part_graph[{label!r}] does not have {unknown}")
