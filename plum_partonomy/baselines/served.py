"""A vision-language model behind an OpenAI-compatible endpoint (vLLM, llama.cpp, an endpoint of the Hub)."""

import base64
import io
import os
import re
from collections.abc import Sequence
from typing import Any

import httpx
from PIL import Image

from plum_partonomy.baselines.vlm import LIST_PROMPT, Messages
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.letters import letter_question, read_letter
from plum_partonomy.seeding import seeded_generator

__all__ = ["ServedVlm"]

TIMEOUT = 120  # seconds for one answer
HUB = re.compile(r"https://([\w-]+\.)*huggingface\.(co|cloud)(:\d+)?(/|$)")


class ServedVlm:
    """Choices by letter and answers of the first model that an endpoint lists.

    Such endpoints return no likelihood of a given text. An answer without a letter counts as a guess, drawn by the
    question, so that refusing scores at chance. The key is OPENAI_API_KEY, or HF_TOKEN for an endpoint of the Hub,
    which no other server gets.
    """

    def __init__(self, url: str, *, max_new_tokens: int = 96):
        self.url, self.max_new_tokens = url, max_new_tokens
        token = os.environ.get("HF_TOKEN" if HUB.match(url) else "OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(headers=headers, timeout=TIMEOUT)
        try:
            listed = self.client.get(f"{url.rstrip('/')}/models").raise_for_status().json()
            self.model = listed["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"--vlm {url}: expected an API that lists its models at /models ({error}).") from error

    def encode(self, image: Image.Image) -> str:
        """Return the image as a data URL."""
        content = io.BytesIO()
        image.save(content, format="PNG")
        return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()

    def choose(self, seen: str, messages: Messages, choices: Sequence[str]) -> list[float]:
        """Return 1 for the choice whose letter the model gives and 0 for the others."""
        text = self._complete(seen, letter_question(messages, choices), max_tokens=self.max_new_tokens)
        index = read_letter(text, len(choices))
        if index is None:
            index = int(seeded_generator("letter", messages[-1]["content"], *choices).integers(len(choices)))
        return [float(i == index) for i in range(len(choices))]

    def answer(self, seen: str, messages: Messages) -> str:
        """Return the generated answer to the last message, with a prompt to list names."""
        asked = {"role": "user", "content": f"{messages[-1]['content']}\n{LIST_PROMPT}"}
        return self._complete(seen, [*messages[:-1], asked], max_tokens=self.max_new_tokens).strip()

    def _complete(self, seen: str, messages: Messages, *, max_tokens: int) -> str:
        chat: list[dict[str, Any]] = [dict(message) for message in messages]
        image = {"type": "image_url", "image_url": {"url": seen}}
        chat[0]["content"] = [image, {"type": "text", "text": chat[0]["content"]}]
        asked = {"model": self.model, "messages": chat, "max_tokens": max_tokens, "temperature": 0.0}
        try:
            reply = self.client.post(f"{self.url.rstrip('/')}/chat/completions", json=asked).raise_for_status().json()
            content = reply["choices"][0]["message"]["content"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"the endpoint {self.url} gave no answer: {error!r}") from error
        if not isinstance(content, str | None):
            raise DataError(f"the endpoint {self.url} gave no text as answer, but {content!r:.80}")
        return content or ""
