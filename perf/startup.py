"""
Processor seconds (user and system) of commands from start to end, mostly spent on imports.

    python perf/startup.py

The lower of two runs each, on one thread, with the target in seconds.
"""

import os
import resource
import subprocess
import sys

from measure import ROOT, result

PICTURE, QUESTION = "examples/sailboat.png", "What visible parts does the object in the image have?"
# Words after `python`, exit code, target in seconds.
COMMANDS = {
    "plum --help": (["-m", "plum_partonomy.cli", "--help"], 0, 1),
    "plum ask, plum-tiny": (["-m", "plum_partonomy.cli", "ask", PICTURE, QUESTION], 0, 5),
    "plum ask, no such image": (["-m", "plum_partonomy.cli", "ask", "absent.png", QUESTION], 1, 1),
    "train.py --help": (["train.py", "--help"], 0, None),
    "train.py, misspelt option": (["train.py", "recipes/plum_tiny.yaml", "--modle", "none"], 2, None),
    "evaluate_plum.py --help": (["evaluate_plum.py", "--help"], 0, 1),
    "evaluate_plum.py, misspelt option": (["evaluate_plum.py", "--output_dir", "none", "--modle", "none"], 2, 1),
}


def run(words: list[str]) -> tuple[float, int]:
    """Return processor seconds and exit code of Python with these words."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.returncode


def main() -> None:
    for name, (words, code, target) in COMMANDS.items():
        runs = [run(words) for _ in range(2)]
        detail = {"runs": [round(seconds, 2) for seconds, _ in runs]}
        equal = all(found == code for _, found in runs)
        result(f"{name}, processor seconds", min(runs)[0], target, better="lower", equal=equal, detail=detail)


if __name__ == "__main__":
    main()
