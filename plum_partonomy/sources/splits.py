"""Survey a raw data set before a build makes its first record.

    folder --survey--> Survey: examples of each split, parts that each example shows, graphs --> knowledge

Published splits are kept. Splits of your own parts and of a descriptor are drawn by image. No image may be in two
splits.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from plum_partonomy.questions.part_statistics import PartKnowledge, collect_knowledge
from plum_partonomy.records import DataError
from plum_partonomy.sources.catalogue import SOURCES, Source
from plum_partonomy.sources.coco import CocoParts, Graph
from plum_partonomy.sources.conversation_file import ConversationFile
from plum_partonomy.sources.descriptor import Descriptor
from plum_partonomy.sources.own_parts import OwnParts, open_own_parts
from plum_partonomy.sources.question_chats import CoreConversations
from plum_partonomy.sources.referring import Referring
from plum_partonomy.sources.untrusted import OnError, check_labels, refuse

DRAWN_SPLITS = ("descriptor", "own_parts")
"""Data sets of your own: a tenth of the images is drawn for validation and a tenth for test."""
PUBLISHED_PARTS = ("pascal_part", "paco_lvis", "partimagenet", "partimagenet_pp")
PART_SOURCES = (*DRAWN_SPLITS, *PUBLISHED_PARTS)
"""Data sets of objects and parts, which have benchmark questions."""

Opened = Source | Descriptor | OwnParts | ConversationFile


class Annotated(NamedTuple):
    image_id: str
    label: str
    parts: list[str]


@dataclass
class Survey:
    """
    The examples of a data set.

    Args:
        members: Split -> indices of its examples in the source returned by `open_source`.
        annotated: Split -> the (label, parts) of these examples, in the same order.
        part_graph, instance_graph: The merged graphs of all splits.
    """

    members: dict[str, list[int]] = field(default_factory=dict)
    annotated: dict[str, list[Annotated]] = field(default_factory=dict)
    part_graph: Graph = field(default_factory=dict)
    instance_graph: Graph = field(default_factory=dict)

    def knowledge(self) -> PartKnowledge:
        """Return the part statistics of the examples of all splits."""
        counted = [(item.label, item.parts) for split in self.annotated.values() for item in split]
        return collect_knowledge(counted, part_graph=self.part_graph, instance_graph=self.instance_graph)


def open_source(name: str, folder: Path, *, split: str, on_error: OnError = refuse) -> Opened:
    """Return the source that the indices of a split belong to. `name` is one of DRAWN_SPLITS or SOURCES."""
    if name == "own_parts":
        return open_own_parts(folder, on_error=on_error)
    if name == "descriptor":
        return Descriptor(folder, on_error=on_error)
    kind = SOURCES[name]
    if issubclass(kind, CocoParts | Referring | CoreConversations):
        return kind(folder, split=split, on_error=on_error)
    return kind(folder, split=split)  # the others check records only on access


def usable(name: str, folder: Path, *, on_error: OnError = refuse, read_all: bool = False) -> dict[str, list[int]]:
    """Return split -> indices of the records that can be used. `name` is one of SOURCES.

    Unless `read_all`, no record is read here; the build stops at the first bad one.
    """
    members = {}
    for split in SOURCES[name].splits(folder):
        source = open_source(name, folder, split=split, on_error=on_error)
        members[split] = list(range(len(source)))
        if read_all:
            members[split] = [index for index in members[split] if _is_good(source, index, on_error)]
    return members


def _is_good(source: Opened, index: int, on_error: OnError) -> bool:
    try:
        for _ in source.conversations(index, seed=0):
            pass
    except DataError as error:
        on_error(error)
        return False
    return True


def survey(name: str, folder: Path, *, seed: int, on_error: OnError = refuse, read_all: bool = False) -> Survey:
    """Read the annotations of all examples, and all images with `read_all`.

    Conversations of your own have members only, because their parts are unknown.

    Args:
        name: One of PART_SOURCES.
        seed: Seed of drawn splits.
        on_error: Receives a DataError for each bad record; its example is skipped.
        read_all: Read images and conversations as well, to find all bad records. Otherwise they are checked in the
            build, so that each image is decoded only once.

    Raises:
        DataError: A file cannot be read, an image is in two splits, or no example is left.
    """
    found = Survey()
    owners: dict[str, str] = {}
    for split, source, indices in _open_splits(name, folder, seed=seed, on_error=on_error):
        if isinstance(source, ConversationFile):
            good = [i for i in indices if _is_good(source, i, on_error)] if read_all else indices
            found.members |= {split: good} if good else {}
            continue
        _unite(found.part_graph, source.part_graph)
        _unite(found.instance_graph, source.instance_graph)
        members, annotated = [], []
        for index in indices:
            try:
                claim_image(owners, source, index, split=split)
                example = source.example(index) if read_all else source.annotation(index)
            except DataError as error:
                on_error(error)
                continue
            members.append(index)
            parts = [mask.label for mask in example.masks]
            annotated.append(Annotated(example.image_id, example.image_label, parts))
        if members:
            found.members[split], found.annotated[split] = members, annotated
    if not found.members:
        raise DataError(f"{folder}: not one example of {name} can be used; see `plum data validate`")
    check_labels(found.part_graph, where=f"{folder}, labels of all splits")
    return found


def claim_image(owners: dict[str, str], source: Opened, index: int, *, split: str) -> None:
    """Enter the split of an example's image into `owners`. Raises DataError if the image is in another split too."""
    image_path = source.image_path(index)
    if image_path is not None and owners.setdefault(image_path, split) != split:
        raise DataError(f"{source.path}: {image_path!r} is also in the split {owners[image_path]}")


def equal_images(folder: Path, owners: dict[str, str]) -> list[tuple[str, str]]:
    """
    Return the pairs of images in different splits whose files have the same content.

    Args:
        owners: Path of each image, relative to the folder -> its split.
    """
    by_size: dict[int, list[str]] = {}
    for path in sorted(owners):
        by_size.setdefault((folder / path).stat().st_size, []).append(path)
    pairs = []
    for paths in by_size.values():
        first: dict[bytes, str] = {}
        for path in paths if len({owners[path] for path in paths}) > 1 else ():  # few files are read
            with open(folder / path, "rb") as file:
                other = first.setdefault(hashlib.file_digest(file, "sha256").digest(), path)
            if owners[other] != owners[path]:
                pairs.append((other, path))
    return pairs


def _open_splits(
    name: str, folder: Path, *, seed: int, on_error: OnError
) -> Iterator[tuple[str, Opened, list[int] | range]]:
    if name in DRAWN_SPLITS:
        source = open_source(name, folder, split="", on_error=on_error)
        for split, indices in source.splits(seed=seed).items():
            yield split, source, indices
        return
    for split in SOURCES[name].splits(folder):
        source = open_source(name, folder, split=split, on_error=on_error)
        yield split, source, range(len(source))


def _unite(graph: Graph, other: Graph) -> None:
    for label, values in other.items():
        graph[label] = sorted({*graph.get(label, ()), *values})
