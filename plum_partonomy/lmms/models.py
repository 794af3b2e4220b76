"""PLUM as a model of lmms-eval, found by the entry point `lmms_eval.models` of this distribution.

`PlumChat` reads messages and replies with JSON (see questions.py): it segments the answer at the end of a
conversation, or generates one. `PlumSimple` (`--force_simple`) reads one text and also returns the loss of choices,
which lmms-eval requests from simple models only.
"""

import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from chats_plum import parse_span_tags
from modules_plum import keep_last_answer
from plum_partonomy.baselines.model import ask as messages_up_to
from plum_partonomy.images import read_image
from plum_partonomy.inference.encoded import RecentImage, encode_chats
from plum_partonomy.inference.one_image import MAX_NEW_TOKENS, Reply, ask, finish, load_model, segment_again
from plum_partonomy.lmms.questions import as_question
from plum_partonomy.masks import DataError, encode
from plum_partonomy.records import escape_tags

__all__ = ["PlumChat", "PlumSimple", "manifest"]


def manifest() -> ModelManifest:
    """Return the registration of `--model plum`."""
    return ModelManifest(
        model_id="plum",
        simple_class_path=f"{__name__}.PlumSimple",
        chat_class_path=f"{__name__}.PlumChat",
    )


class _Plum(lmms):
    """The common part of both classes.

    Args:
        pretrained: Folder of a checkpoint, or its name on the Hub.
        device: `auto` is a GPU if there is one, for each process its own.
        output: `json` with masks, or `text` for tasks that do not use masks.
        choice_reduction: Loss of a choice, as in evaluate_plum.py.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
        output: Literal["json", "text"] = "json",
        choice_reduction: Literal["sequence_mean", "answer_mean", "answer_sum"] = "sequence_mean",
        batch_size: int | str = 1,
        **options: Any,
    ):
        super().__init__()
        if unknown := sorted(options.keys() - {"max_batch_size"}):  # lmms-eval always passes it
            raise DataError(f"--model_args: unknown option {unknown[0]!r}; see plum_partonomy/lmms/models.py.")
        for name, value, known in (
            ("output", output, ("json", "text")),
            ("dtype", dtype, ("float32", "bfloat16")),
            ("choice_reduction", choice_reduction, ("sequence_mean", "answer_mean", "answer_sum")),
        ):
            if value not in known:
                raise DataError(f"--model_args {name}={value}: expected {' or '.join(known)}.")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device)
        _, self.plum = load_model(pretrained, dtype=dtype, device=self.device)
        self.output, self.choice_reduction = output, choice_reduction
        self.recent = RecentImage(self.plum.model, self.plum.processor)

    def _reply(self, image: Image.Image, messages: Sequence[dict[str, str]], options: dict[str, Any]) -> str:
        """Return the answer to messages that end with a question, or the masks of an answer at their end."""
        *earlier, last = messages
        encoded = self.recent.encode(image)
        if last["role"] == "assistant":
            text, ranges = parse_span_tags(last["content"])
            reply = segment_again(self.plum, Reply(image, earlier, text, encoded=encoded), ranges)
        else:
            length = _answer_length(options)
            reply = ask(self.plum, image, last["content"], history=earlier, encoded=encoded, max_new_tokens=length)
        answer = finish(self.plum, reply)
        if self.output == "text":
            return answer.text
        return json.dumps(
            {
                "answer": answer.text,
                "labels": [span.text for span in answer.spans],
                "masks": [encode(np.asarray(span.mask)) for span in answer.spans],
                "boxes": [span.box for span in answer.spans],
                "scores": [span.score for span in answer.spans],
            }
        )

    @abstractmethod
    def _read(self, args: tuple) -> tuple[Image.Image, list[dict[str, str]], dict]:
        """Return image, messages and options of the arguments of a request, whose order depends on the interface."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return a reply to each request."""
        asked = tqdm(requests, desc="answering", unit="question")
        return [self._reply(*self._read(request.args)) for request in asked]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval requests no likelihoods from chat models: pass --force_simple.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("PLUM has no task of several rounds in lmms-eval.")


class PlumChat(_Plum):
    is_simple = False

    def _read(self, args: tuple) -> tuple[Image.Image, list[dict[str, str]], dict]:
        _, doc_to_messages, options, doc_id, task, split = args
        return *_plain(doc_to_messages(self.task_dict[task][split][doc_id]), task), options


class PlumSimple(_Plum):
    is_simple = True

    def _read(self, args: tuple) -> tuple[Image.Image, list[dict[str, str]], dict]:
        context, options, doc_to_visual, doc_id, task, split = args
        image = _only_image(doc_to_visual(self.task_dict[task][split][doc_id]), task)
        return image, [{"role": "user", "content": context}], options

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the loss of each continuation, smaller is better, as lmms-eval compares them.

        Whether a continuation is the greedy one is not computed (False). A question of PARTONOMY is asked as in
        evaluate_plum.py, after the earlier messages.
        """
        losses = []
        for request in tqdm(requests, desc="scoring", unit="choice"):
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            image = _only_image(doc_to_visual(doc), task)
            messages = [{"role": "user", "content": context}]
            if "choice_parts" in doc:
                messages = messages_up_to(as_question(doc))
            answer = {"role": "assistant", "content": escape_tags(continuation)}
            chats = [(self.recent.encode(image), [*messages, answer])]
            inputs = encode_chats(self.plum.model, self.plum.processor, chats)
            inputs["labels"] = keep_last_answer(inputs["labels"])
            scores = self.plum.model.score_choices(**inputs, num_choices=1, reduction=self.choice_reduction)
            losses.append((float(scores[0, 0]), False))
        return losses


def _answer_length(options: dict[str, Any]) -> int:
    """Return `max_new_tokens` of the options of a task or --gen_kwargs; raises DataError if they need sampling or
    beams.

    `until` has no effect: an answer ends with the model's own token.
    """
    samples = options.get("do_sample")
    if samples is None:
        samples = options.get("temperature") not in (None, 0)
    if samples or options.get("num_beams") not in (None, 1):
        raise DataError(
            f"--gen_kwargs: PLUM decodes greedily, expected do_sample=False and num_beams=1, found {options}."
        )
    return options.get("max_new_tokens", MAX_NEW_TOKENS)


def _only_image(images: Sequence[Image.Image], task: str) -> Image.Image:
    if len(images) != 1 or not isinstance(images[0], Image.Image):
        found = [type(image).__name__ for image in images]
        raise DataError(f"--tasks {task}: PLUM answers questions about one image, found {found}; give another task.")
    return read_image(images[0], where=f"--tasks {task}")


def _plain(messages: Sequence[dict[str, Any]], task: str) -> tuple[Image.Image, list[dict[str, str]]]:
    """Return the image of a chat and its messages with plain texts."""
    parts = [(message["role"], message["content"]) for message in messages]
    media = [part["url"] for _, content in parts for part in content if part["type"] != "text"]
    texts = [" ".join(part["text"] for part in content if part["type"] == "text") for _, content in parts]
    messages = [{"role": role, "content": text} for (role, _), text in zip(parts, texts, strict=True)]
    return _only_image(media, task), messages
