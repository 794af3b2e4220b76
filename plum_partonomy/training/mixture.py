"""
Several data sets of grounded conversations as one: sources and the rates at which their records come.

    mixture:
      - {name: refcoco, data_dir: refer, rate: 5}
      - {name: reason_seg, data_dir: reason_seg, rate: 1}

A single data set is a mixture of one. Memory-mapped, the order of the records depends on the seed alone, whatever the
number of processes and workers; a stream is read in shards, one process and worker each, and never ends.
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
"""Records of each streamed source among which the next one is drawn."""


@dataclass(frozen=True)
class Source:
    """A data set, what is read of it, and how often its records come, in proportion to the rates of the others."""

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
    An entry of a mixture over the defaults of all entries; its `data_dir` lies in the default one.

    Raises:
        DataError: An unknown field, or a rate that is not a positive number.
    """
    known = [field.name for field in dataclasses.fields(Source)]
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise DataError(f"mixture has an entry with fields {unknown}; those of an entry are {known}.")
    source = Source(**{**defaults, **entry})
    if not isinstance(source.rate, int | float) or isinstance(source.rate, bool) or not source.rate > 0:
        raise DataError(f"mixture has the rate {source.rate!r} for {source}; a rate is a number above 0.")
    if defaults.get("data_dir") and entry.get("data_dir"):
        return dataclasses.replace(source, data_dir=str(Path(defaults["data_dir"], entry["data_dir"])))
    return source


def load_records(source: Source, split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """
    The columns `id`, `image`, `messages` and `masks` of one split.

    Raises:
        DataError: It cannot be loaded, a streamed split holds no records, or a source no conversations.
    """
    records = load_split(source.dataset, source.name, split=split, data_dir=source.data_dir, streaming=streaming)
    if streaming and next(iter(records.take(1)), None) is None:
        raise DataError(f"Split {split!r} of {source} holds no records.")
    missing = sorted(set(COLUMNS) - set(records.column_names or COLUMNS))
    if missing:
        raise DataError(f"{source} has no columns {missing}; training needs grounded conversations.")
    records = records.select_columns(list(COLUMNS))
    features = datasets.Features({name: GROUNDED_CONVERSATION_FEATURES[name] for name in COLUMNS})
    return records if records.features == features else records.cast(features)


def load_eval_records(sources: list[Source], streaming: bool) -> Dataset | None:
    """The evaluated splits of all sources that name one, one after the other; of streams they are kept in memory."""
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
    One data set in which each record is drawn from the parts by their rates, in proportion.

    Memory-mapped, it ends when every record of every part has come once, those of parts that are small for their rate
    several times. Streamed, it goes on for ever, each part shuffled within a buffer.
    """
    if isinstance(parts[0], IterableDataset):
        parts = [part.repeat(None).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER) for part in parts]
    probabilities = [rate / sum(rates) for rate in rates]
    return interleave_datasets(parts, probabilities, seed=seed, stopping_strategy="all_exhausted")
