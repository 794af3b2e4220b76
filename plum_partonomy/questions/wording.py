"""The exact wording of the official release; `inflect` chooses the articles.

NAME is the word "object", or the label of the image in types ending in `_with_label` and in `whole_to_part`. The
partner is the object compared with; the contrast is the second one of a difference question.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import inflect

WITH_LABEL = "_with_label"
OBJECT_QUESTION = "What is the object in the image?"

QUESTION_TEMPLATES = {
    "identification": "What visible parts does the {name} in the image have?",
    "positive": "What visible parts does the {name} in the image have in common with {partner}?",
    "negative": "What visible parts does the {name} in the image have which {partner} does not have?",
    "difference": "What visible parts does the {name} in the image have in common with {partner} "
    "but not with {contrast}?",
}
ANSWER_TEMPLATES = {
    "identification": "The {name} in the image has the following visible parts: {parts}.",
    "positive": "The {name} in the image has the following visible parts in common with {partner}: {parts}.",
    "negative": "The {name} in the image has the following visible parts which {partner} does not: {parts}.",
    "difference": "The {name} in the image has the following visible parts in common with {partner} "
    "but not with {contrast}: {parts}.",
}


@dataclass(frozen=True)
class Comparison:
    """The labels of the objects that a question compares with, if any."""

    partner: str | None = None
    contrast: str | None = None


def question_kind(question_type: str) -> str:
    """Return the template of a type; the whole-part types ask for the parts as identification does.

    >>> question_kind("negative_with_label"), question_kind("part_to_whole")
    ('negative', 'identification')
    """
    kind = question_type.removesuffix(WITH_LABEL)
    return kind if kind in QUESTION_TEMPLATES else "identification"


def official_question(
    question_type: str, *, image_label: str, partner: str | None = None, contrast: str | None = None
) -> str:
    return QUESTION_TEMPLATES[question_kind(question_type)].format(
        name=_name(question_type, image_label), partner=_described(partner), contrast=_described(contrast)
    )


def official_answer(
    question_type: str, parts: str, *, image_label: str, partner: str | None = None, contrast: str | None = None
) -> str:
    """Return the answer of the official release. `parts` is the list as text, from `join_parts`."""
    return ANSWER_TEMPLATES[question_kind(question_type)].format(
        name=_name(question_type, image_label),
        partner=_described(partner),
        contrast=_described(contrast),
        parts=parts,
    )


def object_answer(label: str) -> str:
    """
    Return the answer that names the object.

    >>> object_answer("angled sedan")
    'It is an angled sedan.'
    """
    return f"It is {with_article(label)}."


def _name(question_type: str, image_label: str) -> str:
    return image_label if question_type.endswith(WITH_LABEL) or question_type == "whole_to_part" else "object"


def _described(label: str | None) -> str | None:
    return label and with_article(label)


@cache
def with_article(phrase: str) -> str:
    """Return the phrase after "a" or "an", chosen by `inflect` for the whole phrase."""
    return inflect_engine().a(phrase)


@cache
def inflect_engine() -> "inflect.engine":
    """Return the grammar of `inflect`, which takes seconds to import and is needed only for articles and plurals."""
    import inflect

    return inflect.engine()
