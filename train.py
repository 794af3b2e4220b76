"""
Trains PLUM on grounded conversations.

    accelerate launch train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny
    torchrun --nproc_per_node 2 train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny --use_cpu true

A recipe is a yaml file of the options below and of `transformers.TrainingArguments`; options on the command line go
over it. The output folder holds the trained model with its processor and code (loadable with `AutoModel` and
`trust_remote_code=True`), `training_curves.csv` and `.png`, and the checkpoints to resume from.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SamImageProcessor,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)
from configuration_plum import PlumConfig
from data_plum import Collator, ConversationDataset
from modeling_plum import PlumForConditionalGeneration
from processing_plum import PlumProcessor, parse_span_tags
from trainer_plum import PlumTrainer, TrainingCurves

# A checkpoint is read by the code of this folder, so nobody is asked whether to trust the copy saved with it.
AutoConfig.register("plum", PlumConfig, exist_ok=True)

# What a model from scratch writes after each grounded phrase if its span_source is "seg_token".
SEG_TOKEN = "[SEG]"

# The published run adapts the language model's attention and trains these modules whole.
LORA_TARGETS = r".*language_model\..*\.(q_proj|v_proj)"
LORA_TRAINED_WHOLE = ["lm_head", "embed_tokens", "span_tagger", "span_projector", "mask_feedback", "mask_decoder"]


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
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except json.JSONDecodeError as error:
                raise ValueError(f"model_config must be a mapping (JSON on the command line): {error}") from error
        if not isinstance(self.model_config, dict | None):
            raise ValueError(f"model_config must be a mapping, found {self.model_config!r}.")
        if (self.vlm is None) != (self.sam is None):
            raise ValueError(f"Give vlm and sam together, found vlm={self.vlm!r} and sam={self.sam!r}.")
        if self.model is not None and self.vlm is not None:
            raise ValueError("Give either model (a checkpoint) or vlm and sam (pretrained backbones), not both.")
        if self.model is None and self.vlm is None and self.model_config is None:
            raise ValueError("Give model (a checkpoint), vlm and sam (backbones) or model_config (from scratch).")


@dataclass
class DataArguments:
    """The grounded conversations, and how an example varies from epoch to epoch."""

    dataset: str = field(default="partonomy", metadata={"help": "Name or folder for load_dataset."})
    name: str = field(default="mini", metadata={"help": "Configuration of the data set."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the configuration's files."})
    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    eval_split: str = field(default="validation", metadata={"help": "Split that is evaluated during training."})
    color_jitter: float = field(default=0.0, metadata={"help": "Largest relative change of each colour channel."})
    turns_per_record: int | None = field(
        default=None,
        metadata={
            "help": "Train on so many random turns of a record, 0 for all, each as a conversation of its own, so that "
            "no answer is copied from another. Default: a record is one conversation."
        },
    )
    max_spans: int | None = field(
        default=None, metadata={"help": "Masks per record that are supervised; a random choice beyond that."}
    )


@dataclass
class PlumTrainingArguments(TrainingArguments):
    muon_learning_rate: float | None = field(
        default=None, metadata={"help": "Train weight matrices with Muon at this rate, the rest with AdamW."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep False: images are read when batched."})
    # Rows without images or spans leave parameters unused, on some ranks and not on others.
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "Needed with text-only rows."})


# ------------------------------------------------------------------------------------------------ options


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PlumTrainingArguments]:
    """
    A recipe (yaml, first argument) and options over it.

    Raises:
        SystemExit: An unknown option, or a value of the wrong type; the message names it.
    """
    arguments = [ModelArguments, DataArguments, PlumTrainingArguments]
    parser = HfArgumentParser(arguments, description=__doc__, allow_abbrev=False)
    options = []
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe, argv = Path(argv[0]), argv[1:]
        if not recipe.is_file():
            parser.error(f"recipe {recipe} does not exist")
        try:
            content = yaml.safe_load(recipe.read_text())
        except yaml.YAMLError as error:
            parser.error(f"recipe {recipe} is not valid yaml: {' '.join(str(error).split())}")
        if not isinstance(content, dict):
            parser.error(f"recipe {recipe} must be a yaml mapping of options, found {type(content).__name__}")
        known = {field.name for part in parser.dataclass_types for field in dataclasses.fields(part)}
        unknown = sorted(set(content) - known)
        if unknown:
            parser.error(f"recipe {recipe} has unknown options {unknown}")
        # As command line words, so that values are checked in the same way and later words win.
        for name, value in content.items():
            if value is None:
                parser.error(f"recipe {recipe} gives option {name!r} no value; leave it out for its default")
            options += [f"--{name}", *_as_words(value)]
    try:
        return parser.parse_args_into_dataclasses(options + argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))


def _as_words(value) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


# ------------------------------------------------------------------------------------------------ model


def load_checkpoint(folder: str, changes: dict | None, **kwargs) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """A PLUM checkpoint and its processor; `changes` are fields of its config to overwrite."""
    config, _ = PlumConfig.get_config_dict(folder)
    if config.get("model_type") != "plum":
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model, expected 'plum'.")
    config = PlumConfig.from_pretrained(folder, **(changes or {}))
    check_config_fields(changes or {}, config)
    model = PlumForConditionalGeneration.from_pretrained(folder, config=config, **kwargs)
    processor = PlumProcessor.from_pretrained(folder)
    if processor.image_token_id != config.vlm_config.image_token_id:
        raise ValueError(
            f"The processor of {folder} has image token id {processor.image_token_id}, the model "
            f"{config.vlm_config.image_token_id}; use the processor that was saved with the model."
        )
    return model, processor


def compose_backbones(vlm: str, sam: str, options: dict) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """Pretrained backbones with fresh modules of PLUM, in float32, and their processor; `options` are its config's."""
    backbones = sorted({"vlm_config", "sam_config"} & set(options))
    if backbones:
        raise ValueError(f"model_config gives {backbones}, which come with vlm and sam; leave them out.")
    check_config_fields(options, PlumConfig())
    model = PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam, dtype=torch.float32, **options)
    return model, PlumProcessor.from_backbones(vlm=vlm, sam=sam)


def build_from_scratch(
    config: dict, vocab_size: int, texts: list[str]
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """A model of random weights that looks through SAM's encoder, and a processor with a tokenizer for `texts`."""
    seg_token = SEG_TOKEN if config.get("span_source") == "seg_token" else None
    tokenizer = train_tokenizer(texts, vocab_size, seg_token)
    if seg_token is not None:
        config = {**config, "seg_token_id": tokenizer.convert_tokens_to_ids(seg_token)}
    given, config = config, PlumConfig(**config)
    check_config_fields(given, config)
    if config.vlm_image_input != "sam_image_embeddings":
        raise ValueError("A model from scratch needs vlm_image_input: sam_image_embeddings in its model_config.")
    text_config = config.vlm_config.text_config
    text_config.vocab_size = len(tokenizer)
    config.vlm_config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    model = PlumForConditionalGeneration(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))

    return model, build_processor(model, tokenizer, seg_token=seg_token)


@torch.no_grad()
def build_processor(
    model: PlumForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, **options
) -> PlumProcessor:
    """The processor of a model that looks through SAM's encoder; `options` are further ones of [`PlumProcessor`]."""
    config = model.config
    side, grid = config.sam_config.vision_config.image_size, config.sam_grid_size
    sam_image_processor = SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    blank = torch.zeros(1, config.sam_config.vision_config.output_channels, grid, grid)
    return PlumProcessor(
        sam_image_processor,
        sam_image_processor,
        tokenizer,
        num_image_tokens=len(torch.cat(list(model.vlm.get_image_features(blank, return_dict=True).pooler_output))),
        vlm_image_input=config.vlm_image_input,
        **options,
    )


def check_span_source(config: PlumConfig, processor: PlumProcessor):
    """`ValueError` if the processor writes span tokens that the model does not read, or the other way round."""
    written = processor.seg_token and processor.tokenizer.convert_tokens_to_ids(processor.seg_token)
    if written != config.seg_token_id:
        raise ValueError(
            f"The model has span_source {config.span_source!r} and seg_token_id {config.seg_token_id}, the processor "
            f"seg_token {processor.seg_token!r} of id {written}; a model keeps the span source it was built with."
        )


def check_config_fields(given: dict, config: PreTrainedConfig, where: str = "model_config"):
    """`ValueError` on a field that `config` does not have: transformers would keep it and never read it."""
    known = {*type(config)().to_dict(), *config.attribute_map}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{where} has fields {unknown}, which {type(config).__name__} does not know.")
    for name, value in given.items():
        if isinstance(getattr(config, name), PreTrainedConfig):
            check_config_fields(value, getattr(config, name), f"{where}.{name}")


def train_tokenizer(texts: list[str], vocab_size: int, seg_token: str | None = None) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer: any text can be written in it, the words of `texts` in few tokens. A `seg_token` comes
    on top of `vocab_size`, so that words are cut up as without it.
    """
    further_tokens = ["<image>"] if seg_token is None else ["<image>", seg_token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(further_tokens) - 1,
        special_tokens=["<pad>", "<s>", "</s>", *further_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=further_tokens,
    )


def freeze(model: PlumForConditionalGeneration, names: list[str]):
    """Leaves modules out of the training; `ValueError` naming one that the model does not have."""
    for name in names:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError as error:
            raise ValueError(f"frozen_modules has {name!r}, which is no module of the model: {error}") from error


def span_token_rows(model: PlumForConditionalGeneration, trained_whole: list[str]) -> dict[str, list[int]] | None:
    """
    The rows of `embed_tokens` and `lm_head` that are trained because a span token is new to the language model, unless
    the matrices are trained whole. None for a model with a span tagger.

    Raises:
        ValueError: The two matrices are one: a row of it cannot be trained in both places.
    """
    if model.config.seg_token_id is None:
        return None
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ValueError(
            "LoRA on a model with a span token needs embeddings of its own for input and output; build it with "
            "tie_word_embeddings: false in its vlm_config."
        )
    names = [name for name in ("embed_tokens", "lm_head") if name not in trained_whole]
    return dict.fromkeys(names, [model.config.seg_token_id]) or None


def add_lora(model: PlumForConditionalGeneration, arguments: ModelArguments) -> nn.Module:
    """LoRA on the language model's attention, the modules of `lora_trained_whole` trained whole."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=LORA_TARGETS,
            modules_to_save=arguments.lora_trained_whole,
            trainable_token_indices=span_token_rows(model, arguments.lora_trained_whole),
        ),
    )


# ------------------------------------------------------------------------------------------------ main


def load_split(arguments: DataArguments, split: str) -> Dataset:
    """Records of one split; `ValueError` if it holds none, or no conversations."""
    records = load_dataset(arguments.dataset, arguments.name, data_dir=arguments.data_dir, split=split)
    if not len(records):
        raise ValueError(f"Split {split!r} of {arguments.dataset}/{arguments.name} holds no records.")
    missing = sorted({"id", "image", "messages", "masks"} - set(records.column_names))
    if missing:
        raise ValueError(
            f"{arguments.dataset}/{arguments.name} has no columns {missing}; training needs grounded conversations."
        )
    return records


def conversation_texts(records: Dataset) -> list[str]:
    """All texts of the records, without span tags."""
    texts = []
    for messages in records["messages"]:
        for message in messages:
            text = message["content"]
            texts.append(" " + (parse_span_tags(text)[0] if message["role"] == "assistant" else text))
    return texts


def find_checkpoint(args: PlumTrainingArguments) -> str | None:
    """The checkpoint to resume from: a given folder, or the last of the output folder for `true`."""
    wanted = args.resume_from_checkpoint or "false"
    if wanted.lower() not in ("true", "false"):
        return wanted
    if wanted.lower() == "false":
        return None
    checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if checkpoint is None:
        raise ValueError(f"resume_from_checkpoint is true but {args.output_dir} holds no checkpoint.")
    return checkpoint


def main(argv: list[str]):
    model_arguments, data_arguments, args = parse_arguments(argv)
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)

    # Data
    train_records = load_split(data_arguments, data_arguments.train_split)
    eval_records = load_split(data_arguments, data_arguments.eval_split)

    # Model
    if model_arguments.model is not None:
        model, processor = load_checkpoint(model_arguments.model, model_arguments.model_config)
    elif model_arguments.vlm is not None:
        model, processor = compose_backbones(
            model_arguments.vlm, model_arguments.sam, model_arguments.model_config or {}
        )
    else:
        texts = conversation_texts(train_records)
        model, processor = build_from_scratch(
            model_arguments.model_config, model_arguments.tokenizer_vocab_size, texts
        )
    check_span_source(model.config, processor)
    freeze(model, model_arguments.frozen_modules)
    if model_arguments.lora_r:
        model = add_lora(model, model_arguments)

    # Training
    trainer = PlumTrainer(
        model=model,
        args=args,
        train_dataset=ConversationDataset(
            train_records,
            seed=args.seed,
            jitter=data_arguments.color_jitter,
            turns_per_record=data_arguments.turns_per_record,
            max_spans=data_arguments.max_spans,
        ),
        eval_dataset=ConversationDataset(
            eval_records, turns_per_record=None if data_arguments.turns_per_record is None else 0
        ),
        data_collator=Collator(processor),
        processing_class=processor,
        callbacks=[TrainingCurves()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    # Output
    if model_arguments.lora_r:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"The trained model, its processor and its curves are in {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
