"""Answer requests at an inference endpoint of the Hub; `push_to_hub.py model` adds this file to the weights.

A request and its answer. An image is a URL or base64; RLE counts are COCO's uncompressed run lengths:

    {"inputs": {"image": "https://...", "text": "Which parts does it have?"}, "parameters": {"max_new_tokens": 64}}
    {"generated_text": "It has a wheel.", "is_truncated": false, "confidence": 0.98, "segments": [
        {"label": "wheel", "start": 9, "end": 14, "score": 0.9, "box": [3, 40, 38, 77],
         "rle": {"size": [480, 640], "counts": [1021, 12, ...]}}]}

The file imports nothing of this library: an endpoint has only the model's repository and transformers.
"""

from typing import Any

import numpy as np
import torch
from transformers import pipeline


class EndpointHandler:
    """Created once by the Hub's inference toolkit and called for each request."""

    def __init__(self, path: str = ""):
        device = 0 if torch.cuda.is_available() else -1
        self.pipe = pipeline(model=path, trust_remote_code=True, device=device)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to {"inputs": {"image", "text"}, "parameters": {...}}.

        Raises:
            ValueError: the request has no question, or its image cannot be read.
        """
        inputs = data.get("inputs")
        if not isinstance(inputs, dict) or not isinstance(inputs.get("text"), str):
            raise ValueError('Expected {"inputs": {"image": ..., "text": "a question"}}.')
        asked = {"text": inputs["text"], "image": inputs.get("image")}
        answer = self.pipe(asked, **(data.get("parameters") or {}))
        for segment in answer["segments"]:
            segment["rle"] = encode(np.asarray(segment.pop("mask")) > 0)
            segment["box"] = None if segment["box"] is None else [int(side) for side in segment["box"]]
            segment["score"] = float(segment["score"])
        return answer


def encode(mask: np.ndarray) -> dict[str, list[int]]:
    """Return the run lengths of a boolean mask (height, width), column by column, background first."""
    pixels = np.concatenate([[False], mask.flatten(order="F"), [False]])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
    return {"size": list(mask.shape), "counts": counts[:-1] if counts[-1] == 0 else counts}
