"""
Conversations of PLUM to plain text: chat templates, the places of answers in them, and span tags.

A *span tag* `<p>...</p>` in an assistant's text says that the words are grounded by a mask. Ranges are `(start, end)`
in characters.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

DEFAULT_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' -}}
{%- for part in message.content if part.type == 'image' -%}{{- image_token + '\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{{- ' ' -}}
{%- else -%}
{{- 'ASSISTANT: ' + message.content[0].text + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


IMAGE_KEYS = ("image", "url", "path", "base64")
"""What an image may be given under in a part of a message, as in transformers."""


@dataclass
class PlainChat:
    """
    A rendered conversation without tags and with one placeholder per image; ranges are `(start, end)` in characters.
    """

    text: str
    answers: list[tuple[int, int]]
    spans: list[tuple[int, int]]


def parse_span_tags(text: str) -> tuple[str, list[tuple[int, int]]]:
    r"""
    Takes the span tags out of a text.

    >>> parse_span_tags("A <p>wing</p> and \\<p> as text.")
    ('A wing and <p> as text.', [(2, 6)])

    Returns:
        The plain text, and the character range `(start, end)` of each span in it.

    Raises:
        ValueError: A tag is unbalanced, nested or empty; the message counts the tags and quotes the text.
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


def render_chats(
    chats: list[list[dict]], template: str, variables: dict, add_generation_prompt: bool = False
) -> list[str]:
    """Chats, their contents lists of parts, as text; `variables` are those of the Jinja template."""
    rendered, _ = render_jinja_template(
        chats, chat_template=template, add_generation_prompt=add_generation_prompt, **variables
    )
    return rendered


def find_answers(messages: list[dict], rendered: str, template: str, variables: dict) -> list[tuple[int, int]]:
    """
    Ranges of the assistant's texts in a rendered chat: what a turn adds to the prompt that asks for it. That needs no
    marks in the template, which those of most vision-language models do not have.

    Raises:
        ValueError: The template renders a turn differently according to what follows it.
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


def can_train_on(template: str, variables: dict, stops: tuple[str, ...]) -> bool:
    """Whether a template places one `image_token` per image, and answers in place that end with one of `stops`."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which parts?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A wing."}]}
    messages = [question, answer, {"role": "user", "content": [{"type": "text", "text": "Any other?"}]}, answer]
    try:
        (text,) = render_chats([messages], template, variables)
        ranges = find_answers(messages, text, template, variables)
    except (TemplateError, TypeError, ValueError):
        return False
    return text.count(variables["image_token"]) == 1 and all(text[slice(*found)].endswith(stops) for found in ranges)


def strip_span_tags(rendered: str, answer_ranges: list[tuple[int, int]]) -> PlainChat:
    """Takes the span tags out of the answers of a rendered conversation."""
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
    Puts the special token after each span; the spans of the result are those tokens.

    >>> insert_seg_tokens(PlainChat("A wing.", [(0, 7)], [(2, 6)]), "[SEG]")
    PlainChat(text='A wing[SEG].', answers=[(0, 12)], spans=[(6, 11)])

    Raises:
        ValueError: The token stands in a message's text.
    """
    if seg_token in chat.text:
        raise ValueError(f"{seg_token!r} may not stand in a message's text, found {chat.text!r}.")
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


def find_last_phrase(text: str) -> int:
    """
    Where the phrase at the end of a text starts: after the last punctuation mark, conjunction or article. For texts
    in which a token says where a phrase ends and nothing says where it starts.

    >>> text = "It has a tail and a left wing"
    >>> text[find_last_phrase(text) :]
    'left wing'
    """
    boundary = re.match(r".*([.,:;!?()]|\b(and|or|an?|another|the)\s)\s*", text, re.DOTALL | re.IGNORECASE)
    return boundary.end() if boundary else 0


def without_images(messages: list[dict]) -> list[dict]:
    """The messages with lists of parts as contents and bare image placeholders: templates touch no pixels."""
    plain = []
    for message in messages:
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        plain.append({**message, "content": [{"type": "image"} if _is_image(part) else part for part in parts]})
    return plain


def find_image(messages: list[dict]):
    """What is given as the one image of a conversation, in whatever form, or `None`."""
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
