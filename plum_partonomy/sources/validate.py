"""Check a data set before a long build: read every record and decode every image.

    validate("paco_lvis", FOLDER) -> Report(problems=[...], notes=[...])

Problems are records that a build rejects, and counts or versions that differ from the published ones. Notes describe
what was read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from plum_partonomy.drawn.miniature import DEFAULT_SEED
from plum_partonomy.records import DataError, as_row
from plum_partonomy.sources.catalogue import SOURCES, Source
from plum_partonomy.sources.coco import CocoParts
from plum_partonomy.sources.conversation_file import ConversationFile
from plum_partonomy.sources.descriptor import HELD_OUT, Descriptor
from plum_partonomy.sources.official import read_questions
from plum_partonomy.sources.own_parts import OwnParts, open_own_parts, unlisted_images
from plum_partonomy.sources.splits import Opened, claim_image, equal_images, open_source
from plum_partonomy.sources.statistics import Statistics

PUBLISHED_CORE = {"objects": 534, "parts": 862, "object-part pairs": 1976, "images": 1068, "masks": 4968}
"""The paper's counts of Partonomy-Core. Other releases have the same layout, so a difference is only a note."""


@dataclass
class Report:
    """Problems and notes, one sentence each. A data set without problems can be built."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refuse(self, error: DataError) -> None:
        self.problems.append(str(error))


def validate(source: str, folder: str | Path) -> Report:
    """Read everything that the source finds in the folder, continuing after bad records. `source` is one of CHECKS."""
    report = Report()
    try:
        CHECKS[source](Path(folder), report)
    except DataError as error:
        report.refuse(error)
    return report


def _check_core(folder: Path, report: Report) -> None:
    resized: list[int] = []
    questions = read_questions(folder, on_error=report.refuse, on_resize=resized.append)
    statistics = Statistics()
    for question in tqdm(questions, desc="questions", unit=" questions", disable=None):  # only on a terminal
        statistics.add(as_row(question))
    by_type = ", ".join(f"{count} {name}" for name, count in sorted(statistics.questions.items()))
    counts = statistics.as_row()
    report.notes.append(f"{counts['questions']} questions: {by_type}")
    if resized:
        report.notes.append(f"{sum(resized)} masks have another size than their image and are resized when loaded")
    report.notes.append(
        ", ".join(f"{counts[what]} {what} (Partonomy-Core: {found})" for what, found in PUBLISHED_CORE.items())
    )


def _check_source(kind: type[Source]) -> Callable[[Path, Report], None]:
    def check(folder: Path, report: Report) -> None:
        for split in kind.splits(folder):
            try:
                source = open_source(kind.name, folder, split=split, on_error=report.refuse)
            except DataError as error:
                report.refuse(error)
                continue
            report.problems.extend(_differences_from_published(source))
            _check_conversations(source, report)

    return check


def _check_conversations(source: Source, report: Report) -> None:
    made = _read_conversations(source, range(len(source)), split=source.split, report=report)
    held = ", ".join(f"{count} {what}" for what, count in source.counts.items())
    report.notes.append(f"{source.split}: {held}, of which {source.blank} give nothing to talk about; {made}")


def _check_descriptor(folder: Path, report: Report) -> None:
    source = Descriptor(folder, on_error=report.refuse)
    _check_drawn_splits(folder, source, source.splits(seed=DEFAULT_SEED), report)


def _check_own_parts(folder: Path, report: Report) -> None:
    source = open_own_parts(folder, on_error=report.refuse)
    if isinstance(source, OwnParts):
        objects = ", ".join(f"{label} ({len(parts)} parts)" for label, parts in source.part_graph.items())
        report.notes.append(f"{source.kind} in {source.path}: {objects}")
        _note_left_out(report, "files are no annotations", [path.name for path in source.others])
        _note_left_out(report, "images show no part", source.unannotated)
        if source.whole_objects:
            names = ", ".join(sorted(source.whole_objects))
            report.notes.append(f"masks and boxes of whole objects are no parts and are left out: {names}")
    splits = source.splits(seed=DEFAULT_SEED)
    _check_drawn_splits(folder, source, splits, report)
    if not report.problems:
        listed = {source.image_path(index) for index in range(len(source))}
        listed.update(source.unannotated if isinstance(source, OwnParts) else ())
        _note_left_out(report, "images are in no annotation", unlisted_images(folder, listed))
    if not splits["validation"]:
        needed = f"at least {HELD_OUT} images are needed; one in {HELD_OUT} is held out to select a checkpoint"
        if splits["test"]:  # splits given by the files
            needed = "the split validation has no image with a part; it selects the checkpoint"
        report.problems.append(f"{folder}: {needed}")


def _note_left_out(report: Report, what: str, names: Sequence[str]) -> None:
    if names:
        report.notes.append(f"{len(names)} {what} and are left out, such as {', '.join(names[:3])}")


def _check_drawn_splits(
    folder: Path, source: Descriptor | OwnParts | ConversationFile, splits: dict[str, list[int]], report: Report
) -> None:
    owners: dict[str, str] = {}
    for split, indices in splits.items():
        for index in indices:
            try:
                claim_image(owners, source, index, split=split)
            except DataError as error:
                report.refuse(error)
        made = _read_conversations(source, indices, split=split, report=report)
        report.notes.append(f"{split}: {list(owners.values()).count(split)} images, {made}")
    if report.problems:
        return
    for one, other in (pairs := equal_images(folder, owners))[:1]:
        report.notes.append(
            f"{len(pairs)} images are in two splits under two names, such as {one} ({owners[one]}) and {other} "
            f"({owners[other]}), so that results on held-out images are too good; delete one file of each"
        )


def _read_conversations(source: Opened, indices: Sequence[int], *, split: str, report: Report) -> str:
    """Return a summary of the conversations of these records; bad ones are reported."""
    conversations, questions, spans, masks = 0, 0, 0, set()
    for index in tqdm(indices, desc=split, unit=" records", disable=None):
        try:
            for conversation in source.conversations(index, seed=DEFAULT_SEED):
                conversations += 1
                questions += len(conversation.messages) // 2
                spans += len(conversation.masks or [])
                masks |= {(index, mask.label, mask.rle["counts"]) for mask in conversation.masks or []}
        except DataError as error:
            report.refuse(error)
    return f"{conversations} conversations, {questions} questions, {spans} spans of {len(masks)} masks"


def _differences_from_published(source: Source) -> Iterator[str]:
    if isinstance(source, CocoParts) and len(source.categories) != source.category_count:
        yield (
            f"{source.path}: {len(source.categories)} categories, but the published version of {source.name} has "
            f"{source.category_count}; this is another version"
        )
    for what, published in source.published_counts.get(source.split, {}).items():
        if source.counts[what] != published:
            yield (
                f"{source.path}: {source.counts[what]} {what}, but the publishers count {published}; "
                "this is another version or a part of it"
            )


CHECKS: dict[str, Callable[[Path, Report], None]] = {
    "core": _check_core,
    "own_parts": _check_own_parts,
    "descriptor": _check_descriptor,
    **{name: _check_source(kind) for name, kind in SOURCES.items()},
}
"""Name -> function that reads a folder into a report."""
