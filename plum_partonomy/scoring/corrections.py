"""Metrics and report of `--task correction`: how well a model separates equal parts, and the effect of corrections.

    masks of one answer, own, after given true ones, after clicks ──> CorrectedAnswer ──> metrics.json, report.html

Spans of one answer with the same words are *equal*, and their masks are interchangeable. A *matched* IoU compares each
span with the true mask assigned to it by a Hungarian assignment among equal spans. IoUs after clicks (see clicks.py)
use the same true mask, or, where clicks move a mask to another instance, that of the next equal span. All other IoUs
compare spans and true masks in the order of the answer.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from plum_partonomy.files import write_whole
from plum_partonomy.masks import RLE, DataError
from plum_partonomy.scoring.bootstrap import Tally, interval, ratio_draws, ratio_figures
from plum_partonomy.scoring.overlays import panel, pick_colours
from plum_partonomy.scoring.pages import pick_evenly, render_page

__all__ = [
    "CLICKS",
    "CURVE_STEPS",
    "SHOWN_CLICKS",
    "CorrectedAnswer",
    "match_equal",
    "read_corrections",
    "score_corrections",
]

CURVE_STEPS = 4
"""Points of the correction curve: after 0, 1, 2 and 3 given masks."""
CLICKS, SHOWN_CLICKS = (1, 3, 5), 3
"""Numbers of clicks on each span with a metric, and the number in the pictures of the report."""


def _after(count: int) -> str:
    return f"after_{count}_click{'s' if count > 1 else ''}"


METRICS = {
    "later_iou_own": "IoU of the second and later spans, in listed order, after predicted earlier masks",
    "later_iou_given": "the same after the true earlier masks",
    "correction_gain": "later_iou_given minus later_iou_own: the effect of a correction on later masks",
    "matched_iou": "IoU after matching equal spans, predicted masks",
    "matched_iou_given": "IoU after matching equal spans, masks that follow 1, 2, ... given true masks",
    **{
        f"iou_{_after(count)}": f"matched_iou of the same spans {_after(count).replace('_', ' ')} on each, in its "
        "largest error region"
        for count in CLICKS
    },
    **{
        f"moved_iou_{_after(count)}": "IoU of each span that has an equal one with the true mask of the next such "
        f"span, {_after(count).replace('_', ' ')} that mean it: whether a click chooses the instance"
        for count in CLICKS
    },
    "repeat_overlap": "largest IoU of a mask with an earlier one of the same words; low is good",
}


@dataclass(frozen=True, kw_only=True)
class CorrectedAnswer:
    """
    The measurements on one answer of S spans, at least two.

    Attributes:
        phrases: Words of each span.
        own, given: IoU of each span in listed order, after predicted and after given true earlier masks.
        matched: IoU of each span after matching, predicted masks.
        matched_given: For k = 1 to S - 1 given masks, the matched IoUs of the spans after them.
        repeats: For each span with an earlier equal span, its largest IoU with the mask of such a span.
        curve: For k = 0, 1, ... given masks, worst first, the mean matched IoU of the spans without a given mask.
        clicked: For 1, 2, ... clicks on each span, the matched IoU of each.
        moved: For 1, 2, ... clicks on each span that has an equal one, which mean the true mask of the next such span,
            the IoU with that mask of each.
        corrected: Index of the span whose mask was given first.
        true, before, after, after_clicks: Masks in the order of the spans: matched true masks, predicted masks, masks
            after the first was given, and masks after SHOWN_CLICKS clicks on each.
    """

    id: str
    image_id: str
    row: int
    question: str
    phrases: list[str]
    own: list[float]
    given: list[float]
    matched: list[float]
    matched_given: list[list[float]]
    repeats: list[float]
    curve: list[float]
    clicked: list[list[float]]
    moved: list[list[float]]
    corrected: int
    true: list[RLE]
    before: list[RLE]
    after: list[RLE]
    after_clicks: list[RLE]


def match_equal(ious: np.ndarray, phrases: Sequence[str], given: Mapping[int, int]) -> list[int]:
    """
    Return the true mask of each span: the assignment among equal spans with the largest summed IoU.

    Args:
        ious: `(S, S)` IoU of each span's mask with each true mask; true mask i has the words of span i.
        phrases: S words.
        given: Span -> true mask, for the spans with given masks, which are excluded from the assignment.

    >>> match_equal(np.array([[0.1, 0.9], [0.2, 0.8]]), ["wheel", "wheel"], {})
    [1, 0]
    """
    targets = dict(given)
    for phrase in dict.fromkeys(phrases):
        equal = [i for i, other in enumerate(phrases) if other == phrase]
        spans = [i for i in equal if i not in given]
        masks = [i for i in equal if i not in set(given.values())]
        rows, columns = linear_sum_assignment(-ious[np.ix_(spans, masks)])
        targets |= {spans[row]: masks[column] for row, column in zip(rows, columns, strict=True)}
    return [targets[i] for i in range(len(phrases))]


def read_corrections(path: Path) -> list[CorrectedAnswer]:
    """Return the answers of a run's file. Raises DataError if a line is not an answer."""
    answers = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            answers.append(CorrectedAnswer(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{path}, line {number}: expected an answer of an interrupted run; give another folder ({error})."
            ) from error
    return answers


# ---------------------------------------------------------------- metrics


def tally(answer: CorrectedAnswer) -> Tally:
    """Return the contribution of one answer to each metric."""
    later = len(answer.own) - 1
    remaining = [iou for ious in answer.matched_given for iou in ious]
    ratios = {
        "later_iou_own": (fsum(answer.own[1:]), later),
        "later_iou_given": (fsum(answer.given[1:]), later),
        "correction_gain": (fsum(answer.given[1:]) - fsum(answer.own[1:]), later),
        "matched_iou": (fsum(answer.matched), len(answer.matched)),
        "matched_iou_given": (fsum(remaining), len(remaining)),
    }
    for count in CLICKS:
        ratios[f"iou_{_after(count)}"] = (fsum(answer.clicked[count - 1]), len(answer.matched))
        if answer.moved[count - 1]:
            ratios[f"moved_iou_{_after(count)}"] = (fsum(answer.moved[count - 1]), len(answer.moved[count - 1]))
    if answer.repeats:
        ratios["repeat_overlap"] = (fsum(answer.repeats), len(answer.repeats))
    ratios |= {_point(k): (iou, 1) for k, iou in enumerate(answer.curve)}
    return Tally(ratios)


def _point(k: int) -> str:
    return f"correction_curve_{k}"


def summarise_corrections(answers: Sequence[CorrectedAnswer]) -> dict[str, Any]:
    """
    Return `overall`: METRICS, `correction_curve` (by number of given masks, None without an answer of that many
    spans) and `n`; and `intervals`: the 95 % bootstrap interval of each over images.
    """
    tallies, names = [tally(answer) for answer in answers], [*METRICS, *map(_point, range(CURVE_STEPS))]
    values = ratio_figures(tallies, names=names)
    draws = ratio_draws(tallies, [answer.image_id for answer in answers], names=names)
    intervals = {name: interval(drawn) for name, drawn in draws.items()}
    points = [_point(k) for k in range(CURVE_STEPS)]
    overall = {"n": len(answers), "images": len({answer.image_id for answer in answers})}
    overall |= {name: values[name] for name in METRICS}
    overall["correction_curve"] = [values[name] for name in points]
    limits = {name: intervals[name] for name in METRICS if name in intervals}
    limits["correction_curve"] = [intervals.get(name) for name in points]
    return {"overall": overall, "intervals": {"overall": limits}}


# ---------------------------------------------------------------- report


def score_corrections(
    answers: Sequence[CorrectedAnswer],
    load_image: Callable[[CorrectedAnswer], Image.Image],
    *,
    output_dir: Path,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Write metrics.json and report.html; return the metrics."""
    metrics = {**summarise_corrections(answers), "run": run}
    write_whole(output_dir / "metrics.json", [json.dumps(metrics, indent=2, allow_nan=False), "\n"])
    gains = sorted(answers, key=lambda answer: (-gain(answer), answer.id))
    page = render_page(
        PAGE,
        title="Evaluation: correction of masks",
        run=run,
        metrics=metrics,
        explained=METRICS,
        examples=[_example(answer, load_image(answer)) for answer in pick_evenly(gains)],
    )
    write_whole(output_dir / "report.html", [page])
    return metrics


def gain(answer: CorrectedAnswer) -> float:
    """Return the mean change of the other masks' IoU after the first given mask."""
    others = [iou for i, iou in enumerate(answer.matched) if i != answer.corrected]
    return answer.curve[1] - fsum(others) / len(others)


def _example(answer: CorrectedAnswer, image: Image.Image) -> dict[str, Any]:
    colours = pick_colours(len(answer.phrases))
    panels = (
        ("true masks", answer.true),
        ("before", answer.before),
        ("after one given mask", answer.after),
        (f"after {SHOWN_CLICKS} clicks on each mask", answer.after_clicks),
    )
    return {
        "id": answer.id,
        "question": answer.question,
        "phrases": list(zip(answer.phrases, colours, strict=True)),
        "given": answer.phrases[answer.corrected],
        "given_colour": colours[answer.corrected],
        "gain": f"{gain(answer):+.2f}",
        "panels": [(caption, panel(image, rles, colours)) for caption, rles in panels],
    }


def format_correction_table(metrics: dict[str, Any]) -> str:
    """Return the metrics with their intervals as a table."""
    overall, intervals = metrics["overall"], metrics["intervals"]["overall"]
    lines = [f"{'answers':24}{overall['n']:>9}", f"{'images':24}{overall['images']:>9}"]
    cells = [(name.replace("_", " "), overall[name], intervals.get(name)) for name in METRICS]
    cells += [
        (f"matched IoU, {k} given", value, limits)
        for k, (value, limits) in enumerate(
            zip(overall["correction_curve"], intervals["correction_curve"], strict=True)
        )
    ]
    for name, value, limits in cells:
        text = "-" if value is None else f"{value:.3f}"
        lines.append(f"{name:24}{text:>9}" + ("  [{:.3f}, {:.3f}]".format(*limits) if limits else ""))
    return "\n".join(lines)


def as_line(answer: CorrectedAnswer) -> str:
    """Return the answer as a line for `read_corrections`."""
    return json.dumps(dataclasses.asdict(answer), ensure_ascii=False) + "\n"


PAGE = """<p class="quiet">{{ metrics.overall.n }} answers with two or more masks about {{ metrics.overall.images }}
images{% if run.model %}, model {{ run.model }}{% endif %}. Small print: 95 % bootstrap intervals over the images.</p>
<div class="box"><table>
<tr><th>metric</th><th></th><th>meaning</th></tr>
{% for name, meaning in explained.items() %}
<tr><td>{{ name }}</td><td>
{% if metrics.overall[name] is none %}–{% else %}<b>{{ "%.3f" | format(metrics.overall[name]) }}</b>{% endif %}
{% if name in metrics.intervals.overall %}
<small>{{ "%.3f to %.3f" | format(*metrics.intervals.overall[name]) }}</small>
{% endif %}</td><td style="text-align: left">{{ meaning }}</td></tr>
{% endfor %}
</table></div>
<h2>Correction curve</h2>
<p class="quiet">Mean matched IoU of the remaining masks after this number of true masks was given, worst mask first.
An answer counts as long as it has remaining masks.</p>
<div class="box bars" style="columns: 1">
{% for value in metrics.overall.correction_curve if value is not none %}
<div class="bar"><span>{{ loop.index0 }} given</span><i><i style="width: {{ 100 * value }}%"></i></i>
<span>{{ "%.3f" | format(value) }}</span></div>
{% endfor %}
</div>
<h2>Answers</h2>
<p class="quiet">{{ examples | length }} answers at even distances from the largest gain to the smallest. The gain is
the change in the matched IoU of the others after the first given mask.</p>
{% for example in examples %}
<div class="box">
<h3>{{ example.question }}</h3>
<p>{{ show_pieces(example.phrases) }}</p>
<p class="quiet">{{ example.id }} · given: {{ show_pieces([(example.given, example.given_colour)]) }} · gain
{{ example.gain }}</p>
{{ show_panels(example.panels) }}
</div>
{% endfor %}
"""
