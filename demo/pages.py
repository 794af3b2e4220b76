"""Render images and coloured words of the app: pure functions from answers to HTML.

Images are embedded in the HTML (data URLs), so a page loads nothing else and leaves no files. The template engine
escapes all text.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from PIL import Image, ImageColor

from demo.checkpoints import Checkpoint
from plum_partonomy.inference.one_image import Prompt, Range
from plum_partonomy.masks import encode
from plum_partonomy.records import Question
from plum_partonomy.scoring.mask_metrics import normalise
from plum_partonomy.scoring.metrics import true_masks
from plum_partonomy.scoring.overlays import highlight, mask_opacity, panel, pick_colours
from plum_partonomy.scoring.predictions import Prediction
from processing_plum import PlumAnswer, PlumSpan

LONGEST_SIDE = 640
"""Longest side of the images of an answer, in pixels; steps and questions use the size of the reports' panels."""


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) in pixels of an image on the page."""
    scale = LONGEST_SIDE / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def draw_mask(mask: np.ndarray, colour: str, size: tuple[int, int]) -> Image.Image:
    """Return a boolean mask as a translucent, outlined area of an RGBA image of (width, height) `size`."""
    smooth = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BILINEAR)
    drawn = Image.new("RGBA", size, ImageColor.getrgb(colour))
    drawn.putalpha(Image.fromarray(mask_opacity(np.asarray(smooth) > 127)))
    return drawn


def _address(image: Image.Image, *, format: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=format, compress_level=1)  # of PNG: masks are small at any level
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _render(template: str, **values) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(**values)


# ---------------------------------------------------------------- a model


def draw_checkpoint(checkpoint: Checkpoint) -> str:
    """Return name and size of a model, the kinds of its training images, and its metrics."""
    return _render(CHECKPOINT, checkpoint=checkpoint, size=f"{checkpoint.parameters / 1e6:,.1f}")


CHECKPOINT = """
<p class="plum-model">Model: <b>{{ checkpoint.name }}</b>, {{ size }} million parameters.
{% if checkpoint.kinds %}It knows {{ checkpoint.kinds }}; other images get a warning.
{% else %}Its config does not say which images it knows.{% endif %}
{% for dataset, figures in checkpoint.figures.items() %}
<br>Measured on {{ dataset }}: {% for metric, value in figures.items() %}
{{ metric }} {{ "%.2f" | format(value) }}{{ "." if loop.last else ", " }}
{%- endfor %}{% endfor %}</p>
"""


# ---------------------------------------------------------------- an answer


@dataclass(frozen=True)
class Change:
    """
    A change of an answer by the user.

    Args:
        masks: The masks before the change, by the characters of their spans.
        corrected: Characters of the span whose mask was corrected; None if words were added.
    """

    masks: dict[Range, np.ndarray]
    corrected: Range | None = None


def draw_text(text: str, *, begun: bool = False) -> str:
    """Return an answer during generation; `begun` scrolls it into view on a narrow page."""
    page = '<p class="plum-answer{% if begun %} plum-begun{% endif %}" aria-busy="true">{{ text }}</p>'
    return _render(page, text=text, begun=begun)


def draw_note(text: str) -> str:
    """Return a message instead of an answer."""
    return _render('<p class="plum-note" role="status">{{ text }}</p>', text=text)


def draw_answer(
    image: Image.Image,
    answer: PlumAnswer,
    *,
    colours: Sequence[str] | None = None,
    written: int | None = None,
    warning: str | None = None,
    least_score: float = 0.0,
    change: Change | None = None,
    prompts: Mapping[Range, Prompt] | None = None,
) -> str:
    """
    Return the image with its masks, and the answer whose spans isolate and correct them (view.js).

    Args:
        colours: "#rrggbb" per span.
        written: Number of characters written by the model; the others are the user's; default: all.
        warning: Shown above the image.
        least_score: Minimum score of shown spans.
        change: The last change by the user.
        prompts: Clicks and boxes of the user, by the characters of their spans.
    """
    prompts = prompts or {}
    size = shown_size(image)
    colours = colours or pick_colours(len(answer.spans))
    spans = []
    for span, colour in zip(answer.spans, colours, strict=True):
        place = span.start, span.end
        was = None if change is None else change.masks.get(place)
        changed = was is not None and not np.array_equal(was, span.mask)
        spans.append(
            {
                "text": span.text,
                "start": span.start,
                "score": f"{span.score:.2f}",
                "colour": colour,
                "mask": _address(draw_mask(span.mask, colour, size), format="PNG"),
                "was": _address(draw_mask(was, colour, size), format="PNG") if changed else None,
                "added": change is not None and was is None,
                "corrected": change is not None and change.corrected == place,
                "prompts": name_prompts(prompts.get(place)),
                "marks": _place_marks(prompts.get(place), image.size),
            }
        )
    return _render(
        ANSWER,
        image=_address(image.resize(size, Image.Resampling.BICUBIC), format="JPEG"),
        shown_size=size,
        size=image.size,
        spans=spans,
        pieces=_cut(answer.text, answer.spans, len(answer.text) if written is None else written),
        warning=warning,
        cut=answer.is_truncated,
        changed=change is not None,
        least_score=least_score,
    )


def name_prompts(prompt: Prompt | None) -> str:
    """Return in words how many clicks and boxes a mask has, "" for none.

    >>> name_prompts(Prompt(points=((1, 2), (3, 4)), labels=(1, 0), box=(0, 0, 5, 5)))
    'your 2 clicks and box'
    """
    if prompt is None:
        return ""
    count = len(prompt.points)
    words = [f"{count} click{'s' if count > 1 else ''}"] if count else []
    return "your " + " and ".join([*words, *["box"] * (prompt.box is not None)])


def _place_marks(prompt: Prompt | None, size: tuple[int, int]) -> list[tuple[str, str, list[float]]]:
    """Return the marks of a prompt as (class, sign, left, top, width and height in percent of the image)."""
    if prompt is None:
        return []
    width, height = size
    marks = []
    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box
        marks.append(("plum-box", "", [x0 / width, y0 / height, (x1 - x0) / width, (y1 - y0) / height]))
    for (x, y), label in zip(prompt.points, prompt.labels, strict=True):
        middle = [(x + 0.5) / width, (y + 0.5) / height, 0.0, 0.0]  # of the pixel
        marks.append(("plum-point", "+", middle) if label else ("plum-point plum-less", "−", middle))
    return [(kind, sign, [round(100 * part, 3) for part in parts]) for kind, sign, parts in marks]


def _cut(text: str, spans: Sequence[PlumSpan], written: int) -> list[tuple[str, int | None, bool]]:
    """Return a text as (piece, index of its span or None, whether the user wrote it)."""
    pieces: list[tuple[str, int | None, bool]] = []
    numbers = [str(index) for index in range(len(spans))]
    start = 0
    for piece, number in highlight(text, spans, colours=numbers):
        index = None if number is None else int(number)
        cut = min(max(written - start, 0), len(piece)) if index is None else len(piece) * (start < written)
        pieces += [part for part in [(piece[:cut], index, False), (piece[cut:], index, True)] if part[0]]
        start += len(piece)
    return pieces


ANSWER = """
{% macro chip(span) %}<span class="plum-chip" style="--colour: {{ span.colour }}">{{ span.text }}</span>{% endmacro %}
{% if warning %}
<p class="plum-warning" role="status">{{ warning }}</p>
{% endif %}
<div class="plum-stage" data-width="{{ size[0] }}" data-height="{{ size[1] }}">
<img src="{{ image }}" alt="the image" width="{{ shown_size[0] }}" height="{{ shown_size[1] }}">
{% for span in spans %}
<img class="plum-mask{% if span.was %} plum-changed{% endif %}" data-span="{{ loop.index0 }}" src="{{ span.mask }}"
alt="mask of {{ span.text }}">
{% if span.was %}
<img class="plum-was" data-span="{{ loop.index0 }}" src="{{ span.was }}" alt="mask of {{ span.text }} before">
{% endif %}
{% endfor %}
<canvas class="plum-pad" width="{{ shown_size[0] }}" height="{{ shown_size[1] }}" tabindex="0" role="application"
aria-label="the image: arrow keys move a cross, Enter clicks there, Shift+Enter takes away there"></canvas>
{% for span in spans %}{% set number = loop.index0 %}{% for kind, sign, (left, top, width, height) in span.marks %}
<span class="plum-mark {{ kind }}" data-span="{{ number }}" aria-hidden="true"
style="left: {{ left }}%; top: {{ top }}%; width: {{ width }}%; height: {{ height }}%">{{ sign }}</span>
{% endfor %}{% endfor %}
</div>
<p class="plum-answer">
{%- for piece, index, own in pieces -%}
{%- if index is none %}{% if own %}<span class="plum-own">{{ piece }}</span>{% else %}{{ piece }}{% endif %}{% else -%}
<span class="plum-span{% if spans[index].was %} plum-changed{% endif %}{% if own %} plum-own{% endif %}" role="button"
tabindex="0" aria-pressed="false" data-start="{{ spans[index].start }}"
data-span="{{ index }}" data-score="{{ spans[index].score }}"
style="--colour: {{ spans[index].colour }}">{{ piece }}</span>
{%- endif -%}
{%- endfor -%}
</p>
{% if cut %}<p class="plum-warning" role="status">The answer is cut off, it is too long.</p>
{% endif %}
{% if changed %}
<div class="plum-notice" role="status">
{% for span in spans if span.corrected %}
{% if span.prompts %}<span class="plum-clicked" data-start="{{ span.start }}">The mask of {{ chip(span) }} follows
{{ span.prompts }}.</span>{% else %}Your mask of {{ chip(span) }} is used.{% endif %}
{% endfor %}
{% for span in spans if span.added %}{% if loop.first %}Added: {% endif %}{{ chip(span) }} {% endfor %}
{% for span in spans if span.was and not span.corrected %}{% if loop.first %}Changed with it: {% endif %}
{{ chip(span) }} {% endfor %}
{% if spans | selectattr("was") | list %}
<button type="button" data-do="before" aria-pressed="false">Show before</button>
{% endif %}
<button type="button" data-do="undo">Undo</button>
</div>
{% endif %}
{% if spans %}
<div class="plum-tools plum-choosing">
<button type="button" data-do="correct" disabled>Correct this mask</button>
<span class="plum-note">Click a coloured word or its mask to see it alone and to correct it. Numbers are scores.</span>
</div>
<div class="plum-tools plum-correction">
<span class="plum-choice" role="group" aria-label="Correct with">
<button type="button" data-do="click" aria-pressed="true">Click or box</button>
<button type="button" data-do="brush" aria-pressed="false">Brush</button>
</span>
<span class="plum-choice" role="group" aria-label="It is to">
<button type="button" data-do="add" aria-pressed="true">+ Add</button>
<button type="button" data-do="take" aria-pressed="false">− Take away</button>
</span>
<button type="button" class="plum-with-click" data-do="undo-click" disabled>Undo click</button>
<button type="button" class="plum-with-click" data-do="done">Done</button>
<label class="plum-with-brush">Size <input class="plum-size" type="range" min="4" max="96" value="28"></label>
<button type="button" class="plum-with-brush" data-do="undo-stroke">Undo stroke</button>
<button type="button" class="plum-with-brush" data-do="use">Use this mask</button>
<button type="button" class="plum-with-brush" data-do="done">Cancel</button>
<span class="plum-note plum-with-click">Click to add a place; Shift-click, or choose Take away, to remove
one; drag to draw a box around the part. The mask changes at once.</span>
<span class="plum-note plum-with-brush">The white line is the edge that the mask had.</span>
</div>
{% elif least_score > 0 %}
<p class="plum-note">No mask has a score of at least {{ "%.2f" | format(least_score) }}: move the slider
"Minimum score" to the left.</p>
{% else %}
<p class="plum-note">The answer names no part that has a mask. Type words below to segment them.</p>
{% endif %}
"""


# ---------------------------------------------------------------- steps


def draw_steps(
    image: Image.Image,
    spans: Sequence[PlumSpan],
    apart: Sequence[PlumSpan],
    colours: Sequence[str],
    by_user: Sequence[str],
) -> str:
    """
    Return each mask, the earlier masks that it is conditioned on, and the mask of the same span without them.

    Args:
        by_user: What the user has corrected each mask with, "" for nothing.
    """
    rles = [encode(span.mask) for span in spans]
    steps = []
    for t, (span, alone, own) in enumerate(zip(spans, apart, by_user, strict=True)):
        colour = colours[t]
        union = (span.mask | alone.mask).sum()
        steps.append(
            {
                "text": span.text,
                "colour": colour,
                "own": own,
                "iou": f"{(span.mask & alone.mask).sum() / union:.2f}" if union else "–",
                "panels": [
                    ("earlier masks", panel(image, rles[:t], colours)),
                    (f"with {own or 'feedback'}", panel(image, rles[t : t + 1], [colour])),
                    ("without", panel(image, [encode(alone.mask)], [colour])),
                ],
            }
        )
    return _render(STEPS, steps=steps)


STEPS = """
{% for step in steps %}
<section class="plum-step">
<h3><span class="plum-chip" style="--colour: {{ step.colour }}">{{ loop.index }}. {{ step.text }}</span>
{{ step.own ~ "; " if step.own }}
{% if step.own or not loop.first %}IoU of the two masks {{ step.iou }}{% else %}
the first mask has no earlier ones{% endif %}</h3>
<div class="plum-panels">
{% for caption, picture in step.panels %}
<figure><img src="{{ picture }}" alt="{{ caption }}: {{ step.text }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
</section>
{% else %}
<p class="plum-note">Ask a question first; an answer with tagged spans has steps.</p>
{% endfor %}
"""


# ---------------------------------------------------------------- benchmark


def draw_question(image: Image.Image, question: Question, prediction: Prediction) -> str:
    """Return a benchmark question: image and masks, choices with the model's, and the generated answer."""
    generated, truth = prediction.generated_spans, true_masks(question)
    names = list(dict.fromkeys(normalise(name) for name in [*(m.label for m in truth), *(s.text for s in generated)]))
    colours = dict(zip(names, pick_colours(len(names)), strict=True))
    own_colours = [colours[normalise(span.text)] for span in generated]
    choices = zip(question.choices, prediction.choice_scores, strict=True)
    return _render(
        QUESTION,
        question=question,
        choices=[
            {"text": text, "score": f"{score:.3f}", "right": i == question.correct, "chosen": i == prediction.choice}
            for i, (text, score) in enumerate(choices)
        ],
        panels=[
            (
                "parts of the correct choice",
                panel(image, [m.rle for m in truth], [colours[normalise(m.label)] for m in truth]),
            ),
            ("generated answer", panel(image, [span.rle for span in generated], own_colours)),
        ],
        pieces=highlight(prediction.generated_text, generated, colours=own_colours),
    )


QUESTION = """
<p class="plum-note">{{ question.question_type }} · {{ question.image_label }} · {{ question.id }}</p>
<h3>{{ question.question }}</h3>
<div class="plum-panels">
{% for caption, picture in panels %}
<figure><img src="{{ picture }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
<p class="plum-answer">
{%- for piece, colour in pieces -%}
{%- if colour is none %}{{ piece }}{% else -%}
<span class="plum-chip" style="--colour: {{ colour }}">{{ piece }}</span>
{%- endif -%}
{%- endfor -%}
</p>
<ol class="plum-choices">
{% for choice in choices %}
<li{% if choice.chosen %} class="plum-chosen"{% endif %}>{{ choice.text }}
<small>{{ choice.score }}{% if choice.chosen %} · <b>the model's choice</b>{% endif %}
{%- if choice.right %} · <b>right</b>{% endif %}</small></li>
{% endfor %}
</ol>
<p class="plum-note">Numbers are negative log-likelihoods per token; the model chooses the least.</p>
"""
