"""Options of a training run: a yaml recipe, overridden by the command line."""

import argparse
import dataclasses
import json
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from configuration_plum import PlumConfig
from inputs_plum import check_number
from plum_partonomy.command_line import Options, as_options, nearest
from plum_partonomy.inference.checkpoint import with_floats
from plum_partonomy.masks import DataError
from plum_partonomy.training.mixture import Source, parse_source

USAGE = """
Train PLUM on grounded conversations.

    python train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py recipes/plum_tiny.yaml --output_dir runs/gpus
    torchrun --nproc_per_node 2 train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny --use_cpu true

A recipe is a yaml file of the options below and of `transformers.TrainingArguments`; options on the command line
override it. The output folder contains the trained model with its processor, code and card (loadable with `AutoModel`
and `trust_remote_code=True`), `recipe.yaml` (all options of the run, for another run of this script),
`training_curves.csv` and `.png`, and the checkpoints to resume from.
"""

# The published run trains these modules whole, in addition to LoRA on the language model's attention.
LORA_TRAINED_WHOLE = ["lm_head", "embed_tokens", "span_tagger", "span_projector", "mask_feedback", "mask_decoder"]


METRICS = ("strict_macro_giou", "strict_micro_giou", "span_f1", "language_modeling_loss")
"""Metrics of validation during training; all but the last need records with masks."""
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "seed": 0,
}
"""Option of `TrainingArguments` -> its least value."""
FIXED = {
    "batch_eval_metrics": "validation gathers a few counts per record",
    "label_smoothing_factor": "the losses have no label smoothing",
    "prediction_loss_only": "validation computes no total loss",
    "remove_unused_columns": "images are read when a batch is made",
    "use_liger_kernel": "it has no kernels for this model",
}
"""Option of `TrainingArguments` that must keep its default -> the reason."""


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
    The starting model: a checkpoint; pretrained backbones with fresh PLUM modules; or a model from scratch with a
    tokenizer trained on the training texts.
    """

    model: str | None = field(default=None, metadata={"help": "Folder or Hub name of a PLUM checkpoint."})
    vlm: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a vision-language model to start from."}
    )
    sam: str | None = field(default=None, metadata={"help": "Folder or Hub name of a SAM to start from."})
    vlm_image_options: dict | str | None = field(
        default=None,
        metadata={"help": "Changes to the settings of the image processor that comes with vlm, such as its size."},
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "PlumConfig fields of a model from scratch, or changes to those of a checkpoint or backbones."
        },
    )
    tokenizer_vocab_size: int = field(default=800, metadata={"help": "Vocabulary of a tokenizer from scratch."})
    frozen_modules: list[str] = field(
        default_factory=list,
        metadata={"help": "Modules to freeze, such as sam.vision_encoder."},
    )
    frozen_dtype: Literal["bfloat16"] | None = field(
        default=None,
        metadata={"help": "Precision of frozen layers during training; needs bf16. Default: float32."},
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model; 0 trains all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of LoRA."})
    lora_trained_whole: list[str] = field(
        default_factory=lambda: LORA_TRAINED_WHOLE,
        metadata={"help": "Modules trained whole in addition to LoRA, such as vision towers from scratch."},
    )

    def __post_init__(self):
        for name, least in (("tokenizer_vocab_size", 1), ("lora_r", 0), ("lora_alpha", 1)):
            check_number(getattr(self, name), name=name, least=least, whole=True)
        if not 0 <= self.lora_dropout < 1:
            raise DataError(f"lora_dropout must be at least 0 and below 1, found {self.lora_dropout}.")
        if self.model_config is not None:
            self.model_config = with_floats(_parse_mapping(self.model_config, "model_config"), PlumConfig())
        if self.vlm_image_options is not None:
            self.vlm_image_options = _parse_mapping(self.vlm_image_options, "vlm_image_options")
            if self.vlm is None:
                raise DataError("vlm_image_options change the image processor that comes with vlm; give vlm as well.")
        if (self.vlm is None) != (self.sam is None):
            raise DataError(f"Give vlm and sam together, found vlm={self.vlm!r} and sam={self.sam!r}.")
        if self.model is not None and self.vlm is not None:
            raise DataError("Give either model (a checkpoint) or vlm and sam (pretrained backbones), not both.")
        if self.model is None and self.vlm is None and self.model_config is None:
            raise DataError("Give model (a checkpoint), vlm and sam (backbones) or model_config (from scratch).")


@dataclass
class DataArguments:
    """The grounded conversations, and their augmentation."""

    dataset: str = field(default="partonomy", metadata={"help": "Name or folder for load_dataset."})
    name: str = field(default="mini", metadata={"help": "Configuration of the data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the configuration's files."})
    train_split: str = field(default="train", metadata={"help": "Split for training."})
    eval_split: str | None = field(default="validation", metadata={"help": "Split for evaluation during training."})
    mixture: list[str] = field(
        default_factory=lambda: ["{}"],
        metadata={
            "help": "Data sets to mix, each a mapping (JSON on the command line) of its rate and differing options "
            "from the five above; its data_dir is relative to the option data_dir."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training data without preparing it first."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print the data preview, write samples.html to the output folder, and stop."}
    )
    color_jitter: float = field(default=0.0, metadata={"help": "Maximum relative change of each colour channel."})
    random_crop: float = field(
        default=0.0, metadata={"help": "Maximum share of each side of an image that is cut off; below 1."}
    )
    random_affine: float = field(
        default=0.0,
        metadata={"help": "Maximum change of each entry of a linear map that stretches, rotates and shears an image."},
    )
    turns_per_record: int | None = field(
        default=None,
        metadata={
            "help": "Number of random turns of a record, 0 for all, each as a separate conversation, so that no "
            "answer is copied from another. Default: a record is one conversation."
        },
    )
    follow_up_probability: float = field(
        default=0.0,
        metadata={"help": "With turns_per_record: probability that a turn follows another turn of its record."},
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
        metadata={"help": "With fresh_records: flip every second photograph, and exchange left and right in names."},
    )
    teacher_forcing_probability: float = field(
        default=0.0,
        metadata={"help": "Probability of feeding back the true mask of a span instead of the predicted one."},
    )
    prompt_probability: float = field(
        default=0.0,
        metadata={"help": "Probability of decoding the mask of a span again with random clicks or a random box."},
    )
    order_free_targets: bool = field(
        default=False,
        metadata={"help": "Spans of one answer with the same words may take their masks in any order."},
    )
    max_spans: int | None = field(
        default=None, metadata={"help": "Maximum number of supervised masks per record, chosen at random."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens of a conversation, including image tokens; longer ones are cut."},
    )
    cache_image_embeddings: str | None = field(
        default=None, metadata={"help": "Folder that caches the embeddings of a frozen SAM encoder."}
    )
    sources: list[Source] = field(init=False)

    def __post_init__(self):
        for name, least in (("turns_per_record", 0), ("max_spans", 1), ("max_length", 1)):
            if getattr(self, name) is not None:
                check_number(getattr(self, name), name=name, least=least, whole=True)
        check_number(self.color_jitter, name="color_jitter", least=0)
        if not 0 <= self.random_crop < 1:
            raise DataError(f"random_crop must be at least 0 and below 1, found {self.random_crop}.")
        if not 0 <= self.random_affine <= 0.5:
            raise DataError(f"random_affine must be between 0 and 0.5, found {self.random_affine}.")
        for name in ("teacher_forcing_probability", "prompt_probability", "follow_up_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} must be between 0 and 1, found {getattr(self, name)}.")
        if self.follow_up_probability and self.turns_per_record is None:
            raise DataError("follow_up_probability needs turns_per_record: without it all turns follow each other.")
        if self.mirror and not self.fresh_records:
            raise DataError("mirror needs fresh_records: true, which makes new conversations.")
        if self.fresh_records and self.streaming:
            raise DataError("fresh_records makes records by their number, which a stream has not; leave one out.")
        defaults = {name: getattr(self, name) for name in ("dataset", "name", "data_dir", "train_split", "eval_split")}
        entries = [_parse_mapping(entry, "an entry of mixture") for entry in self.mixture]
        if not entries:
            raise DataError("mixture must name at least one data set, found none.")
        self.sources = [parse_source(entry, defaults) for entry in entries]


@dataclass
class PlumTrainingArguments(TrainingArguments):
    output_dir: str = field(metadata={"help": "Folder for the trained model and its checkpoints."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Train into a folder that contains a finished run."}
    )
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Train weight matrices with Muon at this learning rate, the rest with AdamW."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep False: images are read in the collator."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers of the log, such as tensorboard, or none."}
    )
    metric_for_best_model: str = field(
        default="strict_macro_giou",
        metadata={"help": "Metric that selects the best checkpoint."},
    )
    # Rows without images or spans leave parameters unused on some ranks.
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "Needed with text-only rows."})

    def __post_init__(self):
        for name, least in LEAST.items():
            check_number(getattr(self, name), name=name, least=least, whole=isinstance(getattr(self, name), int))
        if self.seed >= 2**32:
            raise DataError(f"seed must be below 2**32, found {self.seed}.")
        if self.max_steps == 0:
            raise DataError("max_steps must be at least 1, or -1 for num_train_epochs, found 0.")
        try:
            super().__post_init__()
        except TypeError as error:  # an unknown field of a mapping, such as accelerator_config
            raise DataError(f"the options cannot be used: {error}.") from error
        self._check_unsupported()
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # which would minimise any metric
            self.lr_scheduler_kwargs = {"mode": "max" if self.greater_is_better else "min"} | (
                self.lr_scheduler_kwargs or {}
            )
        # Each process reads its own part of a stream, because lists of masks cannot be split and sent.
        self.accelerator_config.dispatch_batches = False

    def _check_unsupported(self):
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, reason in FIXED.items():
            if getattr(self, name) != defaults[name]:
                raise DataError(f"{name} must be {defaults[name]}, found {getattr(self, name)}: {reason}.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise DataError(
                f"train_sampling_strategy must be random or sequential, found {self.train_sampling_strategy}: the "
                "length of a conversation is unknown before its images are read."
            )
        if self.metric_for_best_model.removeprefix("eval_") not in METRICS:
            raise DataError(
                f"metric_for_best_model must be one of {', '.join(METRICS)}, found {self.metric_for_best_model!r}."
            )
        if self.muon_learning_rate is not None:
            check_number(self.muon_learning_rate, name="muon_learning_rate", least=0)
            if self.optim != defaults["optim"]:
                raise DataError("muon_learning_rate trains with Muon and AdamW; leave it out, or leave optim out.")
        if self.dataloader_persistent_workers and not self.dataloader_num_workers:
            raise DataError("dataloader_persistent_workers needs workers; set dataloader_num_workers above 0.")
        if self.accelerator_config.dispatch_batches:
            raise DataError("accelerator_config cannot dispatch batches: masks of several sizes cannot be sent.")
        if self.torch_compile:
            modes, backends = torch._inductor.list_mode_options(), torch.compiler.list_backends()
            self._check_choice("torch_compile_mode", [*modes], modes)
            self._check_choice("torch_compile_backend", backends, torch.compiler.list_backends(exclude_tags=()))
        if missing := sorted(set(self.report_to) - set(get_available_reporting_integrations())):
            raise DataError(f"report_to has {missing[0]!r}, which is misspelt or not installed; install its package.")

    def _check_choice(self, name: str, told: list[str], allowed: Container[str]):
        value = getattr(self, name)
        if value is not None and value not in allowed:
            raise DataError(f"{name} must be one of {', '.join(told)}, found {value!r}.")

    def __getstate__(self) -> dict:
        """Return the state for `training_args.bin`, which is saved with checkpoints, without tokens."""
        return {name: None if name.endswith("_token") else value for name, value in self.__dict__.items()}


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PlumTrainingArguments]:
    """
    Return the options of a recipe (yaml, first argument), overridden by the command line.

    Raises:
        SystemExit: An unknown option, or a value of the wrong type; the message names it.
        DataError: Options that exclude each other.
    """
    parser = _make_parser()
    words = _expand_recipe(parser, argv)
    _, left = parser.parse_known_args(words)
    if left:
        parser.error(f"{left[0]!r} belongs to no option; a recipe comes first, and there is at most one")
    try:
        model, data, args = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
        _check_together(model, data, args)
    except ValueError as error:
        parser.error(as_options(str(error), option_names()))
    return model, data, args


def _check_together(model: ModelArguments, data: DataArguments, args: PlumTrainingArguments):
    if model.frozen_dtype is not None and not args.bf16:
        raise DataError("frozen_dtype needs autocast to the same precision; add bf16: true, or leave it out.")
    if model.frozen_dtype is not None and not (model.lora_r or model.frozen_modules):
        raise DataError("frozen_dtype needs frozen layers; set lora_r or frozen_modules, or leave it out.")
    if model.lora_r and args.push_to_hub and args.hub_strategy != "end":
        raise DataError("hub_strategy must be end with LoRA: an adapter must not remain beside the merged weights.")
    if data.streaming and args.max_steps < 1:
        raise DataError("streaming never ends and needs max_steps above 0.")
    if evaluates(args) and not any(source.eval_split for source in data.sources):
        raise DataError("validation needs an eval_split of some entry of mixture; name one, or set eval_strategy=no.")


def evaluates(args: TrainingArguments) -> bool:
    """Return whether a run evaluates during training."""
    return args.eval_strategy != "no" or args.eval_on_start


def read_options(argv: list[str]) -> dict:
    """Return name -> value of the options given in recipe and command line, without defaults."""
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
    """Parser of the options of a training run."""

    def choices_of(self, name: str) -> list[str]:
        return self._option_string_actions[f"--{name}"].choices or []

    def takes_list(self, name: str) -> bool:
        return self._option_string_actions[f"--{name}"].nargs == "*"


def option_names() -> list[str]:
    """Return the names of all options of a training run."""
    return [field.name for part in _make_parser().dataclass_types for field in dataclasses.fields(part) if field.init]


def _make_parser() -> TrainingOptions:
    arguments = [ModelArguments, DataArguments, PlumTrainingArguments]
    kind = argparse.RawDescriptionHelpFormatter
    parser = TrainingOptions(arguments, prog="train.py", description=USAGE, allow_abbrev=False, formatter_class=kind)
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # a list may be empty, as in frozen_modules: []
    return parser


class _RecipeLoader(yaml.SafeLoader):
    """Yaml without repeated names, whose last value would win, and with 1e-4 as a number, as in yaml 1.2."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def _expand_recipe(parser: TrainingOptions, argv: list[str]) -> list[str]:
    """Return the command line with the options of the recipe first, in place of its name."""
    options = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, argv = Path(argv[0]), argv[1:]
        if not recipe.is_file():
            others = [str(path) for path in recipe.parent.glob("*.yaml")]
            parser.error(f"recipe {recipe} does not exist{nearest(str(recipe), others)}")
        try:
            content = yaml.load(recipe.read_bytes(), Loader=_RecipeLoader)
        except yaml.YAMLError as error:
            parser.error(f"recipe {recipe} is not valid yaml: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            parser.error(f"recipe {recipe} must be a yaml mapping of options, found {type(content).__name__}")
        known = {field.name for part in parser.dataclass_types for field in dataclasses.fields(part)}
        for name in sorted(map(str, content.keys() - known)):
            parser.error(f"recipe {recipe} has the unknown option {name!r}{nearest(name, known)}")
        # As command line words, so that values are checked in the same way and later words override.
        for name, value in content.items():
            if value is None:
                parser.error(f"recipe {recipe} gives option {name!r} no value; remove it to use its default")
            if isinstance(value, list) and not parser.takes_list(name):
                parser.error(f"recipe {recipe} gives option {name!r} a list; it takes one value")
            if value is False and "no" in parser.choices_of(name):
                value = "no"  # which yaml reads as false, as in eval_strategy: no
            options += [f"--{name}", *_as_words(value)]
    return options + argv


def _as_words(value) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _as_words(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]
