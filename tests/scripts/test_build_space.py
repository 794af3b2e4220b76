import argparse

import pytest

from scripts.build_space import build_space
from scripts.push_to_hub import SPACE_FILES, prepare_space, stage


@pytest.mark.slow
def test_the_space_starts_from_the_files_that_are_pushed_and_nothing_else(tmp_path):
    build_space(tmp_path / "built")
    stage(tmp_path / "built", tmp_path / "pushed", SPACE_FILES)
    assert (tmp_path / "pushed" / "checkpoints" / "plum-tiny" / "model.safetensors").is_file()
    prepare_space(tmp_path / "pushed", argparse.Namespace())
