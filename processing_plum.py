"""
Processor of PLUM: conversations with span tags and masks to model inputs, and model outputs to typed results.

    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What parts ...?"}]},
     {"role": "assistant", "content": "It has a <p>left wing</p> and a <p>tail</p>."}]        + two masks

A *span tag* `<p>...</p>` in an assistant's text says that the words are grounded by a mask, the i-th tag of a
conversation by its i-th mask. Tags live in Python strings only: they are taken out before tokenizing, and become
character spans, then O/B/I labels by the offsets of the tokens that overlap them. A literal tag is written `\\<p>`;
in a user's text there are no tags, so nothing needs escaping there.
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import load_image
from transformers.utils.chat_template_utils import render_jinja_template

TAG_OUTSIDE, TAG_BEGIN, TAG_INSIDE = 0, 1, 2
IGNORE_INDEX = -100

DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- ' ' -}}
{%- else -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{%- if message.content is string -%}{{- ' ' + message.content + eos_token -}}
{%- else -%}{{- ' ' + message.content[0].text + eos_token -}}
{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class PlumSpan:
    """
    A segmented span of an answer.

    Args:
        text: The words of the span.
        start, end: Their character range in the answer's text.
        mask: Boolean array `(height, width)` at the size of the image as given.
        score: Tag probability times predicted IoU, in 0..1.
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
    """The text of an answer and its segmented spans, in order."""

    text: str
    spans: list[PlumSpan]


@dataclass
class _Text:
    """A rendered conversation without tags; ranges are `(start, end)` in characters of `text`."""

    text: str
    answers: list[tuple[int, int]]
    spans: list[tuple[int, int]]


def parse_span_tags(text: str) -> tuple[str, list[tuple[int, int]]]:
    r"""
    Takes the span tags out of a text.

    >>> parse_span_tags("A <p>wing</p> and \\<p> as text.")
    ('A wing and <p> as text.', [(2, 6)])

    Returns:
        The plain text, and the character range `(start, end)` of each span in it.

    Raises:
        ValueError: A tag is unbalanced, nested or empty; the message counts the tags and quotes the text.
    """
    plain, spans, opened, last = "", [], None, 0

    def fail(problem: str):
        opening, closing = (len(re.findall(rf"(?<!\\){tag}", text)) for tag in ("<p>", "</p>"))
        raise ValueError(f"{problem} in a text with {opening} opening and {closing} closing span tags: {text!r}")

    for match in re.finditer(r"\\?</?p>", text):
        plain += text[last : match.start()]
        last = match.end()
        tag = match.group()
        if tag.startswith("\\"):
            plain += tag[1:]
        elif tag == "<p>":
            if opened is not None:
                fail("Nested span tag")
            opened = len(plain)
        else:
            if opened is None:
                fail("Unbalanced span tag")
            if not plain[opened:].strip():
                fail("Empty span tag")
            spans.append((opened, len(plain)))
            opened = None
    if opened is not None:
        fail("Unbalanced span tag")
    return plain + text[last:], spans


def to_binary_mask(mask, size: tuple[int, int]) -> np.ndarray:
    """
    A mask in any of the usual forms as a boolean array.

    Args:
        mask: Array, tensor or PIL image `(height, width)` (non-zero is inside); COCO RLE `{"size", "counts"}`; or a
            list of polygons `[x0, y0, x1, y1, ...]` in pixels, united.
        size: (height, width) of the image the mask belongs to.

    Raises:
        ValueError: The mask has another size than its image, or its RLE is damaged.
    """
    if isinstance(mask, (dict, list)):
        mask = _decode_coco(mask, size)
    mask = np.asarray(mask)
    if mask.shape != tuple(size):
        raise ValueError(f"A mask is {mask.shape} (height, width) but its image is {tuple(size)}; resize the mask.")
    return mask != 0


def _decode_coco(mask: dict | list, size: tuple[int, int]) -> np.ndarray:
    from pycocotools import mask as coco_mask

    if isinstance(mask, dict):
        if list(mask["size"]) != list(size):
            raise ValueError(f"An RLE mask has size {list(mask['size'])} (height, width) but its image {list(size)}.")
        if isinstance(mask["counts"], list):
            if any(run < 0 for run in mask["counts"]) or sum(mask["counts"]) != size[0] * size[1]:
                raise ValueError(f"The runs of an RLE mask do not add up to {size[0]} x {size[1]} pixels.")
            mask = coco_mask.frPyObjects(mask, *size)
        try:
            return coco_mask.decode(mask)
        except ValueError as error:
            raise ValueError(f"An RLE mask does not decode to {size[0]} x {size[1]} pixels: {error}") from error
    if not mask or any(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
        raise ValueError(f"A polygon needs at least three points, [x0, y0, x1, y1, x2, y2], found {mask}.")
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(mask, *size)))


class PlumProcessor(ProcessorMixin):
    r"""
    Image processors, tokenizer and chat template of PLUM in one.

    Args:
        image_processor: Prepares images for the vision-language model.
        sam_image_processor: Prepares images for SAM: longest side resized, padded to a square.
        tokenizer: A fast tokenizer that has `image_token` as one token.
        num_image_tokens (`int`): Tokens that stand for one image in the language model's input.
        vlm_image_input (`str`): As in [`PlumConfig`]; with `"sam_image_embeddings"` no `pixel_values` are made.
        image_token (`str`): Placeholder of an image in a rendered conversation.
        chat_template (`str`, *optional*): Jinja template; it must mark assistant texts with `{% generation %}`.
    """

    def __init__(
        self,
        image_processor=None,
        sam_image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 576,
        vlm_image_input: str = "pixel_values",
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs,
    ):
        self.num_image_tokens = num_image_tokens
        self.vlm_image_input = vlm_image_input
        self.image_token = image_token
        super().__init__(
            image_processor, sam_image_processor, tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE
        )
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"The tokenizer has no token {image_token!r}; add it as a special token.")

    @property
    def model_input_names(self) -> list[str]:
        sam_names = ["sam_pixel_values", "sam_image_index", "original_sizes", "reshaped_input_sizes"]
        vlm_names = ["pixel_values"] if self.vlm_image_input == "pixel_values" else []
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
        padding: bool | str = True,
        padding_side: str | None = None,
        **kwargs,
    ) -> str | list[str] | BatchFeature:
        r"""
        Renders conversations, and with `tokenize=True` encodes them with their images, spans and masks.

        Args:
            conversation: One conversation or a list of them: messages `{"role", "content"}`, the content a string or
                a list of `{"type": "text", "text"}` and `{"type": "image", "image"}` (PIL image, array, path or URL).
                At most one image per conversation. One image object in several conversations is encoded once.
            add_generation_prompt: End with the words after which an assistant answers.
            masks: For each conversation (or for the only one) the masks of its span tags in order, in any form that
                [`to_binary_mask`] takes, or `None` where the conversation does not supervise spans.
            padding, padding_side: As in tokenizers; prompts that are continued need `padding_side="left"`.
            kwargs: Variables of the template.

        Returns:
            The rendered text with its tags; or a `BatchFeature` of tensors: `input_ids`, `attention_mask` `(B, L)`;
            `labels` `(B, L)` where a conversation has answers (-100 elsewhere); `spans` `(S, 3)` `[row, start, end)`
            in tokens where an answer is tagged; `span_labels` `(B, L)` (O/B/I as 0/1/2, -100 where unsupervised) and
            `mask_labels` (S bool tensors `(height, width)`) with `masks`; `sam_image_index` `(B,)`, and where there
            are images `sam_pixel_values` `(N, 3, h, w)`, `original_sizes` and `reshaped_input_sizes` `(N, 2)`
            (height, width), and `pixel_values` of the image processor.

        Raises:
            ValueError: Unbalanced, nested or empty tags; a count of tags that differs from the count of masks; a mask
                of another size than its image; tags outside assistant texts cannot occur, they are plain text there.
        """
        is_batched = not isinstance(conversation[0], dict)
        conversations = conversation if is_batched else [conversation]
        rendered, answer_ranges = render_jinja_template(
            conversations=[_without_images(messages) for messages in conversations],
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if not tokenize:
            return rendered if is_batched else rendered[0]

        texts = [self._parse(text, ranges) for text, ranges in zip(rendered, answer_ranges, strict=True)]
        images = [_find_image(messages) for messages in conversations]
        if masks is not None and not is_batched:
            masks = [masks]
        batch = self._encode(texts, images, masks, padding, padding_side, has_answers=any(answer_ranges))
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        padding: bool | str = True,
        padding_side: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Encodes rendered prompts that hold one image placeholder for each image; see [`apply_chat_template`] for
        conversations, answers and masks.

        Args:
            images: An image or a list with one image for each text that has a placeholder, in order.
            text: A prompt or a list of prompts.
        """
        if text is None:
            raise ValueError("PlumProcessor needs text; pass text='USER: <image>\\n... ASSISTANT:' or use a chat.")
        texts = [text] if isinstance(text, str) else list(text)
        images = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        wanted = [self.image_token in text for text in texts]
        if sum(wanted) != len(images):
            raise ValueError(f"Found {len(images)} images for {sum(wanted)} texts with {self.image_token!r}.")
        remaining = iter(images)
        images = [load_image(next(remaining)) if has_image else None for has_image in wanted]
        return self._encode([self._parse(text, []) for text in texts], images, None, padding, padding_side)

    def _parse(self, rendered: str, answer_ranges: list[tuple[int, int]]) -> _Text:
        """Expands image placeholders outside the answers and takes the span tags out of the answers."""
        parsed, last = _Text("", [], []), 0
        for start, end in answer_ranges:
            parsed.text += self._expand_image(rendered[last:start])
            answer, spans = parse_span_tags(rendered[start:end])
            offset, last = len(parsed.text), end
            parsed.answers.append((offset, offset + len(answer)))
            parsed.spans += [(offset + span_start, offset + span_end) for span_start, span_end in spans]
            parsed.text += answer
        parsed.text += self._expand_image(rendered[last:])
        return parsed

    def _expand_image(self, text: str) -> str:
        return text.replace(self.image_token, self.image_token * self.num_image_tokens)

    def _encode(self, texts, images, masks, padding, padding_side, has_answers=False) -> BatchFeature:
        if masks is not None and len(masks) != len(texts):
            raise ValueError(f"Found masks for {len(masks)} conversations but {len(texts)} conversations.")
        self._check_images(texts, images)
        add_special_tokens = not all(text.text.startswith(self.tokenizer.bos_token or "\0") for text in texts)
        encoded = self.tokenizer(
            [text.text for text in texts],
            padding=padding,
            padding_side=padding_side,
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        offsets = encoded.pop("offset_mapping")
        batch = BatchFeature({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})
        if has_answers:
            in_answer = torch.stack([_overlap(row, text.answers) for row, text in zip(offsets, texts, strict=True)])
            in_answer &= encoded["attention_mask"].bool()
            batch["labels"] = torch.where(in_answer, encoded["input_ids"], IGNORE_INDEX)
        if any(text.spans for text in texts) or masks is not None:
            batch["spans"] = self._locate_spans(texts, offsets)
        if masks is not None:
            batch["span_labels"] = self._label_spans(batch, masks)
            batch["mask_labels"] = self._prepare_masks(texts, images, masks)
        batch.update(self._encode_images(images))
        return batch

    def _check_images(self, texts, images):
        for row, (text, image) in enumerate(zip(texts, images, strict=True)):
            found, expected = text.text.count(self.image_token), self.num_image_tokens if image is not None else 0
            if found != expected:
                raise ValueError(
                    f"Conversation {row} has {found} image tokens, expected {expected} for "
                    f"{int(image is not None)} image(s); {self.image_token!r} may not stand in a message's text."
                )

    def _locate_spans(self, texts, offsets) -> torch.LongTensor:
        """Token ranges `(S, 3)` of the character spans: the tokens that overlap them."""
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

    def _prepare_masks(self, texts, images, masks) -> list[torch.Tensor]:
        prepared = []
        for text, image, row in zip(texts, images, masks, strict=True):
            count = len(row or [])
            if count != len(text.spans):
                answers = " ".join(text.text[start:end].strip() for start, end in text.answers)
                raise ValueError(f"Found {len(text.spans)} span tags but {count} masks for the text {answers!r}.")
            if not count:
                continue
            if image is None:
                raise ValueError(f"Found {count} masks for a conversation without an image.")
            size = (image.height, image.width)
            prepared += [torch.from_numpy(to_binary_mask(mask, size)) for mask in row]
        return prepared

    def _encode_images(self, images) -> dict:
        unique = list({id(image): image for image in images if image is not None}.values())
        position = {id(image): i for i, image in enumerate(unique)}
        encoded = {"sam_image_index": torch.tensor([position.get(id(image), -1) for image in images])}
        if not unique:
            return encoded
        sam = self.sam_image_processor(unique, return_tensors="pt")
        encoded["sam_pixel_values"] = sam["pixel_values"]
        encoded["original_sizes"] = torch.as_tensor(sam["original_sizes"])
        encoded["reshaped_input_sizes"] = torch.as_tensor(sam["reshaped_input_sizes"])
        if self.vlm_image_input == "pixel_values":
            present = [image for image in images if image is not None]
            encoded |= self.image_processor(present, return_tensors="pt")
        return encoded

    # ---------------------------------------------------------------- decoding

    def post_process_segmentation(self, outputs, mask_threshold: float = 0.0) -> list[PlumAnswer]:
        """
        Typed results of [`PlumForConditionalGeneration.segment`] at the size of the images as given.

        Args:
            outputs: What `segment` returned.
            mask_threshold: Logit above which a pixel is inside.

        Returns:
            One [`PlumAnswer`] per row; a row without spans has an empty list of them.
        """
        ids = [row[mask].tolist() for row, mask in zip(outputs.sequences, outputs.answer_mask, strict=True)]
        rows = outputs.spans[:, 0].tolist()
        answers = []
        for row, answer_ids in enumerate(ids):
            text = self._decode(answer_ids)
            lead = len(text) - len(text.lstrip())
            members = [i for i, span_row in enumerate(rows) if span_row == row]
            masks = self._upscale(outputs, row, members, mask_threshold)
            spans = []
            for i, mask in zip(members, masks, strict=True):
                start, end = self._character_range(answer_ids, outputs.answer_mask[row], outputs.spans[i, 1:].tolist())
                words = text[start:end]
                start += len(words) - len(words.lstrip())
                end -= len(words) - len(words.rstrip())
                score = float(outputs.tag_scores[i] * outputs.iou_scores[i].clamp(0, 1))
                spans.append(PlumSpan(text[start:end], start - lead, end - lead, mask, score, _bounding_box(mask)))
            answers.append(PlumAnswer(text.strip(), spans))
        return answers

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _character_range(self, answer_ids, answer_mask, token_range) -> tuple[int, int]:
        """Characters of the answer's text that a range of tokens of the sequence decodes to."""
        before, until = (int(answer_mask[:position].sum()) for position in token_range)
        return len(self._decode(answer_ids[:before])), len(self._decode(answer_ids[:until]))

    def _upscale(self, outputs, row: int, members: list[int], mask_threshold: float) -> list[np.ndarray]:
        if not members:
            return []
        image = int(outputs.sam_image_index[row])
        masks = self.sam_image_processor.post_process_masks(
            [outputs.pred_masks[members][:, None].float()],
            outputs.original_sizes[image : image + 1].tolist(),
            outputs.reshaped_input_sizes[image : image + 1].tolist(),
            mask_threshold=mask_threshold,
        )[0]
        return list(masks[:, 0].cpu().numpy())


def _without_images(messages: list[dict]) -> list[dict]:
    """The messages with bare image placeholders, so that templates are rendered without touching pixels."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [{"type": "image"} if part["type"] == "image" else part for part in message["content"]],
        }
        for message in messages
    ]


def _find_image(messages: list[dict]):
    """The one image of a conversation, loaded, or `None`."""
    contents = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = [part["image"] for part in contents if part["type"] == "image"]
    if len(images) > 1:
        raise ValueError(f"PLUM segments one image per conversation, found {len(images)}.")
    if not images:
        return None
    return load_image(images[0]) if isinstance(images[0], str) else images[0]


def _overlap(offsets: torch.Tensor, ranges: list[tuple[int, int]]) -> torch.BoolTensor:
    """Which tokens, by their `(L, 2)` character offsets, overlap any of the character ranges."""
    # Overlap and not containment: the offsets of some tokenizers take in the space before a word.
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


PlumProcessor.register_for_auto_class()

__all__ = ["PlumAnswer", "PlumProcessor", "PlumSpan"]
