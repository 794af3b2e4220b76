"""Encode an image once for all conversations about it, in the shell, in the app and in evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.utils import ModelOutput

from plum_partonomy.records import as_chat
from processing_plum import PlumProcessor, PreparedImage

Message = dict[str, Any]


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """
    The outputs of both encoders for one image.

    Args:
        shown: The image in conversations: its placeholder tokens, or the image itself if the vision-language model
            needs the pixels each time.
        sam_embedding: `(E, G, G)`.
        vlm_features: Features of the vision-language model; None if it needs the pixels.
        sam_pixels: `(3, image_size, image_size)`, if the model decodes corrected masks in windows of the image.
    """

    shown: PreparedImage | Image.Image
    sam_embedding: torch.Tensor
    vlm_features: ModelOutput | None
    sam_pixels: torch.Tensor | None = None


@torch.no_grad()
def encode_image(
    model,
    processor: PlumProcessor,
    image: Image.Image,
    *,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> EncodedImage:
    """Return the features of an RGB image; `embed` replaces the model's `get_image_embeddings`."""
    embed, device = embed or model.get_image_embeddings, model.device
    (prepared,), sam_inputs, vlm_inputs = processor.prepare_images([image])
    pixels = sam_inputs["sam_pixel_values"].to(device)
    embeddings, kept = embed(pixels), None if model.config.correction_window is None else pixels[0]
    vlm_inputs = {name: value.to(device) for name, value in vlm_inputs.items() if isinstance(value, torch.Tensor)}
    features = model.get_vlm_image_features([prepared.tokens], sam_image_embeddings=embeddings, **vlm_inputs)
    if features is None:
        return EncodedImage(image, embeddings[0], None, kept)
    return EncodedImage(prepared, embeddings[0], features[0], kept)


class RecentImage:
    """Encodes an image once for all questions about it that follow each other; equal images have equal pixels."""

    def __init__(self, model, processor: PlumProcessor):
        self.model, self.processor = model, processor
        self._pixels: tuple | None = None
        self._encoded: EncodedImage | None = None

    def encode(self, image: Image.Image) -> EncodedImage:
        """Return the features of an RGB image."""
        pixels = (image.mode, image.size, image.tobytes())
        if pixels != self._pixels:
            self._encoded = encode_image(self.model, self.processor, image)
            self._pixels = pixels
        return self._encoded


def encode_chats(
    model, processor: PlumProcessor, chats: Sequence[tuple[EncodedImage, Sequence[Message]]], **options: Any
) -> dict[str, Any]:
    """
    Return the inputs of a model for conversations about encoded images.

    Args:
        options: As in `PlumProcessor.apply_chat_template`.

    Raises:
        ValueError: As in `PlumProcessor.apply_chat_template`.
    """
    conversations = [as_chat(list(messages), image.shown) for image, messages in chats]
    inputs = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)
    inputs = dict(inputs.to(model.device))
    inputs.pop("sam_pixel_values", None)
    images = list({id(image.shown): image for image, _ in chats}.values())
    inputs["sam_image_embeddings"] = torch.stack([image.sam_embedding for image in images])
    if images[0].vlm_features is not None:
        inputs["vlm_image_features"] = [image.vlm_features for image in images]
    return inputs
