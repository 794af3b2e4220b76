"""The benchmarks: that all of them are run, and that the one for a GPU takes its steps."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PERF = Path(__file__).parents[1] / "perf"
FEW_BITS = "training step with LoRA, batch 1, language model in 4 bits"  # needs bitsandbytes


def test_every_benchmark_is_run_but_that_for_a_gpu():
    benchmarks = {path.stem for path in PERF.glob("*.py") if "__main__" in path.read_text()}
    assert set(runpy.run_path(str(PERF / "all.py"))["SCRIPTS"]) == benchmarks - {"all", "gpu"}


def test_new_results_replace_those_of_the_same_name_and_device_and_keep_all_others():
    rows = [{"name": name, "device": device, "ratio": 1} for name in ("a", "b") for device in ("cpu", "gpu")]
    newer, further = rows[2] | {"ratio": 2}, {"name": "c", "device": "cpu", "ratio": 3}
    merge = runpy.run_path(str(PERF / "all.py"))["merge"]
    assert merge(rows, [newer, further]) == [*rows[:2], newer, rows[3], further]
    stored = json.loads((PERF / "results.json").read_text())
    assert merge(stored, []) == stored


@pytest.mark.slow
def test_the_benchmark_for_a_gpu_scores_segments_and_trains_at_its_tiny_size():
    command = [sys.executable, PERF / "gpu.py", "--tiny", "--steps", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"')]
    assert [line["name"] for line in lines if "failed" in line] in ([], [FEW_BITS]), lines
    tiny, scored, answered, static, encoded, trained, unchecked, one_row, *few_bits, recipe, frozen = lines
    for line in (tiny, scored, answered, static, encoded, trained, unchecked):
        detail = line["detail"]
        expected = (
            detail["tera_flops"] / detail["peak_tflops"] + detail["giga_bytes_read"] / detail["peak_tbytes"] / 1e3
        )
        assert line["equal"] and detail["floor_seconds"] == pytest.approx(expected, abs=1e-4)
    for line in (tiny, scored, answered, trained):
        parts = line["detail"]["breakdown"]["parts"]
        assert sum(parts.values()) == pytest.approx(line["detail"]["breakdown"]["seconds"], rel=0.01)
    scored, answered, trained = ({*line["detail"]["breakdown"]["parts"]} for line in (scored, answered, trained))
    assert scored == {"vision tower", "projector", "prefill", "head", "other"}
    assert answered == scored | {"SAM encoder", "decoding", "tagger", "mask decoder"}
    assert trained == answered - {"prefill", "decoding"} | {"language model", "loss", "backward", "optimizer"}
    assert one_row["ratio"] > 0 and [line["name"] for line in few_bits] == [FEW_BITS]
    for line in (recipe, frozen):
        assert line["detail"]["samples_per_step"] == 2 and 0 <= line["detail"]["loader_share"] < 1
