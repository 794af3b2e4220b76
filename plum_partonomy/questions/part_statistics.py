"""What is known about objects and parts apart from one image: graphs, how often parts are visible, and which together.

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
    Args:
        part_graph: all parts an object of each label can have.
        instance_graph: parent -> children; parents need not be labels.
        presence: label -> part -> share of the label's images that show the part.
        together: how often two parts are visible in one image: float (parts, parts), in the order of `parts`. On the
            diagonal the images that show the part.
        images: how many images were counted.
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
        """How likely the column's part is where the row's is visible: float (parts, parts).

        Shrunk towards the column's overall frequency by one pseudo-image, so that rare parts claim nothing certain.
        Raises ValueError if the knowledge does not come from images.
        """
        if self.together is None:
            raise ValueError("which parts occur together is not known: make the knowledge with collect_knowledge")
        frequency = self.together.diagonal() / max(self.images, 1)
        return (self.together + frequency) / (self.together.diagonal()[:, None] + 1)

    def shared_parts(self, label: str) -> dict[str, frozenset[str]]:
        """Every label, sorted -> those of the parts of `label`, under their names there, that it can have too."""
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
        """How alike any two labels are, within [0, 1]: parts that both can have over parts that either can have."""
        has = np.zeros((len(labels), len(self.parts)))
        for row, label in enumerate(labels):
            has[row, [self.position[part] for part in self.part_graph[label]]] = 1
        shared = has @ has.T
        either = has.sum(1)[:, None] + has.sum(1) - shared
        return shared / np.maximum(either, 1)

    def relatives(self, label: str, *, up: bool) -> set[str]:
        """All ancestors, or all descendants, of a label in the instance graph. Cycles do no harm."""
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
        """Labels that `label` might be taken for: its siblings, or where there are fewer than `at_least` all others.

        Never an ancestor or a descendant: those would be right, too.
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
    """Counts over (label, visible parts) of all images; their order does not matter.

    Raises DataError if the part graph does not know a label, or a part of it.
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
    """Raises DataError if the part graph does not know the label, or one of the parts for it."""
    if label not in part_graph:
        raise DataError(f"{where}, field 'image_label': the part graphs do not know {label!r}")
    unknown = sorted(set(parts) - set(part_graph[label]))
    if unknown:
        raise DataError(f"{where}, field 'masks': part_graph[{label!r}] does not have {unknown}")
