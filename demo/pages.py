"""The parts of the demonstration that are pictures and coloured words: pure functions from answers to HTML.

Pictures are part of the HTML (data: addresses), so that a page needs nothing from elsewhere and leaves no files
behind. All text is escaped by the template engine.
"""

import base64
import io
from collections.abc import Sequence

import jinja2
import numpy as np
from PIL import Image, ImageColor

from plum_partonomy.masks import encode
from plum_partonomy.records import Question
from plum_partonomy.scoring.mask_metrics import normalise
from plum_partonomy.scoring.metrics import true_masks
from plum_partonomy.scoring.overlays import COLOURS, highlight, mask_opacity, panel
from plum_partonomy.scoring.predictions import Prediction
from processing_plum import PlumAnswer, PlumSpan

LONGEST_SIDE = 640
"""Of the pictures of an answer, in pixels; those of steps and questions have the size of the reports' panels."""


def shown_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in pixels of an image on the page."""
    scale = LONGEST_SIDE / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def draw_mask(mask: np.ndarray, colour: str, size: tuple[int, int]) -> Image.Image:
    """A boolean mask as a translucent, outlined area of an RGBA image of (width, height) `size`."""
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
    return environment.from_string(template).render(colours=COLOURS, **values)


# ---------------------------------------------------------------- an answer


def draw_text(text: str) -> str:
    """An answer that is still being written."""
    return _render('<p class="plum-answer" aria-busy="true">{{ text }}</p>', text=text)


def draw_answer(image: Image.Image, answer: PlumAnswer, warning: str | None = None) -> str:
    """The image with its masks, and the answer whose spans isolate them (view.js), under a warning if there is one.

    Below an answer that was cut off it says so.
    """
    size = shown_size(image)
    spans = [
        {
            "text": span.text,
            "score": f"{span.score:.2f}",
            "colour": COLOURS[index % len(COLOURS)],
            "mask": _address(draw_mask(span.mask, COLOURS[index % len(COLOURS)], size), format="PNG"),
        }
        for index, span in enumerate(answer.spans)
    ]
    shown = _address(image.resize(size, Image.Resampling.BICUBIC), format="JPEG")
    pieces = _cut(answer.text, answer.spans)
    return _render(ANSWER, image=shown, spans=spans, pieces=pieces, warning=warning, cut=answer.is_truncated)


def _cut(text: str, spans: Sequence[PlumSpan]) -> list[tuple[str, int | None]]:
    """A text as (piece, index of its span or None)."""
    numbers = [str(index) for index in range(len(spans))]
    return [
        (piece, None if number is None else int(number))
        for piece, number in highlight(text, spans, colours=numbers or COLOURS)
    ]


ANSWER = """
{% if warning %}
<p class="plum-warning" role="status">{{ warning }}</p>
{% endif %}
<div class="plum-stage">
<img src="{{ image }}" alt="the image">
{% for span in spans %}
<img class="plum-mask" data-span="{{ loop.index0 }}" src="{{ span.mask }}" alt="mask of {{ span.text }}">
{% endfor %}
</div>
<p class="plum-answer">
{%- for piece, index in pieces -%}
{%- if index is none %}{{ piece }}{% else -%}
<span class="plum-span" role="button" tabindex="0" aria-pressed="false" data-span="{{ index }}"
style="--colour: {{ spans[index].colour }}" title="score {{ spans[index].score }}">{{ piece }}</span>
{%- endif -%}
{%- endfor -%}
</p>
{% if cut %}<p class="plum-warning" role="status">The answer is cut off, it is too long.</p>
{% endif %}
{% if not spans %}<p class="plum-note">No span of this answer is tagged, or none reaches the span threshold.</p>
{% endif %}
"""


# ---------------------------------------------------------------- steps


def draw_steps(image: Image.Image, spans: Sequence[PlumSpan], apart: Sequence[PlumSpan]) -> str:
    """Each mask, the earlier masks that it is conditioned on, and the mask of the same span without them."""
    rles = [encode(span.mask) for span in spans]
    steps = []
    for t, (span, alone) in enumerate(zip(spans, apart, strict=True)):
        colour = COLOURS[t % len(COLOURS)]
        union = (span.mask | alone.mask).sum()
        steps.append(
            {
                "text": span.text,
                "colour": colour,
                "iou": f"{(span.mask & alone.mask).sum() / union:.2f}" if union else "–",
                "panels": [
                    ("earlier masks", panel(image, rles[:t], COLOURS)),
                    ("with feedback", panel(image, rles[t : t + 1], [colour])),
                    ("without", panel(image, [encode(alone.mask)], [colour])),
                ],
            }
        )
    return _render(STEPS, steps=steps)


STEPS = """
{% for step in steps %}
<section class="plum-step">
<h3><span class="plum-chip" style="--colour: {{ step.colour }}">{{ loop.index }}. {{ step.text }}</span>
{% if loop.first %}the first mask has no earlier ones{% else %}IoU of the two masks {{ step.iou }}{% endif %}</h3>
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
    """A benchmark question: its image and masks, the choices with the model's, and the model's own answer."""
    generated, truth = prediction.generated_spans, true_masks(question)
    names = list(dict.fromkeys(normalise(name) for name in [*(m.label for m in truth), *(s.text for s in generated)]))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
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
                "parts of the right choice",
                panel(image, [m.rle for m in truth], [colours[normalise(m.label)] for m in truth]),
            ),
            ("the model's own answer", panel(image, [span.rle for span in generated], own_colours)),
        ],
        pieces=highlight(prediction.generated_text, generated, colours=own_colours or COLOURS),
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
