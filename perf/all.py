"""
Run the benchmarks of this folder, each in a separate process, and update perf/results.json: a new row replaces the one
of the same name and device, and all others are kept.

    python perf/all.py               # all except the one for a GPU
    python perf/all.py masks gpu     # some of them
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
SCRIPTS = [
    "choices",
    "masks",
    "segmentation",
    "segmenters",
    "training",
    "training_step",
    "photographs",
    "language_loss",
    "evaluation",
    "pipeline",
    "metrics",
    "build_questions",
    "growth",
    "startup",
]


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """Return the old rows, each replaced by the new one of the same name and device, and the other new rows."""
    rows = {(row["name"], row["device"]): row for row in [*old, *new]}
    return list(rows.values())


def main() -> None:
    different = []
    for name in sys.argv[1:] or SCRIPTS:
        run = subprocess.run([sys.executable, FOLDER / f"{name}.py"], stdout=subprocess.PIPE, text=True, check=True)
        print(run.stdout, end="", flush=True)
        rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
        rows = [row for row in rows if "failed" not in row]
        RESULTS.write_text(json.dumps(merge(json.loads(RESULTS.read_text()), rows), indent=1) + "\n")
        different += [row["name"] for row in rows if not row["equal"]]
    if different:
        sys.exit(f"Results differ between the two paths: {different}")


if __name__ == "__main__":
    main()
