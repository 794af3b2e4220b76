"""Find part names in an answer without span tags."""

import re
from collections.abc import Iterable, Sequence

__all__ = ["find_parts"]

MAX_WORDS = 4
"""Maximum words of a list item; a longer piece is a sentence, in which only names of the benchmark are found."""

SENTENCE_WORDS = frozenset(
    "i it you we there here this that is are has have had can could see sees show shows with without of in on "
    "under".split()
)
"""Words that occur in sentences but not in list items."""

_BREAK = re.compile(r"[,;\n\u2022]|\band\b|(?<=\w)[.:](?=\s|$)")
_LEAD = re.compile(r"^[\W\d_]*(?:(?:the|a|an|its|their|one|two|three|four|several)\s+)*", re.IGNORECASE)
_TAIL = re.compile(r"(?<![\W_])[\W_]+$")  # starts at the start of a run only, so that long runs take linear time


def find_parts(text: str, known: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return the parts that a plain-text answer names, as (name, start, end) with the characters [start, end).

    The text is split at commas, semicolons, line ends, full stops, colons and the word "and". A piece of at most four
    words, without articles, bullets and quotes, is a name. In a longer piece, or one with a verb or a preposition,
    only `known` names are found, the longest first. Text before the first colon introduces a list and is skipped if a
    list follows.

    Args:
        text: The answer.
        known: The part names of the benchmark; case and a plural "s" are ignored.

    >>> [name for name, _, _ in find_parts("The object has these parts: a left wing, and the tail.", [])]
    ['left wing', 'tail']
    >>> [name for name, _, _ in find_parts("I can clearly see the wheels of this thing and a mast.", ["wheel"])]
    ['wheel', 'mast']
    """
    introduction = re.match(r"[^,\n]*?:\s*(?=\S)", text)
    pieces = _pieces(text, introduction.end() if introduction else 0)
    pattern = _known_names(known)
    found: dict[str, tuple[str, int, int]] = {}
    for start, end in pieces:
        for name, left, right in _names(text, start, end, pattern):
            found.setdefault(name.casefold(), (name, left, right))
    return list(found.values())


def _pieces(text: str, start: int) -> list[tuple[int, int]]:
    """Return the ranges of the text between the breaks, from `start` on."""
    ranges = []
    for match in _BREAK.finditer(text, start):
        ranges.append((start, match.start()))
        start = match.end()
    return [*ranges, (start, len(text))]


def _known_names(names: Iterable[str]) -> re.Pattern | None:
    by_length = sorted(set(names), key=lambda name: (-len(name), name))
    if not by_length:
        return None
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, by_length))})s?(?!\w)", re.IGNORECASE)


def _names(text: str, start: int, end: int, pattern: re.Pattern | None) -> Sequence[tuple[str, int, int]]:
    piece = text[start:end]
    left = _LEAD.match(piece).end()
    name = _TAIL.sub("", piece[left:])
    if not name:
        return []
    words = name.casefold().split()
    if len(words) <= MAX_WORDS and not SENTENCE_WORDS.intersection(words):
        return [(name, start + left, start + left + len(name))]
    matches = pattern.finditer(piece) if pattern else ()
    return [(match[1], start + match.start(1), start + match.end(1)) for match in matches]
