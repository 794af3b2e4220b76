"""Build the starting model of a training run: a checkpoint, pretrained backbones, or from scratch; and add LoRA."""

import re

import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from backbones_plum import image_processor_class
from chats_plum import parse_span_tags
from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.command_line import nearest
from plum_partonomy.inference.checkpoint import check_config_fields, load_checkpoint, load_processor
from plum_partonomy.masks import DataError
from plum_partonomy.training.options import LORA_TRAINED_WHOLE, ModelArguments
from processing_plum import PlumProcessor

# Token after each grounded phrase for a model from scratch with span_source "seg_token".
SEG_TOKEN = "[SEG]"

# The published run adapts the language model's attention.
LORA_TARGETS = ("q_proj", "v_proj")


def compose_backbones(
    vlm: str, sam: str, options: dict, image_options: dict | None = None
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """Return pretrained backbones with fresh PLUM modules in float32, and their processor.

    `options` are config fields, `image_options` changed settings of the image processor of `vlm`.
    """
    backbones = sorted({"vlm_config", "sam_config"} & set(options))
    if backbones:
        raise DataError(f"model_config gives {backbones}, which come with vlm and sam; leave them out.")
    check_config_fields(options, PlumConfig())
    model = PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam, dtype=torch.float32, **options)
    return model, PlumProcessor.from_backbones(vlm=vlm, sam=sam, vlm_image_options=image_options)


def build_from_scratch(
    config: dict, vocab_size: int, texts: list[str]
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """Return a model with random weights that looks through SAM's encoder, and its processor.

    Its tokenizer is trained on `texts`.
    """
    seg_token = SEG_TOKEN if config.get("span_source") == "seg_token" else None
    tokenizer = train_tokenizer(texts, vocab_size, seg_token)
    if seg_token is not None:
        config = {**config, "seg_token_id": tokenizer.convert_tokens_to_ids(seg_token)}
    given, config = config, PlumConfig(**config)
    check_config_fields(given, config)
    if config.vlm_image_input != "sam_image_embeddings":
        raise DataError("A model from scratch needs vlm_image_input: sam_image_embeddings in its model_config.")
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
    """Return the processor of a model that looks through SAM's encoder; `options` are passed to [`PlumProcessor`]."""
    config = model.config
    side, grid = config.sam_image_size, config.sam_grid_size
    square = {"height": side, "width": side}
    sam_image_processor = image_processor_class("SamImageProcessor")(size={"longest_edge": side}, pad_size=square)
    blank = torch.zeros(1, config.sam_width, grid, grid)
    return PlumProcessor(
        sam_image_processor,
        sam_image_processor,
        tokenizer,
        num_image_tokens=len(torch.cat(list(model.vlm.get_image_features(blank, return_dict=True).pooler_output))),
        vlm_image_input=config.vlm_image_input,
        **options,
    )


def check_span_source(config: PlumConfig, processor: PlumProcessor):
    """Raise `ValueError` if the processor writes span tokens that the model does not read, or the reverse."""
    written = processor.seg_token and processor.tokenizer.convert_tokens_to_ids(processor.seg_token)
    if written != config.seg_token_id:
        raise DataError(
            f"The model has span_source {config.span_source!r} and seg_token_id {config.seg_token_id}, the processor "
            f"seg_token {processor.seg_token!r} of id {written}; a model keeps the span source it was built with."
        )


def train_tokenizer(texts: list[str], vocab_size: int, seg_token: str | None = None) -> PreTrainedTokenizerFast:
    """
    Return a byte-level BPE tokenizer, which encodes any text, and the words of `texts` in few tokens. A `seg_token`
    is added on top of `vocab_size`, so that words are split as without it.
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
    """Freeze modules. Raises `ValueError` that names a module the model does not have."""
    for name in names:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError as error:
            raise DataError(f"frozen_modules has {name!r}, which is not a module of the model: {error}") from error


def store_frozen(model: nn.Module, dtype: torch.dtype):
    """
    Store the frozen linear and convolutional layers of the vision-language model and of SAM's encoder in this
    precision. Autocast to the same precision rounds their weights anyway, so a training step computes the same bit for
    bit. All else, such as norms, position embeddings and the mask branch, is computed in the precision of its weights
    and stays as it is.
    """
    for part in (model.vlm, model.sam.vision_encoder):
        embeddings = {id(module.weight) for module in part.modules() if isinstance(module, nn.Embedding)}
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and id(module.weight) not in embeddings:
                for weight in module.parameters(recurse=False):
                    if not weight.requires_grad:
                        weight.data = weight.data.to(dtype)


def span_token_rows(model: PlumForConditionalGeneration, trained_whole: list[str]) -> dict[str, list[int]] | None:
    """
    Return the rows of `embed_tokens` and `lm_head` to train for a new span token, unless the matrices are trained
    whole; None for a model with a span tagger.

    Raises:
        DataError: The two matrices are tied; the row cannot be trained separately.
    """
    if model.config.seg_token_id is None:
        return None
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise DataError(
            "LoRA on a model with a span token needs separate input and output embeddings; build it with "
            "tie_word_embeddings: false in its vlm_config."
        )
    names = [name for name in ("embed_tokens", "lm_head") if name not in trained_whole]
    return dict.fromkeys(names, [model.config.seg_token_id]) or None


def check_trained_whole(model: PlumForConditionalGeneration, arguments: ModelArguments):
    """Raise `DataError` that names a module of `lora_trained_whole` that is frozen or that the model does not have."""
    modules = [name for name, _ in model.named_modules()]
    for name in arguments.lora_trained_whole:
        found = [module for module in modules if f".{module}".endswith(f".{name}")]
        if not found and name not in LORA_TRAINED_WHOLE:  # a model may lack some of these
            known = {module.rpartition(".")[2] for module in modules}
            raise DataError(
                f"lora_trained_whole has {name!r}, which is not a module of the model{nearest(name, known)}"
            )
        for frozen in arguments.frozen_modules:
            if any(f"{module}.".startswith(f"{frozen}.") or frozen.startswith(f"{module}.") for module in found):
                raise DataError(
                    f"frozen_modules freezes {frozen!r}, but lora_trained_whole trains {name!r}; remove one of them."
                )


def add_lora(model: PlumForConditionalGeneration, arguments: ModelArguments) -> nn.Module:
    """Add LoRA to the language model's attention, with the modules of `lora_trained_whole` trained whole."""
    from peft import LoraConfig, get_peft_model

    if not any(name.endswith(LORA_TARGETS) for name, _ in model.get_decoder().named_modules()):
        raise DataError(
            f"lora_r adapts {' and '.join(LORA_TARGETS)}, which this language model does not have; set lora_r=0."
        )
    check_trained_whole(model, arguments)
    # Families name it language_model or text_model, and their vision towers have projections with the same names.
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
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


def conversation_texts(records: Dataset | IterableDataset) -> list[str]:
    """Return all texts of the records, without span tags. Raises `DataError` for a stream, which has no end."""
    if isinstance(records, IterableDataset):
        raise DataError("A model from scratch learns its tokenizer from all texts first; leave streaming out.")
    texts = []
    for messages in records["messages"]:
        for message in messages:
            text = message["content"]
            texts.append(" " + (parse_span_tags(text)[0] if message["role"] == "assistant" else text))
    return texts


def load_processor_alone(arguments: ModelArguments) -> PlumProcessor | None:
    """Return only the processor, for a data preview; None for a model from scratch, which is built quickly."""
    if arguments.model is not None:
        return load_processor(arguments.model)
    if arguments.vlm is not None:
        image_options = arguments.vlm_image_options
        return PlumProcessor.from_backbones(vlm=arguments.vlm, sam=arguments.sam, vlm_image_options=image_options)
    return None


def load_model(
    arguments: ModelArguments, train_records: Dataset | IterableDataset
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """Return the starting model of the training, before LoRA, and its processor."""
    if arguments.model is not None:
        # a checkpoint saved in bf16 has 8 bits, in which small updates would be lost
        model, processor = load_checkpoint(arguments.model, arguments.model_config, dtype=torch.float32)
    elif arguments.vlm is not None:
        options = (arguments.model_config or {}, arguments.vlm_image_options)
        model, processor = compose_backbones(arguments.vlm, arguments.sam, *options)
    else:
        texts = conversation_texts(train_records)
        model, processor = build_from_scratch(arguments.model_config, arguments.tokenizer_vocab_size, texts)
    check_span_source(model.config, processor)
    model.config.image_statistics = None  # they describe the encoder before training
    freeze(model, arguments.frozen_modules)
    return model, processor
