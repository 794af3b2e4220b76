"""Write a self-contained HTML page of an evaluation: metrics, training curves, parts, and answers with their masks.

A part has the same colour in the masks and in the text of an answer.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from plum_partonomy.files import write_whole
from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.scoring.mask_metrics import normalise
from plum_partonomy.scoring.metrics import Pair, mean_iou, pair_by_id, true_masks, true_parts
from plum_partonomy.scoring.overlays import data_address, highlight, panel, pick_colours
from plum_partonomy.scoring.pages import pick_evenly, render_page
from plum_partonomy.scoring.predictions import Prediction

__all__ = ["FIGURES", "write_report"]

# Rows of the tables: key of the metric, name on the page.
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
    "generated_exact": "generated part set exactly correct",
    "end_to_end_giou": "gIoU of the generated answer",
}
# Definition of each metric, in one line.
MEANINGS = {
    "strict_macro_giou": "mean IoU of a question's masks, averaged over questions; a missing or surplus mask scores 0",
    "strict_micro_giou": "the same, averaged over masks",
    "strict_ciou": "intersections of all masks over their unions",
    "ap50": "average precision of masks with an IoU above 0.5",
    "reference_macro_giou": "mean IoU as in the paper: masks paired in order, surplus and missing ones ignored",
    "reference_micro_giou": "the same, averaged over masks",
    "reference_hungarian_macro_giou": "masks matched for the largest sum of IoU",
    "reference_greedy_macro_giou": "masks matched by descending IoU",
    "reference_union_macro_giou": "all masks of a question merged into one",
    "choice_accuracy": "share of questions with the correct choice",
    "object_choice_accuracy": "share of object questions with the correct choice",
    "part_precision": "share of the chosen answer's parts that are correct",
    "part_recall": "share of the correct parts in the chosen answer",
    "part_f1": "harmonic mean of the two",
    "span_f1": "F1 of the model's span tags in the correct answer",
    "generated_part_precision": "share of the generated answer's parts that are correct",
    "generated_part_recall": "share of the correct parts in the generated answer",
    "generated_part_f1": "harmonic mean of the two",
    "generated_exact": "share of generated answers with all correct parts and no others",
    "end_to_end_giou": "mean IoU, strict, of the masks of the generated answer",
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


def _read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return the columns of a curves file: name -> (steps, values). An empty cell was not measured at that step."""
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
    """Return the training curves as a data address: losses on the left, validation metrics on the right."""
    curves = _read_curves(path)
    losses = [name for name in curves if "loss" in name]
    figures = [name for name in curves if name.startswith("eval_") and name not in losses]
    groups = [group for group in (losses, figures) if group]
    figure = Figure(figsize=(5.5 * max(1, len(groups)), 4.0), layout="constrained")
    for axis, group in zip(np.atleast_1d(figure.subplots(1, max(1, len(groups)))), groups, strict=False):
        for name, colour in zip(group, pick_colours(len(group)), strict=True):
            marker = "o" if len(curves[name][0]) < 20 else None
            axis.plot(*curves[name], label=name, color=colour, marker=marker, markersize=3)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
        if group is losses and all(value > 0 for name in losses for value in curves[name][1]):
            axis.set_yscale("log")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    return data_address(content, kind="png")


# ---------------------------------------------------------------- page


COLUMNS = {"model": "", "wrong image": "_wrong_image", "random": "_random"}  # title: suffix in the figures
EXAMPLES_PER_TYPE = 12
HEAD = ("model", "predictions", "baseline", "dataset", "name", "split", "date", "command")
"""Settings of the run in the head of the page, where known."""


def _range(intervals: dict[str, Any], name: str) -> str:
    return "{:.3f} to {:.3f}".format(*intervals[name]) if name in intervals else ""


def _cells(figures: dict[str, Any], name: str, columns: Iterable[str] = COLUMNS) -> list[str]:
    """Return one metric for each column as text, with a dash where it was not measured."""
    values = [figures.get(name + COLUMNS[column]) for column in columns]
    return ["–" if value is None else f"{value:.3f}" for value in values]


def _shown_iou(pair: Pair) -> float:
    """Return the mean IoU of the generated answer or, without one, of the given answer."""
    question, prediction = pair
    own = prediction.generated_spans
    return mean_iou(question, (prediction.given_spans or ()) if own is None else own)


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Return pairs of each question type, evenly spaced between the worst and the best masks; worst first."""
    by_type: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: (_shown_iou(pair), pair[0].id)):
        by_type.setdefault(pair[0].question_type, []).append(pair)
    shown = [pair for group in by_type.values() for pair in pick_evenly(group, EXAMPLES_PER_TYPE)]
    return sorted(shown, key=lambda pair: (_shown_iou(pair), pair[0].id))


def _columns(overall: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Return the columns with a value of any of these metrics."""
    measured = {
        title for title, suffix in COLUMNS.items() if any(overall.get(name + suffix) is not None for name in names)
    }
    return [title for title in COLUMNS if title in measured]


def _example(pair: Pair, load_image: Callable[[Question], Image.Image]) -> dict[str, Any]:
    question, prediction = pair
    image, masks = load_image(question), true_masks(question)
    given, generated = prediction.given_spans, prediction.generated_spans
    named = [*true_parts(question), *(span.text for span in [*(given or ()), *(generated or ())])]
    order = list(dict.fromkeys(normalise(name) for name in named))
    colours = dict(zip(order, pick_colours(len(order)), strict=True))

    def of(names: Iterable[str]) -> list[str]:
        return [colours[normalise(name)] for name in names]

    panels = [("truth", panel(image, [mask.rle for mask in masks], of(mask.label for mask in masks)))]
    for caption, spans in (("reference answer", given), ("own answer", generated)):
        if spans is not None:
            panels.append((caption, panel(image, [span.rle for span in spans], of(span.text for span in spans))))
    text, own_text, scores = question.choices[question.correct], prediction.generated_text, prediction.choice_scores
    # spans of a given answer refer to the correct answer, which may differ from the given one
    given = [span for span in given or () if text[span.start : span.end] == span.text]
    return {
        "question": question.question,
        "type": question.question_type,
        "about": f"{question.question_type} · {question.image_label} · {question.id}",
        "iou": f"{_shown_iou(pair):.2f}",
        "panels": panels,
        "given": highlight(text, given, colours=of(span.text for span in given)),
        "generated": None
        if own_text is None
        else highlight(own_text, generated or (), colours=of(span.text for span in generated or ())),
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
    """Write the page, completely or not at all.

    Args:
        path: The HTML file, replaced if it exists.
        metrics: The content of metrics.json: `overall`, `by_type` and `intervals` of `evaluate_predictions`, `by_part`
            of `iou_per_part`, and `run`, the head of the page.
        questions: The scored questions.
        predictions: One per question.
        load_image: Returns the image of a question, at the size of its masks.
        training_curves: CSV with a column `step` and one column per loss or metric; omitted if None.
    """
    shown = [name for name in FIGURES if metrics["overall"].get(name) is not None]
    columns = _columns(metrics["overall"], shown)
    intervals, run = metrics["intervals"]["overall"], metrics["run"]
    page = render_page(
        PAGE,
        title="PARTONOMY evaluation",
        run=run,
        head=[(name, run[name]) for name in HEAD if run.get(name) is not None],
        n=metrics["overall"]["n"],
        columns=columns,
        overall=[
            (FIGURES[name], MEANINGS[name], _range(intervals, name), _cells(metrics["overall"], name, columns))
            for name in shown
        ],
        type_columns=[(FIGURES[name], MEANINGS[name]) for name in FIGURES_BY_TYPE if name in shown],
        type_suffixes=columns[1:],
        by_type=[
            (
                question_type,
                figures["n"],
                [_cells(figures, name, columns) for name in FIGURES_BY_TYPE if name in shown],
            )
            for question_type, figures in metrics["by_type"].items()
        ],
        curves=None if training_curves is None else _draw_curves(training_curves),
        parts=sorted(metrics["by_part"].items(), key=lambda item: -item[1]["mean_iou"]),
        examples=[_example(pair, load_image) for pair in _spread(pair_by_id(questions, predictions))],
    )
    write_whole(path, [page])


PAGE = """{{ show_left_out(run) }}
<dl class="box">
{% for name, value in head %}
<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
<nav><a href="#overall">Overall</a> <a href="#types">By question type</a>
{% if curves %}<a href="#training">Training</a> {% endif %}
<a href="#parts">Mean IoU by part</a> <a href="#answers">Answers</a></nav>
<p class="quiet">{{ n }} questions. Metrics are shares between 0 and 1; larger is better.
{%- if "wrong image" in columns %} The wrong-image column shows the same questions with another record's image; a score
there does not come from reading the image.{% endif %}</p>
<details class="box">
<summary>Settings of the run{% if run.protocol %}; protocol {{ run.protocol.name }}{% endif %}</summary><dl>
{% for name, value in run.items() if value is not none %}
<dt>{{ name | replace("_", " ") }}</dt>
<dd>{{ value.items() | map("join", " ") | join(", ") if value is mapping else value }}</dd>
{% endfor %}
</dl></details>

<h2 id="overall">Overall</h2>
<p class="quiet">Below each value: 95 % bootstrap interval over images.</p>
<div class="box"><table>
<tr><th></th>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for name, meaning, range, cells in overall %}
<tr><td>{{ name }}<small>{{ meaning }}</small></td><td><b>{{ cells[0] }}</b><small>{{ range }}</small></td>
{% for cell in cells[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>

<h2 id="types">By question type</h2>
{% if type_suffixes %}<p class="quiet">Below each value: {{ type_suffixes | join(" / ") }}.</p>{% endif %}
<div class="box"><table class="wide">
<tr><th>type</th><th>n</th>
{% for name, meaning in type_columns %}<th title="{{ meaning }}">{{ name }}</th>{% endfor %}</tr>
{% for question_type, count, row in by_type %}
<tr><td>{{ question_type }}</td><td>{{ count }}</td>{% for cells in row %}
<td><b>{{ cells[0] }}</b><small>{{ cells[1:] | join(" / ") }}</small></td>
{% endfor %}</tr>
{% endfor %}
</table></div>

{% if curves %}
<h2 id="training">Training</h2>
<div class="box"><img class="curves" src="{{ curves }}" alt="training curves"></div>
{% endif %}

<h2 id="parts">Mean IoU by part</h2>
<p class="quiet">Masks of the reference answer, strict; in brackets the number of questions.</p>
<div class="box bars">
{% for name, part in parts %}
<div class="bar"><span>{{ name }}</span><i><i style="width: {{ "%.1f" | format(100 * part.mean_iou) }}%"></i></i>
<span>{{ "%.2f" | format(part.mean_iou) }} ({{ part.n }})</span></div>
{% endfor %}
</div>

<h2 id="answers">Answers</h2>
<p class="quiet">{{ examples | length }} questions, evenly spaced for each type between the worst and the best masks. A
part has the same colour in text and masks. The reference answer is the correct one, whose spans the model
segmented.</p>
<p><label>Type <select id="type"><option value="">all</option>
{% for name in examples | map(attribute="type") | unique | sort %}
<option>{{ name }}</option>
{% endfor %}
</select></label>
<label>Order <select id="order">
<option value="1">worst first</option><option value="-1">best first</option>
</select></label>
</p>
<div id="examples">
{% for example in examples %}
<div class="box example" data-type="{{ example.type }}" data-iou="{{ example.iou }}">
<h3>{{ example.question }}</h3>
<p class="quiet">{{ example.about }} · mean IoU {{ example.iou }}</p>
{{ show_panels(example.panels) }}
<p><span class="quiet">reference answer</span> {{ show_pieces(example.given) }}</p>
{% if example.generated is not none %}
<p><span class="quiet">generated answer</span> {{ show_pieces(example.generated) or "(empty)" }}</p>
{% endif %}
<details open><summary>choices (a smaller score is more likely)</summary><ol>
{% for choice in example.choices %}
<li>{{ choice.text }} <span class="quiet">{{ choice.score }}</span>
{% if choice.correct %}<span class="tag correct">correct</span>{% endif %}
{% if choice.chosen %}<span class="tag chosen">chosen</span>{% endif %}</li>
{% endfor %}
</ol></details>
</div>
{% endfor %}
</div>
<script>
// without scripts every example is shown, worst first
const type = document.getElementById("type"), order = document.getElementById("order");
const examples = document.getElementById("examples");
function show() {
  const boxes = [...examples.children];
  boxes.sort((a, b) => order.value * (a.dataset.iou - b.dataset.iou));
  for (const box of boxes) box.hidden = type.value !== "" && box.dataset.type !== type.value;
  examples.append(...boxes);
}
type.addEventListener("change", show);
order.addEventListener("change", show);
</script>
"""
