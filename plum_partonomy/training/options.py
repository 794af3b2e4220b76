"""Options of a training run: a yaml recipe, and the command line over it."""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from configuration_plum import PlumConfig
from plum_partonomy.command_line import Options, as_options, nearest
from plum_partonomy.inference.checkpoint import with_floats
from plum_partonomy.masks import DataError
from plum_partonomy.training.mixture import Source, parse_source

USAGE = """
Trains PLUM on grounded conversations.

    python train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py recipes/plum_tiny.yaml --output_dir runs/gpus
    torchrun --nproc_per_node 2 train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny --use_cpu true

A recipe is a yaml file of the options below and of `transformers.TrainingArguments`; options on the command line go
over it. The output folder holds the trained model with its processor, code and card (loadable with `AutoModel` and
`trust_remote_code=True`), `recipe.yaml` (all options of the run, to give to this script again), `training_curves.csv`
and `.png`, and the checkpoints to resume from.
"""

# The published run trains these modules whole, beside LoRA on the language model's attention.
LORA_TRAINED_WHOLE = ["lm_head", "embed_tokens", "span_tagger", "span_projector", "mask_feedback", "mask_decoder"]


def _parse_mapping(value: dict | str, name: str) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{name} must be a mapping (JSON on the command line): {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} must be a mapping, found {value!r}.")
    return value


@dataclass
class ModelArguments:
    """
    What is trained: a checkpoint; pretrained backbones with fresh modules of PLUM around them; or a model from scratch
    with a tokenizer learned from the training texts.
    """

    model: str | None = field(default=None, metadata={"help": "Folder or Hub name of a PLUM checkpoint."})
    vlm: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a vision-language model to start from."}
    )
    sam: str | None = field(default=None, metadata={"help": "Folder or Hub name of a SAM to start from."})
    model_config: dict | str | None = field(
        default=None,
        metadata={"help": "PlumConfig of a model from scratch, or changes to that of a checkpoint or of backbones."},
    )
    tokenizer_vocab_size: int = field(default=800, metadata={"help": "Vocabulary of a tokenizer from scratch."})
    frozen_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Modules whose weights are left as they are, such as sam.vision_encoder."},
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    lora_trained_whole: list[str] = field(
        default_factory=lambda: LORA_TRAINED_WHOLE,
        metadata={"help": "Modules trained whole beside LoRA, such as vision towers that start from nothing."},
    )

    def __post_init__(self):
        if self.model_config is not None:
            self.model_config = with_floats(_parse_mapping(self.model_config, "model_config"), PlumConfig())
        if (self.vlm is None) != (self.sam is None):
            raise DataError(f"Give vlm and sam together, found vlm={self.vlm!r} and sam={self.sam!r}.")
        if self.model is not None and self.vlm is not None:
            raise DataError("Give either model (a checkpoint) or vlm and sam (pretrained backbones), not both.")
        if self.model is None and self.vlm is None and self.model_config is None:
            raise DataError("Give model (a checkpoint), vlm and sam (backbones) or model_config (from scratch).")


@dataclass
class DataArguments:
    """The grounded conversations, and how an example varies from epoch to epoch."""

    dataset: str = field(default="partonomy", metadata={"help": "Name or folder for load_dataset."})
    name: str = field(default="mini", metadata={"help": "Configuration of the data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the configuration's files."})
    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    eval_split: str | None = field(default="validation", metadata={"help": "Split that is evaluated during training."})
    mixture: list[str] = field(
        default_factory=lambda: ["{}"],
        metadata={
            "help": "Data sets to mix, each a mapping (JSON on the command line) of its rate and of whatever differs "
            "from the five options above; its data_dir lies in theirs."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training data without preparing it first."})
    dry_run: bool = field(
        default=False, metadata={"help": "Survey the data, write samples.html to the output folder, and stop."}
    )
    color_jitter: float = field(default=0.0, metadata={"help": "Largest relative change of each colour channel."})
    random_crop: float = field(
        default=0.0, metadata={"help": "Largest share of each side of an image that is cut off; below 1."}
    )
    random_affine: float = field(
        default=0.0,
        metadata={"help": "Largest change of each number of a linear map that stretches, turns and shears an image."},
    )
    turns_per_record: int | None = field(
        default=None,
        metadata={
            "help": "Train on so many random turns of a record, 0 for all, each as a conversation of its own, so that "
            "no answer is copied from another. Default: a record is one conversation."
        },
    )
    follow_up_probability: float = field(
        default=0.0,
        metadata={"help": "With turns_per_record: how often a turn comes second, after another turn of its record."},
    )
    fresh_records: bool = field(
        default=False,
        metadata={
            "help": "Instead of the stored records, train on new drawings of mini and mini_instances, and on new "
            "conversations about photographs with part masks, in every epoch."
        },
    )
    mirror: bool = field(
        default=False,
        metadata={"help": "With fresh_records: turn every second photograph over, left and right exchanged in names."},
    )
    teacher_forcing_probability: float = field(
        default=0.0,
        metadata={"help": "How often the true mask of a span is fed back to the later spans, instead of the model's."},
    )
    order_free_targets: bool = field(
        default=False,
        metadata={"help": "Spans of one answer with the same words may take their masks in any order."},
    )
    max_spans: int | None = field(
        default=None, metadata={"help": "Masks per record that are supervised; a random choice beyond that."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a conversation, those of its image among them; it is cut there."},
    )
    cache_image_embeddings: str | None = field(
        default=None, metadata={"help": "Folder that keeps what a frozen SAM encoder makes of each image."}
    )
    sources: list[Source] = field(init=False)

    def __post_init__(self):
        if not 0 <= self.random_crop < 1:
            raise DataError(f"random_crop must be at least 0 and below 1, found {self.random_crop}.")
        if not 0 <= self.random_affine <= 0.5:
            raise DataError(f"random_affine must be between 0 and 0.5, found {self.random_affine}.")
        for name in ("teacher_forcing_probability", "follow_up_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} must be between 0 and 1, found {getattr(self, name)}.")
        if self.follow_up_probability and self.turns_per_record is None:
            raise DataError("follow_up_probability needs turns_per_record: without it all turns follow each other.")
        if self.mirror and not self.fresh_records:
            raise DataError("mirror needs fresh_records: true, which words its conversations anew.")
        if self.fresh_records and self.streaming:
            raise DataError("fresh_records makes records by their number, which a stream has not; leave one out.")
        defaults = {name: getattr(self, name) for name in ("dataset", "name", "data_dir", "train_split", "eval_split")}
        entries = [_parse_mapping(entry, "an entry of mixture") for entry in self.mixture]
        self.sources = [parse_source(entry, defaults) for entry in entries]


@dataclass
class PlumTrainingArguments(TrainingArguments):
    output_dir: str = field(metadata={"help": "Folder for the trained model and its checkpoints."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into a folder that holds a finished run."}
    )
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Train weight matrices with Muon at this rate, the rest with AdamW."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: images are read when batched."})
    metric_for_best_model: str = field(
        default="strict_macro_giou",
        metadata={"help": "What the best checkpoint is best by; a figure of the evaluation."},
    )
    # Rows without images or spans leave parameters unused, on some ranks and not on others.
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "Needed with text-only rows."})

    def __post_init__(self):
        super().__post_init__()
        # Each process reads its own part of a stream: a batch holds lists of masks, which are not cut up and sent.
        self.accelerator_config.dispatch_batches = False

    def __getstate__(self) -> dict:
        """What is pickled into `training_args.bin`, which travels with checkpoints: no token."""
        return {name: None if name.endswith("_token") else value for name, value in self.__dict__.items()}


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PlumTrainingArguments]:
    """
    A recipe (yaml, first argument) and options over it.

    Raises:
        SystemExit: An unknown option, or a value of the wrong type; the message names it.
    """
    parser = _make_parser()
    words = _expand_recipe(parser, argv)
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        parser.error(as_options(str(error), option_names()))


def read_options(argv: list[str]) -> dict:
    """What a command line that [`parse_arguments`] accepts gives, its recipe included, by name; no defaults."""
    parser = _make_parser()
    words = _expand_recipe(parser, argv)
    values = vars(parser.parse_args(words))
    given = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    names = dict.fromkeys(name if name in values else name.removeprefix("no_") for name in given)
    return {name: _from_words(values[name]) for name in names}


def _from_words(value):
    if isinstance(value, list):
        return [_from_words(item) for item in value]
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


class TrainingOptions(Options, HfArgumentParser):
    """Parser of a training run's options."""


def option_names() -> list[str]:
    """Names of all options of a training run."""
    return [field.name for part in _make_parser().dataclass_types for field in dataclasses.fields(part) if field.init]


def _make_parser() -> TrainingOptions:
    arguments = [ModelArguments, DataArguments, PlumTrainingArguments]
    kind = argparse.RawDescriptionHelpFormatter
    return TrainingOptions(arguments, prog="train.py", description=USAGE, allow_abbrev=False, formatter_class=kind)


def _expand_recipe(parser: TrainingOptions, argv: list[str]) -> list[str]:
    """The words of a command line, with those of the recipe before them in place of its name."""
    options = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, argv = Path(argv[0]), argv[1:]
        if not recipe.is_file():
            others = [str(path) for path in recipe.parent.glob("*.yaml")]
            parser.error(f"recipe {recipe} does not exist{nearest(str(recipe), others)}")
        try:
            content = yaml.safe_load(recipe.read_text())
        except yaml.YAMLError as error:
            parser.error(f"recipe {recipe} is not valid yaml: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            parser.error(f"recipe {recipe} must be a yaml mapping of options, found {type(content).__name__}")
        known = {field.name for part in parser.dataclass_types for field in dataclasses.fields(part)}
        for name in sorted(set(content) - known):
            parser.error(f"recipe {recipe} has the unknown option {name!r}{nearest(name, known)}")
        # As command line words, so that values are checked in the same way and later words win.
        for name, value in content.items():
            if value is None:
                parser.error(f"recipe {recipe} gives option {name!r} no value; leave it out for its default")
            options += [f"--{name}", *_as_words(value)]
    return options + argv


def _as_words(value) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _as_words(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
