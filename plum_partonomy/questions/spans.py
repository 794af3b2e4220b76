"""Put span tags around the part names of a plain answer."""

import re
from collections.abc import Sequence

from plum_partonomy.records import escape_tags

__all__ = ["join_parts", "tag_phrases"]


def join_parts(parts: Sequence[str]) -> str:
    """Return the parts as the benchmark's answers list them: "x", "x, and y", "x, y, and z"."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + ", and " + parts[-1]


def tag_phrases(text: str, phrases: Sequence[str]) -> str:
    """Return the answer with span tags around the phrases of its part list.

    Args:
        text: A plain answer that contains the phrases in this order, joined as by `join_parts`. The last occurrence
            is used (an object may have the name of its part). A literal tag in it is escaped.
        phrases: At least one part name.

    Raises:
        ValueError: The text does not contain the list, or a phrase is empty.

    >>> tag_phrases("The wing in the image has the following visible parts: flap, and wing.", ["flap", "wing"])
    'The wing in the image has the following visible parts: <p>flap</p>, and <p>wing</p>.'
    """
    if not phrases or not all(phrases):
        raise ValueError(f"Expected at least one phrase and no empty one, found {list(phrases)}.")
    text, phrases = escape_tags(text), [escape_tags(phrase) for phrase in phrases]
    part_list = join_parts(phrases)
    matches = list(re.finditer(rf"(?<!\w){re.escape(part_list)}(?!\w)", text))
    if not matches:
        raise ValueError(
            f"Expected the answer to list {part_list!r}, found {text!r}: name the parts as the answer does."
        )
    start, end = matches[-1].span()
    return text[:start] + join_parts([f"<p>{phrase}</p>" for phrase in phrases]) + text[end:]
