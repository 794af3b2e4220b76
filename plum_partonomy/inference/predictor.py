"""Answer benchmark questions with a PLUM model; evaluate_plum.py selects the questions and scores the predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from chats_plum import parse_span_tags
from modules_plum import decode_spans, keep_last_answer
from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.inference.encoded import EncodedImage, Message, encode_chats, encode_image
from plum_partonomy.inference.image_cache import ImageCache
from plum_partonomy.inference.packing import encode_conversations
from plum_partonomy.masks import encode, resize
from plum_partonomy.questions.spans import tag_phrases
from plum_partonomy.records import Question, escape_tags
from plum_partonomy.scoring.benchmark import Asked
from plum_partonomy.scoring.metrics import MaskSource
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from processing_plum import PlumProcessor

IMAGES_KEPT = 128
Row = tuple[str, list[Message]]  # image id, and a conversation about the image


@dataclass(frozen=True)
class Scored:
    """
    The scores of a question's choices.

    Attributes:
        choices, object_choices: Negative log-likelihood of each choice.
        answer: Index of the choice whose parts are segmented.
        hidden_states: Hidden states of the conversation with this choice, (L, D).
    """

    choices: list[float]
    object_choices: list[float] | None
    answer: int
    hidden_states: torch.Tensor


class Predictor:
    """
    Answers questions with one model. An image is encoded once for all its questions, shared prefixes of choices and
    questions are computed once, and the masks of a given answer reuse the pass that scored it.
    """

    def __init__(
        self,
        model,
        processor: PlumProcessor,
        *,
        max_new_tokens: int,
        choice_reduction: str,
        mask_source: MaskSource,
        image_cache_size: int = IMAGES_KEPT,
        embedding_cache: EmbeddingCache | None = None,
    ):
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.choice_reduction = choice_reduction
        self.mask_source = mask_source
        embed = None if embedding_cache is None else embedding_cache.embed
        self.images = ImageCache(partial(encode_image, model, processor, embed=embed), size=image_cache_size)
        self._features: dict[str, EncodedImage] = {}

    def predict(self, asked: Sequence[Asked]) -> list[Prediction]:
        """Return one prediction per question."""
        self._features = self.images.look_up(asked)
        scored = self._score(asked)
        given, generated = self._segment_given(asked, scored), self._segment_freely(asked)
        return [
            Prediction(
                question_id=each.question.id,
                image_id=each.image_id,
                choice_scores=scores.choices,
                object_choice_scores=scores.object_choices,
                **of_given,
                **of_generated,
            )
            for each, scores, of_given, of_generated in zip(asked, scored, given, generated, strict=True)
        ]

    def _encode(self, rows: Sequence[Row], *, prompt: bool = False) -> dict[str, torch.Tensor]:
        chats = [(self._features[name], messages) for name, messages in rows]
        side = "left" if prompt else "right"
        inputs = encode_chats(self.model, self.processor, chats, add_generation_prompt=prompt, padding_side=side)
        if not prompt:
            inputs["labels"] = keep_last_answer(inputs["labels"])
        return inputs

    def _score(self, asked: Sequence[Asked]) -> list[Scored]:
        """Return the scores of all choices, computed in one batch."""
        tagged = self.processor.seg_token is not None
        choices = [(each.image_id, chat) for each in asked for chat in choose(each.question, tagged=tagged)]
        choices += [(each.image_id, chat) for each in asked for chat in choose_object(each.question, tagged=tagged)]
        inputs = self._encode(choices)
        inputs["hidden_states"] = encode_conversations(self.model, **inputs)
        scores = self.model.score_choices(**inputs, num_choices=1, reduction=self.choice_reduction)
        rest, states = iter(scores.flatten().tolist()), iter(inputs["hidden_states"])
        scores = [list(islice(rest, len(each.question.choices))) for each in asked]
        object_scores = [list(islice(rest, len(each.question.object_choices or ()))) or None for each in asked]
        scored = []
        for each, of_choices, of_objects in zip(asked, scores, object_scores, strict=True):
            chosen = int(np.argmin(of_choices))
            answer = chosen if self.mask_source == "predicted_answer" else each.question.correct
            of_question = list(islice(states, len(of_choices)))
            scored.append(Scored(of_choices, of_objects, answer, of_question[answer]))
        return scored

    def _segment_given(self, asked: Sequence[Asked], scored: Sequence[Scored]) -> list[dict[str, Any]]:
        """Return the masks of the parts of one choice each, from hidden states; span tags do not change its tokens."""
        given = list(zip(asked, scored, strict=True))
        chats = [answered(each.question, scores.answer, tagged=True) for each, scores in given]
        inputs = self._encode([(each.image_id, chat) for each, chat in zip(asked, chats, strict=True)])
        length = inputs["input_ids"].shape[1]
        hidden_states = torch.stack([scores.hidden_states[:length] for scores in scored])
        outputs = self.model.segment_spans(**inputs, hidden_states=hidden_states)
        answers = self.processor.post_process_segmentation(outputs)
        starts = outputs.answer_mask.int().argmax(dim=1).tolist()
        true = tags_by_row(inputs["spans"], starts)
        predicted = tags_by_row(decode_spans(outputs.span_logits.argmax(dim=-1), outputs.answer_mask), starts)
        predictions = []
        for row, (each, scores) in enumerate(given):
            parts = each.question.choice_parts[scores.answer]
            _, places = parse_span_tags(chats[row][-1]["content"])
            spans = [
                make_span(part, start, end, span, question=each.question)
                for part, (start, end), span in zip(parts, places, answers[row].spans, strict=True)
            ]
            predictions.append({"given_spans": spans, "true_tags": true[row], "predicted_tags": predicted[row]})
        return predictions

    def _segment_freely(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Return the generated answers and their masks."""
        inputs = self._encode([(each.image_id, ask(each.question)) for each in asked], prompt=True)
        outputs = self.model.segment(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        answers = self.processor.post_process_segmentation(outputs)
        return [
            {
                "generated_text": answer.text,
                "generated_spans": [
                    make_span(span.text, span.start, span.end, span, question=each.question) for span in answer.spans
                ],
            }
            for each, answer in zip(asked, answers, strict=True)
        ]


def ask(question: Question) -> list[Message]:
    """Return the messages up to the part question; `whole_to_part` first asks for the object, with its answer."""
    messages = [{"role": "user", "content": question.question}]
    if question.question_type != "whole_to_part":
        return messages
    answer = escape_tags(question.object_choices[question.object_correct])
    return [{"role": "user", "content": question.object_question}, {"role": "assistant", "content": answer}, *messages]


def write_choice(question: Question, index: int, *, tagged: bool) -> str:
    """Return a choice as the model would write it: with tagged parts if a token follows each grounded phrase."""
    choice = question.choices[index]
    return tag_phrases(choice, question.choice_parts[index]) if tagged else escape_tags(choice)


def answered(question: Question, index: int, *, tagged: bool) -> list[Message]:
    """Return the conversation with a choice as the answer to the part question."""
    return [*ask(question), {"role": "assistant", "content": write_choice(question, index, tagged=tagged)}]


def choose(question: Question, *, tagged: bool) -> list[list[Message]]:
    """Return one conversation per choice of the part question."""
    return [answered(question, index, tagged=tagged) for index in range(len(question.choices))]


def choose_object(question: Question, *, tagged: bool) -> list[list[Message]]:
    """
    Return one conversation per object choice, after the answered part question in `part_to_whole`; none for a question
    without object choices.
    """
    if question.object_question is None:
        return []
    messages = [{"role": "user", "content": question.object_question}]
    if question.question_type == "part_to_whole":
        messages = [*answered(question, question.correct, tagged=tagged), *messages]
    return [[*messages, {"role": "assistant", "content": escape_tags(choice)}] for choice in question.object_choices]


def tags_by_row(spans: torch.LongTensor, starts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return token spans (S, 3) as [start, end) for each row, counted from the first token of its answer."""
    tags: list[list[tuple[int, int]]] = [[] for _ in starts]
    for row, start, end in spans.tolist():
        tags[row].append((start - starts[row], end - starts[row]))
    return tags


def make_span(text: str, start: int, end: int, span: Any, *, question: Question) -> SpanMask:
    """Return the record of a segmented span. A mask of a wrong image is resized to the question's image."""
    rle = resize(encode(np.asarray(span.mask)), question.masks[0].rle["size"])
    return SpanMask(text=text, start=start, end=end, rle=rle, score=span.score)
