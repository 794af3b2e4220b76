"""What is made of files does not depend on the process that makes it, nor on Python's hash seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.digests import digest
from tests.questions.test_question_builds import small_descriptor
from tests.sources.test_mixture_configs import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("pascal_part", "semantic_paco_lvis", "ade20k", "grefcoco", "reasonseg", "core_stage2")


def test_records_are_those_of_two_other_processes_with_another_hash_seed(tmp_path):
    found = {}
    for name, make_folder in [*((name, FOLDERS[name]) for name in NAMES), ("descriptor_questions", small_descriptor)]:
        found[name] = digest(name, make_folder(tmp_path / name), streaming=True)
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.digests", str(tmp_path), *found]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found
