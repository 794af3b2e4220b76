"""
What PLUM takes from pretrained vision-language models as their own code has it, without knowing their family: weights,
processors, logits and image features.

*Features* of images are what a family's `get_image_features` returns and its `forward` accepts as
`mm_encoder_outputs`: an output with `pooler_output`, the embeddings of the image tokens, and further fields, such as
the features that Qwen3-VL adds in deeper layers. A field is one tensor `(..., D)` of all images, a sequence with one
tensor `(n, D)` per image, or a sequence with one such sequence per layer.
"""

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput, is_torchvision_available

# Fields of an image encoder's output that no language model takes.
ENCODER_FIELDS = ("last_hidden_state", "hidden_states", "attentions")


def load_whole(auto_class: type, folder: str, config: PreTrainedConfig, dtype: str | torch.dtype) -> PreTrainedModel:
    """Return a pretrained model. Raises `ValueError` if any of its weights is missing from the checkpoint."""
    model, report = auto_class.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:
        raise ValueError(
            f"{folder} lacks {len(absent)} tensors of a {config.model_type!r} model or holds them in another shape: "
            f"{', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}."
        )
    return model


# -------------------------------------------------------------------- logits


class _GivenOutput(SimpleNamespace):
    """Output of a model of any family: hidden states, and None for all else that a head passes on."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]


class _GivenStates(nn.Module):
    """Takes the place of the model below a head, and returns given hidden states."""

    def __init__(self, hidden_states: torch.Tensor):
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *args, **kwargs) -> _GivenOutput:
        return _GivenOutput(last_hidden_state=self.hidden_states)


def next_token_logits(vlm: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """
    Return the logits `(B, L, vocab_size)` of hidden states `(B, L, D)` as the family's own `forward` computes them:
    with its head and whatever follows, such as the soft cap of Gemma 4.
    """
    head = copy.copy(vlm)  # shares all weights; the model itself is not changed, because threads may share it
    head._modules = {**vlm._modules, "model": _GivenStates(hidden_states)}
    unread = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
    return type(vlm).forward(head, input_ids=unread, return_dict=True).logits


# ------------------------------------------------------------ image features


def split_features(outputs: ModelOutput, counts: list[int]) -> list[ModelOutput] | None:
    """
    Return the features of each image, in the output class of the family, from those of all; None if a field has
    another form. `counts` are the image tokens of each image.

    Raises:
        ValueError: There are more or fewer features than image tokens.
    """
    found = len(rows_of(outputs.pooler_output))
    if found != sum(counts):
        raise ValueError(
            f"Image features and image tokens do not match: {len(counts)} images have {found} features and "
            f"{sum(counts)} image tokens; set the processor's num_image_tokens right."
        )
    fields = {name: _split(value, counts) for name, value in outputs.items() if name not in ENCODER_FIELDS}
    if any(parts is None for parts in fields.values()):
        return None
    return [type(outputs)(**{name: parts[i] for name, parts in fields.items()}) for i in range(len(counts))]


def join_features(features: Sequence[ModelOutput]) -> ModelOutput:
    """Return the features of several images as one output, the reverse of [`split_features`]."""
    return type(features[0])(**{name: _join([image[name] for image in features]) for name in features[0]})


def rows_of(value: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the features `(n, D)` of one or of several tensors `(..., D)`."""
    return torch.cat([part.flatten(0, -2) for part in ([value] if isinstance(value, torch.Tensor) else value)])


def _split(value, counts: list[int]) -> list | None:
    """Return the part of each image in the form of the whole; None for an unknown form."""
    if isinstance(value, torch.Tensor):
        rows = value.flatten(0, -2)
        return list(rows.split(counts)) if len(rows) == sum(counts) else None
    if not isinstance(value, (list, tuple)) or not value:
        return None
    if isinstance(value[0], torch.Tensor):
        rows = rows_of(value)
        return [[part] for part in rows.split(counts)] if len(rows) == sum(counts) else None
    layers = [_split(layer, counts) for layer in value]
    return None if None in layers else [list(of_image) for of_image in zip(*layers, strict=True)]


def _join(parts: list):
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    if isinstance(parts[0][0], torch.Tensor):
        return [tensor for (tensor,) in parts]
    return [_join(list(layer)) for layer in zip(*parts, strict=True)]


# ---------------------------------------------------------------- processors


def image_processor_class(name: str) -> type:
    """
    Return an image processor class of transformers by its name: the one that needs torchvision if that is installed,
    otherwise its counterpart, which transformers would also choose, but with a warning at every start.
    """
    twin = f"{name}Pil"
    use_twin = not is_torchvision_available() and hasattr(transformers, twin)
    return ProcessorMixin.get_possibly_dynamic_module(twin if use_twin else name)


def find_processor_class(name: str | None) -> type[ProcessorMixin]:
    try:
        family = getattr(transformers, name or "", None)
    except ImportError as error:
        raise ValueError(f"{name} needs a library that is not installed: {error.__cause__ or error}") from error
    if not (isinstance(family, type) and issubclass(family, ProcessorMixin)):
        raise ValueError(f"vlm_processor_class is {name!r}, which is not a processor class of transformers.")
    return family


def images_only_processor(name: str, image_processor, tokenizer, options: dict) -> ProcessorMixin:
    """Return transformers' processor `name` without its video and audio parts, which need further libraries."""
    family = find_processor_class(name)

    def check_unless_absent(self, part: str, value):
        return None if value is None else family.check_argument_for_proper_class(self, part, value)

    images_only = type(name, (family,), {"check_argument_for_proper_class": check_unless_absent})
    absent = [part for part in family.get_attributes() if "image_processor" not in part and "tokenizer" not in part]
    parts = {**dict.fromkeys(absent), "image_processor": image_processor, "tokenizer": tokenizer}
    try:
        return images_only(**parts, **options)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be built from an image processor and a tokenizer: {error}") from error
