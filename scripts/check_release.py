"""
Check a release in a fresh clone: clone the last commit into a new folder and run all checks there.

    python scripts/check_release.py [--slow] [--output_dir FOLDER]

Steps: installation, linter, default suite, documentation site; with --slow also `make demo`, the slow tests, the
fuzzer and the benchmarks. The output of each step goes to a log file. Its last line is printed; for tests it counts
skipped tests. The exit status is 0 only if every step passed.
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
    """Return whether the command succeeds in the clone; print its name, log, outcome, seconds and last line."""
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
    parser.add_argument("--output_dir", type=Path, help="Folder for clone and logs (default: a temporary folder).")
    arguments = parser.parse_args()
    folder = arguments.output_dir or Path(tempfile.mkdtemp(prefix="release-"))
    folder.mkdir(parents=True, exist_ok=True)
    clone = folder / "clone"
    if clone.exists():
        sys.exit(f"{clone} exists; name a new --output_dir, a release is checked from a fresh clone.")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run(["git", "log", "-1", "--format=Checking %h %s"], cwd=clone, check=True)
    if subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True).stdout:
        print("Uncommitted changes are not checked.", flush=True)
    steps = STEPS | (SLOW_STEPS if arguments.slow else {})
    failed = [
        name for name, command in steps.items() if not run_step(name, command, clone=clone, log=folder / f"{name}.log")
    ]
    if failed:
        sys.exit(f"Release checks failed: {', '.join(failed)}.")
    print("All release checks passed.")


if __name__ == "__main__":
    main()
