"""Print the published grounded mean IoU on PARTONOMY-Core as a Markdown table, with a column for each of your runs:

    python scripts/published_table.py runs/core/metrics.json runs/other/metrics.json

Published results are those of plum_partonomy/scoring/published.py: micro / macro, in percent. Yours are
`reference_micro_giou` and `reference_macro_giou` of the same question types. The lines below the table name the data
set of each run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from plum_partonomy.scoring.published import METHODS, PUBLISHED
from plum_partonomy.scoring.results import describe_left_out


def format_published(runs: dict[str, dict[str, Any]]) -> str:
    """Return the table; without runs its last column is empty.

    Args:
        runs: Name of the column -> content of metrics.json.
    """
    measured = [f"measured: {name}" for name in runs] or ["measured"]
    header = ["question type", *(f"{method} (published)" for method in METHODS), *measured]
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for question_type, (name, published) in PUBLISHED.items():
        own = [_measured(metrics, question_type) for metrics in runs.values()] or [None]
        cells = ["" if pair is None else "{:.1f} / {:.1f}".format(*pair) for pair in (*published, *own)]
        lines.append(_row([f"{name} (`{question_type}`)", *cells]))
    return "\n".join(lines)


def describe(name: str, metrics: dict[str, Any]) -> str:
    """Return one line about the data of a run."""
    run = metrics["run"]
    data = f"{run['dataset']} {run['name']}, split {run['split']}"
    about = [f"{name}: {data}, {metrics['overall']['n']} questions, protocol {run['protocol']['name']}"]
    return "; ".join(about + describe_left_out(run))


def _measured(metrics: dict[str, Any], question_type: str) -> tuple[float, float] | None:
    figures = metrics["by_type"].get(question_type, {})
    micro, macro = figures.get("reference_micro_giou"), figures.get("reference_macro_giou")
    return None if micro is None or macro is None else (100 * micro, 100 * macro)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="*", type=Path, help="metrics.json of runs of evaluate_plum.py")
    runs = {}
    for path in parser.parse_args().metrics:
        try:
            runs[str(path.parent)] = json.loads(path.read_text(encoding="utf-8"))
            describe(str(path.parent), runs[str(path.parent)])
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"published_table.py: {path} is not a metrics.json of evaluate_plum.py ({error!r}).")
    print(format_published(runs))
    for name, metrics in runs.items():
        print(f"\n{describe(name, metrics)}")


if __name__ == "__main__":
    main()
