"""The PARTONOMY data set for `datasets`. Importing this module makes `load_dataset("partonomy", NAME)` work anywhere:

    import partonomy_dataset
    from datasets import load_dataset

    load_dataset("partonomy", "mini")                             # drawings: grounded conversations, for training
    load_dataset("partonomy", "mini_instances")                   # drawings: parts that occur several times
    load_dataset("partonomy", "mini_questions")                   # drawings: benchmark questions
    load_dataset("partonomy", "core", data_dir=FOLDER)            # the official release: benchmark questions
    load_dataset("partonomy", "own_parts", data_dir=FOLDER)       # your photographs: COCO, Labelme, conversations
    load_dataset("partonomy", "descriptor", data_dir=FOLDER)      # the authors' input format: grounded conversations
    load_dataset("partonomy", "pascal_part", data_dir=FOLDER)     # your copy of any of plum_partonomy/sources/
    load_dataset("partonomy", "pascal_part_questions", data_dir=FOLDER, scheme="balanced")    # all ten types

docs/mixtures.md lists the files of each folder; `plum data validate NAME FOLDER` checks a folder. `streaming=True` and
`num_proc` are supported. Records depend neither on the number of processes nor on the order of the records in your
files. `own_parts`, `descriptor`, `pascal_part`, `paco_lvis`, `partimagenet` and `partimagenet_pp` have `_questions`.

Splits are those of the published files. For your own parts or a descriptor, about a tenth of the images, drawn by
path, is validation and a tenth is test. Conversations and questions of one folder have the same splits. `scheme`
selects the wrong choices ("official", the default, or "balanced"; see plum_partonomy/questions/distractors.py), from
statistics over all splits of the folder. The choices of `core` are shuffled, seeded by the id of the record.

A bad record raises `plum_partonomy.records.DataError`, or a DatasetGenerationError with it as its `__cause__`. With
`on_error="report"` bad records are skipped: `left_out(rows)` returns one sentence for each, read from errors.jsonl
beside the prepared data, and a warning and the description in `rows.info` give their number. A stream has no such file
and warns of each record. A truncated file always raises an error, because the lost records are unknown.

Masks of `core` with another size than their image are resized (nearest neighbour), as in the authors' loader.
`masks_resized(rows)` and a warning give their number; `on_error="refuse"` raises an error instead.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import datasets.load
from datasets.data_files import DataFilesDict
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

import chats_plum
import inputs_plum
import plum_partonomy
from plum_partonomy.drawn import miniature
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES, QUESTION_FEATURES
from plum_partonomy.files import write_whole
from plum_partonomy.masks import DataError
from plum_partonomy.questions.conversations import converse, converse_about_instances
from plum_partonomy.questions.maker import SCHEMES, QuestionMaker, make_questions
from plum_partonomy.questions.part_statistics import PartKnowledge
from plum_partonomy.records import QUESTION_TYPES, UNNAMED_OBJECT, GroundedConversation, PartExample, Question, as_row
from plum_partonomy.sources.catalogue import SOURCES
from plum_partonomy.sources.descriptor import DESCRIPTOR_FILE
from plum_partonomy.sources.json_files import stream_records
from plum_partonomy.sources.official import QUESTIONS_FILE, read_questions
from plum_partonomy.sources.own_parts import record_files
from plum_partonomy.sources.problems import ERRORS_FILE, read_problems, write_problems
from plum_partonomy.sources.splits import PART_SOURCES, Opened, open_source, survey, usable
from plum_partonomy.sources.untrusted import OnError, refuse

DATASET_NAME = "partonomy"
MINI_SIZES = {"train": 2400, "validation": 100, "test": 150}
MINI_INSTANCES_SIZES = {"train": 500, "validation": 50, "test": 100}
# the questions are about the first drawings of each split
MINI_QUESTIONS_SIZES = {"train": 200, "validation": 100, "test": 150}
MINI_HARD_SIZES = {"train": 192, "validation": 48, "test": 144}
MINI_HARD_QUESTIONS_SIZES = {"train": 48, "validation": 24, "test": 144}
DRAWING_SIZES = {
    "mini": MINI_SIZES,
    "mini_instances": MINI_INSTANCES_SIZES,
    "mini_questions": MINI_QUESTIONS_SIZES,
    "mini_hard": MINI_HARD_SIZES,
    "mini_hard_questions": MINI_HARD_QUESTIONS_SIZES,
}
SCENES = {scene.name: scene for scene in (miniature.MINI, miniature.HARD)}
EXAMPLES_PER_SHARD = 50
# A streamed mixture has as many shards as its smallest source. With these, 8 processes of 8 workers have one each.
MIN_SHARDS = 64
RESIZED_FILE = "masks_resized.json"
SEED = miniature.DEFAULT_SEED

Shards = list[list[int]]

_logger = datasets.logging.get_logger(__name__)


@dataclass
class PartonomyConfig(datasets.BuilderConfig):
    """
    Options of a configuration.

    Args:
        scheme: Scheme of wrong choices in questions about your files: "official" or "balanced".
        on_error: "refuse" (the default) raises an error on a bad record, "report" skips and lists it. A mask of `core`
            with another size than its image is an error only with "refuse"; otherwise it is resized and counted.
    """

    scheme: str | None = None
    on_error: str | None = None

    @property
    def source(self) -> str:
        return self.name.removesuffix("_questions")

    @property
    def asks(self) -> bool:
        return self.name == "core" or self.name != self.source

    def check(self) -> None:
        """Raise DataError for an option that is unknown or that the configuration does not use."""
        if self.scheme is not None and not (self.asks and self.source in PART_SOURCES):
            raise DataError(f'the config "{self.name}" makes no questions about your files: leave out scheme')
        if self.scheme not in (None, *SCHEMES):
            raise DataError(f"unknown scheme {self.scheme!r}; known are {', '.join(SCHEMES)}")
        if self.on_error not in (None, "refuse", "report"):
            raise DataError(f'on_error is "refuse" or "report", found {self.on_error!r}')


def _config(name: str, description: str) -> PartonomyConfig:
    return PartonomyConfig(name=name, version=datasets.Version("1.0.0"), description=description)


class Partonomy(datasets.GeneratorBasedBuilder):
    """One builder for all sources. `core` and names ending in `_questions` are questions, the others grounded
    conversations, with the features of `plum_partonomy.features`.
    """

    DEFAULT_CONFIG_NAME = "mini"
    BUILDER_CONFIG_CLASS = PartonomyConfig
    BUILDER_CONFIGS = [
        _config("mini", "Drawn objects: grounded conversations for training."),
        _config("mini_instances", "Drawn objects whose parts occur several times, one mask per instance."),
        _config("mini_questions", "Benchmark questions about the drawings of mini."),
        _config("mini_hard", "Harder drawings: 24 objects, two in an image, hidden and rare parts; conversations."),
        _config("mini_hard_questions", "Benchmark questions about the drawings of mini_hard."),
        _config("core", f"The official release; data_dir contains {QUESTIONS_FILE} and images/."),
        _config("own_parts", "Conversations about your own photographs; docs/own_data.md describes data_dir."),
        _config(
            "descriptor", f"Conversations about a raw data set; data_dir contains {DESCRIPTOR_FILE} and its images."
        ),
        *(_config(name, f"Conversations; docs/mixtures.md describes the data_dir of {name}.") for name in SOURCES),
        *(_config(f"{name}_questions", f"Benchmark questions; data_dir as for {name}.") for name in PART_SOURCES),
    ]

    def _info(self) -> datasets.DatasetInfo:
        self.config.check()
        features = QUESTION_FEATURES if self.config.asks else GROUNDED_CONVERSATION_FEATURES
        return datasets.DatasetInfo(description=self.config.description, features=features)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        name = self.config.source
        problems: list[DataError] = []
        skips = self.config.on_error == "report"
        on_error: OnError = problems.append if skips else refuse
        self._streaming = dl_manager.is_streaming
        knowledge = None
        if name == "core":
            members = {"test": None}
            # `datasets` would hide that the folder or its file is missing behind an error of its own
            next(stream_records(self._data_dir() / QUESTIONS_FILE), None)
            if skips and not sum(1 for _ in self._core_questions(on_error, resized=[])):
                raise DataError(f"not one question can be used; the first problem: {problems[0]}")
        elif name in PART_SOURCES:
            found = survey(name, self._data_dir(), seed=SEED, on_error=on_error, read_all=skips)
            members, knowledge = found.members, found.knowledge()
            if self.config.asks and not found.annotated:
                raise DataError(
                    f"{self._data_dir()} holds conversations, but questions are made about masks of parts; train on "
                    f'it with the config "{name}"'
                )
        elif name in SOURCES:
            members = usable(name, self._data_dir(), on_error=on_error, read_all=skips)
        else:
            members = {split: list(range(size)) for split, size in DRAWING_SIZES[self.config.name].items()}
        if problems:
            self._report(problems, streaming=dl_manager.is_streaming)
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={"split": split, "shards": indices and shards_of(indices), "knowledge": knowledge},
            )
            for split, indices in members.items()
        ]

    def _report(self, problems: list[DataError], *, streaming: bool) -> None:
        self.info.description += f" {len(problems)} bad records were skipped."
        if streaming:
            for problem in problems:
                _logger.warning(f"skipped: {problem}")
            return
        # this folder is renamed to the cache folder at the end
        write_problems(Path(self._output_dir, ERRORS_FILE), problems)
        _logger.warning(f"{len(problems)} bad records were skipped: see {Path(self.cache_dir, ERRORS_FILE)}")

    def _generate_examples(
        self, split: str, shards: Shards | None, knowledge: PartKnowledge | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        resized: list[int] = []
        if self.config.source == "core":
            records = self._core_questions(_ignore if self.config.on_error == "report" else refuse, resized=resized)
        elif self.config.source in (*PART_SOURCES, *SOURCES):
            records = self._records_of_files(split, shards, knowledge)
        else:
            records = self._records_of_drawings(split, shards)
        for record in records:
            yield record.id, as_row(record)
        if resized:
            self._note_resized(sum(resized))

    def _core_questions(self, on_error: OnError, *, resized: list[int]) -> Iterator[Question]:
        """Yield the questions of `core`; appends the number of resized masks of each record to `resized`."""
        on_resize = None if self.config.on_error == "refuse" else resized.append
        return read_questions(self._data_dir(), on_error=on_error, on_resize=on_resize)

    def _note_resized(self, count: int) -> None:
        _logger.warning(f"{count} masks differed in size from their image and were resized")
        if not self._streaming:
            write_whole(Path(self._output_dir, RESIZED_FILE), [json.dumps({"masks_resized": count}), "\n"])

    def _records_of_files(
        self, split: str, shards: Shards, knowledge: PartKnowledge | None
    ) -> Iterator[GroundedConversation | Question]:
        source = _opened(self.config.source, self._data_dir(), split, state=self.hash)
        if not self.config.asks:
            for index in _flat(shards):
                yield from source.conversations(index, seed=SEED)
            return
        maker = QuestionMaker(knowledge, scheme=self.config.scheme or SCHEMES[0], seed=SEED)
        for index in _flat(shards):
            example = source.example(index)
            named = example.image_label != UNNAMED_OBJECT
            yield from maker.questions(example, QUESTION_TYPES if named else ("identification",))

    def _records_of_drawings(self, split: str, shards: Shards) -> Iterator[GroundedConversation | Question]:
        for index in _flat(shards):
            if self.config.asks:
                scene = SCENES[self.config.source]
                yield from make_questions(
                    _drawn(self.config.source, split, index),
                    part_graph=miniature.part_graph(scene),
                    instance_graph=miniature.instance_graph(scene),
                    presence=miniature.presence(scene),
                    seed=SEED,
                )
            else:
                yield converse_about_drawing(self.config.name, split, index)

    def as_dataset(self, split: Any = None, in_memory: bool = False) -> datasets.Dataset | datasets.DatasetDict:
        """Return the data set as every builder does. Raises DataError for a split without records, which `datasets`
        cannot load.
        """
        empty = [name for name, info in self.info.splits.items() if not info.num_examples]
        asked = empty if split is None else [name for name in empty if str(split) == name]
        if asked:
            reason = "its records give nothing to ask or to talk about"
            if self.config.scheme == "balanced":
                reason = 'scheme="balanced" finds too few parts that objects may have or lack; "official" needs none'
            others = "".join(f", or load the split {name} alone" for name in self.info.splits if name not in empty)
            raise DataError(
                f'the config "{self.config.name}" makes no record of the split {asked[0]} ({reason}); use a larger '
                f"copy{others}"
            )
        return super().as_dataset(split, in_memory=in_memory)

    def _data_dir(self) -> Path:
        if self.config.data_dir is None:
            raise DataError(
                f'"{self.config.name}" of {DATASET_NAME} reads your files: give their folder as data_dir=FOLDER.'
            )
        return Path(self.config.data_dir).expanduser()


def left_out(rows: datasets.Dataset) -> list[str]:
    """Return one sentence for each record of a loaded split that `on_error="report"` skipped."""
    path = _beside(rows, ERRORS_FILE)
    return [] if path is None else read_problems(path)


def masks_resized(rows: datasets.Dataset) -> int:
    """Return the number of masks of a loaded split that were resized to their image."""
    path = _beside(rows, RESIZED_FILE)
    return 0 if path is None else json.loads(path.read_text())["masks_resized"]


def _beside(rows: datasets.Dataset, name: str) -> Path | None:
    """Return a file beside the prepared data of a split, if it exists."""
    path = Path(rows.cache_files[0]["filename"]).parent / name if rows.cache_files else None
    return path if path is not None and path.is_file() else None


@lru_cache(maxsize=32)
def _opened(name: str, folder: Path, split: str, *, state: str) -> Opened:
    """Return an open split, read once for all its shards; `state` changes with the files.

    Bad records were refused or reported when the splits were made.
    """
    return open_source(name, folder, split=split, on_error=_ignore)


def _ignore(error: DataError) -> None:
    """Ignore an error that was raised or reported before."""


def converse_about_drawing(name: str, split: str, index: int) -> GroundedConversation:
    """Return the conversation about one drawing of a configuration; the index may exceed the stored split."""
    example = _drawn(name, split, index)
    if name == "mini_instances":
        return converse_about_instances(example, seed=SEED)
    return converse(example, part_graph=miniature.part_graph(SCENES[name]), seed=SEED)


def _drawn(name: str, split: str, index: int) -> PartExample:
    if name == "mini_instances":
        example = miniature.draw_instances_example(split, index, seed=SEED)
    else:
        example = miniature.draw_example(split, index, scene=SCENES[name], seed=SEED)
    example.image = miniature.encode_image(example.image)
    return example


def shards_of(indices: list[int]) -> Shards:
    """Return the shards for `num_proc` and streams, of equal size up to one example."""
    count = min(len(indices), max(MIN_SHARDS, math.ceil(len(indices) / EXAMPLES_PER_SHARD)))
    ends = [len(indices) * number // count for number in range(count + 1)] if count else []
    return [indices[start:end] for start, end in itertools.pairwise(ends)]


def _flat(shards: Shards) -> Iterator[int]:
    return (index for shard in shards for index in shard)


_RECORD_PATHS = {QUESTIONS_FILE, DESCRIPTOR_FILE}.union(*(kind.record_paths() for kind in SOURCES.values()))


def _records_state(folder: Path) -> str:
    """Return a text that changes with the name, size or time of any file with records of a source."""
    paths = [folder / name for name in _RECORD_PATHS]
    within = [path for name in paths if name.is_dir() for path in name.iterdir() if path.suffix in (".png", ".json")]
    files = {*paths, *within, *record_files(folder)}
    files = [(str(path), path.stat()) for path in sorted(files) if path.is_file()]
    return repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in files])


class _ModuleFactory(datasets.load.PackagedDatasetModuleFactory):
    """Finds the builder without searching for data files; the cache key depends on the records in data_dir.

    For a packaged module `datasets` globs the whole working directory (or data_dir) and adds the result to the cache
    key: slow in a large folder, an error in an empty one, and a rebuild whenever an unrelated file changes.
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


def source_files() -> list[Path]:
    """Return the code files that determine the records: readers, drawings, questions and what they use."""
    library = Path(plum_partonomy.__file__).parent
    built_of = [library / f"{name}.py" for name in ("records", "features", "masks", "images", "seeding", "files")]
    made_by = [path for room in ("sources", "drawn", "questions") for path in (library / room).rglob("*.py")]
    return sorted([Path(__file__), Path(inputs_plum.__file__), Path(chats_plum.__file__), *built_of, *made_by])


def _source_hash() -> str:
    """Return a hash of the code that determines the records, so that no outdated cache is used."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in source_files())).hexdigest()


_PACKAGED_DATASETS_MODULES[DATASET_NAME] = (__name__, _source_hash())
datasets.load.PackagedDatasetModuleFactory = _ModuleFactory
