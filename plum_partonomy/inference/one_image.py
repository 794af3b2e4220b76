"""Use a PLUM checkpoint on one image: ask, segment words, correct a mask, save the result.

    load_model ──> Plum ──ask, segment_words, correct_mask, correct_with_prompts──> Reply
    Reply ──finish, thresholds──> PlumAnswer ──save──> files

A [`Reply`] keeps the output of the model, so that a threshold can change without another call, and the encoded image
and answer, so that a corrected mask costs no more than its decoding. The shell
(plum_partonomy/cli.py) and the demo (demo/app.py) use these functions; predictor.py works in batches.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from chats_plum import parse_span_tags
from inputs_plum import check_number
from plum_partonomy.inference.checkpoint import load_checkpoint, problems_named
from plum_partonomy.inference.encoded import EncodedImage, encode_chats, encode_image
from plum_partonomy.inference.inputs import check_phrases, check_text
from plum_partonomy.masks import DataError, area, encode
from plum_partonomy.questions.spans import join_parts
from plum_partonomy.questions.wording import official_answer, official_question
from plum_partonomy.records import escape_tags
from plum_partonomy.scoring.overlays import draw_named_masks
from processing_plum import PlumAnswer, PlumProcessor, PlumSpan

MAX_NEW_TOKENS = 96
OVERLAY_FILE, MASKS_FILE = "overlay.png", "masks.json"
OWN_WORDS = " Also: "
"""Text before the words that a user adds to an answer."""

Range = tuple[int, int]
"""Character range [start, end) of an answer."""


@dataclass(frozen=True)
class Plum:
    """A model in evaluation mode and its processor."""

    model: Any
    processor: PlumProcessor


@dataclass(frozen=True)
class Prompt:
    """
    Points, a box and a present mask given for a span, which guide its mask.

    Args:
        points: x, y of each point, in pixels of the image.
        labels: 1 for a point inside the mask, 0 for one outside.
        box: x0, y0, x1, y1 in pixels of the image.
        mask: The present mask: bool (height, width), or low-res logits of the model.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask: np.ndarray | torch.Tensor | None = None


@dataclass(frozen=True)
class Reply:
    """
    An answer with the output of the model.

    Args:
        image: RGB image of the conversation.
        messages: The conversation up to and including the question; contents are strings.
        text: The words of the answer.
        outputs: Output of `segment`; None before the first one.
        encoded: The encoded image, used by all later calls about it.
        hidden_states: `(1, L, D)` of the tokens in `outputs.sequences`; None for a generated answer.
        given_masks: Boolean masks (height, width) drawn by the user, by the range of their words.
        prompts: Points and boxes of the user, by the range of their words.
        is_truncated: Whether the text reached the token limit.
    """

    image: Image.Image
    messages: list[dict[str, str]]
    text: str
    outputs: Any = None
    encoded: EncodedImage | None = None
    hidden_states: torch.Tensor | None = None
    given_masks: dict[Range, np.ndarray] = field(default_factory=dict)
    prompts: dict[Range, Prompt] = field(default_factory=dict)
    is_truncated: bool = False


# ---------------------------------------------------------------- what comes in


def load_model(name: str | Path, *, dtype: str = "float32", device: str | torch.device = "cpu") -> tuple[Path, Plum]:
    """Return the folder and the model of a checkpoint, given as a folder or a name on the Hub.

    Raises:
        ModelError: It is not safe to load, not a PLUM checkpoint, its processor belongs to another model, or it cannot
            answer.
    """
    model, processor = load_checkpoint(name, dtype=getattr(torch, dtype))
    folder, plum = Path(model.name_or_path), Plum(model.to(device).eval(), processor)
    with problems_named(f"{folder} cannot answer, its files do not fit together"):
        _try_out(plum)
    return folder, plum


def _try_out(plum: Plum) -> None:
    """
    Let a model read a blank image and write one token of another answer, without SAM's encoder. Settings of processor,
    template and generation that only fail then are an error of the checkpoint, not of a user's question.
    """
    config, question = plum.model.config, [{"role": "user", "content": "Which parts?"}]
    width, grid = plum.model.segmenter.embedding_width(config.sam_config), config.sam_grid_size

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        if not pixels.isfinite().all():
            raise ValueError("its processor makes pixels that are not finite numbers")
        return torch.zeros(1, width, grid, grid, device=pixels.device)

    image = encode_image(plum.model, plum.processor, Image.new("RGB", (48, 32)), embed=embed)
    encode_chats(plum.model, plum.processor, [(image, question)], add_generation_prompt=True)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = plum.processor.apply_chat_template(question, **options).to(plum.model.device)
    options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if not plum.model.generate(**inputs, **options).logits[0].isfinite().all():
        raise ValueError("its weights give numbers that are not finite")


def find_ranges(text: str, phrases: Sequence[str], *, taken: Sequence[Range] = ()) -> list[Range]:
    """Return the range of each phrase in a text: its first occurrence as whole words that is not taken.

    >>> find_ranges("A wheel and another wheel.", ["wheel", "wheel"])
    [(2, 7), (20, 25)]

    Raises:
        DataError: A phrase is empty or does not occur (often enough).
    """
    found: list[Range] = []
    for phrase in phrases:
        places = (match.span() for match in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))
        free = (place for place in places if phrase and not overlaps(place, [*taken, *found]))
        place = next(free, None)
        if place is None:
            raise DataError(f"The words {phrase!r} do not occur (often enough) in the answer {text!r}.")
        found.append(place)
    return found


def overlaps(place: Range, others: Sequence[Range]) -> bool:
    return any(place[0] < end and start < place[1] for start, end in others)


# ---------------------------------------------------------------- what the model does


def stream(
    plum: Plum,
    image: Image.Image,
    question: str,
    *,
    history: Sequence[dict[str, str]] = (),
    encoded: EncodedImage | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[str | Reply]:
    """Yield the words of the answer so far, repeatedly, and the complete [`Reply`] last.

    Closing the iterator early stops the generation.

    Args:
        history: Earlier messages of the same conversation, from [`remember`].
        encoded: `encoded` of an earlier reply of the same model about the same image.
    """
    messages = [*history, {"role": "user", "content": check_text(question, what="a question")}]
    streamer = TextIteratorStreamer(plum.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = False

    def run():
        try:
            known = encoded or encode_image(plum.model, plum.processor, image)
            inputs = _encode(plum, known, messages, add_generation_prompt=True)
            options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
            return known, plum.model.segment(**inputs, **options, streamer=streamer, stopping_criteria=[is_closed])
        finally:
            streamer.end()

    def is_closed(input_ids, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), closed, device=input_ids.device)

    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(run)
        try:
            text = ""
            for piece in streamer:
                text += piece
                yield text
        finally:
            closed = True
        encoded, outputs = running.result()
    (answer,) = plum.processor.post_process_segmentation(outputs)
    yield Reply(image, messages, answer.text, outputs, encoded, is_truncated=answer.is_truncated)


def ask(plum: Plum, image: Image.Image, question: str, **options) -> Reply:
    """Return the reply to a question about an image; options as in [`stream`]."""
    *_, reply = stream(plum, image, question, **options)
    return reply


def remember(reply: Reply) -> list[dict[str, str]]:
    """Return the conversation with its answer, as the `history` of the next question."""
    return [*reply.messages, {"role": "assistant", "content": escape_tags(reply.text)}]


def segment_words(
    plum: Plum,
    image: Image.Image,
    messages: Sequence[dict[str, str]],
    text: str,
    ranges: Sequence[Range],
    **corrections,
) -> Reply:
    """
    Segment the words of an answer at the given ranges, in text order, as if the model had tagged them.

    Args:
        messages: The conversation up to and including the question.
        text: The answer.
        ranges, corrections: As in [`segment_again`], and errors as well.
    """
    return segment_again(plum, Reply(image, list(messages), text), ranges, **corrections)


def segment_again(
    plum: Plum,
    reply: Reply,
    ranges: Sequence[Range],
    *,
    given_masks: Mapping[Range, np.ndarray] | None = None,
    prompts: Mapping[Range, Prompt] | None = None,
) -> Reply:
    """
    Segment other spans of a reply's answer, in text order. The image is encoded once for all replies that follow
    from each other, and the answer once for all with the same text.

    Args:
        ranges: Character ranges of the words in the answer.
        given_masks: Boolean masks (height, width) of some ranges; later spans are decoded from them.
        prompts: Points, boxes and present masks of other ranges.

    Raises:
        DataError: There are no ranges, or ranges overlap, touch or contain no word; a point or box is outside the
            image.
    """
    ranges = sorted(ranges)
    answer = {"role": "assistant", "content": _tag(reply.text, ranges)}
    given = {place: mask for place, mask in (given_masks or {}).items() if place in ranges}
    kept = {place: prompt for place, prompt in (prompts or {}).items() if place in ranges}
    encoded = reply.encoded or encode_image(plum.model, plum.processor, reply.image)
    inputs = _encode(plum, encoded, [*reply.messages, answer])
    hidden_states = reply.hidden_states
    if hidden_states is None or not torch.equal(reply.outputs.sequences, inputs["input_ids"]):
        hidden_states = plum.model.encode_conversations(**inputs)
    if encoded.sam_pixels is not None:
        inputs["sam_pixel_values"] = encoded.sam_pixels[None]
    inputs["given_masks"] = {ranges.index(place): torch.tensor(mask) for place, mask in given.items()}
    try:
        outputs = plum.model.segment_spans(**inputs, hidden_states=hidden_states, **_prompt_inputs(kept, ranges))
    except ValueError as error:
        raise DataError(str(error)) from error
    return replace(
        reply, outputs=outputs, encoded=encoded, hidden_states=hidden_states, given_masks=given, prompts=kept
    )


def _tag(text: str, ranges: Sequence[Range]) -> str:
    """Return a text with span tags around sorted ranges. Raises DataError if there are none, or two touch."""
    if not ranges or any(start < end for (_, end), (start, _) in pairwise(ranges)):
        raise DataError(f"Expected words that do not overlap or touch, found the characters {ranges} of {text!r}.")
    tagged, last = "", 0
    for start, end in ranges:
        tagged += f"{escape_tags(text[last:start])}<p>{escape_tags(text[start:end])}</p>"
        last = end
    return tagged + escape_tags(text[last:])


def _prompt_inputs(prompts: Mapping[Range, Prompt], ranges: Sequence[Range]) -> dict[str, dict[int, Any]]:
    """Return prompts as arguments of `segment_spans`."""
    names = {"input_points": "points", "input_labels": "labels", "input_boxes": "box", "input_masks": "mask"}
    inputs: dict[str, dict[int, Any]] = {name: {} for name in names}
    for place, prompt in prompts.items():
        for name, field_name in names.items():
            value = getattr(prompt, field_name)
            if value is not None and len(value):
                inputs[name][ranges.index(place)] = value
    return inputs


def segment_phrases(
    plum: Plum, image: Image.Image, phrases: Sequence[str], *, prompts: Sequence[Prompt | None] = ()
) -> Reply:
    """Segment the named parts, as if the model had answered with a list of them.

    Args:
        prompts: Points and boxes of each phrase, None for none; empty for no prompts.

    Raises:
        DataError: There are no phrases, or one is empty; prompts are of another number or outside the image.
    """
    parts = join_parts([f"<p>{escape_tags(phrase)}</p>" for phrase in check_phrases(phrases)])
    text, ranges = parse_span_tags(official_answer("identification", parts, image_label="object"))
    question = official_question("identification", image_label="object")
    if len(prompts) not in (0, len(ranges)):
        raise DataError(
            f"Expected prompts for each of {len(ranges)} phrases, found {len(prompts)}; give None for none."
        )
    prompted = {place: prompt for place, prompt in zip(ranges, prompts, strict=False) if prompt is not None}
    return segment_words(plum, image, [{"role": "user", "content": question}], text, ranges, prompts=prompted)


def correct_mask(plum: Plum, reply: Reply, ranges: Sequence[Range], place: Range, mask: np.ndarray) -> Reply:
    """Replace the mask of one span of a reply by the user's mask (height, width) and decode the later spans again."""
    prompts = {other: prompt for other, prompt in reply.prompts.items() if other != place}
    return segment_again(plum, reply, ranges, given_masks={**reply.given_masks, place: mask}, prompts=prompts)


def present_masks(outputs, spans: Sequence[PlumSpan]) -> Sequence[np.ndarray | torch.Tensor]:
    """
    Return the masks of all spans of an output of the model as `input_masks` of further prompts: low-res logits or,
    since those of a window show less than the image, the masks of the image.
    """
    return outputs.pred_masks if outputs.mask_windows is None else [span.mask for span in spans]


def correct_with_prompts(
    plum: Plum,
    reply: Reply,
    ranges: Sequence[Range],
    place: Range,
    *,
    points: Sequence[tuple[float, float]] = (),
    labels: Sequence[int] = (),
    box: Sequence[float] | None = None,
) -> Reply:
    """
    Correct the mask of one span of a reply with further points or a box, and decode the later spans again. Other
    corrections of the reply stay. The prompts are added to the span's earlier ones; its present mask, predicted or
    drawn, becomes its dense prompt.

    Args:
        ranges: The ranges to segment, with `place` among them.
        points, labels, box: As in [`Prompt`].

    Raises:
        DataError: `place` is not one of the ranges, or a point or box is outside the image or has no label.
    """
    if place not in ranges:
        raise DataError(f"Expected one of the ranges {list(ranges)} to correct, found {place}.")
    given_masks, earlier = dict(reply.given_masks), reply.prompts.get(place, Prompt())
    prompt = Prompt(
        points=(*earlier.points, *map(tuple, points)),
        labels=(*earlier.labels, *labels),
        box=earlier.box if box is None else tuple(box),
        mask=given_masks.pop(place, None),
    )
    if prompt.mask is None:
        spans = finish(plum, reply).spans
        places = [(span.start, span.end) for span in spans]
        if place in places:
            prompt = replace(prompt, mask=present_masks(reply.outputs, spans)[places.index(place)])
    return segment_again(plum, reply, ranges, given_masks=given_masks, prompts={**reply.prompts, place: prompt})


def add_words(text: str, phrases: Sequence[str], *, taken: Sequence[Range] = ()) -> tuple[str, list[Range]]:
    """Return an answer that contains every phrase, if necessary in an added sentence, and the ranges of the phrases.

    >>> add_words("A wheel.", ["wheel", "left wing"])
    ('A wheel. Also: left wing.', [(2, 7), (15, 24)])

    Raises:
        DataError: A phrase is empty.
    """
    places: list[Range] = []
    own, start = [], len(text) + len(OWN_WORDS)
    for phrase in check_phrases(phrases):
        try:
            places += find_ranges(text, [phrase], taken=[*taken, *places])
        except DataError:
            places.append((start, start + len(phrase)))
            start += len(phrase) + len(", ")
            own.append(phrase)
    return text + (f"{OWN_WORDS}{', '.join(own)}." if own else ""), places


def segment_apart(plum: Plum, reply: Reply, ranges: Sequence[Range]) -> list[Reply]:
    """Segment each span as if it were the only one: its mask without feedback from earlier masks."""
    return [segment_again(plum, reply, [place]) for place in ranges]


def finish(plum: Plum, reply: Reply, *, span_threshold: float = 0.0, mask_threshold: float = 0.5) -> PlumAnswer:
    """
    Return text and spans of a reply: spans of at least this score, pixels above this probability.

    Raises:
        DataError: A threshold is not a number, or the probability is not between 0 and 1.
    """
    check_number(span_threshold, name="span_threshold")
    check_number(mask_threshold, name="mask_threshold")
    if not 0 < mask_threshold < 1:
        raise DataError(f"mask_threshold must be a probability between 0 and 1, found {mask_threshold}.")
    logit = math.log(mask_threshold / (1 - mask_threshold))
    (answer,) = plum.processor.post_process_segmentation(reply.outputs, mask_threshold=logit)
    spans = [span for span in answer.spans if span.score >= span_threshold]
    return replace(answer, spans=spans, is_truncated=reply.is_truncated)


def warn_of_unknown_image(plum: Plum, answer: PlumAnswer) -> str | None:
    """Return a warning if the image is unlike the training images, or None."""
    known = plum.model.config.image_statistics
    if answer.confidence is None or known is None or answer.confidence >= known["threshold"]:
        return None
    kinds = f", {known['kinds']}" if known.get("kinds") else ""
    return f"This image is unlike the training images{kinds}: answer and masks may be meaningless."


def _encode(plum: Plum, image: EncodedImage, messages, **options) -> dict[str, Any]:
    try:
        inputs = encode_chats(plum.model, plum.processor, [(image, messages)], **options)
    except ValueError as error:
        raise DataError(str(error)) from error
    count, most = inputs["input_ids"].shape[1], plum.model.config.get_text_config().max_position_embeddings
    if count > most:
        raise DataError(
            f"The question is too long: with image and earlier turns it has {count} tokens, and this model reads at "
            f"most {most}; shorten it."
        )
    return inputs


# ---------------------------------------------------------------- what goes out


def as_json(answer: PlumAnswer) -> dict[str, Any]:
    """
    Return an answer for `json.dump`.

    Keys: text, truncation, confidence, and the text, characters, score, box and RLE mask of each span.
    """
    spans = [{**vars(span), "mask": encode(span.mask)} for span in answer.spans]
    return {"text": answer.text, "is_truncated": answer.is_truncated, "confidence": answer.confidence, "spans": spans}


def as_coco(answer: PlumAnswer, image: Image.Image, *, file_name: str) -> dict[str, Any]:
    """Return an answer in COCO's instance format: a category for each phrase, an annotation for each span."""
    categories = list(dict.fromkeys(span.text for span in answer.spans))
    annotations = []
    for number, span in enumerate(answer.spans, start=1):
        x0, y0, x1, y1 = span.box or (0, 0, 0, 0)
        rle = encode(span.mask)
        annotations.append(
            {
                "id": number,
                "image_id": 1,
                "category_id": categories.index(span.text) + 1,
                "segmentation": rle,
                "area": area(rle),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
                "score": span.score,
            }
        )
    return {
        "images": [{"id": 1, "file_name": file_name, "width": image.width, "height": image.height}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
        "annotations": annotations,
    }


def save(
    answer: PlumAnswer, image: Image.Image, folder: Path, *, file_name: str, colours: Sequence[str] | None = None
) -> list[Path]:
    """
    Write overlay.png (with names beside the masks), a black-and-white PNG for each span and masks.json (COCO) into
    a folder; return their paths. Files of an earlier answer in the folder are replaced, once the new ones are written.

    Raises:
        DataError: The folder cannot be written, or has such a file that no earlier answer wrote.
    """
    masks, names = [span.mask for span in answer.spans], [span.text for span in answer.spans]
    drawings = {OVERLAY_FILE: draw_named_masks(image, masks, names, colours=colours)}
    for number, (mask, name) in enumerate(zip(masks, names, strict=True), start=1):
        words = re.sub(r"\W+", "_", name).strip("_")[:60]
        drawings[f"{number:02}_{words}.png"] = Image.fromarray(mask)
    coco = as_coco(answer, image, file_name=file_name)
    coco["info"] = {"description": answer.text, "files": list(drawings)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _saved_before(folder)
        for name in [*drawings, MASKS_FILE]:
            if name not in earlier and os.path.lexists(folder / name):
                raise DataError(
                    f"{folder / name} is not of an earlier answer: delete it, or give another save=FOLDER."
                )
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as new:
            for name, drawing in drawings.items():
                drawing.save(Path(new, name))
            Path(new, MASKS_FILE).write_text(json.dumps(coco, indent=1) + "\n", encoding="utf-8")
            for name in earlier:
                (folder / name).unlink(missing_ok=True)
            for name in [MASKS_FILE, *drawings]:  # the list of files first, so that none is unknown to the next answer
                os.replace(Path(new, name), folder / name)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder} cannot be written ({reason}): make room, or give another save=FOLDER.") from error
    return [folder / name for name in [*drawings, MASKS_FILE]]


def _saved_before(folder: Path) -> list[str]:
    """Return the names of the files of an earlier `save` in a folder, as listed in its masks.json, and of this."""
    try:
        names = json.loads((folder / MASKS_FILE).read_text(encoding="utf-8"))["info"]["files"]
        if names[0] != OVERLAY_FILE:
            return []
        return [OVERLAY_FILE, *(name for name in names if re.fullmatch(r"\d{2,}_\w*\.png", name)), MASKS_FILE]
    except (OSError, ValueError, LookupError, TypeError):
        return []  # no such file, or not written by `save`


__all__ = [
    "Plum",
    "Prompt",
    "Reply",
    "add_words",
    "as_coco",
    "as_json",
    "ask",
    "correct_mask",
    "correct_with_prompts",
    "find_ranges",
    "finish",
    "load_model",
    "present_masks",
    "remember",
    "save",
    "segment_again",
    "segment_apart",
    "segment_phrases",
    "segment_words",
    "stream",
    "warn_of_unknown_image",
]
