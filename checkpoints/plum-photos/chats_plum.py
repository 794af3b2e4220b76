"""
Conversations: their messages, the span tags of answers, and chat templates.

    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What parts ...?"}]},
     {"role": "assistant", "content": "It has a <p>left wing</p>."}]
        ──> without_images, render_chats  "USER: <image>\nWhat parts ...? ASSISTANT: It has a <p>left wing</p>.</s>"
        ──> find_answers, strip_span_tags  the text without tags, and the ranges of its answers and spans

A *span tag* `<p>...</p>` in an assistant's text encloses words with a mask; a literal tag is written `\\<p>`.

Processor and readers share this file. Only templates need transformers, and nothing needs torch.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import TemplateError

ROLES = ("system", "user", "assistant")
# Possible keys of an image in a part of a message, as in transformers.
IMAGE_KEYS = ("image", "url", "path", "base64")
DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' -}}
{%- for part in message.content if part.type == 'image' -%}{{- image_token + '\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- ' ' -}}
{%- elif message.role == 'assistant' -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{{- ' ' -}}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- eos_token -}}
{%- endgeneration -%}
{%- elif message.role == 'system' and loop.first -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- ' ' -}}
{%- else -%}
{{- raise_exception('Roles are user and assistant, and system in the first message, found ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
# Options of transformers' `apply_chat_template` with the values that match the behaviour here.
FIXED_OPTIONS = {
    "padding": (True, "longest"),
    "truncation": (False, None, "do_not_truncate"),
    "max_length": (None,),
    "return_tensors": ("auto", "pt"),
    "return_attention_mask": (True,),
    "return_assistant_tokens_mask": (False,),
    "load_audio_from_video": (False,),
    "sanitize_control_tokens": (True, False),
}


# ---------------------------------------------------------------- messages


def without_images(messages: list[dict], special_tokens: Iterable[str], *, where: str) -> list[dict]:
    """
    Return the messages with lists of parts as contents and bare image placeholders, without pixels for templates.

    Args:
        special_tokens: Texts that must not occur: the tokenizer reads them as the end of an answer or an image.
        where: Start of error messages.

    Raises:
        ValueError: A role or part is unknown, or a text contains a special token.
    """
    plain = []
    for i, message in enumerate(messages):
        place = f"{where}, message {i}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            found = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"{place}: expected a role of {', '.join(ROLES)}, found {found!r}.")
        parts = message.get("content")
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"{place}: expected a string or a list of parts as content, found {parts!r}.")
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if not (kind in ("image", "image_url") or (kind == "text" and isinstance(part.get("text"), str))):
                raise ValueError(f"{place}: expected parts of type 'text' or 'image', found {part!r:.200}.")
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        _check_special_tokens(text, message["role"], special_tokens, where=place)
        plain.append({**message, "content": [{"type": "image"} if _is_image(part) else part for part in parts]})
    if not plain:
        raise ValueError(f"{where} has no messages.")
    return plain


def _check_special_tokens(text: str, role: str, special_tokens: Iterable[str], *, where: str):
    if role == "assistant":
        text = re.sub(r"(\\?)</?p>", lambda tag: tag.group()[1:] if tag.group(1) else "", text)
    found = next((token for token in special_tokens if token in text), None)
    if found is not None:
        raise ValueError(
            f"{where}: the text contains {found!r}, which the tokenizer reads as a special token; "
            f"remove it from {text!r:.200}"
        )


def find_image(messages: list[dict]):
    """Return the one image of a conversation, in its given form, or `None`."""
    contents = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = [part for part in contents if _is_image(part)]
    if len(images) > 1:
        raise ValueError(f"PLUM segments one image per conversation, found {len(images)}.")
    if not images:
        return None
    part = images[0]
    if part["type"] == "image_url":
        url = part.get("image_url")
        part = {"url": url.get("url") if isinstance(url, dict) else url}
    given = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"Expected the image of a part under one of the keys {', '.join(IMAGE_KEYS)}, found {sorted(part)}."
        )
    return given[0]


def _is_image(part: dict) -> bool:
    return part["type"] in ("image", "image_url")


# --------------------------------------------------------------- span tags


@dataclass
class PlainChat:
    """
    A rendered conversation without tags, with one placeholder per image; ranges are `(start, end)` in characters.
    """

    text: str
    answers: list[tuple[int, int]]
    spans: list[tuple[int, int]]


def parse_span_tags(text: str) -> tuple[str, list[tuple[int, int]]]:
    r"""
    Remove the span tags of a text.

    >>> parse_span_tags("A <p>wing</p> and \\<p> as text.")
    ('A wing and <p> as text.', [(2, 6)])

    Returns:
        The plain text, and the character range `(start, end)` of each span in it.

    Raises:
        ValueError: A tag is unbalanced, nested or empty; the message contains the number of tags and the text.
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


def strip_span_tags(rendered: str, answer_ranges: list[tuple[int, int]]) -> PlainChat:
    """Remove the span tags in the answers of a rendered conversation."""
    parsed, last = PlainChat("", [], []), 0
    for start, end in answer_ranges:
        parsed.text += rendered[last:start]
        answer, spans = parse_span_tags(rendered[start:end])
        offset, last = len(parsed.text), end
        parsed.answers.append((offset, offset + len(answer)))
        parsed.spans += [(offset + span_start, offset + span_end) for span_start, span_end in spans]
        parsed.text += answer
    parsed.text += rendered[last:]
    return parsed


def insert_seg_tokens(chat: PlainChat, seg_token: str) -> PlainChat:
    """
    Insert the special token after each span; the spans of the result are these tokens.

    >>> insert_seg_tokens(PlainChat("A wing.", [(0, 7)], [(2, 6)]), "[SEG]")
    PlainChat(text='A wing[SEG].', answers=[(0, 12)], spans=[(6, 11)])
    """
    ends, width = [end for _, end in chat.spans], len(seg_token)
    pieces = [chat.text[start:end] for start, end in zip([0, *ends], [*ends, len(chat.text)], strict=True)]
    return PlainChat(
        seg_token.join(pieces),
        [
            (start + width * bisect_right(ends, start), end + width * bisect_right(ends, end))
            for start, end in chat.answers
        ],
        [(end + width * i, end + width * (i + 1)) for i, end in enumerate(ends)],
    )


class WordMarks:
    """Spans are the words between tags, for a model with a span tagger."""

    def write(self, chat: PlainChat) -> PlainChat:
        """Return the chat as the model reads it, with its spans."""
        return chat

    def find_start(self, text: str, start: int, end: int, *, last_end: int) -> int:
        """Return the character of an answer's text where the words of a span found at `start` begin."""
        return start


@dataclass(frozen=True)
class TokenMarks:
    """Spans are a special token after their words, as in LISA, which marks only the end of the words."""

    token: str

    def write(self, chat: PlainChat) -> PlainChat:
        return insert_seg_tokens(chat, self.token)

    def find_start(self, text: str, start: int, end: int, *, last_end: int) -> int:
        return last_end + find_last_phrase(text[last_end:end])


def span_marks(seg_token: str | None) -> WordMarks | TokenMarks:
    """Return how spans are marked in texts, with or without a special token."""
    return WordMarks() if seg_token is None else TokenMarks(seg_token)


def find_last_phrase(text: str) -> int:
    """
    Return the start of the phrase at the end of a text: after the last punctuation mark, conjunction or article. For
    texts in which a token marks only the end of a phrase.

    >>> text = "It has a tail and a left wing"
    >>> text[find_last_phrase(text) :]
    'left wing'
    """
    boundary = re.match(r".*([.,:;!?()]|\b(and|or|an?|another|the)\s)\s*", text, re.DOTALL | re.IGNORECASE)
    return boundary.end() if boundary else 0


# --------------------------------------------------------------- templates


def check_options(options: dict, num_texts: int, template: str = "") -> dict:
    """
    Return the variables of the Jinja template among the options of a call.

    Raises:
        ValueError: An option of transformers is not supported, or the template does not have a variable.
    """
    variables = {}
    for name, value in options.items():
        alone = name == "padding" and num_texts == 1 and value in (False, "do_not_pad")
        if name in FIXED_OPTIONS:
            if not alone and value not in FIXED_OPTIONS[name]:
                expected = " or ".join(map(repr, FIXED_OPTIONS[name]))
                raise ValueError(f"{name}={value!r} is not supported: expected {expected}, or leave it out.")
        elif re.search(rf"\b{re.escape(name)}\b", template):
            variables[name] = value
        elif value is not None:
            raise ValueError(f"{name!r} is neither an option of PlumProcessor nor a variable of its chat template.")
    return variables


def render_chats(chats: list[list[dict]], template: str, variables: dict, **options) -> list[str]:
    """
    Return chats, whose contents are lists of parts, as text; `variables` belong to the Jinja template, `options` to
    transformers, such as `add_generation_prompt`.

    Raises:
        ValueError: The template rejects a chat.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(chats, chat_template=template, **options, **variables)
    except TemplateError as error:
        raise ValueError(f"The chat template refuses a conversation: {error}") from error
    return rendered


def find_answers(messages: list[dict], rendered: str, template: str, variables: dict) -> list[tuple[int, int]]:
    """
    Return the ranges of the assistant's texts in a rendered chat: the text that a turn adds to its prompt. This needs
    no marks in the template, which most vision-language models do not have.

    Raises:
        ValueError: The text of a turn depends on later turns.
    """
    ranges = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            (prompt,) = render_chats([messages[:i]], template, variables, add_generation_prompt=True)
            (answered,) = render_chats([messages[: i + 1]], template, variables)
            answered = answered.rstrip()
            if not (answered.startswith(prompt) and rendered.startswith(answered)):
                raise ValueError(
                    f"The chat template renders turn {i} differently when it is asked for, given or followed by "
                    "other turns, so that its answer cannot be located; pass a chat_template that does not."
                )
            ranges.append((len(prompt), len(answered)))
    return ranges


def find_continued_answer(messages: list[dict], rendered: str, template: str, variables: dict) -> tuple[int, int]:
    """Return the range of the text of the last turn, an assistant's, in a chat rendered to be continued there."""
    (prompt,) = render_chats([messages[:-1]], template, variables, add_generation_prompt=True)
    if not rendered.startswith(prompt):
        raise ValueError("The chat template renders an answer that is continued elsewhere than where it asks for one.")
    return len(prompt), len(rendered)


def can_train_on(template: str, variables: dict, stops: tuple[str, ...]) -> bool:
    """
    Return whether a template renders one `image_token` per image, all parts of a text, and answers in place that end
    with one of `stops`.
    """
    texts = ("Which parts", " can you see?", "A wing", " and a tail.", "Any other?")
    first, second, wing, tail, other = ({"type": "text", "text": text} for text in texts)
    answer = {"role": "assistant", "content": [wing, tail]}
    messages = [
        {"role": "user", "content": [{"type": "image"}, first, second]},
        answer,
        {"role": "user", "content": [other]},
        answer,
    ]
    try:
        (text,) = render_chats([messages], template, variables)
        ranges = find_answers(messages, text, template, variables)
    except (TypeError, ValueError):
        return False
    complete = text.count(variables["image_token"]) == 1 and all(words.strip() in text for words in texts)
    return complete and all(text[slice(*found)].endswith(stops) for found in ranges)
