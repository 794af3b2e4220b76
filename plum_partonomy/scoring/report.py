"""One self-contained HTML page about an evaluation: figures, training curve, parts, and answers drawn on their images.

A part has one colour in the masks and in the text of an answer.
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
    return mean_iou(question, (prediction.given_spans or ()) if own is None else own)


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs from the best to the worst masks."""
    return pick_evenly(sorted(pairs, key=lambda pair: (-_shown_iou(pair), pair[0].id)))


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


PAGE = """{{ show_left_out(run) }}
<p class="quiet">{{ n }} questions. Figures are shares between 0 and 1, larger is better. The wrong-image
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
{% for example in examples %}
<div class="box">
<h3>{{ example.question }}</h3>
<p class="quiet">{{ example.about }} · mean IoU {{ example.iou }}</p>
{{ show_panels(example.panels) }}
<p><span class="quiet">correct answer</span> {{ show_pieces(example.given) }}</p>
{% if example.generated is not none %}
<p><span class="quiet">own answer</span> {{ show_pieces(example.generated) or "(empty)" }}</p>
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
