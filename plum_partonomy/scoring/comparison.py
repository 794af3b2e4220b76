"""Compare several models on the same questions on one page: metrics with intervals, paired differences, masks side by
side.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plum_partonomy.files import write_whole
from plum_partonomy.records import Question
from plum_partonomy.scoring.bootstrap import Tally, interval, resample, summarise
from plum_partonomy.scoring.mask_metrics import normalise
from plum_partonomy.scoring.metrics import MaskSource, mean_iou, pair_by_id, scored_spans, tally, true_masks
from plum_partonomy.scoring.overlays import panel, pick_colours
from plum_partonomy.scoring.pages import render_page
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from plum_partonomy.scoring.report import FIGURES, MEANINGS

__all__ = ["compare", "write_comparison"]

EXAMPLES_PER_TYPE = 6


def compare(
    questions: Sequence[Question], models: dict[str, Sequence[Prediction]], *, mask_source: MaskSource = "gt_answer"
) -> dict[str, list[dict[str, Any]]]:
    """Return, for all questions (`overall`) and each question type, one row per metric of any model.

    A row has `figure` and `cells`: for each model `value`, `interval`, `gain` (its value minus that of the first
    model) and `difference` (the interval of the gain over the same draws of images; None for the first model and
    without both values). The choice of images does not explain a difference whose interval excludes 0.

    Args:
        questions: The questions that all models answered.
        models: Model name -> predictions, one per question. Differences are relative to the first.
        mask_source: The source of the scored masks.
    """
    ordered = sorted(questions, key=lambda question: question.id)
    tallies = {
        name: [tally(*pair, mask_source=mask_source) for pair in pair_by_id(ordered, predictions)]
        for name, predictions in models.items()
    }
    photographs = np.array([question.photograph for question in ordered])
    groups = {"overall": np.arange(len(ordered))}
    for question_type in sorted({question.question_type for question in ordered}):
        groups[question_type] = np.flatnonzero([question.question_type == question_type for question in ordered])
    return {
        group: _rows(
            {name: [found[index] for index in indices] for name, found in tallies.items()}, photographs[indices]
        )
        for group, indices in groups.items()
    }


def _rows(tallies: dict[str, list[Tally]], photographs: Sequence[str]) -> list[dict[str, Any]]:
    figures = {name: summarise(found) for name, found in tallies.items()}
    draws = {name: resample(found, photographs) for name, found in tallies.items()}
    first = next(iter(tallies))
    rows = []
    for figure in FIGURES:
        cells = []
        for name in tallies:
            own, other = draws[name].get(figure), draws[first].get(figure)
            paired = name != first and own is not None and other is not None
            cells.append(
                {
                    "value": figures[name][figure],
                    "interval": None if own is None else interval(own),
                    "gain": figures[name][figure] - figures[first][figure] if paired else None,
                    "difference": interval(own - other) if paired else None,
                }
            )
        if any(cell["value"] is not None for cell in cells):
            rows.append({"figure": figure, "cells": cells})
    return rows


def write_comparison(
    path: Path,
    *,
    questions: Sequence[Question],
    models: dict[str, Sequence[Prediction]],
    load_image: Callable[[Question], Image.Image],
    mask_source: MaskSource = "gt_answer",
) -> None:
    """Write the page completely or not at all. Arguments as in `compare`.

    For each question type it shows the questions on which the masks of the models differ most. `load_image` returns
    the image of a question, at the size of its masks.
    """
    answers = {name: [p for _, p in pair_by_id(questions, predictions)] for name, predictions in models.items()}
    ious = np.array(
        [
            [mean_iou(q, scored_spans(p, mask_source) or ()) for q, p in zip(questions, given, strict=True)]
            for given in answers.values()
        ]
    )
    examples = []
    for index in _most_differing(questions, ious):
        question = questions[index]
        spans = {name: scored_spans(given[index], mask_source) or [] for name, given in answers.items()}
        captions = {
            name: _caption(name, question, given[index], iou)
            for (name, given), iou in zip(answers.items(), ious[:, index], strict=True)
        }
        examples.append({"question": question, **_panels(question, spans, captions, load_image(question))})
    groups = compare(questions, models, mask_source=mask_source)
    page = render_page(
        PAGE,
        title="PARTONOMY comparison",
        groups=groups,
        counts=Counter(question.question_type for question in questions) | {"overall": len(questions)},
        names=list(models),
        titles=FIGURES,
        meanings=MEANINGS,
        examples=examples,
        examples_per_type=EXAMPLES_PER_TYPE,
    )
    write_whole(path, [page])


def _most_differing(questions: Sequence[Question], ious: np.ndarray) -> list[int]:
    """Return the indices of the questions to show, largest difference first; `ious` is (models, questions)."""
    shown, taken = [], Counter()
    for index in np.argsort(-np.ptp(ious, axis=0), kind="stable").tolist():
        question_type = questions[index].question_type
        if taken[question_type] < EXAMPLES_PER_TYPE:
            taken[question_type] += 1
            shown.append(index)
    return shown


def _caption(name: str, question: Question, prediction: Prediction, iou: float) -> str:
    caption = f"{name}: mean IoU {iou:.2f}"
    if prediction.choice_scores is None:
        return caption
    return f"{caption}, choice {'right' if prediction.choice == question.correct else 'wrong'}"


def _panels(
    question: Question, spans: dict[str, list[SpanMask]], captions: dict[str, str], image: Image.Image
) -> dict[str, Any]:
    """Return `parts` (part, colour) and `panels` (caption, data address of the drawing) of the ground truth and each
    model.
    """
    sides = {"truth": [(mask.label, mask.rle) for mask in true_masks(question)]}
    sides |= {captions[name]: [(span.text, span.rle) for span in found] for name, found in spans.items()}
    parts = list(dict.fromkeys(normalise(part) for side in sides.values() for part, _ in side))
    colours = dict(zip(parts, pick_colours(len(parts)), strict=True))
    panels = [
        (caption, panel(image, [rle for _, rle in side], [colours[normalise(part)] for part, _ in side]))
        for caption, side in sides.items()
    ]
    return {"parts": list(colours.items()), "panels": panels}


PAGE = """<p class="quiet">Below each value: 95 % bootstrap interval over images.
{% for name in names[1:] %}{% if loop.first %}
For {{ names[1:] | join(", ") }} also: the difference from {{ names[0] }} with its interval over the same draws,
in bold if it excludes 0, so that the choice of images does not explain it.{% endif %}{% endfor %}</p>
<p><label>Questions <select id="type">
{% for group in groups %}
<option value="{{ group }}">{{ group | replace("_", " ") }} ({{ counts[group] }})</option>
{% endfor %}
</select></label></p>
{% for group, rows in groups.items() %}
<div class="box" data-type="{{ group }}"><h3>{{ group | replace("_", " ") }}</h3><table class="models">
<tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ titles[row.figure] }}<small>{{ meanings[row.figure] }}</small></td>
{% for cell in row.cells %}
<td data-name="{{ names[loop.index0] }}">{% if cell.value is none %}–{% else %}{{ "%.3f" | format(cell.value) }}
{% if cell.interval %}<small>{{ "%.3f to %.3f" | format(*cell.interval) }}</small>{% endif %}
{% if cell.difference %}
{% set text = "%+.3f (%+.3f to %+.3f)" | format(cell.gain, *cell.difference) %}
{% set certain = cell.difference[0] > 0 or cell.difference[1] < 0 %}
<small>{% if certain %}<b>{{ text }}</b>{% else %}{{ text }}{% endif %}</small>
{% endif %}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}

<h2>Masks</h2>
<p class="quiet">Of each question type the questions on which the mean IoU of {{ names | join(", ") }} differs most, at
most {{ examples_per_type }}. A part has one colour.</p>
{% for example in examples %}
{% set question = example.question %}
<div class="box example" data-type="{{ question.question_type }}">
<h3>{{ question.question }}</h3>
<p class="quiet">{{ question.question_type | replace("_", " ") }} · {{ question.image_label }} · {{ question.id }}</p>
<p>{% for part, colour in example.parts %}<mark style="background: {{ colour }}">{{ part }}</mark>
{% endfor %}</p>
{{ show_panels(example.panels) }}
</div>
{% endfor %}
<script>
// without scripts every table and every example is shown
const select = document.getElementById("type");
function show() {
  for (const box of document.querySelectorAll("[data-type]")) {
    const table = box.querySelector("table") !== null;
    box.hidden = box.dataset.type !== select.value && (table || select.value !== "overall");
  }
}
select.addEventListener("change", show);
show();
</script>
"""
