"""PLUM as a model of lmms-eval, found by the entry point `lmms_eval.models` of this distribution.

`PlumChat` reads messages and replies with JSON (see questions.py): it segments the answer at the end of a
conversation, or generates one. `PlumSimple` (`--force_simple`) reads one text and also returns the loss of choices,
which lmms-eval requests from simple models only.
"""

import json
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

from modules_plum import keep_last_answer
from plum_partonomy.baselines.model import ask as messages_up_to
from plum_partonomy.inference.one_image import MAX_NEW_TOKENS, Reply, ask, finish, load_model
from plum_partonomy.lmms.questions import as_question
from plum_partonomy.masks import DataError, encode
from plum_partonomy.records import as_chat, escape_tags

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
        output: `json` with masks, or `text` for tasks that do not use masks.
        choice_reduction: Loss of a choice, as in evaluate_plum.py.
    """

    def __init__(
        self,
        pretrained: str,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
        output: Literal["json", "text"] = "json",
        choice_reduction: Literal["sequence_mean", "answer_mean", "answer_sum"] = "sequence_mean",
        batch_size: int | str = 1,
        **options: Any,
    ):
        super().__init__()
        if unknown := sorted(options.keys() - {"max_batch_size"}):  # lmms-eval always passes it
            raise DataError(f"--model_args: unknown option {unknown[0]!r}; see plum_partonomy/lmms/models.py.")
        if output not in ("json", "text"):
            raise DataError(f"--model_args output={output}: expected json or text.")
        _, self.plum = load_model(pretrained, dtype=dtype, device=device)
        self.output, self.choice_reduction = output, choice_reduction

    def _reply(self, image: Image.Image, messages: Sequence[dict[str, str]], options: dict[str, Any]) -> str:
        """Return the answer to messages that end with a question, or the masks of an answer at their end."""
        if messages[-1]["role"] == "assistant":
            reply = self._segment(image, messages)
        else:
            length = options.get("max_new_tokens", MAX_NEW_TOKENS)
            reply = ask(self.plum, image, messages[-1]["content"], history=messages[:-1], max_new_tokens=length)
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

    @torch.no_grad()
    def _segment(self, image: Image.Image, messages: Sequence[dict[str, str]]) -> Reply:
        outputs = self.plum.model.segment_spans(**self._encode(image, messages))
        return Reply(image, list(messages[:-1]), messages[-1]["content"], outputs)

    def _encode(self, image: Image.Image, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        chat = as_chat(list(messages), image)
        inputs = self.plum.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
        return dict(inputs.to(self.plum.model.device))

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
        return *_plain(doc_to_messages(self.task_dict[task][split][doc_id])), options


class PlumSimple(_Plum):
    is_simple = True

    def _read(self, args: tuple) -> tuple[Image.Image, list[dict[str, str]], dict]:
        context, options, doc_to_visual, doc_id, task, split = args
        (image,) = doc_to_visual(self.task_dict[task][split][doc_id])
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
            (image,) = doc_to_visual(doc)
            messages = [{"role": "user", "content": context}]
            if "question_type" in doc:
                messages = messages_up_to(as_question(doc))
            answer = {"role": "assistant", "content": escape_tags(continuation)}
            inputs = self._encode(image, [*messages, answer])
            inputs["labels"] = keep_last_answer(inputs["labels"])
            scores = self.plum.model.score_choices(**inputs, num_choices=1, reduction=self.choice_reduction)
            losses.append((float(scores[0, 0]), False))
        return losses


def _plain(messages: Sequence[dict[str, Any]]) -> tuple[Image.Image, list[dict[str, str]]]:
    """Return the image of a chat and its messages with plain texts."""
    parts = [(message["role"], message["content"]) for message in messages]
    (image,) = (part["url"] for _, content in parts for part in content if part["type"] == "image")
    texts = [" ".join(part["text"] for part in content if part["type"] == "text") for _, content in parts]
    return image, [{"role": role, "content": text} for (role, _), text in zip(parts, texts, strict=True)]
