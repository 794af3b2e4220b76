"""
Run every benchmark of this folder except the one for a GPU, each in a separate process, and write perf/results.json.

    python perf/all.py
"""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
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


def main() -> None:
    results = []
    for name in SCRIPTS:
        run = subprocess.run([sys.executable, FOLDER / f"{name}.py"], stdout=subprocess.PIPE, text=True, check=True)
        print(run.stdout, end="", flush=True)
        results += [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    missed = [line["name"] for line in results if not line["equal"]]
    if missed:
        sys.exit(f"Results differ between the two paths: {missed}")


if __name__ == "__main__":
    main()
