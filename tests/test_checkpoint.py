"""What is refused before it is loaded."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import evaluate_plum
import plumkit.cli
from partkit.masks import DataError
from plumkit.checkpoint import check_checkpoint, load_checkpoint, open_checkpoint
from tests.tiny import random_image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    tiny_model().save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    shutil.copytree(sound, tmp_path / "plum")
    return tmp_path / "plum"


def change_config(folder: Path, **changes):
    """Sets fields of the config; `a__b` is field b of its part a."""
    settings = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *parts, last = name.split("__")
        part = settings
        for key in parts:
            part = part[key]
        assert last in part
        part[last] = value
    (folder / "config.json").write_text(json.dumps(settings))


def change_index(folder: Path, name):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    path.write_text(json.dumps(index))


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def only_pickles(folder: Path):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))


def outside_weights(folder: Path):
    save_file({"weight": torch.zeros(1)}, folder.parent / "outside.safetensors")
    change_index(folder, "../outside.safetensors")


def half_a_file(folder: Path):
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_header_of_exabytes(folder: Path):
    path = sorted(folder.glob("*.safetensors"))[0]
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def peak_kilobytes() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def a_picture_of_kilometres(folder: Path):
    side = {
        "sam_config__vision_config__image_size": 8 * 10**6,
        "sam_config__prompt_encoder_config__image_size": 8 * 10**6,
    }
    change_config(folder, **side, vlm_config__vision_config__image_size=10**6)


@pytest.mark.parametrize(
    "damage, message",
    [
        (only_pickles, r"found \['pytorch_model.bin'\], which are pickles"),
        (outside_weights, r"names '\.\./outside\.safetensors', which is no safetensors file of this folder"),
        (lambda folder: change_index(folder, "/etc/passwd"), "names '/etc/passwd'"),
        (lambda folder: change_index(folder, ["a", "list"]), "names .* which is no safetensors file"),
        (lambda folder: change_index(folder, "config.json"), "names 'config.json'"),
        (half_a_file, "is no whole safetensors file"),
        (a_header_of_exabytes, "is no whole safetensors file"),
        (a_picture_of_kilometres, r"config.json asks for [\d,]{15,} parameters, the weights hold"),
        (lambda folder: change_config(folder, vlm_config__text_config__vocab_size=10**12), "asks for .* parameters"),
        (lambda folder: change_config(folder, vlm_config__text_config__num_hidden_layers=10**9), "num_hidden_layers"),
        (
            lambda folder: change_config(folder, vlm_config__text_config__hidden_size=2**40),
            "no model that can be built",
        ),
        (lambda folder: change_config(folder, span_tagger_num_layers=10**9), "span_tagger_num_layers = 1000000000"),
        (lambda folder: change_config(folder, model_type="llava"), "'llava' model, expected 'plum'"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
    ],
)
def test_a_hostile_folder_is_refused_before_memory_is_spent(damage, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    damage(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = peak_kilobytes()
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder)
    assert peak_kilobytes() - before < 64 * 1024
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(only_pickles, "which are pickles"), (outside_weights, "no safetensors file of this folder")],
)
def test_the_shell_the_evaluation_and_the_training_refuse_a_hostile_folder(
    damage, message, folder, tmp_path, monkeypatch, capsys
):
    tiny_processor().save_pretrained(folder)
    damage(folder)
    random_image().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    questions = [
        "--dataset",
        str(ROOT / "partonomy" / "mini_questions"),
        "--name",
        "default",
        "--limit",
        "3",
        "--control",
        "none",
    ]
    with pytest.raises(SystemExit, match=f"^{plumkit.cli.NO_MODEL}$"):
        plumkit.cli.main(["ask", "image.png", "Which parts?", "--model", str(folder)])
    assert message in capsys.readouterr().err
    with pytest.raises(DataError, match=message):
        evaluate_plum.main(["--model", str(folder), *questions, "--device", "cpu", "--output_dir", "run"])
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
    assert not Path("executed").exists() and not Path("run").exists()


def test_a_sound_folder_passes_in_one_file_and_in_several(sound, tmp_path):
    assert len(list(sound.glob("*.safetensors"))) > 2
    check_checkpoint(sound)
    tiny_model(span_tagger_num_layers=0).save_pretrained(tmp_path)
    check_checkpoint(tmp_path)
