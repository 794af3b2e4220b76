"""Read what the page sends with its events: a span, a selection, a click or a box. Requests may send anything."""

import reprlib
from collections.abc import Sequence
from typing import Any

import gradio as gr

from plum_partonomy.inference.one_image import Prompt, Range
from plum_partonomy.masks import DataError
from processing_plum import PlumSpan

MAX_CLICKS = 32
"""Maximum number of clicks on one mask."""


def sent(event: gr.EventData, name: str) -> Any:
    """Return a value sent with an event, None if it is absent."""
    try:
        return getattr(event, name)
    except (AttributeError, TypeError):  # a request may send no event, or one that is not an object
        return None


def read_span(event: gr.EventData, spans: Sequence[PlumSpan]) -> PlumSpan:
    """Return the span that begins at the character `start` of an event. Raises DataError if there is none."""
    start = sent(event, "start")
    for span in spans:
        if span.start == start:
            return span
    raise DataError("This mask is not there any more: choose another.")


def read_selection(event: gr.EventData, length: int) -> Range:
    """Return the characters [start, end) of an event, cut to a text of this length. Raises DataError."""
    places = [sent(event, name) for name in ("start", "end")]
    if not all(isinstance(place, int) for place in places):
        raise DataError(f"Expected selected characters, found {reprlib.repr(places)}: select the words again.")
    start, end = sorted(min(max(place, 0), length) for place in places)
    return start, end


def read_prompt(event: gr.EventData, size: tuple[int, int], earlier: Prompt) -> Prompt:
    """
    Return the `point` with its `label` or the `box` of an event.

    Args:
        size: (width, height) of the image.
        earlier: The prompts that the mask has.

    Raises:
        DataError: It is not a point or a box inside the image, or the mask has MAX_CLICKS points.
    """
    point, label, box = (sent(event, name) for name in ("point", "label", "box"))
    width, height = size
    if _are_within(point, (width - 1, height - 1)) and label in (0, 1):
        if len(earlier.points) >= MAX_CLICKS:
            raise DataError(f"A mask takes at most {MAX_CLICKS} clicks: undo one, or use the brush.")
        return Prompt(points=(tuple(point),), labels=(int(label),))
    if _are_within(box, (width, height, width, height)) and box[0] < box[2] and box[1] < box[3]:
        return Prompt(box=tuple(box))
    found = reprlib.repr([point, label] if box is None else box)
    raise DataError(
        f"Expected a point with label 0 or 1, or a box, inside the image of {width} x {height} pixels, found {found}: "
        "click on the image again."
    )


def _are_within(values: Any, limits: Sequence[int]) -> bool:
    """Return whether values are a list of one number from 0 to each limit; NaN is none."""
    if not isinstance(values, list) or len(values) != len(limits):
        return False
    return all(
        isinstance(value, int | float) and 0 <= value <= limit for value, limit in zip(values, limits, strict=True)
    )
