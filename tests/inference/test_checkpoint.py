"""What is refused before it is loaded."""

import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plum_partonomy import cli
from plum_partonomy.evaluation.run import main as evaluate_plum
from plum_partonomy.inference.checkpoint import check_checkpoint, load_checkpoint, load_processor
from plum_partonomy.inference.inputs import ModelError
from plum_partonomy.inference.one_image import load_model
from plum_partonomy.masks import DataError
from tests.tiny import random_image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]


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


def add_to_json(name: str, **fields):
    def damage(folder: Path):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | fields))

    return damage


def change_processor(**settings):
    """Sets fields of the image processor for SAM."""

    def damage(folder: Path):
        path = folder / "processor_config.json"
        content = json.loads(path.read_text())
        content["sam_image_processor"] |= settings
        path.write_text(json.dumps(content))

    return damage


def an_adapter(folder: Path):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 200000}')


def an_adapter_alone(folder: Path):
    an_adapter(folder)
    (folder / "config.json").unlink()


def a_million_layers_of(family: str, name: str):
    """A language model of another family, whose config calls its number of layers `name`."""

    def damage(folder: Path):
        settings = json.loads((folder / "config.json").read_text())
        settings["vlm_config"]["text_config"] = {"model_type": family, name: 10**6, "vocab_size": 300}
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


def a_pipe_in_place_of_the_config(folder: Path):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def nested(levels: int) -> dict:
    return {"inner": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    "damage, message",
    [
        (only_pickles, r"found \['pytorch_model.bin'\], which are pickles"),
        (outside_weights, r"names '\.\./outside\.safetensors', which is not a safetensors file in this folder"),
        (lambda folder: change_index(folder, "/etc/passwd"), "names '/etc/passwd'"),
        (lambda folder: change_index(folder, ["a", "list"]), "names .* which is not a safetensors file"),
        (lambda folder: change_index(folder, "config.json"), "names 'config.json'"),
        (half_a_file, "is not a complete safetensors file"),
        (a_header_of_exabytes, "is not a complete safetensors file"),
        (a_picture_of_kilometres, "config.json has image_size = 8000000, more than 1,000,000"),
        (lambda folder: change_config(folder, vlm_config__text_config__vocab_size=10**6), "needs .* parameters"),
        (lambda folder: change_config(folder, vlm_config__text_config__num_hidden_layers=10**9), "num_hidden_layers"),
        (lambda folder: change_config(folder, vlm_config__text_config__num_hidden_layers=10**5), "more parameters"),
        (lambda folder: change_config(folder, vlm_config__text_config__hidden_size=7), "no model that can be built"),
        (lambda folder: change_config(folder, span_tagger_num_layers=10**9), "span_tagger_num_layers = 1000000000"),
        (
            lambda folder: change_config(folder, sam_config__mask_decoder_config__num_multimask_outputs=10**6),
            "more parameters",
        ),
        (
            lambda folder: change_config(folder, sam_config__prompt_encoder_config__num_point_embeddings=10**6),
            "more parameters",
        ),
        (a_million_layers_of("gpt2", "n_layer"), "more parameters"),
        (a_million_layers_of("bloom", "n_layer"), "more parameters"),
        (a_million_layers_of("gpt_neox", "num_hidden_layers"), "more parameters"),
        (an_adapter, "adapter_config.json belongs to an adapter, which is not used"),
        (an_adapter_alone, "adapter_config.json belongs to an adapter, which is not used"),
        (add_to_json("config.json", inner=nested(40)), "nested more than 32 levels deep"),
        (add_to_json("config.json", auto_map={"AutoModel": "evil.Evil"}), "code or weights from elsewhere"),
        (add_to_json("config.json", vlm_config={"auto_map": {"AutoModel": "evil.Evil"}}), "from elsewhere"),
        (add_to_json("config.json", sam_config={"attn_implementation": "evil/kernel"}), "attn_implementation"),
        (add_to_json("config.json", vlm_config={"use_pretrained_backbone": True}), "use_pretrained_backbone"),
        (add_to_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}), "from elsewhere"),
        (
            add_to_json("processor_config.json", image_processor={"auto_map": {"AutoImageProcessor": "evil.Evil"}}),
            "from elsewhere",
        ),
        (add_to_json("processor_config.json", audio_tokenizer={"audio_tokenizer_class": "X"}), "audio_tokenizer"),
        (add_to_json("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"}), "from elsewhere"),
        (add_to_json("generation_config.json", penalty_alpha=0.6, top_k=4), "asks for 'contrastive_search'"),
        (add_to_json("generation_config.json", num_beams=0), "num_beams must be an integer of at least 1, found 0"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json cannot be read"),
        (add_to_json("config.json", vlm_config={"num_labels": 10**5}), "has num_labels = 100000, more than 1,000"),
        (add_to_json("processor_config.json", num_image_tokens=10**9), "num_image_tokens = 1000000000, more than"),
        (a_pipe_in_place_of_the_config, "config.json cannot be read"),
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
        check_checkpoint(folder)
    assert peak_kilobytes() - before < 64 * 1024
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(only_pickles, "which are pickles"), (outside_weights, "not a safetensors file in this folder")],
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
    assert cli.main(["ask", "image.png", "Which parts?", "--model", str(folder)]) == cli.NO_MODEL
    assert message in capsys.readouterr().err
    with pytest.raises(DataError, match=message):
        evaluate_plum(["--model", str(folder), *questions, "--device", "cpu", "--output_dir", "run"])
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)
    assert not Path("executed").exists() and not Path("run").exists()


FLAG = "open('executed', 'w').close()"


def code_of_a_tokenizer(folder: Path):
    (folder / "evil.py").write_text(
        f"{FLAG}\nfrom transformers import PreTrainedTokenizerFast as Fast\nclass Evil(Fast): pass\n"
    )
    names = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    add_to_json("tokenizer_config.json", tokenizer_class="Evil", auto_map=names)(folder)


def code_under_the_names_of_this_project(folder: Path):
    for path in folder.glob("*.py"):
        path.write_text(FLAG)
    for auto_class in ("AutoTokenizer", "AutoImageProcessor"):
        auto_map = {auto_class: "processing_plum.PlumProcessor"}
        add_to_json("tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)(folder)
        add_to_json("processor_config.json", auto_map=auto_map)(folder)


def code_for_generation(folder: Path):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{FLAG}\ndef generate(model, **_): pass\n")


@pytest.mark.parametrize(
    "damage", [code_of_a_tokenizer, code_under_the_names_of_this_project, code_for_generation, only_pickles]
)
def test_code_in_a_folder_does_not_run_whatever_is_answered_to_a_question(damage, folder, monkeypatch):
    tiny_processor().save_pretrained(folder)
    damage(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    for load in (load_checkpoint, load_processor):
        with contextlib.suppress(ModelError):
            load(folder)
    assert not Path("executed").exists()


@pytest.mark.parametrize("place", ["span_tagger", "span_projector", "sam.mask_decoder", "vlm.lm_head"])
def test_tensors_that_are_not_in_the_files_are_an_error(place, folder):
    tiny_processor().save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        renamed = {f"old.{name}" if name.startswith(place) else name: tensor for name, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        f"old.{name}" if name.startswith(place) else name: file for name, file in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"lack \d+ tensors of the model, such as '{place}"):
        load_checkpoint(folder)


def test_tensors_that_the_config_does_not_describe_are_an_error_and_not_left_out(folder):
    tiny_processor().save_pretrained(folder)
    change_config(folder, vlm_config__text_config__num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"have \d+ tensors that are not in the model of its config, such as 'vlm.*1"):
        load_checkpoint(folder)


def not_a_number(folder: Path):
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_to_json("processor_config.json", num_image_tokens=7), "16 features and 7 image tokens"),
        (add_to_json("processor_config.json", num_image_tokens="x"), "cannot answer"),
        (change_processor(image_std=[0.0] * 3), "makes pixels that are not finite numbers"),
        (add_to_json("processor_config.json", vlm_image_input="pixel_values"), "the model expects 'sam_image_embedd"),
        (
            add_to_json("tokenizer_config.json", extra_special_tokens=[f"<{n}>" for n in range(99)]),
            "tokens up to the id",
        ),
        (add_to_json("generation_config.json", eos_token_id="x"), "cannot answer"),
        (add_to_json("generation_config.json", bad_words_ids=[[10**6]]), "cannot answer"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "division by zero"),
        (not_a_number, "its weights give numbers that are not finite"),
    ],
)
def test_files_that_do_not_fit_together_are_an_error_of_the_checkpoint_and_not_of_a_question(damage, message, folder):
    tiny_processor().save_pretrained(folder)
    damage(folder)
    with pytest.raises(ModelError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_only_modules_that_a_change_of_the_config_adds_may_start_from_nothing(tmp_path):
    tiny_model(mask_feedback=False).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model, _ = load_checkpoint(tmp_path, {"mask_feedback": True})
    assert model.mask_feedback is not None


def test_a_change_of_a_nested_field_keeps_the_fields_beside_it(folder):
    tiny_processor().save_pretrained(folder)
    text = {"model_type": "llama", "hidden_size": 32, "attention_dropout": 0.5}
    model, _ = load_checkpoint(folder, {"vlm_config": {"model_type": "llava", "text_config": text}})
    expected = tiny_model()
    assert model.config.get_text_config().attention_dropout == 0.5
    assert model.config.get_text_config().vocab_size == expected.config.get_text_config().vocab_size
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


UNFIT = "model_config does not fit the checkpoint .*plum: "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vlm_config": {"text_config": {"vocab_size": 500}}},
            rf"{UNFIT}2 .*'vlm.*, which is \(500, 32\) by",
        ),
        ({"vlm_config": {"text_config": {"num_hidden_layers": 3}}}, rf"{UNFIT}.*layers.2.*\(32,\) by .* absent in"),
        ({"vlm_config": {"text_config": {"num_hidden_layers": 1}}}, rf"{UNFIT}.*layers.1.*, which is absent by"),
        ({"sam_config": {"mask_decoder_config": {"mlp_dim": 32}}}, rf"{UNFIT}.*'sam.mask_decoder.*, which is \(32"),
        ({"span_tagger_intermediate_size": 32}, rf"{UNFIT}.*'span_tagger.layers.0.* which is \(32"),
        ({"sam_config": {"vision_config": {"image_size": 32}}}, "model_config cannot be used: .*image_size is 32"),
        ({"vlm_config": 3}, "model_config cannot be used: "),
        ({"vlm_config": {"hiden_size": 3}}, r"model_config.vlm_config has fields \['hiden_size'\]"),
    ],
)
def test_a_change_that_the_weights_do_not_fit_is_named(changes, message, folder):
    tiny_processor().save_pretrained(folder)
    with pytest.raises(DataError, match=message):
        load_checkpoint(folder, changes)


def test_weights_of_other_shapes_than_those_of_the_config_are_an_error(folder):
    tiny_processor().save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["vlm_config"]["text_config"]["vocab_size"] -= 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"have 'vlm.*' in shape \(400, 32\), its config needs \(399, 32\); fetch"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer_config.json", "[]"),
        ("processor_config.json", '{"image_processor": 3}'),
        ("processor_config.json", '{"vlm_processor_class": "AutoModel"}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_processor_is_one_sentence_and_the_exit_code_of_models(
    name, content, folder, tmp_path, capsys, monkeypatch
):
    tiny_processor().save_pretrained(folder)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    random_image().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ask", "image.png", "Which parts?", "--model", str(folder)]) == cli.NO_MODEL
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plum: ") and str(folder) in line


def test_a_processor_for_images_of_another_size_is_refused(folder):
    tiny_processor().save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    for size, side, words in (
        (10**5, 64, "SAM has size {'longest_edge': 100000} and pad_size {'height': 64, 'width': 64}, expected"),
        (32, 32, "makes images of 32 x 32 for SAM, the model expects 64 x 64"),
    ):
        changed = {"size": {"longest_edge": size}, "pad_size": {"height": side, "width": side}}
        settings["sam_image_processor"] |= changed
        (folder / "processor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=re.escape(words)):
            load_checkpoint(folder)


def test_a_sound_folder_passes_in_one_file_and_in_several(sound, tmp_path):
    assert len(list(sound.glob("*.safetensors"))) > 2
    check_checkpoint(sound)
    tiny_model(span_tagger_num_layers=0).save_pretrained(tmp_path)
    check_checkpoint(tmp_path)
