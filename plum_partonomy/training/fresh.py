"""
Make training records as they are read, so that no epoch repeats an earlier one.

    drawn configurations ("mini", "mini_hard", ...)         ──> a new drawing, and a conversation about it
    photographs with part masks ("own_parts", PACO, ...)     ──> the same photograph, perhaps mirrored, in new words
    conversations with fixed words (LLaVA, ...)               ──> as stored

A record depends only on its number, not on the process, the worker or earlier records.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import ImageOps

import partonomy_dataset
from inputs_plum import read_image
from plum_partonomy.images import undecoded
from plum_partonomy.masks import decode, encode
from plum_partonomy.questions.conversations import converse
from plum_partonomy.records import GroundedConversation, PartExample, PartMask, as_row
from plum_partonomy.sources.splits import PART_SOURCES, Survey, open_source, survey
from plum_partonomy.training.mixture import COLUMNS, Source

FreshRecords = Callable[[int, int], dict[str, Any]]
"""(row of the stored split, number) -> record; different numbers give different records."""

DRAWN = ("mini", "mini_instances", "mini_hard")
_SIDES = re.compile(r"\b(left|right)\b")


def open_fresh(source: Source, stored: datasets.Dataset, *, mirror: bool) -> FreshRecords:
    """
    Return the maker of a source's training records.

    Args:
        stored: The stored records of the split, used if none can be made.
        mirror: Flip every second photograph, and exchange "left" and "right" in the names of its parts. Drawings, and
            photographs with a part without a counterpart on the other side, are unchanged.
    """
    if source.dataset == partonomy_dataset.DATASET_NAME and source.name in DRAWN:
        return _Drawings(source.name, source.train_split)
    if source.dataset == partonomy_dataset.DATASET_NAME and source.name in PART_SOURCES:
        found = survey(source.name, Path(source.data_dir).expanduser(), seed=partonomy_dataset.SEED)
        if found.annotated:
            return _Photographs(source, found, mirror=mirror)
    return _Stored(undecoded(stored))


class _Stored:
    def __init__(self, records: datasets.Dataset):
        self.records = records

    def __call__(self, row: int, number: int) -> dict[str, Any]:
        return self.records[row]


class _Drawings:
    def __init__(self, name: str, split: str):
        self.name, self.split = name, split
        self.stored = partonomy_dataset.DRAWING_SIZES[name][split]

    def __call__(self, row: int, number: int) -> dict[str, Any]:
        return _as_record(partonomy_dataset.converse_about_drawing(self.name, self.split, self.stored + number))


class _Photographs:
    def __init__(self, source: Source, found: Survey, *, mirror: bool):
        self.mirror = mirror
        self.members, self.part_graph = found.members[source.train_split], found.part_graph
        self.source = open_source(source.name, Path(source.data_dir).expanduser(), split=source.train_split)

    def __call__(self, row: int, number: int) -> dict[str, Any]:
        example = self.source.example(self.members[row])
        if self.mirror and np.random.default_rng(number).random() < 0.5:
            example = mirror_example(example, part_graph=self.part_graph)
        # the number is larger than the seed of the stored conversations
        return _as_record(converse(example, part_graph=self.part_graph, seed=partonomy_dataset.SEED + 1 + number))


def mirror_example(example: PartExample, *, part_graph: dict[str, list[str]]) -> PartExample:
    """Return the example flipped left to right; unchanged if a part has no counterpart on the other side."""
    labels = [exchange_sides(mask.label) for mask in example.masks]
    if not set(labels).issubset(part_graph[example.image_label]):
        return example
    image = read_image(example.image, where=f"image {example.image_id}")
    masks = [
        PartMask(label, encode(decode(mask.rle)[:, ::-1])) for label, mask in zip(labels, example.masks, strict=True)
    ]
    return dataclasses.replace(example, image=ImageOps.mirror(image), masks=masks)


def exchange_sides(label: str) -> str:
    """
    Return the label with "left" and "right" exchanged.

    >>> exchange_sides("front left door")
    'front right door'
    """
    return _SIDES.sub(lambda match: {"left": "right", "right": "left"}[match.group()], label)


def _as_record(conversation: GroundedConversation) -> dict[str, Any]:
    row = as_row(conversation)
    return {name: row[name] for name in COLUMNS}
