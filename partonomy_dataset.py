"""The PARTONOMY data set for `datasets`. Importing this module makes `load_dataset("partonomy", NAME)` work anywhere:

import partonomy_dataset
from datasets import load_dataset

load_dataset("partonomy", "mini")                             # grounded conversations about drawings, for training
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.load
from datasets.data_files import DataFilesDict
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

import partkit
from partkit import synthesis
from partkit.conversations import converse
from partkit.schema import GROUNDED_CONVERSATION_FEATURES, as_row

DATASET_NAME = "partonomy"
MINI_SIZES = {"train": 2400, "validation": 100, "test": 150}
DRAWINGS_PER_SHARD = 50

Rows = Iterator[tuple[str, dict[str, Any]]]
IndexRange = tuple[int, int]


class Partonomy(datasets.GeneratorBasedBuilder):
    """One builder for every source; each config has its own features."""

    VERSION = datasets.Version("1.0.0")
    DEFAULT_CONFIG_NAME = "mini"
    BUILDER_CONFIGS = [
        datasets.BuilderConfig(
            name="mini", version=VERSION, description="Drawn objects: grounded conversations for training."
        ),
    ]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.config.description, features=GROUNDED_CONVERSATION_FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "shards": _shards(size)})
            for split, size in MINI_SIZES.items()
        ]

    def _generate_examples(self, split: str, shards: list[IndexRange]) -> Rows:
        for start, stop in shards:
            for index in range(start, stop):
                example = synthesis.draw_example(split, index)
                example.image = synthesis.encode_image(example.image)
                conversation = converse(example, part_graph=synthesis.part_graph(), seed=synthesis.DEFAULT_SEED)
                yield conversation.id, as_row(conversation)


def _shards(size: int) -> list[IndexRange]:
    """Index ranges, the unit that `num_proc` shares out."""
    return [(start, min(start + DRAWINGS_PER_SHARD, size)) for start in range(0, size, DRAWINGS_PER_SHARD)]


class _ModuleFactory(datasets.load.PackagedDatasetModuleFactory):
    """Finds the builder without searching for data files.

    For a packaged module `datasets` globs the whole working directory (or data_dir) and makes what it finds part of
    the cache key: slow in a large folder, an error in an empty one, and a rebuild whenever an unrelated file changes.
    """

    def get_module(self) -> datasets.load.DatasetModule:
        if self.name != DATASET_NAME:
            return super().get_module()
        module_path, source_hash = _PACKAGED_DATASETS_MODULES[self.name]
        return datasets.load.DatasetModule(
            module_path, source_hash, {"data_files": DataFilesDict(), "dataset_name": self.name}
        )


def _source_hash() -> str:
    """Changes whenever the code that makes the records does, so that no stale cache is served."""
    files = [Path(__file__), *sorted(Path(partkit.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


_PACKAGED_DATASETS_MODULES[DATASET_NAME] = (__name__, _source_hash())
datasets.load.PackagedDatasetModuleFactory = _ModuleFactory
