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


@pytest.fixture(scope="session")
def whole_recording(fixtures_dir, tmp_path_factory):
    """A whole set of tensors recorded from the authors' code."""
    from tests.recording import Recording

    return Recording(fixtures_dir / "parity", tmp_path_factory.mktemp("whole_recording"))


@pytest.fixture(scope="session", params=["the part in tests/fixtures", "all of it in PLUM_FIXTURES"])
def recording(request, tmp_path_factory):
    """Tensors recorded from the authors' code: the part that is in the repository, and a whole set."""
    from tests.recording import PUBLIC_FOLDER, Recording

    if request.param == "all of it in PLUM_FIXTURES":
        return request.getfixturevalue("whole_recording")
    return Recording(PUBLIC_FOLDER, tmp_path_factory.mktemp("recording"))
