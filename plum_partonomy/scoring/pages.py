"""HTML pages in one style, without external files; the template engine escapes all text."""

from collections.abc import Sequence
from typing import Any

import jinja2

__all__ = ["pick_evenly", "render_page"]

EXAMPLES = 24


def pick_evenly(ordered: Sequence[Any], most: int = EXAMPLES) -> list[Any]:
    """Return that many of the items, evenly spaced, including the first and the last."""
    count = min(most, len(ordered))
    return [ordered[round(number * (len(ordered) - 1) / max(count - 1, 1))] for number in range(count)]


def render_page(body: str, *, title: str, **values: Any) -> str:
    """Return a complete HTML page. `body` is a template of its content, filled with `values`, and may use MACROS."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(MACROS + START + body + END).render(title=title, style=STYLE, **values)


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
nav a { margin-right: 14px; color: var(--accent) } label { margin-right: 14px } [hidden] { display: none }
td:first-child small { white-space: normal; max-width: 34em; font-weight: 400 }
.example { content-visibility: auto; contain-intrinsic-size: auto 640px } /* drawn as one scrolls to it */
@media (max-width: 600px) {
  .models tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--line) }
  .models tr:first-child { display: none }
  .models, .models tbody { display: block }
  .models td { display: block; text-align: left; border: 0; padding: 2px 0; white-space: normal }
  .models td:first-child { font-weight: 600 } .models td:first-child small { display: block; margin: 0 }
  .models td[data-name]::before { content: attr(data-name) ": " }
  .models td small { display: inline; margin-left: 6px } }
"""

MACROS = """{% macro show_panels(panels) %}
<div class="panels">
{% for caption, address in panels %}
<figure><img src="{{ address }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
</div>
{% endmacro %}
{% macro show_pieces(pieces) %}
{% for text, colour in pieces %}
{% if colour %}<mark style="background: {{ colour }}">{{ text }}</mark>{% else %}{{ text }}{% endif %}
{% endfor %}
{% endmacro %}
{% macro show_left_out(run) %}
{% if run.left_out or run.records_left_out %}
<p><b>Left out: {{ run.left_out }} questions, {{ run.records_left_out }} records of the data set</b>, which could not
be used; errors.jsonl says why.</p>
{% endif %}
{% endmacro %}
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
