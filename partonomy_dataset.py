"""The PARTONOMY data set for `datasets`. Importing this module makes `load_dataset("partonomy", NAME)` work anywhere:

    import partonomy_dataset
    from datasets import load_dataset

    load_dataset("partonomy", "mini")                             # drawings: grounded conversations, for training
    load_dataset("partonomy", "mini_instances")                   # drawings: parts that occur several times
    load_dataset("partonomy", "mini_questions")                   # drawings: benchmark questions
    load_dataset("partonomy", "core", data_dir=FOLDER)            # the official release: benchmark questions
    load_dataset("partonomy", "descriptor", data_dir=FOLDER)      # the authors' input format: grounded conversations
    load_dataset("partonomy", "pascal_part", data_dir=FOLDER)     # your copy of any of partkit.sources.catalogue

What a folder must hold stands in docs/mixtures.md; `python -m partkit validate NAME FOLDER` checks it.
`streaming=True` and `num_proc` work as everywhere. A bad record raises `partkit.schema.DataError`, which `datasets` wraps in a
DatasetGenerationError unless it streams; see its `__cause__`.
"""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import datasets.load
from datasets.data_files import DataFilesDict
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

import partkit
from partkit import schema, synthesis
from partkit.conversations import converse, converse_about_instances
from partkit.questions import make_questions
from partkit.seeding import seeded_generator
from partkit.sources.catalogue import SOURCES, Source
from partkit.sources.descriptor import DESCRIPTOR_FILE, Descriptor
from partkit.sources.official import QUESTIONS_FILE, read_questions

DATASET_NAME = "partonomy"
MINI_SIZES = {"train": 2400, "validation": 100, "test": 150}
MINI_INSTANCES_SIZES = {"train": 500, "validation": 50, "test": 100}
# the questions are about the first drawings of each split of mini
MINI_QUESTIONS_SIZES = {"train": 200, "validation": 100, "test": 150}
DRAWING_SIZES = {"mini": MINI_SIZES, "mini_instances": MINI_INSTANCES_SIZES, "mini_questions": MINI_QUESTIONS_SIZES}
EXAMPLES_PER_SHARD = 50
HELD_OUT = 10
"""One in so many images of a descriptor goes to its validation split."""
SEED = synthesis.DEFAULT_SEED

Shards = list[list[int]]


def _config(name: str, description: str) -> datasets.BuilderConfig:
    return datasets.BuilderConfig(name=name, version=datasets.Version("1.0.0"), description=description)


class Partonomy(datasets.GeneratorBasedBuilder):
    """One builder for every source. `mini_questions` and `core` give questions, the others grounded conversations,
    with the features of `partkit.schema`."""

    DEFAULT_CONFIG_NAME = "mini"
    BUILDER_CONFIGS = [
        _config("mini", "Drawn objects: grounded conversations for training."),
        _config("mini_instances", "Drawn objects whose parts occur several times, one mask per instance."),
        _config("mini_questions", "Benchmark questions about the drawings of mini."),
        _config("core", f"The official release; data_dir holds {QUESTIONS_FILE} and images/."),
        _config("descriptor", f"Conversations about a raw data set; data_dir holds {DESCRIPTOR_FILE} and its images."),
        *(_config(name, f"Conversations; docs/mixtures.md says what data_dir holds for {name}.") for name in SOURCES),
    ]

    def _info(self) -> datasets.DatasetInfo:
        asks = self.config.name in ("mini_questions", "core")
        features = schema.QUESTION_FEATURES if asks else schema.GROUNDED_CONVERSATION_FEATURES
        return datasets.DatasetInfo(description=self.config.description, features=features)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        if self.config.name == "core":
            return [datasets.SplitGenerator(name="test", gen_kwargs={"split": "test", "shards": None})]
        if self.config.name == "descriptor":
            indices = _descriptor_splits(Descriptor(self._data_dir()))
        elif self.config.name in SOURCES:
            kind, folder = SOURCES[self.config.name], self._data_dir()
            indices = {split: range(len(kind(folder, split=split))) for split in kind.splits(folder)}
        else:
            indices = {split: range(size) for split, size in DRAWING_SIZES[self.config.name].items()}
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"split": split, "shards": _shards(list(members))})
            for split, members in indices.items()
        ]

    def _generate_examples(self, split: str, shards: Shards | None) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in self._records(split, shards):
            yield record.id, schema.as_row(record)

    def _records(self, split: str, shards: Shards | None) -> Iterator[schema.GroundedConversation | schema.Question]:
        match self.config.name:
            case "mini":
                graph = synthesis.part_graph()
                for index in _flat(shards):
                    yield converse(_drawn(split, index), part_graph=graph, seed=SEED)
            case "mini_instances":
                for index in _flat(shards):
                    yield converse_about_instances(_drawn(split, index, instances=True), seed=SEED)
            case "mini_questions":
                graph, required = synthesis.part_graph(), synthesis.required_parts()
                for index in _flat(shards):
                    yield from make_questions(
                        _drawn(split, index), part_graph=graph, required_parts=required, seed=SEED
                    )
            case "core":
                yield from read_questions(self._data_dir())
            case "descriptor":
                descriptor = Descriptor(self._data_dir())
                for index in _flat(shards):
                    yield converse(descriptor.example(index), part_graph=descriptor.part_graph, seed=SEED)
            case name if name in SOURCES:
                source = _opened(name, self._data_dir(), split, state=self.hash)
                for index in _flat(shards):
                    yield from source.conversations(index, seed=SEED)

    def _data_dir(self) -> Path:
        if self.config.data_dir is None:
            raise schema.DataError(
                f'the config "{self.config.name}" reads your files: call load_dataset("{DATASET_NAME}", '
                f'"{self.config.name}", data_dir=FOLDER)'
            )
        return Path(self.config.data_dir).expanduser()


@lru_cache(maxsize=32)
def _opened(name: str, folder: Path, split: str, *, state: str) -> Source:
    """A split, read once however many shards of it are; `state` changes with the files."""
    return SOURCES[name](folder, split=split)


def _drawn(split: str, index: int, *, instances: bool = False) -> schema.PartExample:
    draw = synthesis.draw_instances_example if instances else synthesis.draw_example
    example = draw(split, index, seed=SEED)
    example.image = synthesis.encode_image(example.image)
    return example


def _descriptor_splits(descriptor: Descriptor) -> dict[str, list[int]]:
    """Indices of the instances per split; those that share an image stay together."""
    image_paths = [descriptor.image_path(index) for index in range(len(descriptor))]
    shuffled = seeded_generator(SEED, "held out").permutation(sorted(set(image_paths))).tolist()
    held_out = set(shuffled[: len(shuffled) // HELD_OUT])
    splits = {"train": [], "validation": []}
    for index, image_path in enumerate(image_paths):
        splits["validation" if image_path in held_out else "train"].append(index)
    return splits


def _shards(indices: list[int]) -> Shards:
    """What `num_proc` shares out."""
    return [indices[start : start + EXAMPLES_PER_SHARD] for start in range(0, len(indices), EXAMPLES_PER_SHARD)]


def _flat(shards: Shards) -> Iterator[int]:
    return (index for shard in shards for index in shard)


_RECORD_PATHS = {QUESTIONS_FILE, DESCRIPTOR_FILE}.union(*(kind.record_paths() for kind in SOURCES.values()))


def _records_state(folder: Path) -> str:
    """Changes whenever a file does that a source would read records from: its name, size or time."""
    paths = [folder / name for name in _RECORD_PATHS]
    within = [path for name in paths if name.is_dir() for path in name.iterdir() if path.suffix in (".png", ".json")]
    files = [(str(path), path.stat()) for path in sorted({*paths, *within}) if path.is_file()]
    return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files])


class _ModuleFactory(datasets.load.PackagedDatasetModuleFactory):
    """Finds the builder without searching for data files; the cache depends on the records that data_dir holds.

    For a packaged module `datasets` globs the whole working directory (or data_dir) and makes what it finds part of
    the cache key: slow in a large folder, an error in an empty one, and a rebuild whenever an unrelated file changes.
    """

    def get_module(self) -> datasets.load.DatasetModule:
        if self.name != DATASET_NAME:
            return super().get_module()
        module_path, source_hash = _PACKAGED_DATASETS_MODULES[self.name]
        if self.data_dir is not None:
            state = _records_state(Path(self.data_dir).expanduser().resolve())
            source_hash = hashlib.sha256((source_hash + state).encode()).hexdigest()
        return datasets.load.DatasetModule(
            module_path, source_hash, {"data_files": DataFilesDict(), "dataset_name": self.name}
        )


def _source_hash() -> str:
    """Changes whenever the code that makes the records does, so that no stale cache is served."""
    files = [Path(__file__), *sorted(Path(partkit.__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


_PACKAGED_DATASETS_MODULES[DATASET_NAME] = (__name__, _source_hash())
datasets.load.PackagedDatasetModuleFactory = _ModuleFactory
