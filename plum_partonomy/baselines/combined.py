"""Combine a model that answers with one that segments the named parts: the strongest baseline without training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from plum_partonomy.records import Question

__all__ = ["Combined"]


class Combined:
    """`speaker` chooses and answers; `segmenter` makes the masks of the named parts."""

    def __init__(self, speaker: Any, segmenter: Any):
        self.speaker, self.segmenter = speaker, segmenter

    def encode(self, image: Image.Image) -> tuple[Any, Any]:
        return self.speaker.encode(image), self.segmenter.encode(image)

    def choose(self, seen: tuple[Any, Any], messages: Sequence[dict[str, str]], choices: list[str]) -> list[float]:
        return self.speaker.choose(seen[0], messages, choices)

    def answer(self, seen: tuple[Any, Any], messages: Sequence[dict[str, str]]) -> str:
        return self.speaker.answer(seen[0], messages)

    def segment(self, seen: tuple[Any, Any], question: Question, parts: list[str]) -> list[tuple[np.ndarray, float]]:
        return self.segmenter.segment(seen[1], question, parts)
