"""SAM 3 (transformers' `Sam3Model`), prompted with the name of each part."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from plum_partonomy.masks import DataError
from plum_partonomy.records import UNNAMED_OBJECT, Question

__all__ = ["Sam3"]

PromptForm = Literal["part", "part_of_object"]
MASK_THRESHOLD = 0.5
PROMPTS_AT_ONCE = 8


@dataclass
class SeenImage:
    """Features of an image, and the masks of earlier prompts."""

    features: Sam3VisionEncoderOutput
    size: tuple[int, int]
    masks: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)


class Sam3:
    """Masks for words: the union of all instances of a part with a score above the threshold.

    A part without such an instance has an empty mask and the score of its best instance. Images are resized to the
    model's square here (Pillow, bilinear), because the processor of SAM 3 in transformers needs torchvision.

    Args:
        prompt: "part" prompts with "left wing", "part_of_object" with "left wing of the plane".
    """

    def __init__(
        self, model: Sam3Model, tokenizer: Any, *, threshold: float = 0.3, prompt: PromptForm = "part"
    ) -> None:
        self.model, self.tokenizer, self.threshold, self.prompt = model.eval(), tokenizer, threshold, prompt

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: torch.dtype = torch.float32, device: Any = "cpu", **options: Any
    ) -> "Sam3":
        """Load a checkpoint from a folder or the Hub. Raises DataError if it takes no text prompts."""
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"--sam3 {name}: expected a SAM 3 of transformers: {reason:.300}") from error
        if config.model_type not in ("sam3", "sam3_video"):
            raise DataError(
                f"--sam3 {name}: expected a SAM 3 that takes text prompts (model type sam3), found "
                f"{config.model_type!r}; use facebook/sam3."
            )
        model = Sam3Model.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device)
        return cls(model, AutoTokenizer.from_pretrained(name, trust_remote_code=False), **options)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> SeenImage:
        """Return the features of an RGB image."""
        side = self.model.config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
        pixels = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]  # (1, 3, H, W) in [-1, 1]
        features = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype))
        return SeenImage(features, (image.height, image.width))

    def segment(self, seen: SeenImage, question: Question, parts: list[str]) -> list[tuple[np.ndarray, float]]:
        """Return the union of the instances of each part, and the best score."""
        words = [self._words(part, question) for part in parts]
        absent = [text for text in dict.fromkeys(words) if text not in seen.masks]
        for start in range(0, len(absent), PROMPTS_AT_ONCE):
            some = absent[start : start + PROMPTS_AT_ONCE]
            seen.masks |= dict(zip(some, self._segment(seen, some), strict=True))
        return [seen.masks[text] for text in words]

    def _words(self, part: str, question: Question) -> str:
        if self.prompt == "part" or question.image_label == UNNAMED_OBJECT:
            return part
        return f"{part} of the {question.image_label}"

    @torch.no_grad()
    def _segment(self, seen: SeenImage, words: list[str]) -> list[tuple[np.ndarray, float]]:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            words, return_tensors="pt", padding="max_length", truncation=True, max_length=length
        ).to(self.model.device)
        features = Sam3VisionEncoderOutput(
            fpn_hidden_states=tuple(item.expand(len(words), -1, -1, -1) for item in seen.features.fpn_hidden_states),
            fpn_position_encoding=tuple(
                item.expand(len(words), -1, -1, -1) for item in seen.features.fpn_position_encoding
            ),
        )
        outputs = self.model(
            vision_embeds=features, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        scores = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()).float()  # (words, queries)
        return [
            (self._unite(masks[found > self.threshold], seen.size), float(found.max()))
            for masks, found in zip(outputs.pred_masks, scores, strict=True)
        ]

    @staticmethod
    def _unite(masks: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
        """Return the union (H, W) of masks (N, h, w) of logits."""
        if not len(masks):
            return np.zeros(size, dtype=bool)
        probabilities = F.interpolate(masks[None].float().sigmoid(), size, mode="bilinear", align_corners=False)[0]
        return (probabilities > MASK_THRESHOLD).any(dim=0).cpu().numpy()
