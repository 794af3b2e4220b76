"""
Checks a release as a stranger would meet it: clones the last commit into a new folder and runs everything there.

    python scripts/check_release.py [--slow] [--output_dir FOLDER]

The steps: installation, linter, default suite, documentation site; with --slow also `make demo`, the slow tests, the
fuzzer and the benchmarks. Each step's output goes to a log file, whose last line is shown: the tests count there what
they skip. The exit status is 0 only if every step passed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = {
    "install": ["make", ".venv/installed"],
    "lint": ["make", "lint"],
    "test": ["make", "test"],
    "docs": ["make", "docs"],
}
SLOW_STEPS = {
    "demo": ["make", "demo"],
    "slow-tests": ["make", "slow"],
    "fuzz": ["make", "fuzz"],
    "perf": ["make", "perf"],
}


def run_step(name: str, command: list[str], *, clone: Path, log: Path) -> bool:
    """Whether the command succeeds in the clone; prints its name and log, then outcome, seconds and last line."""
    print(f"{name:<12}{' '.join(command)} > {log}", flush=True)
    start = time.monotonic()
    with log.open("wb") as file:
        code = subprocess.run(command, cwd=clone, stdout=file, stderr=subprocess.STDOUT).returncode
    outcome = "ok" if code == 0 else f"FAILED ({code})"
    *_, last = ["", *log.read_text(errors="replace").splitlines()]
    print(f"{'':<12}{outcome:<14}{time.monotonic() - start:8.0f} s   {last}", flush=True)
    return code == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="Also the demo, slow tests, fuzzer and benchmarks.")
    parser.add_argument("--output_dir", type=Path, help="Where clone and logs go (default: a temporary folder).")
    arguments = parser.parse_args()
    folder = arguments.output_dir or Path(tempfile.mkdtemp(prefix="release-"))
    folder.mkdir(parents=True, exist_ok=True)
    clone = folder / "clone"
    if clone.exists():
        sys.exit(f"{clone} exists; name a new --output_dir, a release is checked from a fresh clone.")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "log", "-1", "--format=Checking %h %s"], cwd=clone, check=True)
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True).stdout:
        print("Changes that are not committed are not part of it.", flush=True)
    steps = STEPS | (SLOW_STEPS if arguments.slow else {})
    failed = [
        name for name, command in steps.items() if not run_step(name, command, clone=clone, log=folder / f"{name}.log")
    ]
    if failed:
        sys.exit(f"Release checks failed: {', '.join(failed)}.")
    print("All release checks passed.")


if __name__ == "__main__":
    main()
