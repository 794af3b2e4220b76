"""Puts part questions to a PLUM model and writes down what it says; evaluate_plum.py decides which, and scores it."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_plum import decode_spans
from partkit.masks import encode
from partkit.metrics import MaskSource
from partkit.predictions import Prediction, SpanMask
from partkit.schema import Question, as_chat, escape_tags
from partkit.spans import tag_phrases
from processing_plum import PlumProcessor, parse_span_tags

IGNORE_INDEX = -100

Message = dict[str, Any]
Row = tuple[Image.Image, list[Message]]  # a conversation and the image its first message is about


class Predictor:
    """Puts questions to one model; an image is encoded once per batch, however many questions it has."""

    def __init__(
        self, model, processor: PlumProcessor, *, max_new_tokens: int, choice_reduction: str, mask_source: MaskSource
    ):
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.choice_reduction = choice_reduction
        self.mask_source = mask_source
        self._embeddings: dict[int, torch.Tensor] = {}

    def predict(
        self, questions: Sequence[Question], images: Sequence[Image.Image], image_ids: Sequence[str]
    ) -> list[Prediction]:
        """One prediction per question, from the image given beside it. The same image must be the same object."""
        self._encode_images(images)
        tagged = self.processor.seg_token is not None
        choice_scores = self._score(
            [[(image, c) for c in choose(q, tagged=tagged)] for q, image in zip(questions, images, strict=True)]
        )
        asked = [index for index, question in enumerate(questions) if question.object_question is not None]
        object_scores = self._score(
            [[(images[i], c) for c in choose_object(questions[i], tagged=tagged)] for i in asked]
        )
        object_scores = dict(zip(asked, object_scores, strict=True))
        answers = [question.correct for question in questions]
        if self.mask_source == "predicted_answer":
            answers = [int(np.argmin(scores)) for scores in choice_scores]
        given = self._segment_given(questions, images, answers)
        generated = self._segment_freely(questions, images)
        return [
            Prediction(
                question_id=question.id,
                image_id=image_ids[index],
                choice_scores=choice_scores[index],
                object_choice_scores=object_scores.get(index),
                **given[index],
                **generated[index],
            )
            for index, question in enumerate(questions)
        ]

    def _encode_images(self, images: Sequence[Image.Image]) -> None:
        unique = list({id(image): image for image in images}.values())
        pixels = self.processor.sam_image_processor(unique, return_tensors="pt")["pixel_values"]
        embeddings = self.model.get_image_embeddings(pixels.to(self.model.device, self.model.dtype))
        self._embeddings = dict(zip(map(id, unique), embeddings, strict=True))

    def _encode(self, rows: Sequence[Row], *, prompt: bool = False) -> dict[str, torch.Tensor]:
        conversations = [as_chat(messages, image) for image, messages in rows]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            padding_side="left" if prompt else "right",
        )
        inputs = dict(inputs.to(self.model.device))
        del inputs["sam_pixel_values"]
        unique = dict.fromkeys(id(image) for image, _ in rows)
        inputs["sam_image_embeddings"] = torch.stack([self._embeddings[key] for key in unique])
        if prompt:
            inputs.pop("labels", None)
        else:
            inputs["labels"] = keep_last_answer(inputs["labels"])
        return inputs

    def _score(self, questions: Sequence[Sequence[Row]]) -> list[list[float]]:
        """Negative log-likelihood of every choice of every question."""
        scores = []
        for count, group in itertools.groupby(questions, key=len):
            inputs = self._encode(list(itertools.chain.from_iterable(group)))
            scores += self.model.score_choices(**inputs, num_choices=count, reduction=self.choice_reduction).tolist()
        return scores

    def _segment_given(
        self, questions: Sequence[Question], images: Sequence[Image.Image], answers: Sequence[int]
    ) -> list[dict[str, Any]]:
        given = list(zip(questions, answers, strict=True))
        tagged = [write_choice(question, index, tagged=True) for question, index in given]
        rows = [
            (image, [*ask(question), {"role": "assistant", "content": answer}])
            for question, image, answer in zip(questions, images, tagged, strict=True)
        ]
        inputs = self._encode(rows)
        outputs = self.model.segment(**inputs)
        segmented = self.processor.post_process_segmentation(outputs)
        starts = outputs.answer_mask.int().argmax(dim=1).tolist()
        true = tags_by_row(inputs["spans"], starts)
        predicted = tags_by_row(decode_spans(outputs.span_logits.argmax(dim=-1), outputs.answer_mask), starts)
        return [
            {
                "given_spans": [
                    make_span(part, start, end, span, question=question)
                    for part, (start, end), span in zip(
                        question.choice_parts[index],
                        parse_span_tags(tagged[row])[1],
                        segmented[row].spans,
                        strict=True,
                    )
                ],
                "true_tags": true[row],
                "predicted_tags": predicted[row],
            }
            for row, (question, index) in enumerate(given)
        ]

    def _segment_freely(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        rows = [(image, ask(question)) for question, image in zip(questions, images, strict=True)]
        inputs = self._encode(rows, prompt=True)
        outputs = self.model.segment(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        answers = self.processor.post_process_segmentation(outputs)
        return [
            {
                "generated_text": answer.text,
                "generated_spans": [
                    make_span(span.text, span.start, span.end, span, question=question) for span in answer.spans
                ],
            }
            for question, answer in zip(questions, answers, strict=True)
        ]


def ask(question: Question) -> list[Message]:
    """The messages up to the part question; `whole_to_part` asks for the object first, and is told."""
    messages = [{"role": "user", "content": question.question}]
    if question.question_type != "whole_to_part":
        return messages
    answer = escape_tags(question.object_choices[question.object_correct])
    return [{"role": "user", "content": question.object_question}, {"role": "assistant", "content": answer}, *messages]


def write_choice(question: Question, index: int, *, tagged: bool) -> str:
    """A choice as the model would write it: with its parts tagged if a token follows each grounded phrase."""
    choice = question.choices[index]
    return tag_phrases(choice, question.choice_parts[index]) if tagged else escape_tags(choice)


def choose(question: Question, *, tagged: bool) -> list[list[Message]]:
    """One conversation per choice of the part question."""
    choices = [write_choice(question, index, tagged=tagged) for index in range(len(question.choices))]
    return [[*ask(question), {"role": "assistant", "content": choice}] for choice in choices]


def choose_object(question: Question, *, tagged: bool) -> list[list[Message]]:
    """One conversation per choice of the object question; `part_to_whole` asks for the parts first, and is told."""
    messages = [{"role": "user", "content": question.object_question}]
    if question.question_type == "part_to_whole":
        answer = write_choice(question, question.correct, tagged=tagged)
        messages = [*ask(question), {"role": "assistant", "content": answer}, *messages]
    return [[*messages, {"role": "assistant", "content": escape_tags(choice)}] for choice in question.object_choices]


def keep_last_answer(labels: torch.LongTensor) -> torch.LongTensor:
    """Labels (B, L) of the last answer of each row; earlier answers, which were given, become -100."""
    answered = labels != IGNORE_INDEX
    number = (answered & ~F.pad(answered, (1, 0))[:, :-1]).cumsum(dim=1)
    return labels.masked_fill(number < number[:, -1:], IGNORE_INDEX)


def tags_by_row(spans: torch.LongTensor, starts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Token spans (S, 3) as [start, end) of each row, counted from the first token of its answer."""
    tags: list[list[tuple[int, int]]] = [[] for _ in starts]
    for row, start, end in spans.tolist():
        tags[row].append((start - starts[row], end - starts[row]))
    return tags


def make_span(text: str, start: int, end: int, span: Any, *, question: Question) -> SpanMask:
    """The record of a segmented span. A mask in the frame of a wrong image is stretched to the question's image."""
    height, width = question.masks[0].rle["size"]
    mask = span.mask
    if mask.shape != (height, width):
        mask = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return SpanMask(text=text, start=start, end=end, rle=encode(np.asarray(mask)), score=span.score)
