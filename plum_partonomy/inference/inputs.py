"""Check the inputs of users before a model is loaded, without torch, which takes seconds to import."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

import inputs_plum
from plum_partonomy.masks import DataError

MAX_IMAGE_BYTES = 10_000_000
MAX_IMAGE_PIXELS = 40_000_000
SHOWN_CHARACTERS = 200
"""Maximum length of a source in messages; base64 text may have millions of characters."""


class ModelError(DataError):
    """A checkpoint that cannot be loaded, or is not a PLUM checkpoint."""


def read_image(source: str | Path | BinaryIO) -> Image.Image:
    """Return an image file as upright RGB, as in training. Its size is checked before it is decoded.

    Raises:
        DataError: Not an image, or more than MAX_IMAGE_BYTES or MAX_IMAGE_PIXELS.
    """
    name = str(getattr(source, "name", "the file") if hasattr(source, "read") else source)
    where = name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}..."
    return inputs_plum.read_image(source, where=where, max_pixels=MAX_IMAGE_PIXELS, max_bytes=MAX_IMAGE_BYTES)


def check_text(text: str, *, what: str, max_characters: int | None = None) -> str:
    """Return the stripped text. Raises DataError if it is empty, too long or not UTF-8."""
    text = text.strip()
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"Expected {what} in UTF-8, found {text!r}.")
    if not text:
        raise DataError(f"Expected {what}, found an empty text.")
    if max_characters is not None and len(text) > max_characters:
        raise DataError(f"Expected {what} of 1 to {max_characters} characters, found {len(text)}.")
    return text


def check_phrases(phrases: Sequence[str]) -> list[str]:
    """Return the stripped phrases. Raises DataError if there is none or one is empty."""
    listed = check_text(", ".join(phrases), what="parts")
    if not all(phrase.strip() for phrase in phrases):
        raise DataError(f"Expected words between the commas, found {listed!r}.")
    return [phrase.strip() for phrase in phrases]
