"""Keeps every test offline and its caches apart; the environment is set before any Hugging Face import."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import yaml

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


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Grounded conversations for `load_dataset`, in the splits train and validation."""
    from tests.runs import make_records, record

    folder = tmp_path_factory.mktemp("data")
    rows = [record(number, number % 4, number % 8 != 0) for number in range(24)]
    make_records(rows).to_parquet(folder / "train.parquet")
    make_records([record(number, number % 4) for number in range(30, 37)]).to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="session")
def trained(data_folder, tmp_path_factory) -> Path:
    """The output folder of a model trained from scratch by a recipe."""
    from plum_partonomy.training.run import main as train
    from tests.runs import base_options
    from tests.tiny import tiny_config

    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config().to_dict()
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "strict_macro_giou"}
    recipe = base_options(data_folder, folder / "out") | {"model_config": config, "tokenizer_vocab_size": 300}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps({**recipe, **evaluated, **best}))))
    train([str(folder / "recipe.yaml"), "--max_steps", "8"])
    return folder / "out"
