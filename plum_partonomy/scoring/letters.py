"""Multiple choice by letter, for models that only generate text."""

import re
from collections.abc import Sequence

__all__ = ["LETTERS", "LETTER_PROMPT", "letter_question", "read_letter"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_PROMPT = "Answer with the letter of the correct choice only."


def letter_question(messages: Sequence[dict[str, str]], choices: Sequence[str]) -> list[dict[str, str]]:
    """Return the messages with lettered choices added to the last one.

    >>> print(letter_question([{"role": "user", "content": "Which?"}], ["hull", "mast"])[0]["content"])
    Which?
    A. hull
    B. mast
    Answer with the letter of the correct choice only.
    """
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    content = "\n".join([messages[-1]["content"], *listed, LETTER_PROMPT])
    return [*messages[:-1], {"role": "user", "content": content}]


def read_letter(text: str, count: int) -> int | None:
    """Return the index of the choice whose letter the answer gives, or None.

    >>> read_letter("B", 5), read_letter("**C.** a hull", 5), read_letter("The answer is (D).", 5)
    (1, 2, 3)
    >>> read_letter("I cannot tell.", 5) is None
    True
    """
    letters = LETTERS[:count]
    first = re.match(rf"[\W_]*([{letters}])(?![\w'])", text)
    found = first or re.search(rf"(?<![\w'])([{letters}])(?=[).:*]|\s*$)", text)
    return None if found is None else letters.index(found[1])
