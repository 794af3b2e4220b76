"""Keeps every test offline and its caches apart; the environment is set before any Hugging Face import."""

import os
import tempfile
from pathlib import Path

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="plum-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The folder of photographs and recorded originals, which are not part of the repository."""
    if "PLUM_FIXTURES" not in os.environ:
        pytest.skip("set PLUM_FIXTURES to the folder that holds official_layout/ and data/real_parts/")
    return Path(os.environ["PLUM_FIXTURES"])
