"""One self-contained HTML page about an evaluation: figures, training curve, parts, and answers drawn on their images.

`overlay` draws masks on one image and `highlight` cuts an answer at its spans; the page uses one colour for a part in
both. Nothing is loaded from elsewhere, all text is escaped by the template engine.
"""

import base64
import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter

from partkit.images import to_rgb
from partkit.mask_metrics import normalise
from partkit.masks import RLE, DataError, decode
from partkit.metrics import Pair, pair_by_id, question_ious, true_masks, true_parts
from partkit.predictions import Prediction, SpanMask, write_whole
from partkit.schema import Question

__all__ = ["COLOURS", "FIGURES", "highlight", "mask_opacity", "overlay", "panel", "render_page", "write_report"]

# Told apart on photographs and by colour-blind readers (after Okabe and Ito), all dark enough for white text.
COLOURS = (
    "#0072b2",
    "#c44e00",
    "#00815e",
    "#b8378a",
    "#6a51a3",
    "#8c6d00",
    "#b2182b",
    "#3f6f8c",
    "#4d7c0f",
    "#7b4b2a",
)
PANEL_SIZE = 288  # longest side of an image on the page, in pixels
EXAMPLES = 24

# What the tables show: key in the figures, name on the page.
FIGURES = {
    "strict_macro_giou": "gIoU, macro (strict)",
    "strict_micro_giou": "gIoU, micro (strict)",
    "strict_ciou": "cIoU (strict)",
    "ap50": "AP50",
    "reference_macro_giou": "gIoU, macro (reference)",
    "reference_micro_giou": "gIoU, micro (reference)",
    "reference_hungarian_macro_giou": "gIoU, macro (Hungarian)",
    "reference_greedy_macro_giou": "gIoU, macro (greedy)",
    "reference_union_macro_giou": "gIoU, macro (union)",
    "choice_accuracy": "choice accuracy",
    "object_choice_accuracy": "object choice accuracy",
    "part_precision": "chosen parts, precision",
    "part_recall": "chosen parts, recall",
    "part_f1": "chosen parts, F1",
    "span_f1": "span tags, F1",
    "generated_part_precision": "generated parts, precision",
    "generated_part_recall": "generated parts, recall",
    "generated_part_f1": "generated parts, F1",
    "generated_exact": "generated part set exactly right",
    "end_to_end_giou": "gIoU of the generated answer",
}
FIGURES_BY_TYPE = (
    "strict_macro_giou",
    "choice_accuracy",
    "part_f1",
    "span_f1",
    "generated_part_f1",
    "generated_exact",
    "end_to_end_giou",
)


# ---------------------------------------------------------------- drawing


def overlay(image: Image.Image, masks: Sequence[np.ndarray], *, colours: Sequence[str] = COLOURS) -> Image.Image:
    """The image with every mask filled translucently and outlined.

    Args:
        image: PIL image of any mode; left unchanged.
        masks: bool arrays of the image's (height, width), drawn in order.
        colours: "#rrggbb" per mask, repeated from the start when there are more masks.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: a mask is not of the image's size.
    """
    drawn = to_rgb(image, where="image")
    for index, mask in enumerate(masks):
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"Expected masks of the image's (height, width) {(image.height, image.width)}, found {mask.shape} "
                f"for mask {index}: resize the mask to the image."
            )
        drawn.paste(colours[index % len(colours)], mask=Image.fromarray(mask_opacity(mask)))
    return drawn


def mask_opacity(mask: np.ndarray) -> np.ndarray:
    """Opacity 0..255, uint8, of a mask as it is drawn: translucent inside, opaque along its edge."""
    area = Image.fromarray(mask.astype(np.uint8) * 255)
    inside = area.filter(ImageFilter.MinFilter(3))
    edge = np.asarray(area) > np.asarray(inside)
    return np.where(edge, 255, np.where(mask, 140, 0)).astype(np.uint8)


def highlight(
    text: str, spans: Sequence[SpanMask], *, colours: Sequence[str] = COLOURS
) -> list[tuple[str, str | None]]:
    """Cuts a text at its spans: (piece, colour of its mask or None), in order; the pieces joined are the text."""
    pieces, position = [], 0
    for index in sorted(range(len(spans)), key=lambda index: spans[index].start):
        span = spans[index]
        pieces.append((text[position : span.start], None))
        pieces.append((text[span.start : span.end], colours[index % len(colours)]))
        position = span.end
    pieces.append((text[position:], None))
    return [piece for piece in pieces if piece[0]]


def panel(image: Image.Image, rles: Iterable[RLE], colours: Sequence[str]) -> str:
    """Address (data:) of the overlay at page size, for an HTML page."""
    scale = PANEL_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    masks = [Image.fromarray(decode(rle, expected_size=(image.height, image.width))) for rle in rles]
    masks = [np.asarray(mask.convert("L").resize(size, Image.Resampling.BILINEAR)) > 127 for mask in masks]
    drawn = overlay(to_rgb(image, where="image").resize(size, Image.Resampling.BICUBIC), masks, colours=colours)
    return _data_address(drawn, format="JPEG", quality=82)


def _data_address(image: Image.Image, *, format: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Columns of a curves file: name -> (steps, values); an empty cell means not measured at that step."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                step = float(row["step"])
                values = {name: float(cell) for name, cell in row.items() if name != "step" and cell}
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}, line {number}: expected a step and numbers, found {dict(row)}.") from error
            for name, value in values.items():
                steps, column = curves.setdefault(name, ([], []))
                steps.append(step)
                column.append(value)
    return curves


def _draw_curves(path: Path) -> str:
    """Data address of the training curves: losses on the left, figures of the validation split on the right."""
    curves = _read_curves(path)
    losses = [name for name in curves if "loss" in name]
    figures = [name for name in curves if name.startswith("eval_") and name not in losses]
    groups = [group for group in (losses, figures) if group]
    figure = Figure(figsize=(5.5 * max(1, len(groups)), 4.0), layout="constrained")
    for axis, group in zip(np.atleast_1d(figure.subplots(1, max(1, len(groups)))), groups, strict=False):
        for index, name in enumerate(group):
            marker = "o" if len(curves[name][0]) < 20 else None
            axis.plot(*curves[name], label=name, color=COLOURS[index % len(COLOURS)], marker=marker, markersize=3)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
        if group is losses and all(value > 0 for name in losses for value in curves[name][1]):
            axis.set_yscale("log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------- page


COLUMNS = {"model": "", "wrong image": "_wrong_image", "random": "_random"}  # title: suffix in the figures


def _range(intervals: dict[str, Any], name: str) -> str:
    return "{:.3f} to {:.3f}".format(*intervals[name]) if name in intervals else ""


def _cells(figures: dict[str, Any], name: str) -> list[str]:
    """One figure for every column as text, a dash where it was not measured."""
    values = [figures.get(name + suffix) for suffix in COLUMNS.values()]
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _shown_iou(pair: Pair) -> float:
    """Mean IoU of the model's own answer or, where it wrote none, of the given one."""
    question, prediction = pair
    own = prediction.generated_spans
    ious = question_ious(question, (prediction.given_spans or ()) if own is None else own)
    return fmean(ious.values()) if ious else 0.0


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs at even distances from the best to the worst masks: no choice of ours."""
    ordered = sorted(pairs, key=lambda pair: (-_shown_iou(pair), pair[0].id))
    return [ordered[round(index)] for index in np.linspace(0, len(ordered) - 1, min(EXAMPLES, len(ordered)))]


def _example(pair: Pair, load_image: Callable[[Question], Image.Image]) -> dict[str, Any]:
    question, prediction = pair
    image, masks = load_image(question), true_masks(question)
    given, generated = prediction.given_spans, prediction.generated_spans
    named = [*true_parts(question), *(span.text for span in [*(given or ()), *(generated or ())])]
    order = list(dict.fromkeys(normalise(name) for name in named))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(order)}

    def of(names: Iterable[str]) -> list[str]:
        return [colours[normalise(name)] for name in names]

    panels = [("truth", panel(image, [mask.rle for mask in masks], of(mask.label for mask in masks)))]
    for caption, spans in (("answer given", given), ("own answer", generated)):
        if spans is not None:
            panels.append((caption, panel(image, [span.rle for span in spans], of(span.text for span in spans))))
    text, own_text, scores = question.choices[question.correct], prediction.generated_text, prediction.choice_scores
    # the spans of a given answer are cut out of the correct one, which need not be what was given
    given = [span for span in given or () if text[span.start : span.end] == span.text]
    return {
        "question": question.question,
        "about": f"{question.question_type} · {question.image_label} · {question.id}",
        "iou": f"{_shown_iou(pair):.2f}",
        "panels": panels,
        "given": highlight(text, given, colours=of(span.text for span in given)),
        "generated": None
        if own_text is None
        else highlight(own_text, generated, colours=of(span.text for span in generated)),
        "choices": [
            {
                "text": choice,
                "score": "" if scores is None else f"{scores[index]:.3f}",
                "correct": index == question.correct,
                "chosen": scores is not None and index == prediction.choice,
            }
            for index, choice in enumerate(question.choices)
        ],
    }


def write_report(
    path: Path,
    *,
    metrics: dict[str, Any],
    questions: Sequence[Question],
    predictions: Iterable[Prediction],
    load_image: Callable[[Question], Image.Image],
    training_curves: Path | None = None,
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file, replaced if it exists.
        metrics: what metrics.json holds: `overall`, `by_type` and `intervals` of `evaluate_predictions`,
            `by_part` of `iou_per_part`, and `run`, whatever should stand in the head of the page.
        questions: the questions scored.
        predictions: one per question.
        load_image: gives the image of a question, in the frame of its masks.
        training_curves: CSV with a column `step` and one column per loss or metric; left out if None.
    """
    shown = [name for name in FIGURES if metrics["overall"].get(name) is not None]
    intervals = metrics["intervals"]["overall"]
    page = render_page(
        PAGE,
        title="PARTONOMY evaluation",
        run=metrics["run"],
        n=metrics["overall"]["n"],
        columns=list(COLUMNS),
        overall=[(FIGURES[name], _range(intervals, name), _cells(metrics["overall"], name)) for name in shown],
        type_columns=[FIGURES[name] for name in FIGURES_BY_TYPE],
        by_type=[
            (question_type, figures["n"], [_cells(figures, name) for name in FIGURES_BY_TYPE])
            for question_type, figures in metrics["by_type"].items()
        ],
        curves=None if training_curves is None else _draw_curves(training_curves),
        parts=sorted(metrics["by_part"].items(), key=lambda item: -item[1]["mean_iou"]),
        examples=[_example(pair, load_image) for pair in _spread(pair_by_id(questions, predictions))],
    )
    write_whole(path, [page])


def render_page(body: str, *, title: str, **values: Any) -> str:
    """A whole HTML page in the style of the reports; `body` is a template of its content, filled with `values`."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(START + body + END).render(title=title, style=STYLE, **values)


STYLE = """
:root { --ink: #1d2430; --quiet: #667085; --line: #e4e7ec; --paper: #ffffff; --ground: #f6f7f9; --accent: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 1060px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 1.7rem; margin: 8px 0 4px }
h2 { font-size: 1.2rem; margin: 40px 0 8px }
p { margin: 4px 0 12px } .quiet { color: var(--quiet); font-size: .88rem }
.box { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px; margin: 12px 0;
  overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: 7px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; font-size: .85rem; color: var(--quiet); vertical-align: bottom }
td:first-child, th { white-space: normal } .wide th, .wide td { padding: 7px } .wide td:first-child { min-width: 9em }
tr:last-child td { border-bottom: 0 } th:first-child, td:first-child { text-align: left }
td b { font-weight: 650 } td small { display: block; color: var(--quiet); font-size: .72rem; line-height: 1.35 }
details dl { margin-top: 10px }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 16px; margin: 0; font-size: .88rem }
dt { color: var(--quiet) } dd { margin: 0; overflow-wrap: anywhere }
.bars { columns: 2 380px; column-gap: 32px }
.bar { display: grid; grid-template-columns: 9.5em 1fr 5.6em; gap: 10px; align-items: center; break-inside: avoid;
  font-size: .85rem; line-height: 1.7 }
.bar i { display: block; height: 10px; border-radius: 5px; background: #e9edf2 }
.bar i i { background: var(--accent) } .bar span:last-child { font-variant-numeric: tabular-nums }
.bar span:first-child { text-align: right }
figure { margin: 0; flex: 1 1 200px; max-width: 300px }
figure img { width: 100%; border-radius: 8px; display: block } figcaption { color: var(--quiet); font-size: .8rem }
.panels { display: flex; flex-wrap: wrap; gap: 12px; margin: 10px 0 }
@media (max-width: 600px) { th, td { padding: 6px } .box { padding: 12px } }
.curves { width: 100% } h3 { font-size: 1rem; margin: 0 }
mark { color: #fff; border-radius: 4px; padding: 0 4px }
ol { margin: 6px 0 0; padding-left: 1.6em; font-size: .85rem } li { margin: 2px 0 }
.tag { border-radius: 4px; padding: 0 6px; font-size: .75rem; font-weight: 600; white-space: nowrap }
.correct { background: #d7f0e2; color: #05603a } .chosen { background: #dbeaf7; color: #004a77 }
summary { cursor: pointer; font-size: .88rem; color: var(--quiet) }
"""

START = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
{{ style | safe }}
</style>
</head>
<body><main>
<h1>{{ title }}</h1>
"""
END = """</main></body>
</html>
"""

LEFT_OUT = """{% if run.left_out or run.records_left_out %}
<p><b>Left out: {{ run.left_out }} questions, {{ run.records_left_out }} records of the data set</b>, which could not
be used; errors.jsonl says why.</p>
{% endif %}
"""
PAGE = (
    LEFT_OUT
    + """<p class="quiet">{{ n }} questions. Figures are shares between 0 and 1, larger is better. The wrong-image
column asks the same questions of another record's image; what remains there is not read from the image.</p>
<details class="box">
<summary>What was run{% if run.protocol %}; protocol {{ run.protocol.name }}{% endif %}</summary><dl>
{% for name, value in run.items() if value is not none %}
<dt>{{ name | replace("_", " ") }}</dt>
<dd>{{ value.items() | map("join", " ") | join(", ") if value is mapping else value }}</dd>
{% endfor %}
</dl></details>

<h2>Overall</h2>
<p class="quiet">Below each figure: its 95 % bootstrap interval over the images.</p>
<div class="box"><table>
<tr><th></th>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for name, range, cells in overall %}
<tr><td>{{ name }}</td><td><b>{{ cells[0] }}</b><small>{{ range }}</small></td>
{% for cell in cells[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>

<h2>By question type</h2>
<p class="quiet">Below each figure: the wrong-image control / a random choice.</p>
<div class="box"><table class="wide">
<tr><th>type</th><th>n</th>{% for name in type_columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for question_type, count, row in by_type %}
<tr><td>{{ question_type }}</td><td>{{ count }}</td>{% for cells in row %}
<td><b>{{ cells[0] }}</b><small>{{ cells[1:] | join(" / ") }}</small></td>
{% endfor %}</tr>
{% endfor %}
</table></div>

{% if curves %}
<h2>Training</h2>
<div class="box"><img class="curves" src="{{ curves }}" alt="training curves"></div>
{% endif %}

<h2>Mean IoU by part</h2>
<p class="quiet">Masks of the given correct answer, strict; in brackets the number of questions.</p>
<div class="box bars">
{% for name, part in parts %}
<div class="bar"><span>{{ name }}</span><i><i style="width: {{ "%.1f" | format(100 * part.mean_iou) }}%"></i></i>
<span>{{ "%.2f" | format(part.mean_iou) }} ({{ part.n }})</span></div>
{% endfor %}
</div>

<h2>Answers</h2>
<p class="quiet">{{ examples | length }} questions at even distances from the best to the worst masks. A
part has one colour in text and masks.</p>
{% macro coloured(pieces) %}
{% for text, colour in pieces %}
{% if colour %}<mark style="background: {{ colour }}">{{ text }}</mark>{% else %}{{ text }}{% endif %}
{% endfor %}
{% endmacro %}
{% for example in examples %}
<div class="box">
<h3>{{ example.question }}</h3>
<p class="quiet">{{ example.about }} · mean IoU {{ example.iou }}</p>
<div class="panels">
{% for caption, address in example.panels %}
<figure><img src="{{ address }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
<p><span class="quiet">correct answer</span> {{ coloured(example.given) }}</p>
{% if example.generated is not none %}
<p><span class="quiet">own answer</span> {{ coloured(example.generated) or "(empty)" }}</p>
{% endif %}
<details open><summary>choices (smaller score is likelier)</summary><ol>
{% for choice in example.choices %}
<li>{{ choice.text }} <span class="quiet">{{ choice.score }}</span>
{% if choice.correct %}<span class="tag correct">correct</span>{% endif %}
{% if choice.chosen %}<span class="tag chosen">chosen</span>{% endif %}</li>
{% endfor %}
</ol></details>
</div>
{% endfor %}
"""
)
