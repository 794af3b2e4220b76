"""Answer benchmark questions with a PLUM model; evaluate_plum.py selects the questions and scores the predictions."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from modules_plum import decode_spans, keep_last_answer
from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.inference.packing import encode_conversations
from plum_partonomy.masks import encode, resize
from plum_partonomy.questions.spans import tag_phrases
from plum_partonomy.records import Question, as_chat, escape_tags
from plum_partonomy.scoring.metrics import MaskSource
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from processing_plum import PlumProcessor, PreparedImage, parse_span_tags

IMAGES_KEPT = 128
Message = dict[str, Any]
Row = tuple[str, list[Message]]  # image id, and a conversation about the image


@dataclass(frozen=True)
class ImageFeatures:
    """Cached features of an image: its placeholder tokens and the outputs of both encoders."""

    shown: PreparedImage | Image.Image
    sam_embedding: torch.Tensor
    vlm_features: torch.Tensor | None  # None if the vision-language model needs the pixels each time


class ImageCache:
    """
    Features of recent images, so that an image is resized and encoded once for all its questions and, if memory
    allows, for its use as a wrong image.

    Args:
        size: Number of images to keep.
        embedding_cache: Embeddings of SAM's encoder on disk, if any.
    """

    def __init__(self, model, processor: PlumProcessor, *, size: int, embedding_cache: EmbeddingCache | None = None):
        self.model, self.processor, self.size = model, processor, size
        self.embed = model.get_image_embeddings if embedding_cache is None else embedding_cache.embed
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()
        self.uses, self.encoded = 0, 0

    def look_up(self, image_ids: Sequence[str], images: Sequence[Image.Image]) -> dict[str, ImageFeatures]:
        """
        Return features by image id. Missing ones are computed one image at a time, so that results do not depend on
        the images that a resumed run has cached.
        """
        wanted = dict(zip(image_ids, images, strict=True))
        absent = {name: image for name, image in wanted.items() if name not in self._features}
        self._features |= {name: self._encode(image) for name, image in absent.items()}
        self.uses += len(image_ids)
        self.encoded += len(absent)
        for name in wanted:
            self._features.move_to_end(name)
        found = {name: self._features[name] for name in wanted}
        while len(self._features) > self.size:
            self._features.popitem(last=False)
        return found

    @torch.no_grad()
    def _encode(self, image: Image.Image) -> ImageFeatures:
        device = self.model.device
        (prepared,), sam_inputs, vlm_inputs = self.processor.prepare_images([image])
        embeddings = self.embed(sam_inputs["sam_pixel_values"].to(device))
        vlm_inputs = {name: value.to(device) for name, value in vlm_inputs.items() if isinstance(value, torch.Tensor)}
        features = self.model.get_vlm_image_features(
            [prepared.num_image_tokens], sam_image_embeddings=embeddings, **vlm_inputs
        )
        if features is None:
            return ImageFeatures(image, embeddings[0], None)
        return ImageFeatures(prepared, embeddings[0], features[0])

    def summary(self) -> dict[str, Any]:
        """Return the number of requests, the number of encoded images and the hit rate."""
        hit_rate = 1 - self.encoded / self.uses if self.uses else None
        return {"size": self.size, "uses": self.uses, "encoded": self.encoded, "hit_rate": hit_rate}


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
        self.images = ImageCache(model, processor, size=image_cache_size, embedding_cache=embedding_cache)
        self._features: dict[str, ImageFeatures] = {}

    def predict(
        self, questions: Sequence[Question], images: Sequence[Image.Image], image_ids: Sequence[str]
    ) -> list[Prediction]:
        """Return one prediction per question for the image at the same index; an id stands for one image."""
        self._features = self.images.look_up(image_ids, images)
        tagged = self.processor.seg_token is not None
        asked = [index for index, question in enumerate(questions) if question.object_question is not None]
        choices = [(image_ids[i], choose(question, tagged=tagged)) for i, question in enumerate(questions)]
        choices += [(image_ids[i], choose_object(questions[i], tagged=tagged)) for i in asked]
        scores, hidden_states = self._score(choices)
        choice_scores, object_scores = (
            scores[: len(questions)],
            dict(zip(asked, scores[len(questions) :], strict=True)),
        )
        answers = [question.correct for question in questions]
        if self.mask_source == "predicted_answer":
            answers = [int(np.argmin(scores)) for scores in choice_scores]
        starts = np.cumsum([0, *(len(question.choices) for question in questions)])[:-1]
        given = self._segment_given(questions, image_ids, answers, hidden_states[starts + answers])
        generated = self._segment_freely(questions, image_ids)
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

    def summary(self) -> dict[str, Any]:
        """Return the number of requests, the number of encoded images and the hit rate."""
        return self.images.summary()

    def _encode(self, rows: Sequence[Row], *, prompt: bool = False) -> dict[str, torch.Tensor]:
        conversations = [as_chat(messages, self._features[name].shown) for name, messages in rows]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            padding_side="left" if prompt else "right",
        )
        inputs = dict(inputs.to(self.model.device))
        inputs.pop("sam_pixel_values", None)
        features = [self._features[name] for name in dict.fromkeys(name for name, _ in rows)]
        inputs["sam_image_embeddings"] = torch.stack([image.sam_embedding for image in features])
        if features[0].vlm_features is not None:
            inputs["vlm_image_features"] = [image.vlm_features for image in features]
        if not prompt:
            inputs["labels"] = keep_last_answer(inputs["labels"])
        return inputs

    def _score(
        self, questions: Sequence[tuple[str, Sequence[list[Message]]]]
    ) -> tuple[list[list[float]], torch.Tensor]:
        """Return the negative log-likelihood of each choice of each question, and the hidden states of all."""
        rows = [(image_id, choice) for image_id, choices in questions for choice in choices]
        inputs = self._encode(rows)
        inputs["hidden_states"] = encode_conversations(self.model, **inputs)
        scores = self.model.score_choices(**inputs, num_choices=1, reduction=self.choice_reduction)
        counts = [len(choices) for _, choices in questions]
        return [of_question.flatten().tolist() for of_question in scores.split(counts)], inputs["hidden_states"]

    def _segment_given(
        self,
        questions: Sequence[Question],
        image_ids: Sequence[str],
        answers: Sequence[int],
        hidden_states: torch.Tensor,
    ) -> list[dict[str, Any]]:
        """Return the masks of the parts of one choice each, from hidden states; span tags do not change its tokens."""
        given = list(zip(questions, answers, strict=True))
        tagged = [write_choice(question, index, tagged=True) for question, index in given]
        rows = [
            (image_id, [*ask(question), {"role": "assistant", "content": answer}])
            for question, image_id, answer in zip(questions, image_ids, tagged, strict=True)
        ]
        inputs = self._encode(rows)
        outputs = self.model.segment_spans(**inputs, hidden_states=hidden_states[:, : inputs["input_ids"].shape[1]])
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

    def _segment_freely(self, questions: Sequence[Question], image_ids: Sequence[str]) -> list[dict[str, Any]]:
        rows = [(image_id, ask(question)) for question, image_id in zip(questions, image_ids, strict=True)]
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


def choose(question: Question, *, tagged: bool) -> list[list[Message]]:
    """Return one conversation per choice of the part question."""
    choices = [write_choice(question, index, tagged=tagged) for index in range(len(question.choices))]
    return [[*ask(question), {"role": "assistant", "content": choice}] for choice in choices]


def choose_object(question: Question, *, tagged: bool) -> list[list[Message]]:
    """Return one conversation per object choice, after the answered part question in `part_to_whole`."""
    messages = [{"role": "user", "content": question.object_question}]
    if question.question_type == "part_to_whole":
        answer = write_choice(question, question.correct, tagged=tagged)
        messages = [*ask(question), {"role": "assistant", "content": answer}, *messages]
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
