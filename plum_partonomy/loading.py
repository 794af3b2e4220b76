"""`datasets.load_dataset` with one-sentence errors."""

import ast
import re
from typing import Any

import datasets

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)
from plum_partonomy.command_line import nearest
from plum_partonomy.masks import DataError

UNKNOWN_NAME = re.compile(r"BuilderConfig '(.*)' not found\. Available: (\[.*\])", re.DOTALL)


def load_split(
    dataset: str, name: str | None, *, split: str, **options: Any
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Return one split of a data set; arguments as in `datasets.load_dataset`.

    Raises:
        DataError: The data set, its configuration or split does not exist, or its files cannot be used.
    """
    try:
        return datasets.load_dataset(dataset, name, split=split, **options)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause: BaseException = error
        while not isinstance(cause, DataError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise DataError(f"Cannot load data set {dataset!r}, name {name!r}, split {split!r}: {_say(cause)}") from error


def _say(error: BaseException) -> str:
    unknown = UNKNOWN_NAME.search(str(error))
    if unknown is None:
        return str(error)
    name, known = unknown[1], ast.literal_eval(unknown[2])
    hint = nearest(name, known)
    return f"there is no name {name!r}{hint or '; there are ' + ', '.join(known) + '.'}"
