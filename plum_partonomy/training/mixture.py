"""
Mix several data sets of grounded conversations by sampling rates.

    mixture:
      - {name: refcoco, data_dir: refer, rate: 5}
      - {name: reason_seg, data_dir: reason_seg, rate: 1}

A single data set is a mixture of one. In a memory-mapped mixture, the order of the records depends only on the seed,
for any number of processes and workers. A stream is read in shards, one process and worker each, and never ends.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.loading import load_split
from plum_partonomy.records import DataError

COLUMNS = ("id", "image", "messages", "masks")
SHUFFLE_BUFFER = 500
"""Size of the shuffle buffer of each streamed source, in records."""


@dataclass(frozen=True)
class Source:
    """A data set, its splits, and its sampling rate relative to the others."""

    dataset: str
    name: str | None = None
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    rate: float = 1.0

    def __str__(self) -> str:
        return " ".join(part for part in (self.dataset, self.name, self.data_dir) if part)


def parse_source(entry: dict, defaults: dict) -> Source:
    """
    Return an entry of a mixture with the defaults of all entries; its `data_dir` is relative to the default one.

    Raises:
        DataError: An unknown field, or a rate that is not a positive number.
    """
    known = [field.name for field in dataclasses.fields(Source)]
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise DataError(f"mixture has an entry with fields {unknown}; known are {known}.")
    source = Source(**{**defaults, **entry})
    if not isinstance(source.rate, int | float) or isinstance(source.rate, bool) or not source.rate > 0:
        raise DataError(f"mixture has the rate {source.rate!r} for {source}; a rate is a number above 0.")
    if defaults.get("data_dir") and entry.get("data_dir"):
        return dataclasses.replace(source, data_dir=str(Path(defaults["data_dir"], entry["data_dir"])))
    return source


def load_records(source: Source, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """
    Return the columns `id`, `image`, `messages` and `masks` of one split.

    Raises:
        DataError: It cannot be loaded, a streamed split has no records, or a source has no conversations.
    """
    records = load_split(source.dataset, source.name, split=split, data_dir=source.data_dir, streaming=streaming)
    if streaming and next(iter(records.take(1)), None) is None:
        raise DataError(f"Split {split!r} of {source} has no records.")
    missing = sorted(set(COLUMNS) - set(records.column_names or COLUMNS))
    if missing:
        raise DataError(f"{source} has no columns {missing}; training needs grounded conversations.")
    records = records.select_columns(list(COLUMNS))
    features = datasets.Features({name: GROUNDED_CONVERSATION_FEATURES[name] for name in COLUMNS})
    return records if records.features == features else records.cast(features)


def load_eval_records(sources: list[Source], streaming: bool) -> Dataset | None:
    """Return the evaluation splits of all sources, one after the other; those of streams are kept in memory."""
    parts = []
    for source in sources:
        if source.eval_split is not None:
            records = load_records(source, source.eval_split, streaming)
            if streaming:
                encoded = records.cast_column("image", datasets.Image(decode=False))
                records = Dataset.from_list(list(encoded), features=records.features)
            parts.append(records)
    return concatenate_datasets(parts) if parts else None


def mix(parts: list[Dataset] | list[IterableDataset], rates: list[float], seed: int) -> Dataset | IterableDataset:
    """
    Return one data set in which the parts are sampled by their relative rates.

    A memory-mapped mixture ends when every record of every part has been seen once, and repeats parts that are small
    for their rate. A streamed mixture never ends; each part is shuffled within a buffer.
    """
    if isinstance(parts[0], IterableDataset):
        parts = [part.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for part in parts]
    probabilities = [rate / sum(rates) for rate in rates]
    return interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")
