"""
Processor of PLUM: converts conversations with span tags and masks to model inputs, and model outputs to results.

    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What parts ...?"}]},
     {"role": "assistant", "content": "It has a <p>left wing</p> and a <p>tail</p>."}]        + two masks

A *span tag* `<p>...</p>` in an assistant's text encloses words with a mask; the i-th mask of a conversation belongs to
its i-th tag. Tags exist in Python strings only: they are removed before tokenizing and become character spans, which
token offsets turn into O/B/I labels by overlap. A literal tag is written `\\<p>`; texts of users have no tags and need
no escaping.

With a `seg_token` (`span_source="seg_token"` in [`PlumConfig`]) the words are followed by this special token, which
represents the span; it is removed from returned texts.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, BatchFeature, ImageProcessingMixin, Pipeline, ProcessorMixin
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

try:
    from .backbones_plum import find_processor_class, image_processor_class, images_only_processor
    from .chats_plum import (
        DEFAULT_CHAT_TEMPLATE,
        PlainChat,
        can_train_on,
        check_options,
        find_answers,
        find_continued_answer,
        find_image,
        render_chats,
        span_marks,
        strip_span_tags,
        without_images,
    )
    from .inputs_plum import check_number, encode_for_sam, read_image, side_for_sam, to_binary_mask
    from .modules_plum import IGNORE_INDEX, TAG_BEGIN, TAG_INSIDE, TAG_OUTSIDE
    from .segmenters_plum import label_frame, shrink_mask, upscale_masks
except ImportError:
    if __package__:
        raise
    from backbones_plum import find_processor_class, image_processor_class, images_only_processor
    from chats_plum import (
        DEFAULT_CHAT_TEMPLATE,
        PlainChat,
        can_train_on,
        check_options,
        find_answers,
        find_continued_answer,
        find_image,
        render_chats,
        span_marks,
        strip_span_tags,
        without_images,
    )
    from inputs_plum import check_number, encode_for_sam, read_image, side_for_sam, to_binary_mask
    from modules_plum import IGNORE_INDEX, TAG_BEGIN, TAG_INSIDE, TAG_OUTSIDE
    from segmenters_plum import label_frame, shrink_mask, upscale_masks

TASK = "grounded-image-text-to-text"
CUSTOM_PIPELINES = {
    TASK: {
        "impl": "processing_plum.PlumPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


@dataclass(frozen=True)
class PlumSpan:
    """
    A segmented span of an answer.

    Args:
        text: The words of the span.
        start, end: Their character range in the answer's text.
        mask: Boolean array `(height, width)` at the size of the given image.
        score: Tag probability times predicted IoU, in [0, 1].
        box: `(x0, y0, x1, y1)` in pixels around the mask, x1 and y1 exclusive; `None` for an empty mask.
    """

    text: str
    start: int
    end: int
    mask: np.ndarray
    score: float
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class PlumAnswer:
    """
    The text of an answer and its segmented spans, in order.

    Args:
        is_truncated: Whether a generated answer was cut off, as by `max_new_tokens`.
        confidence: Probability that the image is of a kind in the training data; answers to other images are
            unreliable. None without an image, or for a model without calibration.
    """

    text: str
    spans: list[PlumSpan]
    is_truncated: bool = False
    confidence: float | None = None


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """
    An image prepared by [`PlumProcessor.prepare_images`]. It replaces the image in conversations, so that an image
    with many questions is resized once.

    Args:
        tokens: The tokens of the image's placeholder by name: `input_ids` and further type ids.
        vlm_inputs: Inputs of the vision-language model for each row with this image, without pixels, `(1, ...)`.
        original_size, reshaped_size: (height, width) in pixels as given, and as resized for SAM before padding.
    """

    tokens: dict[str, list[int]]
    vlm_inputs: dict[str, torch.Tensor]
    original_size: torch.LongTensor
    reshaped_size: torch.LongTensor


class PlumProcessor(ProcessorMixin):
    r"""
    Image processors, tokenizer and chat template of PLUM in one.

    Args:
        image_processor: Prepares images for the vision-language model.
        sam_image_processor: Prepares images for SAM: longest side resized and padded to a square, or, for SAM 2 and 3,
            both sides resized to a square.
        tokenizer: A fast tokenizer with `image_token` as one token.
        num_image_tokens (`int`): Number of tokens of one image in the language model's input, if every image has the
            same number and no tokens around them.
        vlm_image_input (`str`): As in [`PlumConfig`]; with `"sam_image_embeddings"` no `pixel_values` are made.
        image_token (`str`): Placeholder of an image in a rendered conversation.
        seg_token (`str`, *optional*):
            Special token of the tokenizer that follows each grounded phrase, for a model with
            `span_source="seg_token"`; none for one with a span tagger.
        vlm_processor_class (`str`, *optional*):
            transformers' processor of the vision-language model, such as `"Qwen2_5_VLProcessor"`. It then determines
            the tokens of an image and further inputs of the model, and `num_image_tokens` is unused.
        vlm_processor_options (`dict`, *optional*): Further arguments of that class, such as `image_seq_len`.
        chat_template (`str`, *optional*):
            Jinja template of messages whose contents are lists of parts. The text of a turn must not depend on later
            turns.
    """

    def __init__(
        self,
        image_processor=None,
        sam_image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 576,
        vlm_image_input: str = "pixel_values",
        image_token: str = "<image>",
        seg_token: str | None = None,
        vlm_processor_class: str | None = None,
        vlm_processor_options: dict | None = None,
        chat_template: str | None = None,
    ):
        self.num_image_tokens = num_image_tokens
        self.vlm_image_input = vlm_image_input
        self.image_token = image_token
        self.seg_token = seg_token
        self.vlm_processor_class = vlm_processor_class
        self.vlm_processor_options = vlm_processor_options
        super().__init__(
            image_processor, sam_image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE
        )
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no token {image_token!r}; add it as a special token.")
        if seg_token is not None and seg_token not in tokenizer.all_special_tokens:
            raise ValueError(f"The tokenizer has no special token {seg_token!r}; add it.")
        self._marks = span_marks(seg_token)
        self._vlm_processor = None
        if vlm_processor_class is not None:
            options = vlm_processor_options or {}
            self._vlm_processor = images_only_processor(vlm_processor_class, image_processor, tokenizer, options)

    @staticmethod
    def get_possibly_dynamic_module(module_name: str) -> type:
        """Return the class of the second image processor when transformers loads this one."""
        return image_processor_class(module_name)

    @classmethod
    def from_backbones(cls, vlm: str, sam: str, *, vlm_image_options: dict | None = None) -> "PlumProcessor":
        """
        Return the processor for [`PlumForConditionalGeneration.from_backbones`] with the same arguments.

        Tokenizer, image processor and chat template are those of the vision-language model, with two exceptions. An
        image processor that crops pads the image to a square first, so that both models see the whole image. A chat
        template that PLUM cannot train on (it changes earlier turns, omits parts of a text, or does not end an answer
        with a special token) is replaced by PLUM's own, that of LLaVA-1.5, with a warning.

        Args:
            vlm: Folder or Hub name of an image-text-to-text model with its processor.
            sam: Folder or Hub name of a SAM with its image processor.
            vlm_image_options: Changed settings of the vision-language model's image processor, such as its `size`.

        Raises:
            ValueError: The image processor does not have such a setting, or PLUM cannot use the model's processor.
        """
        settings, _ = ProcessorMixin.get_processor_dict(vlm)
        own_code = {"trust_remote_code": False}
        model_type = AutoConfig.from_pretrained(vlm, **own_code).model_type
        name = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(model_type)
        tokenizer = AutoTokenizer.from_pretrained(vlm, **own_code)
        image_processor = _load_image_processor(vlm, vlm_image_options or {})
        family = find_processor_class(name)
        names = inspect.signature(family).parameters.keys() - {"chat_template", *family.get_attributes()}
        options = {key: value for key, value in settings.items() if key in names}
        processor = cls(
            image_processor,
            _sam_image_processor(sam),
            tokenizer,
            image_token=images_only_processor(name, image_processor, tokenizer, options).image_token,
            vlm_processor_class=name,
            vlm_processor_options=options,
        )
        template = settings.get("chat_template") or tokenizer.chat_template
        stops = tuple(tokenizer.all_special_tokens)
        if isinstance(template, str) and can_train_on(template, processor._template_variables, stops):
            processor.chat_template = template
        elif template:
            warnings.warn(
                f"The chat template of {vlm} is replaced by PLUM's own, as PLUM cannot be trained with it: it changes "
                "earlier turns, leaves out parts of a text or does not end answers with a special token.",
                stacklevel=2,
            )
        return processor

    @property
    def _template_variables(self) -> dict:
        return {**self.tokenizer.special_tokens_map, "image_token": self.image_token}

    @property
    def model_input_names(self) -> list[str]:
        sam_names = ["sam_pixel_values", "sam_image_index", "original_sizes", "reshaped_input_sizes"]
        vlm_names = self.image_processor.model_input_names if self.vlm_image_input == "pixel_values" else []
        return [*self.tokenizer.model_input_names, *vlm_names, *sam_names]

    # ---------------------------------------------------------------- encoding

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        masks: list | None = None,
        padding_side: str | None = None,
        continue_final_message: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> str | list[str] | BatchFeature:
        r"""
        Render conversations, and with `tokenize=True` encode them with their images, spans and masks.

        A conversation that ends with an assistant's answer is given, and its answers have labels. One that ends with
        the user, or is encoded with `add_generation_prompt` or `continue_final_message`, is to be continued: its
        earlier answers have neither labels nor spans.

        Args:
            conversation: One conversation or a list of them: messages `{"role", "content"}`, the content a string or
                a list of `{"type": "text", "text"}` and `{"type": "image", "image"}` (in any form that
                [`read_image`] takes, or a [`PreparedImage`]; either all images of a batch are prepared or none). As
                in transformers, `"url"`, `"path"` or `"base64"` may be the key, or `{"type": "image_url",
                "image_url": {"url"}}` the part. At most one image per conversation. One image object, path or URL in
                several conversations is read and encoded once.
            add_generation_prompt: End with the prompt for an assistant's answer.
            continue_final_message: End in the last message, an assistant's, which the model continues.
            masks: For each conversation (or for the only one) the masks of its span tags in order, in any form that
                [`to_binary_mask`] takes, or as one array `(spans, height, width)`; or `None` for a conversation
                without supervision of spans.
            padding_side: As in tokenizers; prompts that are continued need `padding_side="left"`.
            kwargs, processor_kwargs: Variables of the template; and options of transformers, which raise an error if
                they are not supported, such as `truncation`.

        Returns:
            The rendered text with its tags; or a `BatchFeature` of tensors: `input_ids`, `attention_mask` `(B, L)`;
            `labels` `(B, L)` where a conversation is given in full (-100 elsewhere); `spans` `(S, 3)`
            `[row, start, end)` in tokens where such an answer is tagged; `span_labels` `(B, L)` (O/B/I as 0/1/2, -100
            where unsupervised) and `mask_labels` (S bool tensors of the size of [`label_frame`]) with `masks`;
            `sam_image_index` `(B,)`, and where there are images `sam_pixel_values` `(N, 3, h, w)`, `original_sizes`
            and `reshaped_input_sizes` `(N, 2)` (height, width), `pixel_values` and further image inputs of the
            vision-language model.

        Raises:
            ValueError: Tags are unbalanced, nested or empty; the numbers of tags and masks differ; a mask differs in
                size from its image; a role, part or option is unknown; a text contains a special token. Tags outside
                assistant texts are plain text.
        """
        if isinstance(conversation, (str, dict)) or not len(conversation):
            raise ValueError(
                f"Expected a conversation, a list of messages, or at least one in a list, found {conversation!r:.80}."
            )
        is_batched = not isinstance(conversation[0], dict)
        conversation = list(conversation) if is_batched else [conversation]
        special_tokens = self._special_tokens
        conversations = [
            without_images(messages, special_tokens, where=f"Conversation {row}")
            for row, messages in enumerate(conversation)
        ]
        template, options = chat_template or self.chat_template, {**(processor_kwargs or {}), **kwargs}
        padding_side = options.pop("padding_side", padding_side)
        variables = self._template_variables | check_options(options, len(conversations), template)
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        self._check_ends(conversations, **ends)
        rendered = render_chats(conversations, template, variables, **ends)
        if not tokenize:
            return rendered if is_batched else rendered[0]

        texts = []
        for messages, text in zip(conversations, rendered, strict=True):
            given = messages[:-1] if continue_final_message else messages
            answers = find_answers(given, text, template, variables)
            if continue_final_message:
                answers.append(find_continued_answer(messages, text, template, variables))
            plain = self._marks.write(strip_span_tags(text, answers))
            if any(ends.values()) or messages[-1]["role"] != "assistant":
                plain = PlainChat(plain.text, [], [])
            texts.append(plain)
        images = _read_images([find_image(messages) for messages in conversation])
        if masks is not None and not is_batched:
            masks = [masks]
        batch = self._encode(texts, images, masks, padding_side)
        return batch if return_dict else batch["input_ids"]

    @property
    def _special_tokens(self) -> set[str]:
        """Return the texts that the tokenizer always reads as one token."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return {*added, *self.tokenizer.all_special_tokens, self.image_token}

    @staticmethod
    def _check_ends(conversations, *, add_generation_prompt: bool, continue_final_message: bool):
        if not continue_final_message:
            return
        if add_generation_prompt or continue_final_message is not True:
            raise ValueError(
                "continue_final_message writes on the last answer, add_generation_prompt asks for another; pass True "
                f"for one of them, found {continue_final_message!r} and {add_generation_prompt!r}."
            )
        other = next((row for row, messages in enumerate(conversations) if messages[-1]["role"] != "assistant"), None)
        if other is not None:
            raise ValueError(
                f"continue_final_message needs an assistant's message at the end, conversation {other} has none."
            )

    def __call__(
        self, images=None, text: str | list[str] | None = None, padding_side: str | None = None, **kwargs
    ) -> BatchFeature:
        """
        Encode rendered prompts with one image placeholder for each image; see [`apply_chat_template`] for
        conversations, answers and masks.

        Args:
            images: An image, in any form that [`read_image`] takes, or a list with one for each text with a
                placeholder, in order, or with a list for each text.
            text: A prompt or a list of prompts.
            kwargs: Options of transformers, which raise an error if they are not supported, such as `truncation`.
        """
        texts = list(text) if hasattr(text, "__iter__") and not isinstance(text, str) else [text]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"Expected a prompt, such as 'USER: {self.image_token}\\n... ASSISTANT:', or a list of prompts, found "
                f"{text!r:.80}; conversations are for apply_chat_template."
            )
        check_options(kwargs, len(texts))
        images = list(_flatten(images))
        wanted = [self.image_token in text for text in texts]
        if sum(wanted) != len(images):
            raise ValueError(f"Found {len(images)} images for {sum(wanted)} texts with {self.image_token!r}.")
        remaining = iter(images)
        images = _read_images([next(remaining) if has_image else None for has_image in wanted])
        return self._encode([PlainChat(text, [], []) for text in texts], images, None, padding_side)

    def _encode(self, texts, images, masks, padding_side) -> BatchFeature:
        if masks is not None and len(masks) != len(texts):
            raise ValueError(f"Found masks for {len(masks)} conversations but {len(texts)} conversations.")
        if masks is not None and not any(text.answers for text in texts):
            raise ValueError("Masks belong to answers that are given, and all conversations are to be continued.")
        self._check_images(texts, images)
        image_inputs, image_tokens = self._encode_images(images)
        tokens = self._tokenize(texts, image_tokens, padding_side)
        offsets = tokens.pop("offset_mapping")
        batch = BatchFeature(tokens)
        if any(text.answers for text in texts):
            in_answer = torch.stack([_overlap(row, text.answers) for row, text in zip(offsets, texts, strict=True)])
            in_answer &= batch["attention_mask"].bool()
            batch["labels"] = torch.where(in_answer, batch["input_ids"], IGNORE_INDEX)
        if any(text.spans for text in texts) or masks is not None:
            batch["spans"] = self._locate_spans(texts, offsets)
        if masks is not None:
            batch["span_labels"] = self._label_spans(batch, masks)
            batch["mask_labels"] = self._prepare_masks(texts, image_inputs, masks)
        batch.update(image_inputs)
        return batch

    def _check_images(self, texts, images):
        for row, (text, image) in enumerate(zip(texts, images, strict=True)):
            found, expected = text.text.count(self.image_token), int(image is not None)
            if found != expected:
                hint = "it must not occur in a message's text"
                if found < expected:
                    hint = "the chat template leaves the image out, so put it into a message of the user"
                raise ValueError(
                    f"Conversation {row} has {found} image placeholders {self.image_token!r} for {expected} images; "
                    f"{hint}."
                )

    def _tokenize(self, texts, image_tokens, padding_side) -> dict[str, torch.Tensor]:
        """
        Return padded `(B, L)` tensors and `offset_mapping` `(B, L, 2)` of texts whose placeholders are replaced by the
        tokens of their image. Placeholders are special tokens and do not change the tokens around them.
        """
        add_special_tokens = not all(text.text.startswith(self.tokenizer.bos_token or "\0") for text in texts)
        encoded = self.tokenizer(
            [text.text for text in texts], add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
        names = ["attention_mask", *next(filter(None, image_tokens), {"input_ids": []})]
        rows = {name: [] for name in [*names, "offset_mapping"]}
        for ids, offsets, image in zip(encoded["input_ids"], encoded["offset_mapping"], image_tokens, strict=True):
            if not ids:
                raise ValueError(f"Text {len(rows['input_ids'])} has no tokens; give a prompt with words.")
            row = {name: [0] * len(ids) for name in names} | {"input_ids": ids, "offset_mapping": offsets}
            if image is not None:
                at = ids.index(self.image_token_id)
                image = image | {"offset_mapping": [offsets[at]] * len(image["input_ids"])}
                row |= {name: row[name][:at] + image[name] + row[name][at + 1 :] for name in image}
            row["attention_mask"] = [1] * len(row["input_ids"])
            for name, values in row.items():
                rows[name].append(torch.tensor(values))
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        side = padding_side or self.tokenizer.padding_side
        return {
            name: pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0), padding_side=side)
            for name, values in rows.items()
        }

    def _locate_spans(self, texts, offsets) -> torch.LongTensor:
        """Return token ranges `(S, 3)` of the character spans: the tokens that overlap them."""
        spans = []
        for row, (text, row_offsets) in enumerate(zip(texts, offsets, strict=True)):
            last_end = 0
            for start, end in text.spans:
                tokens = _overlap(row_offsets, [(start, end)]).nonzero()[:, 0]
                if not len(tokens) or tokens[0] < last_end:
                    raise ValueError(
                        f"The span {text.text[start:end]!r} of conversation {row} has no tokens of its own; keep a "
                        f"space or a word between two spans: {text.text[max(0, start - 40) : end + 40]!r}"
                    )
                spans.append((row, int(tokens[0]), int(tokens[-1]) + 1))
                last_end = spans[-1][2]
        return torch.tensor(spans, dtype=torch.long).reshape(-1, 3)

    def _label_spans(self, batch, masks) -> torch.LongTensor:
        supervised = torch.tensor([row is not None for row in masks])[:, None]
        span_labels = torch.where((batch["labels"] != IGNORE_INDEX) & supervised, TAG_OUTSIDE, IGNORE_INDEX)
        for row, start, end in batch["spans"].tolist():
            if masks[row] is not None:
                span_labels[row, start:end] = TAG_INSIDE
                span_labels[row, start] = TAG_BEGIN
        return span_labels

    def _prepare_masks(self, texts, image_inputs, masks) -> list[torch.Tensor]:
        prepared = []
        for text, image, row in zip(texts, image_inputs["sam_image_index"].tolist(), masks, strict=True):
            row = [] if row is None else list(row)
            if len(row) != len(text.spans):
                answers = " ".join(text.text[start:end].strip() for start, end in text.answers)
                raise ValueError(f"Found {len(text.spans)} span tags but {len(row)} masks for the text {answers!r}.")
            if not row:
                continue
            if image < 0:
                raise ValueError(f"Found {len(row)} masks for a conversation without an image.")
            original, reshaped = (
                image_inputs[f"{name}_sizes"][image].tolist() for name in ("original", "reshaped_input")
            )
            frame = label_frame(original, reshaped)
            for mask in row:
                whole = torch.from_numpy(to_binary_mask(mask, tuple(original)))
                prepared.append(whole if tuple(whole.shape) == frame else shrink_mask(whole, frame))
        return prepared

    def _encode_images(self, images) -> tuple[dict, list[dict[str, list[int]] | None]]:
        """Return the image inputs of the batch, and for each row the tokens of its placeholder by name."""
        unique = list({id(image): image for image in images if image is not None}.values())
        position = {id(image): i for i, image in enumerate(unique)}
        encoded = {"sam_image_index": torch.tensor([position.get(id(image), -1) for image in images])}
        if not unique:
            return encoded, [None] * len(images)
        present = [image for image in images if image is not None]
        if isinstance(unique[0], PreparedImage):
            encoded["original_sizes"] = torch.stack([image.original_size for image in unique])
            encoded["reshaped_input_sizes"] = torch.stack([image.reshaped_size for image in unique])
            for name in unique[0].vlm_inputs:
                encoded[name] = torch.cat([image.vlm_inputs[name] for image in present])
            return encoded, [None if image is None else image.tokens for image in images]
        encoded |= self._encode_for_sam(unique)
        vlm_inputs, tokens = self._encode_for_vlm(present)
        remaining = iter(tokens)
        return encoded | vlm_inputs, [None if image is None else next(remaining) for image in images]

    def _encode_for_sam(self, images) -> dict[str, torch.Tensor]:
        encoded = encode_for_sam(images, self.sam_image_processor)
        return {name: torch.from_numpy(values) for name, values in encoded.items()}

    def _encode_for_vlm(self, images) -> tuple[dict, list[dict[str, list[int]]]]:
        if self._vlm_processor is not None:
            return self._run_vlm_processor(images)
        tokens = [{"input_ids": [self.image_token_id] * self.num_image_tokens}] * len(images)
        inputs = self.vlm_image_input == "pixel_values" and self.image_processor(images, return_tensors="pt")
        return dict(inputs or {}), tokens

    def prepare_images(self, images: list) -> tuple[list[PreparedImage], dict, dict]:
        """
        Read images for questions in several batches.

        Returns:
            For each image its replacement in conversations; SAM's inputs; and the vision-language model's inputs for
            [`PlumForConditionalGeneration.get_vlm_image_features`]. Conversations with prepared images have no pixels:
            pass `sam_image_embeddings` and `vlm_image_features` to the model instead.
        """
        images = _read_images(images)
        sam_inputs = self._encode_for_sam(images)
        vlm_inputs, tokens = self._encode_for_vlm(images)
        of_rows = {
            name: value
            for name, value in vlm_inputs.items()
            if not name.startswith("pixel_") and isinstance(value, torch.Tensor) and len(value) == len(images)
        }
        prepared = [
            PreparedImage(
                tokens=tokens[i],
                vlm_inputs={name: value[i : i + 1] for name, value in of_rows.items()},
                original_size=sam_inputs["original_sizes"][i],
                reshaped_size=sam_inputs["reshaped_input_sizes"][i],
            )
            for i in range(len(images))
        ]
        return prepared, sam_inputs, vlm_inputs

    def _run_vlm_processor(self, images) -> tuple[dict, list[dict[str, list[int]]]]:
        """Return the vision-language model's image inputs, and the tokens of each image."""
        outputs = self._vlm_processor(
            images=[[image] for image in images],
            text=[self.image_token] * len(images),
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        real, shape = outputs["attention_mask"].bool(), outputs["input_ids"].shape
        by_token = {
            name: outputs.pop(name)
            for name, value in list(outputs.items())
            if name == "input_ids" or name.endswith("token_type_ids") and value.shape == shape
        }
        del outputs["attention_mask"]
        return dict(outputs), [
            {name: value[row][real[row]].tolist() for name, value in by_token.items()} for row in range(len(images))
        ]

    # ---------------------------------------------------------------- decoding

    def post_process_segmentation(self, outputs, mask_threshold: float = 0.0) -> list[PlumAnswer]:
        """
        Return the results of [`PlumForConditionalGeneration.segment`] at the size of the given images. They take one
        byte per pixel and span, and temporarily eight more per pixel of the largest image.

        Args:
            outputs: Output of `segment`.
            mask_threshold: Logit above which a pixel is inside.

        Returns:
            One [`PlumAnswer`] per row; a row without spans has an empty list of them. A `seg_token` marks the end of a
            phrase but not its start, so the text of its span comes from [`find_last_phrase`].

        Raises:
            ValueError: `mask_threshold` is not a finite number, or the outputs lack the sizes of the images.
        """
        check_number(mask_threshold, name="mask_threshold")
        if len(outputs.spans) and (outputs.original_sizes is None or outputs.reshaped_input_sizes is None):
            raise ValueError("Masks need original_sizes and reshaped_input_sizes; pass them to the model as well.")
        ids = [row[mask].tolist() for row, mask in zip(outputs.sequences, outputs.answer_mask, strict=True)]
        # Spans of earlier answers were segmented only to guide later ones.
        in_answer = outputs.answer_mask[outputs.spans[:, 0], outputs.spans[:, 1]].tolist()
        rows = [row if inside else None for row, inside in zip(outputs.spans[:, 0].tolist(), in_answer, strict=True)]
        answers = []
        for row, answer_ids in enumerate(ids):
            text = self._decode(answer_ids)
            lead = len(text) - len(text.lstrip())
            members = [i for i, span_row in enumerate(rows) if span_row == row]
            spans, last_end = [], 0
            for i in members:
                mask = self._upscale(outputs, row, i, mask_threshold)
                start, end = self._character_range(answer_ids, outputs.answer_mask[row], outputs.spans[i, 1:].tolist())
                start, last_end = self._marks.find_start(text, start, end, last_end=last_end), end
                words = text[start:end]
                start += len(words) - len(words.lstrip())
                end -= len(words) - len(words.rstrip())
                score = float(outputs.tag_scores[i] * outputs.iou_scores[i].clamp(0, 1))
                spans.append(PlumSpan(text[start:end], start - lead, end - lead, mask, score, _bounding_box(mask)))
            image, confidence = int(outputs.sam_image_index[row]), None
            if outputs.image_confidences is not None and image >= 0:
                confidence = float(outputs.image_confidences[image])
            answers.append(PlumAnswer(text.strip(), spans, bool(outputs.is_truncated[row]), confidence))
        return answers

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _character_range(self, answer_ids, answer_mask, token_range) -> tuple[int, int]:
        """Return the character range in the answer's text of a range of tokens of the sequence."""
        before, until = (int(answer_mask[:position].sum()) for position in token_range)
        return len(self._decode(answer_ids[:before])), len(self._decode(answer_ids[:until]))

    def _upscale(self, outputs, row: int, index: int, mask_threshold: float) -> np.ndarray:
        """Return one boolean mask at the size of its image; only one span's logits are in memory at that size."""
        image = int(outputs.sam_image_index[row])
        sizes = (getattr(outputs, f"{name}_sizes")[image].tolist() for name in ("reshaped_input", "original"))
        windows = None if outputs.mask_windows is None else outputs.mask_windows[index, None]
        side = side_for_sam(self.sam_image_processor)
        logits = upscale_masks(outputs.pred_masks[index, None].float(), side, *sizes, windows)
        return (logits[0] > mask_threshold).cpu().numpy()


def _flatten(images) -> Iterator:
    """Yield the images of nested lists."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from _flatten(image)
    elif images is not None:
        yield images


def _read_images(sources: list) -> list:
    """Return RGB images for the given sources; a repeated source becomes one object."""
    images = {}
    for i, source in enumerate(sources):
        key = source if isinstance(source, (str, PurePath)) else id(source)
        if key not in images:
            kept = source is None or isinstance(source, PreparedImage)
            images[key] = source if kept else read_image(source, where=f"Image {i}")
    return [images[source if isinstance(source, (str, PurePath)) else id(source)] for source in sources]


def _sam_image_processor(name: str):
    """
    Return the image processor of a SAM. Those of SAM 2 and 3 need torchvision, to no purpose here: they resize to a
    square and normalise, as that of ViT does with the same settings.
    """
    settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    if "longest_edge" in settings["size"]:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    used = ("size", "resample", "rescale_factor", "image_mean", "image_std")
    return image_processor_class("ViTImageProcessor")(**{key: settings[key] for key in used if key in settings})


def _load_image_processor(vlm: str, options: dict):
    """Return the image processor of a vision-language model with changed settings, and padding instead of a crop."""
    image_processor = AutoImageProcessor.from_pretrained(vlm, trust_remote_code=False)
    settings, family = image_processor.to_dict(), type(image_processor)
    unknown = sorted(options.keys() - settings.keys())
    if unknown:
        raise ValueError(
            f"vlm_image_options has {unknown}, which the image processor of {vlm} does not have; its settings are "
            f"{', '.join(sorted(settings))}."
        )
    if settings.get("do_center_crop"):
        family, options = image_processor_class("LlavaImageProcessor"), {**options, "do_pad": True}
    return family.from_dict({**settings, **options}) if options else image_processor


def _overlap(offsets: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.BoolTensor:
    """Return which tokens, by their `(L, 2)` character offsets, overlap any of the character ranges."""
    # Overlap, not containment: the offsets of some tokenizers include the space before a word.
    starts, ends = offsets.unbind(dim=1)
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for start, end in ranges:
        inside |= (starts < end) & (ends > start)
    return inside


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class PlumPipeline(Pipeline):
    """
    Pipeline from an image and a question to text and segments.

    An input is `{"image": ..., "text": question}` (an image in any form that the processor reads, or None; further
    fields are ignored), `{"text": question}`, or a conversation as for `PlumProcessor.apply_chat_template` that ends
    with the user. An output has `generated_text`, `is_truncated` and `confidence` as in [`PlumAnswer`], and
    `segments`: `start` and `end` of a segment are characters of the text, `box` is `(x0, y0, x1, y1)` in pixels or
    None, `mask` is an image of 0 and 255 of the size of the input. `mask_threshold` is a logit; other options are
    those of `generate`.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = False

    def _sanitize_parameters(self, mask_threshold: float | None = None, **generate_options):
        if mask_threshold is not None:
            check_number(mask_threshold, name="mask_threshold")
            generate_options["mask_threshold"] = mask_threshold
        return {}, generate_options, {}

    def __call__(self, inputs, *args, batch_size: int | None = None, **kwargs):
        batch_size = next(size for size in (batch_size, self._batch_size, 1) if size is not None)
        check_number(batch_size, name="batch_size", least=1, whole=True)
        return super().__call__(_stream_data_set(inputs), *args, batch_size=batch_size, **kwargs)

    def preprocess(self, inputs) -> list[dict]:
        """Return the conversation of one input."""
        if isinstance(inputs, dict):
            if not isinstance(inputs.get("text"), str) or "image" not in inputs and len(inputs) > 1:
                raise ValueError(
                    "An input needs a question as its 'text' and an 'image', which may be None, found the fields "
                    f"{sorted(map(str, inputs))}."
                )
            content = [{"type": "text", "text": inputs["text"]}]
            if inputs.get("image") is not None:
                content.insert(0, {"type": "image", "image": inputs["image"]})
            return [{"role": "user", "content": content}]
        chat = getattr(inputs, "messages", inputs)
        if not isinstance(chat, (list, tuple)) or not all(isinstance(message, dict) for message in chat):
            raise ValueError(
                "Expected {'image': ..., 'text': question} or a conversation, a list of messages, found "
                f"{type(chat).__name__} {chat!r:.80}."
            )
        chat = list(chat)
        if not chat or chat[-1].get("role") != "user":
            raise ValueError(f"A conversation must end with the user to be answered, found {len(chat)} messages.")
        return chat

    def _forward(self, chats: list[list[dict]], mask_threshold: float = 0.0, **generate_options) -> list:
        batch = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, padding_side="left"
        )
        outputs = self.model.segment(**batch.to(self.model.device), **generate_options)
        return self.processor.post_process_segmentation(outputs, mask_threshold=mask_threshold)

    def postprocess(self, answer) -> dict:
        segments = [
            {
                "label": span.text,
                "start": span.start,
                "end": span.end,
                "score": span.score,
                "box": span.box,
                "mask": Image.fromarray(span.mask).convert("L"),
            }
            for span in answer.spans
        ]
        return {
            "generated_text": answer.text,
            "is_truncated": answer.is_truncated,
            "confidence": answer.confidence,
            "segments": segments,
        }

    def save_pretrained(self, save_directory, **kwargs):
        """Save model and processor. transformers' pipelines save no processor, and could not be loaded again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    # Rows of a batch share images and differ in their number of spans: they are batched as conversations, and neither
    # padded nor split by the base class.
    def get_iterator(
        self, inputs: Iterable, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict]:
        chats = (self.preprocess(item, **preprocess_params) for item in inputs)
        while batch := list(islice(chats, batch_size)):
            yield from map(self.postprocess, self.forward(batch, **forward_params))

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params) -> dict:
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))


def _stream_data_set(inputs):
    """Return a data set, or a list without inputs, as a generator of its rows; anything else unchanged."""
    is_empty = isinstance(inputs, (list, tuple)) and not inputs  # the base class would look at the first input
    has_rows = hasattr(inputs, "column_names") and hasattr(inputs, "features")  # from `datasets`, which is optional
    if is_empty or has_rows or isinstance(inputs, torch.utils.data.IterableDataset):
        return (row for row in inputs)
    if isinstance(inputs, torch.utils.data.Dataset):
        return (inputs[i] for i in range(len(inputs)))
    return inputs


PlumProcessor.register_for_auto_class()

__all__ = ["PlumAnswer", "PlumPipeline", "PlumProcessor", "PlumSpan", "PreparedImage"]
