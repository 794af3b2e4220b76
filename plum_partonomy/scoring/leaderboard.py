"""Make one page for a folder of results: a sortable table of models for each set of questions, and published results.

    FOLDER/**/metrics.json ──read_results──> [Result] ──make_leaderboard──> index.html

Models share a table only if they answered the same questions, by the fingerprint in metrics.json. Published results
have a separate table, because they were measured by others, possibly on other images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plum_partonomy.masks import DataError
from plum_partonomy.scoring.pages import render_page
from plum_partonomy.scoring.published import METHODS, PUBLISHED, SOURCE
from plum_partonomy.scoring.report import FIGURES
from plum_partonomy.sources.json_files import parse_json
from plum_partonomy.sources.untrusted import typed

__all__ = ["COLUMNS", "Result", "make_leaderboard", "read_results"]

COLUMNS = (
    "strict_macro_giou",
    "choice_accuracy",
    "generated_part_f1",
    "generated_exact",
    "end_to_end_giou",
    "reference_macro_giou",
)


@dataclass(frozen=True)
class Result:
    """One run: its name on the page, and its metrics.json."""

    name: str
    metrics: dict[str, Any]

    @property
    def run(self) -> dict[str, Any]:
        return self.metrics["run"]

    @property
    def model(self) -> str:
        """The name of the scored model."""
        run = self.run
        parts = [run[part]["name"] for part in ("vlm", "sam3") if part in run]
        if parts:
            return " + ".join(parts)
        return str(run.get("model") or run.get("baseline") or Path(run.get("predictions") or "answers").name)

    def cell(self, group: str, figure: str) -> dict[str, Any]:
        """Return value, interval and wrong-image control of a metric, over all questions or one type."""
        figures, ranges = self.metrics["overall"], self.metrics["intervals"]["overall"]
        if group != "overall":
            figures = self.metrics["by_type"].get(group, {})
            ranges = self.metrics["intervals"]["by_type"].get(group, {})
        return {
            "value": figures.get(figure),
            "interval": ranges.get(figure),
            "wrong_image": figures.get(f"{figure}_wrong_image"),
        }


def read_results(folder: Path) -> tuple[list[Result], list[str]]:
    """Return the runs under a folder, named after their folder, and one sentence for each run that is skipped.

    Raises:
        DataError: a metrics.json is damaged, or there is none of PARTONOMY's questions.
    """
    results, others = [], []
    for path in sorted(folder.rglob("metrics.json")):
        name = path.parent.relative_to(folder).as_posix()
        metrics = parse_json(path.read_bytes(), where=str(path))
        run = typed(metrics, "run", dict, where=f"{path}: expected the metrics.json of evaluate_plum.py")
        if "by_type" in metrics and "protocol" in run:
            _check(metrics, where=str(path))
            results.append(Result(name if name != "." else folder.resolve().name, metrics))
        else:
            others.append(f"{name}: task {run.get('task')!r}, not PARTONOMY's questions")
    if not results:
        raise DataError(f"{folder}: expected metrics.json of runs of evaluate_plum.py in its folders, found none.")
    return results, others


def _check(metrics: dict[str, Any], *, where: str) -> None:
    """Raise DataError unless a metrics.json has what the page shows."""
    overall, by_type, intervals = (
        typed(metrics, field, dict, where=where) for field in ("overall", "by_type", "intervals")
    )
    for group in ("overall", "by_type"):
        typed(intervals, group, dict, where=f"{where}, field 'intervals'")
    for figures in (overall, *(typed(by_type, name, dict, where=f"{where}, field 'by_type'") for name in by_type)):
        for name in COLUMNS:
            if figures.get(name) is not None:
                typed(figures, name, (int, float), where=where)
    run = metrics["run"]
    for field in ("dataset", "name", "split", "questions_fingerprint"):
        typed(run, field, str, where=f"{where}, field 'run'")
    typed(typed(run, "protocol", dict, where=where), "name", str, where=f"{where}, field 'protocol'")


def make_leaderboard(results: Sequence[Result], *, title: str = "PARTONOMY leaderboard") -> str:
    """Return the page, which loads no external files. Without scripts it shows every table, best gIoU first."""
    benchmarks: dict[str, list[Result]] = {}
    for result in results:
        benchmarks.setdefault(result.run["questions_fingerprint"], []).append(result)
    tables = [_table(found) for found in benchmarks.values()]
    published = [(name, kind, cells) for kind, (name, cells) in PUBLISHED.items()]
    return render_page(
        PAGE,
        title=title,
        tables=sorted(tables, key=lambda table: table["title"]),
        columns={name: FIGURES[name] for name in COLUMNS},
        methods=METHODS,
        published=published,
        source=SOURCE,
    )


def _table(results: Sequence[Result]) -> dict[str, Any]:
    first = results[0]
    run, overall = first.run, first.metrics["overall"]
    groups = ["overall", *sorted({kind for result in results for kind in result.metrics["by_type"]})]
    order = sorted(results, key=lambda result: -(result.metrics["overall"].get(COLUMNS[0]) or 0))
    return {
        "title": f"{run['dataset']} {run['name']}, split {run['split']}",
        "about": f"{overall['n']} questions about {overall['photographs']} images",
        "groups": {
            group: [
                {"result": result, "cells": [result.cell(group, figure) for figure in COLUMNS]} for result in order
            ]
            for group in groups
        },
    }


PAGE = """<p class="quiet">Measured with evaluate_plum.py. Under each value its 95 % bootstrap interval over images,
and what the model gets with the image of another record. A click on a heading sorts.</p>
{% for table in tables %}
<h2>{{ table.title }}</h2>
<p class="quiet">{{ table.about }} · <label>question type <select>
{% for group in table.groups %}<option value="{{ group }}">{{ group | replace("_", " ") }}</option>{% endfor %}
</select></label></p>
{% for group, rows in table.groups.items() %}
<div class="box wide" data-type="{{ group }}"><h3>{{ group | replace("_", " ") }}</h3><table class="sortable">
<thead><tr><th>model</th>
{% for title in columns.values() %}<th>{{ title }}</th>{% endfor %}
<th>protocol</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td><b>{{ row.result.model }}</b><small>{{ row.result.name }}</small></td>
{% for cell in row.cells %}
<td data-value="{{ -1 if cell.value is none else cell.value }}">{% if cell.value is none %}–{% else %}
{{ "%.3f" | format(cell.value) }}
{% if cell.interval %}<small>{{ "%.3f to %.3f" | format(*cell.interval) }}</small>{% endif %}
{% if cell.wrong_image is not none %}<small>wrong image {{ "%.3f" | format(cell.wrong_image) }}</small>{% endif %}
{% endif %}</td>
{% endfor %}
<td><small>{{ row.result.run.protocol.name }}</small></td></tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endfor %}
<h2>Published, not measured here</h2>
<p class="quiet">Grounded mean IoU on PARTONOMY-Core, micro / macro in percent, as the authors
<a href="{{ source }}">publish</a> it. Nothing in this table was measured with this program.</p>
<div class="box wide"><table>
<tr><th>question type</th>{% for method in methods %}<th>{{ method }} (published)</th>{% endfor %}</tr>
{% for name, kind, cells in published %}
<tr><td>{{ name }}<small>{{ kind }}</small></td>
{% for pair in cells %}<td>{% if pair %}{{ "%.1f / %.1f" | format(*pair) }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<script>
for (const select of document.querySelectorAll("select")) {
  const boxes = [];
  for (let box = select.closest("p").nextElementSibling; box && box.dataset.type; box = box.nextElementSibling) {
    boxes.push(box);
  }
  const show = () => boxes.forEach(box => { box.hidden = box.dataset.type !== select.value; });
  select.addEventListener("change", show);
  show();
}
for (const heading of document.querySelectorAll(".sortable th")) {
  heading.style.cursor = "pointer";
  heading.addEventListener("click", () => {
    const column = heading.cellIndex, body = heading.closest("table").tBodies[0];
    const key = row => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => key(a) === undefined
      ? a.cells[column].textContent.localeCompare(b.cells[column].textContent) : key(b) - key(a));
    body.append(...rows);
  });
}
</script>
"""
