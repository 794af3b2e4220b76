"""The release check: what it runs exists, and a failing step is seen."""

import sys
from pathlib import Path

from scripts.check_release import SLOW_STEPS, STEPS, run_step

ROOT = Path(__file__).parents[2]


def test_every_step_is_a_target_of_the_makefile():
    rules = {line.partition(":")[0] for line in (ROOT / "Makefile").read_text().splitlines()}
    targets = [target for _, target in (STEPS | SLOW_STEPS).values()]
    assert {target.replace(".venv/installed", "$(INSTALLED)") for target in targets} <= rules


def test_a_step_says_what_it_runs_how_it_ended_and_its_last_line(tmp_path, capsys):
    for code, outcome in [(0, "ok"), (3, "FAILED (3)")]:
        command = [sys.executable, "-c", f"import sys; print('started'); print('7 skipped'); sys.exit({code})"]
        assert run_step("test", command, clone=tmp_path, log=tmp_path / "test.log") is (code == 0)
        started, ended = capsys.readouterr().out.splitlines()[-2:]
        assert str(tmp_path / "test.log") in started
        assert outcome in ended and ended.endswith("7 skipped")
