"""The benchmarks: that all of them are run, and that the one for a GPU takes its steps."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parents[1] / "perf"


def test_every_benchmark_is_run_but_that_for_a_gpu():
    benchmarks = {path.stem for path in PERF.glob("*.py") if "__main__" in path.read_text()}
    assert set(runpy.run_path(str(PERF / "all.py"))["SCRIPTS"]) == benchmarks - {"all", "gpu"}


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_scores_segments_and_trains_at_its_tiny_size():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, PERF / "gpu.py", "--tiny"], env=environment, capture_output=True, text=True, check=True
    )
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 3 and all(line["equal"] and line["detail"]["tera_flops"] > 0 for line in results)
