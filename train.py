"""
Trains PLUM on grounded conversations.

    accelerate launch train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny
    torchrun --nproc_per_node 2 train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny --use_cpu true

A recipe is a yaml file of the options below and of `transformers.TrainingArguments`; options on the command line go
over it. The output folder holds the trained model with its processor, code and card (loadable with `AutoModel` and
`trust_remote_code=True`), `recipe.yaml` (all options of the run, to give to this script again), `training_curves.csv`
and `.png`, and the checkpoints to resume from.
"""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from partkit.masks import DataError
from plumkit.cards import make_model_card, write_recipe
from plumkit.checkpoint import check_config_fields, load_checkpoint, load_processor, with_floats
from plumkit.data import Collator, ConversationDataset, FreshConversationDataset, stream_examples
from plumkit.embedding_cache import EmbeddingCache
from plumkit.fresh import open_fresh
from plumkit.mixture import Source, load_eval_records, load_records, mix, parse_source
from plumkit.resume import describe_run, find_checkpoint
from plumkit.survey import format_table, survey, write_samples
from plumkit.trainer import PlumTrainer, TrainingCurves
from processing_plum import PlumProcessor, image_processor_class, parse_span_tags

# What a model from scratch writes after each grounded phrase if its span_source is "seg_token".
SEG_TOKEN = "[SEG]"

# The published run adapts the language model's attention and trains these modules whole.
LORA_TARGETS = ("q_proj", "v_proj")
LORA_TRAINED_WHOLE = ["lm_head", "embed_tokens", "span_tagger", "span_projector", "mask_feedback", "mask_decoder"]


def _parse_mapping(value: dict | str, name: str) -> dict:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be a mapping (JSON on the command line): {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, found {value!r}.")
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
            raise ValueError(f"random_crop must be at least 0 and below 1, found {self.random_crop}.")
        for name in ("teacher_forcing_probability", "follow_up_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)}.")
        if self.follow_up_probability and self.turns_per_record is None:
            raise ValueError("follow_up_probability needs turns_per_record: without it all turns follow each other.")
        if self.mirror and not self.fresh_records:
            raise ValueError("mirror needs fresh_records: true, which words its conversations anew.")
        if self.fresh_records and self.streaming:
            raise ValueError("fresh_records makes records by their number, which a stream has not; leave one out.")
        defaults = {name: getattr(self, name) for name in ("dataset", "name", "data_dir", "train_split", "eval_split")}
        entries = [_parse_mapping(entry, "an entry of mixture") for entry in self.mixture]
        self.sources = [parse_source(entry, defaults) for entry in entries]


@dataclass
class PlumTrainingArguments(TrainingArguments):
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


# ------------------------------------------------------------------------------------------------ options


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, PlumTrainingArguments]:
    """
    A recipe (yaml, first argument) and options over it.

    Raises:
        SystemExit: An unknown option, or a value of the wrong type; the message names it.
    """
    parser = _make_parser()
    words = _expand_recipe(parser, argv)
    parser.parse_args(words)  # an unknown option is named before the one is missed that it was meant for
    try:
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))


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


def _make_parser() -> HfArgumentParser:
    arguments = [ModelArguments, DataArguments, PlumTrainingArguments]
    return HfArgumentParser(arguments, description=__doc__, allow_abbrev=False)


def _expand_recipe(parser: HfArgumentParser, argv: list[str]) -> list[str]:
    """The words of a command line, with those of the recipe before them in place of its name."""
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
    return options + argv


def _as_words(value) -> list[str]:
    if isinstance(value, list):
        return [word for item in value for word in _as_words(item)]
    return [json.dumps(value) if isinstance(value, dict) else str(value)]


# ------------------------------------------------------------------------------------------------ model


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
    square = {"height": side, "width": side}
    sam_image_processor = image_processor_class("SamImageProcessor")(size={"longest_edge": side}, pad_size=square)
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

    # Families call it language_model or text_model, and their vision towers have projections of the same names.
    decoder = next(name for name, module in model.named_modules() if module is model.vlm.get_decoder())
    return get_peft_model(
        model,
        LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=rf"{re.escape(decoder)}\..*\.({'|'.join(LORA_TARGETS)})",
            modules_to_save=arguments.lora_trained_whole,
            trainable_token_indices=span_token_rows(model, arguments.lora_trained_whole),
        ),
    )


def open_embedding_cache(model: nn.Module, arguments: DataArguments) -> EmbeddingCache | None:
    """The cache that the options ask for; `ValueError` if the embedding of an image changes during the training."""
    if arguments.cache_image_embeddings is None:
        return None
    if any(parameter.requires_grad for parameter in model.sam.vision_encoder.parameters()):
        raise ValueError(
            "cache_image_embeddings needs an image encoder that is not trained; add sam.vision_encoder to "
            "frozen_modules, or leave it out of lora_trained_whole."
        )
    if arguments.color_jitter or arguments.random_crop:
        raise ValueError(
            "cache_image_embeddings needs images that stay the same; set color_jitter and random_crop to 0, found "
            f"{arguments.color_jitter} and {arguments.random_crop}."
        )
    return EmbeddingCache(arguments.cache_image_embeddings, model)


# ------------------------------------------------------------------------------------------------ main


def conversation_texts(records: Dataset | IterableDataset) -> list[str]:
    """All texts of the records, without span tags; `ValueError` of a stream, which has no end."""
    if isinstance(records, IterableDataset):
        raise ValueError("A model from scratch learns its tokenizer from all texts first; leave streaming out.")
    texts = []
    for messages in records["messages"]:
        for message in messages:
            text = message["content"]
            texts.append(" " + (parse_span_tags(text)[0] if message["role"] == "assistant" else text))
    return texts


def load_processor_alone(arguments: ModelArguments) -> PlumProcessor | None:
    """The processor alone, which a look at the data needs; None of a model from scratch, which is quickly built."""
    if arguments.model is not None:
        return load_processor(arguments.model)
    if arguments.vlm is not None:
        return PlumProcessor.from_backbones(vlm=arguments.vlm, sam=arguments.sam)
    return None


def load_model(
    arguments: ModelArguments, train_records: Dataset | IterableDataset
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """The model as the training starts from it, before LoRA, and its processor."""
    if arguments.model is not None:
        # small updates would be lost in the 8 bits of a checkpoint saved in bf16
        model, processor = load_checkpoint(arguments.model, arguments.model_config, dtype=torch.float32)
    elif arguments.vlm is not None:
        model, processor = compose_backbones(arguments.vlm, arguments.sam, arguments.model_config or {})
    else:
        texts = conversation_texts(train_records)
        model, processor = build_from_scratch(arguments.model_config, arguments.tokenizer_vocab_size, texts)
    check_span_source(model.config, processor)
    model.config.image_statistics = None  # those of the encoder as it was
    freeze(model, arguments.frozen_modules)
    return model, processor


def main(argv: list[str]):
    model_arguments, data_arguments, args = parse_arguments(argv)
    set_seed(args.seed)

    # Data
    sources, streaming = data_arguments.sources, data_arguments.streaming
    parts = [load_records(source, source.train_split, streaming) for source in sources]
    run = describe_run(model_arguments, data_arguments, args, parts)
    checkpoint = find_checkpoint(args, run)
    train_records = mix(parts, [source.rate for source in sources], args.seed)
    turns_per_record, max_length = data_arguments.turns_per_record, data_arguments.max_length
    example_options = {
        "seed": args.seed,
        "jitter": data_arguments.color_jitter,
        "crop": data_arguments.random_crop,
        "turns_per_record": turns_per_record,
        "follow_up_probability": data_arguments.follow_up_probability,
        "max_spans": data_arguments.max_spans,
        "teacher_forcing_probability": data_arguments.teacher_forcing_probability,
    }
    if streaming:
        train_dataset = stream_examples(train_records, **example_options)
    elif data_arguments.fresh_records:
        places = [
            Dataset.from_dict({"part": [i] * len(part), "row": range(len(part))}) for i, part in enumerate(parts)
        ]
        train_dataset = FreshConversationDataset(
            mix(places, [source.rate for source in sources], args.seed),
            [
                open_fresh(source, part, mirror=data_arguments.mirror)
                for source, part in zip(sources, parts, strict=True)
            ],
            **example_options,
        )
    else:
        train_dataset = ConversationDataset(train_records, **example_options)
    eval_dataset = load_eval_records(sources, streaming)
    if eval_dataset is not None:
        eval_dataset = ConversationDataset(eval_dataset, turns_per_record=None if turns_per_record is None else 0)

    # Model
    model, processor = None, load_processor_alone(model_arguments) if data_arguments.dry_run else None
    if processor is None:
        model, processor = load_model(model_arguments, train_records)
    if args.process_index == 0:
        rows = survey(sources, parts, processor, max_length=max_length, turns_per_record=turns_per_record)
        print(format_table(rows), flush=True)
        if data_arguments.dry_run:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_samples(Path(args.output_dir, "samples.html"), rows, train_dataset, seed=args.seed)
    if data_arguments.dry_run:
        return
    if model_arguments.lora_r:
        model = add_lora(model, model_arguments)

    # Training
    embedding_cache = open_embedding_cache(model, data_arguments)
    trainer = PlumTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(processor, max_length, order_free_targets=data_arguments.order_free_targets),
        processing_class=processor,
        callbacks=[TrainingCurves()],
        embedding_cache=embedding_cache,
        run=run,
    )
    if embedding_cache is not None and trainer.is_world_process_zero():
        images = None if streaming else len(train_dataset) + len(eval_dataset or [])
        print(embedding_cache.describe(images))
    trainer.train(resume_from_checkpoint=checkpoint)

    # Output
    if model_arguments.lora_r:
        trainer.merge_adapter()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_recipe(Path(args.output_dir), read_options(argv))
        make_model_card(Path(args.output_dir)).save(Path(args.output_dir, "README.md"))
        print(f"The trained model, its processor and its curves are in {args.output_dir}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"train.py: {error}")
