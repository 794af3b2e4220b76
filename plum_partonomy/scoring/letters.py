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

    >>> read_letter("b", 5), read_letter("**C.** a hull", 5), read_letter("The answer is (D).", 5)
    (1, 2, 3)
    >>> read_letter("A hull, and a mast.", 5), read_letter("I cannot tell.", 5)  # an article and a pronoun
    (None, None)
    """
    letters = LETTERS[:count]
    alone = re.fullmatch(rf"[\W_]*([{letters}])[\W_]*", text, re.ASCII | re.IGNORECASE)
    # in other languages a letter may touch words without blanks, which are no words in ASCII
    first = re.match(rf"[\W_]*([{letters}])(?![\w'])(?!(?<=[AI])[ \t]+[a-z])", text, re.ASCII)
    found = alone or first or re.search(rf"(?<![\w'])([{letters}])(?=[).:*,]|\s*$)", text)
    return None if found is None else letters.index(found[1].upper())
