"""
What PLUM takes from its pretrained backbones as their own code has it, without knowing their family: weights,
processors, logits, image features; and the images of a call, which it encodes with both.

*Features* of images are what a family's `get_image_features` returns and its `forward` accepts as
`mm_encoder_outputs`: an output with `pooler_output`, the embeddings of the image tokens, and further fields, such as
the features that Qwen3-VL adds in deeper layers. A field is one tensor `(..., D)` of all images, a sequence with one
tensor `(n, D)` per image, or a sequence with one such sequence per layer.

Shapes. B rows, L tokens, S spans of the whole batch, N images, D language width, C SAM width, E channels of an image
embedding (C for SAM itself), G grid side.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput, is_torchvision_available

# Image inputs from the processor, or features computed from them.
IMAGE_INPUTS = ("pixel_values", "sam_pixel_values", "sam_image_embeddings", "sam_image_index", "vlm_image_features")
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


# ---------------------------------------------------------- images of a call


@dataclass
class PlumImages:
    """
    The images of a batch as inputs of the vision-language model and of SAM.

    Args:
        vlm_inputs: Image inputs of the vision-language model.
        sam_embeddings: `(N, E, G, G)`, or None without images.
        index: `(B,)` image of each row, -1 for none.
        original_sizes, reshaped_sizes: `(N, 2)` (height, width) in pixels as given, and as resized for SAM.
        sam_pixels: `(N, 3, image_size, image_size)` for SAM, if given.
    """

    vlm_inputs: dict[str, torch.Tensor]
    sam_embeddings: torch.Tensor | None
    index: torch.LongTensor
    original_sizes: torch.LongTensor | None
    reshaped_sizes: torch.LongTensor | None
    sam_pixels: torch.Tensor | None = None

    def sizes_of(self, spans: torch.LongTensor) -> torch.LongTensor | None:
        """Return `(S, 4)`: original and reshaped size of the image of each span `[row, start, end)`, if known."""
        if self.original_sizes is None or self.reshaped_sizes is None:
            return None
        return torch.cat([self.original_sizes, self.reshaped_sizes], dim=1)[self.index[spans[:, 0]]]


class PlumVision:
    """The part of [`PlumForConditionalGeneration`] that encodes images for its language model and for SAM."""

    def get_image_embeddings(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Return SAM's embeddings `(N, E, G, G)` of pixels `(N, 3, image_size, image_size)`. The first C channels are the
        grid that prompts attend to.
        """
        return self.segmenter.encode(self.sam, sam_pixel_values.to(self.sam.vision_encoder.dtype))

    def get_vlm_image_features(
        self, image_tokens: list[dict[str, list[int]]], **image_inputs
    ) -> list[ModelOutput] | None:
        """
        Return the features of images in the vision-language model, to be passed as `vlm_image_features` for every
        question about them.

        Args:
            image_tokens: `tokens` of each [`PreparedImage`], whose `input_ids` have the image's placeholders.
            image_inputs: `sam_image_embeddings` if the model looks through SAM, else the image inputs of the
                vision-language model.

        Returns:
            Features of each image (see `backbones_plum.py`); `None` for a family that does not accept them.
        """
        if self.config.vlm_image_input == "sam_image_embeddings":
            grid = image_inputs["sam_image_embeddings"][:, : self.config.sam_width].to(self.vlm.dtype)
            outputs = self.vlm.model.get_image_features(grid, return_dict=True)
        else:
            if "mm_encoder_outputs" not in inspect.signature(self.vlm.model.forward).parameters:
                return None
            image_inputs["pixel_values"] = image_inputs["pixel_values"].to(self.vlm.dtype)
            outputs = self.vlm.model.get_image_features(**image_inputs, return_dict=True)
        placeholder = self.config.vlm_config.image_token_id
        return split_features(outputs, [tokens["input_ids"].count(placeholder) for tokens in image_tokens])

    def rate_images(self, sam_image_embeddings: torch.Tensor) -> torch.Tensor | None:
        """
        Return the probability `(N,)` that an image is of a kind in the training data, from embeddings `(N, E, G, G)`;
        None for a model without `config.image_statistics`.

        The distance of an image from a kind is the mean over channels of its squared deviation from the kind's mean
        embedding, in standard deviations; its probability is a logistic function of the smallest distance's logarithm.
        """
        known = self.config.image_statistics
        if known is None:
            return None
        pooled = sam_image_embeddings[:, : self.config.sam_width].float().mean(dim=(2, 3))  # (N, C)
        mean, std = (torch.tensor(known[name], device=pooled.device) for name in ("mean", "std"))  # (kinds, C)
        distance = ((pooled[:, None] - mean) / std).square().mean(dim=2).amin(dim=1)
        return torch.sigmoid(known["intercept"] - known["slope"] * distance.log())

    def _take_images(self, input_ids, inputs: dict) -> tuple[PlumImages, dict]:
        """Return the images among the inputs of a call, and the other inputs."""
        inputs = {name: value for name, value in inputs.items() if value is not None}
        pixels, sam_pixels, embeddings, index, features = (inputs.pop(name, None) for name in IMAGE_INPUTS)
        if embeddings is None and sam_pixels is not None and len(sam_pixels):
            embeddings = self.get_image_embeddings(sam_pixels)
        if embeddings is not None:
            self._check_embeddings(embeddings)
        if index is None:
            count = 0 if embeddings is None else len(embeddings)
            if count not in (0, len(input_ids)):
                raise ValueError(
                    f"Found {count} images for {len(input_ids)} rows; pass sam_image_index (B,) with the image of "
                    "each row, -1 for none."
                )
            rows = torch.arange(len(input_ids), device=input_ids.device)
            index = rows if count else torch.full_like(rows, -1)
        elif embeddings is not None:
            self._check_index(index, len(embeddings), len(input_ids))
        vlm_inputs = {}
        if self.config.vlm_image_input == "sam_image_embeddings":
            if embeddings is not None:
                vlm_inputs["inputs_embeds"] = self._embed_with_images(input_ids, embeddings, index, features)
        elif features is not None:
            of_rows = [features[image] for image in index.tolist() if image >= 0]
            if of_rows:
                vlm_inputs["mm_encoder_outputs"] = {"image": join_features(of_rows)}
        elif pixels is not None and len(pixels):
            vlm_inputs["pixel_values"] = pixels.to(self.vlm.dtype)
        sizes = (inputs.pop("original_sizes", None), inputs.pop("reshaped_input_sizes", None))
        return PlumImages(vlm_inputs, embeddings, index, *sizes, sam_pixels), inputs

    @staticmethod
    def _check_index(sam_image_index: torch.LongTensor, images: int, rows: int):
        """
        Raise `ValueError` unless the index has one of the images, or -1, for each row, and every image has a row.
        Batches that were concatenated without new indices have images without rows.
        """
        found = set(sam_image_index.flatten().tolist())
        if tuple(sam_image_index.shape) != (rows,) or found - {-1} != set(range(images)):
            raise ValueError(
                f"sam_image_index is {sam_image_index.tolist()}, expected for each of {rows} rows the index of one of "
                f"{images} images, or -1, and each image at least once; encode all conversations of a batch together."
            )

    def _check_embeddings(self, sam_image_embeddings: torch.Tensor):
        """Raise `ValueError` if embeddings are those of another segmenter or image size."""
        config = self.config
        expected = (self.segmenter.embedding_width(config.sam_config), config.sam_grid_size, config.sam_grid_size)
        if tuple(sam_image_embeddings.shape[1:]) != expected:
            raise ValueError(
                f"sam_image_embeddings have shape {tuple(sam_image_embeddings.shape)}, but those of this model's "
                f"{config.sam_config.model_type!r} are (N, {', '.join(map(str, expected))}); encode the images again "
                "with get_image_embeddings of this model."
            )

    def _check_image_tokens(self, input_ids, vlm_inputs: dict):
        """Raise `ValueError` if the vision-language model would read image tokens as words; a cache has read them."""
        given = vlm_inputs.keys() & {"inputs_embeds", "pixel_values", "mm_encoder_outputs", "past_key_values"}
        if not given and (input_ids == self.config.vlm_config.image_token_id).any():
            raise ValueError(
                "input_ids contain image tokens, but no image is passed with them; pass pixel_values, or what "
                "get_vlm_image_features returned as vlm_image_features."
            )

    def _embed_with_images(self, input_ids, sam_image_embeddings, sam_image_index, features=None) -> torch.Tensor:
        """
        Return input embeddings `(B, L, D)` with the features of each row's image at its placeholders. The vision tower
        encodes an image once for all rows.
        """
        placeholders = input_ids == self.config.vlm_config.image_token_id
        if features is None:
            grid = sam_image_embeddings[:, : self.config.sam_width].to(self.vlm.dtype)
            outputs = self.vlm.model.get_image_features(grid, return_dict=True)
            features = list(outputs.pooler_output)
        else:
            features = [rows_of(image.pooler_output) for image in features]
        features = torch.stack(features)[sam_image_index[sam_image_index >= 0]]
        if placeholders.sum() != features.shape[:2].numel():
            raise ValueError(
                f"Image features and image tokens do not match: {len(features)} rows with an image have "
                f"{features.shape[1]} features each, found {int(placeholders.sum())} image tokens; set the "
                f"processor's num_image_tokens to {features.shape[1]}."
            )
        embeddings = self.get_input_embeddings()(input_ids)
        return embeddings.masked_scatter(placeholders[..., None], features.to(embeddings))


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
