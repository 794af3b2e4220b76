"""Any vision-language model of transformers (`AutoModelForImageTextToText`): choices by likelihood, and answers.

    image + start of a prompt ──> key-value cache, once for all questions about the image
    cache + question + each choice ──> log-likelihood of the choice
    cache + question ──> answer

The cache contains the tokens up to the last image token. Whole prompts are used instead, with the same scores but
slower, if the model cannot continue from a cache of several rows (one with a recurrent state), or if the processor
tokenizes the words after an image differently with the image.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from plum_partonomy.masks import DataError
from plum_partonomy.scoring.letters import LETTERS, letter_question

__all__ = ["LIST_PROMPT", "Vlm"]

Messages = Sequence[dict[str, str]]
Reduction = Literal["sequence_mean", "answer_mean", "answer_sum"]
ChoicesBy = Literal["likelihood", "letter"]

LIST_PROMPT = "Answer with the names of the parts only, separated by commas."
PROBE: Messages = [{"role": "user", "content": "?"}]


@dataclass(frozen=True)
class Prefix:
    """The tokens of a prompt up to the last image token, with their cache.

    Attributes:
        ids: These tokens, with expanded image placeholders.
        written: The same tokens from the tokenizer without an image.
        cache: Keys and values.
        logits: Logits of the next token, shape (V,).
        loss, count: Summed negative log-likelihood and number of the tokens that are not image tokens.
        rope_deltas: Offset of the following positions, for models that keep it (Qwen-VL).
    """

    ids: list[int]
    written: list[int]
    cache: Any
    logits: torch.Tensor
    loss: float
    count: int
    rope_deltas: torch.Tensor | None


@dataclass(frozen=True)
class SeenImage:
    """An image and, if the model can continue from one, its prefix."""

    image: Image.Image
    prefix: Prefix | None


class Vlm:
    """Choices and answers of a vision-language model.

    Args:
        model, processor: Model and processor of transformers.
        reduction: How a choice is scored: the log-likelihood of its tokens, summed (`answer_sum`) or averaged
            (`answer_mean`), or averaged over prompt and answer without image tokens (`sequence_mean`).
        choices_by: Score the choices themselves, or their letters after a list in the question.
        max_new_tokens: Maximum length of an answer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        reduction: Reduction = "answer_mean",
        choices_by: ChoicesBy = "likelihood",
        max_new_tokens: int = 96,
    ):
        self.model, self.processor = model.eval(), processor
        self.reduction, self.choices_by, self.max_new_tokens = reduction, choices_by, max_new_tokens
        self.shares_prefix = not model._is_stateful
        self.image_token_id = model.config.image_token_id

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: torch.dtype = torch.float32, device: Any = "cpu", **options: Any
    ) -> "Vlm":
        """Load a checkpoint from a folder or the Hub. Raises DataError if it is not a vision-language model."""
        try:
            safely = {"trust_remote_code": False, "use_safetensors": True}  # no interactive prompt
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **safely)
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        except (ValueError, ImportError, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"--vlm {name}: expected a checkpoint of AutoModelForImageTextToText with its processor: {reason:.300}"
            ) from error
        if model.config.is_encoder_decoder or getattr(model.config, "image_token_id", None) is None:
            raise DataError(
                f"--vlm {name}: expected a decoder-only model whose images are tokens of its prompt "
                f"(image_token_id of its config), found {model.config.model_type!r}."
            )
        return cls(model.to(device), processor, **options)

    # ------------------------------------------------------------ the methods of a model under test

    @torch.no_grad()
    def encode(self, image: Image.Image) -> SeenImage:
        """Return the image with its encoded prefix."""
        return SeenImage(image, self._read_prefix(image) if self.shares_prefix else None)

    @torch.no_grad()
    def choose(self, seen: SeenImage, messages: Messages, choices: Sequence[str]) -> list[float]:
        """Return a log-likelihood for each choice."""
        if self.choices_by == "letter":
            messages, choices = letter_question(messages, choices), LETTERS[: len(choices)]
        prompt = self._render(messages, prompt=True)
        answers = [self._render([*messages, {"role": "assistant", "content": choice}]) for choice in choices]
        tails = self._tails(seen, [prompt, *answers])
        if tails is None:
            return [self._score_whole(seen, prompt, answer) for answer in answers]
        starts = [_common(tails[0], tail) for tail in tails[1:]]
        return self._score_tails(seen.prefix, tails[1:], starts)

    @torch.no_grad()
    def answer(self, seen: SeenImage, messages: Messages) -> str:
        """Return the generated answer to the last message, greedy, with a prompt to list names."""
        asked = {"role": "user", "content": f"{messages[-1]['content']}\n{LIST_PROMPT}"}
        prompt = self._render([*messages[:-1], asked], prompt=True)
        tails = self._tails(seen, [prompt])
        if tails is None:
            inputs = self._inputs(prompt, seen.image)
        else:
            ids = torch.tensor([[*seen.prefix.ids, *tails[0]]], device=self.model.device)
            cache = self._resume(seen.prefix, rows=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        output = self.model.generate(**inputs, **options)
        new = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()

    # ------------------------------------------------------------ prompts

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        chat = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        chat[0]["content"].insert(0, {"type": "image"})
        try:
            return self.processor.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"the chat template of {self.model.name_or_path or 'the model'} cannot write a conversation of "
                f"{len(messages)} messages with an image: {error}"
            ) from error

    def _options(self, text: str) -> dict[str, Any]:
        """Return tokenizer options that avoid a second first token if the template writes one."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": bos is None or not text.startswith(bos)}

    def _inputs(self, text: str, image: Image.Image) -> dict[str, torch.Tensor]:
        inputs = self.processor(text=[text], images=[[image]], return_tensors="pt", **self._options(text))
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, **self._options(text))["input_ids"]

    # ------------------------------------------------------------ prefixes

    def _read_prefix(self, image: Image.Image) -> Prefix | None:
        """Encode a prompt up to the last image token; None if the processor tokenizes later words differently."""
        text = self._render(PROBE, prompt=True)
        inputs, written = self._inputs(text, image), self._ids(text)
        ids = inputs["input_ids"][0].tolist()
        same = _common(ids[::-1], written[::-1])
        after = ids[len(ids) - same :][::-1]
        if self.image_token_id in after:  # the placeholder remains if the image is not expanded
            same = after.index(self.image_token_id)
        length = len(ids) - same
        if self.image_token_id in ids[length:] or self.image_token_id not in ids[:length]:
            return None
        shape = inputs["input_ids"].shape
        inputs = {name: value[:, :length] if value.shape == shape else value for name, value in inputs.items()}
        outputs = self.model(**inputs, use_cache=True)
        targets = inputs["input_ids"][0, 1:]
        counted = targets != self.image_token_id
        losses = F.cross_entropy(outputs.logits[0, :-1][counted].float(), targets[counted], reduction="sum")
        return Prefix(
            ids=ids[:length],
            written=written[: len(written) - same],
            cache=outputs.past_key_values,
            logits=outputs.logits[0, -1].float(),
            loss=float(losses),
            count=int(counted.sum()),
            rope_deltas=next((m.rope_deltas for m in self._with_deltas()), None),
        )

    def _with_deltas(self) -> list[Any]:
        return [module for module in self.model.modules() if getattr(module, "rope_deltas", None) is not None]

    def _resume(self, prefix: Prefix, *, rows: int) -> Any:
        """Return a copy of the prefix cache for some rows, with the model's positions as after reading it."""
        for module in self._with_deltas():
            module.rope_deltas = prefix.rope_deltas
        cache = copy.deepcopy(prefix.cache)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def _tails(self, seen: SeenImage, texts: Sequence[str]) -> list[list[int]] | None:
        """Return the tokens of each text after the prefix; None if one does not start with it."""
        if seen.prefix is None:
            return None
        written, rows = seen.prefix.written, [self._ids(text) for text in texts]
        if any(row[: len(written)] != written for row in rows):
            return None
        return [row[len(written) :] for row in rows]

    # ------------------------------------------------------------ scores

    def _score_tails(self, prefix: Prefix, tails: Sequence[list[int]], starts: Sequence[int]) -> list[float]:
        """Return the log-likelihoods of the tokens from `starts` on, in rows that continue one prefix."""
        longest = max(map(len, tails))
        ids = torch.tensor([[*tail, *[0] * (longest - len(tail))] for tail in tails], device=self.model.device)
        # No mask is needed: padding follows the tokens of its row, and attention is causal.
        cache = self._resume(prefix, rows=len(tails))
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        first = prefix.logits.expand(len(tails), 1, -1)
        logits = torch.cat([first, logits[:, :-1].float()], dim=1)  # (rows, longest, V): of each token of the tails
        losses = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        return [
            self._reduce(prefix.loss + float(row[:start].sum()), prefix.count + start, row[start : len(tail)])
            for row, tail, start in zip(losses, tails, starts, strict=True)
        ]

    def _score_whole(self, seen: SeenImage, prompt: str, text: str) -> float:
        """Return the log-likelihood of one answer, with the image in a separate forward pass."""
        inputs = self._inputs(text, seen.image)
        ids = inputs["input_ids"][0]
        start = _common(self._inputs(prompt, seen.image)["input_ids"][0].tolist(), ids.tolist())
        losses = F.cross_entropy(self.model(**inputs).logits[0, :-1].float(), ids[1:], reduction="none")
        before = losses[: start - 1][ids[1:start] != self.image_token_id]
        return self._reduce(float(before.sum()), len(before), losses[start - 1 :])

    def _reduce(self, loss_before: float, count_before: int, losses: torch.Tensor) -> float:
        total = float(losses.sum())
        if self.reduction == "answer_sum":
            return -total
        if self.reduction == "answer_mean":
            return -total / len(losses)
        return -(loss_before + total) / (count_before + len(losses))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
