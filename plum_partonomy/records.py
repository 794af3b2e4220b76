"""Records of all sources, as dataclasses; features.py defines their storage types.

    source files --> PartExample --> GroundedConversation   (training)
                               \\--> Question               (benchmark)

In a conversation, phrases of the assistant that name something visible are in span tags, `<p>left wing</p>`;
`masks[i]` belongs to the i-th tag of the whole conversation. A literal tag in a text has a backslash before it. An
image is anything that `datasets.Image` encodes: a PIL image or `{"bytes": ..., "path": ...}`.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from chats_plum import parse_span_tags
from plum_partonomy.masks import RLE, DataError

__all__ = [
    "QUESTION_TYPES",
    "UNNAMED_OBJECT",
    "DataError",
    "GroundedConversation",
    "PartExample",
    "PartMask",
    "Question",
    "as_chat",
    "as_row",
    "check_plain",
    "check_turns",
    "defuse",
    "escape_tags",
    "tagged_phrases",
]

QUESTION_TYPES = (
    "identification",
    "identification_with_label",
    "positive",
    "positive_with_label",
    "negative",
    "negative_with_label",
    "difference",
    "difference_with_label",
    "whole_to_part",
    "part_to_whole",
)
TWO_STEP_TYPES = ("whole_to_part", "part_to_whole")
"""Question types that also ask for the object; only these have the `object_` fields."""

UNNAMED_OBJECT = "object"
"""Label of an object without a name."""

_JOINED_TAGS = re.compile(r"(?<!\\)</p><p>")
_LITERAL_TAG = re.compile(r"</?p>")
_SPECIAL_TOKEN = re.compile(
    r"<image>|</?s>|<unk>|<pad>|<mask>|<[be]os>|<(?:start|end)_of_[a-z]+>|<[|\uff5c][^<>\s]{1,40}[|\uff5c]>"
    r"|\[SEG\]|\[/?INST\]"
)
"""Special tokens of vision-language models, which their tokenizers recognise anywhere in a text."""


@dataclass
class PartMask:
    """A part name and the RLE of its visible pixels, at the size of the image."""

    label: str
    rle: RLE


@dataclass
class PartExample:
    """An image of one object and the masks of its visible parts.

    A label occurs once, except in sources with separate instances.
    """

    image: Any
    image_id: str
    image_label: str
    masks: list[PartMask]
    source: str
    licence: str


@dataclass
class GroundedConversation:
    """A training record.

    Attributes:
        image: None for a conversation without an image.
        messages: {"role", "content"} of alternating users and assistants.
        masks: One mask per span tag, in order of appearance. None if the answers have no tags although they name
            visible things, so the record gives no supervision of tags.
    """

    id: str
    image: Any
    image_id: str
    image_label: str
    messages: list[dict[str, str]]
    masks: list[PartMask] | None
    source: str
    licence: str

    def validate(self, *, where: str) -> None:
        """Raise DataError as [`check_turns`] does."""
        check_turns(self.messages, len(self.masks or []), where=where)


@dataclass
class Question:
    """A multiple-choice benchmark record.

    Attributes:
        correct, object_correct: Indices into `choices` and `object_choices`.
        choice_parts: The parts that each choice names.
        masks: All visible parts of the image, not only those of the answer.
        object_question, object_choices, object_classes, object_correct: None except for the types `whole_to_part` and
            `part_to_whole`.
    """

    id: str
    image: Any
    image_id: str
    image_label: str
    question_type: str
    question: str
    choices: list[str]
    correct: int
    choice_parts: list[list[str]]
    masks: list[PartMask]
    object_question: str | None = None
    object_choices: list[str] | None = None
    object_classes: list[str] | None = None
    object_correct: int | None = None
    source: str = ""
    licence: str = ""

    @property
    def photograph(self) -> str:
        """The image id without the object: the same for all objects in one photograph.

        Sources with an example for each object of an image append its label to the id, "0.png#car".
        """
        return re.sub(rf"(?<=.)[#-]{re.escape(self.image_label)}$", "", self.image_id)

    def validate(self, *, where: str) -> None:
        """Raise DataError that names the field, unless the choices differ, each part has one mask, and the correct
        choice has masks for all its parts.
        """
        if self.question_type not in QUESTION_TYPES:
            known = ", ".join(QUESTION_TYPES)
            raise DataError(f"{where}, field 'question_type': unknown type {self.question_type!r}; known are {known}")
        _check_choices(self.choices, correct=self.correct, where=where, field="choices")
        if len(self.choice_parts) != len(self.choices):
            raise DataError(
                f"{where}, field 'choice_parts': {len(self.choices)} choices, but parts of {len(self.choice_parts)}"
            )
        part_sets = [frozenset(parts) for parts in self.choice_parts]
        if len(set(part_sets)) != len(part_sets):
            raise DataError(f"{where}, field 'choice_parts': two choices name the same parts {self.choice_parts}")
        empty = [index for index, parts in enumerate(part_sets) if not parts]
        if empty:
            raise DataError(f"{where}, field 'choice_parts': choice {empty[0]} names no part")
        labels = [mask.label for mask in self.masks]
        if len(set(labels)) != len(labels):
            repeated = next(label for label in labels if labels.count(label) > 1)
            raise DataError(f"{where}, field 'masks': two masks are named {repeated!r}; merge them into one")
        unmasked = sorted(part_sets[self.correct] - set(labels))
        if unmasked:
            raise DataError(f"{where}, field 'masks': the correct answer names {unmasked}, which have no mask")
        self._validate_object_fields(where=where)

    def _validate_object_fields(self, *, where: str) -> None:
        fields = (self.object_question, self.object_choices, self.object_classes, self.object_correct)
        if self.question_type not in TWO_STEP_TYPES:
            if any(value is not None for value in fields):
                raise DataError(f"{where}, field 'object_question': set, though {self.question_type} asks no object")
            return
        if any(value is None for value in fields):
            raise DataError(f"{where}, field 'object_question': {self.question_type} needs every object field")
        _check_choices(self.object_choices, correct=self.object_correct, where=where, field="object_choices")
        if len(set(self.object_classes)) != len(self.object_choices):
            raise DataError(
                f"{where}, field 'object_classes': expected {len(self.object_choices)} different classes, "
                f"found {self.object_classes}"
            )


def check_turns(messages: list[dict[str, str]], masks: int, *, where: str) -> None:
    """Raise DataError unless questions and answers alternate, tags pair up, and each tag has a mask."""
    if not messages:
        raise DataError(f"{where}, field 'messages': the conversation is empty")
    tags = 0
    for index, message in enumerate(messages):
        place = f"{where}, field 'messages[{index}]'"
        expected_role = "assistant" if index % 2 else "user"
        if message["role"] != expected_role:
            raise DataError(f"{place}: expected the role {expected_role!r}, found {message['role']!r}")
        if not isinstance(message["content"], str):
            raise DataError(f"{place}: expected a text, found {message['content']!r:.80}")
        phrases = tagged_phrases(message["content"], where=place)
        if phrases and (joined := _JOINED_TAGS.search(message["content"])):
            raise DataError(
                f"{place}: two span tags need a space or a word between them to have tokens of their own, found "
                f"{joined[0]!r:.80}"
            )
        if phrases and expected_role == "user":
            raise DataError(f"{place}: a user message contains the span tag <p>; write it as \\<p>")
        tags += len(phrases)
    if expected_role == "user":
        raise DataError(f"{place}: the conversation ends with the user; add the answer or leave the question out")
    if tags != masks:
        raise DataError(f"{where}, field 'masks': {tags} span tags, but {masks} masks; give each tag one mask")


def as_row(record: GroundedConversation | Question) -> dict[str, Any]:
    """Return the record as plain dictionaries and lists for `datasets`, with the image unchanged."""
    row = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    row["masks"] = record.masks and [{"label": mask.label, "rle": mask.rle} for mask in record.masks]
    return row


def check_plain(text: str, *, where: str) -> None:
    """Raise DataError if a text contains a special token of models, such as the end of an answer."""
    if found := _SPECIAL_TOKEN.search(text):
        raise DataError(
            f"{where}: the text contains {found[0]!r}, a special token of models; write it as "
            f"{defuse(found[0])!r} or remove it"
        )


def defuse(text: str) -> str:
    """Return the text with a blank inside each special token, so that no tokenizer recognises it.

    >>> defuse("an <image> tag, </s>")
    'an <image > tag, </s >'
    """
    return _SPECIAL_TOKEN.sub(lambda match: f"{match[0][:-1]} {match[0][-1]}", text)


def escape_tags(text: str) -> str:
    """Return the text, such as a label, with a backslash before literal span tags."""
    return _LITERAL_TAG.sub(lambda match: "\\" + match.group(), text)


def tagged_phrases(text: str, *, where: str = "text") -> list[str]:
    """Return the phrases between span tags, in order. Raises DataError on unbalanced, nested or empty tags."""
    try:
        plain, spans = parse_span_tags(text)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    return [plain[start:end] for start, end in spans]


def _check_choices(choices: list[str], *, correct: int, where: str, field: str) -> None:
    if len(choices) < 2:
        raise DataError(f"{where}, field {field!r}: expected at least two choices, found {len(choices)}")
    if not 0 <= correct < len(choices):
        raise DataError(f"{where}, field 'correct': {correct} is not an index into {len(choices)} {field}")
    if len(set(choices)) != len(choices):
        repeated = next(choice for choice in choices if choices.count(choice) > 1)
        raise DataError(f"{where}, field {field!r}: {repeated!r} occurs more than once")


def as_chat(messages: list[dict], image: Any) -> list[dict]:
    """Return a copy of the messages with the image, unless it is None, before the text of the first."""
    chat = [dict(message) for message in messages]
    if image is not None:
        chat[0]["content"] = [{"type": "image", "image": image}, {"type": "text", "text": chat[0]["content"]}]
    return chat
