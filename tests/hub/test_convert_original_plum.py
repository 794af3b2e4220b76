"""Conversion of original checkpoints in every form they come in, the way back, and what cannot be converted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from scripts import convert_original_plum
from scripts.convert_original_plum import convert, reverse
from tests.recording import PUBLIC_FOLDER
from tests.tiny import tiny_model

TOWER = "model.vision_tower.vision_tower."
UNUSED = ("mask_pooler.mask_modulator.projections.2.", "rotary_emb.inv_freq")


@pytest.fixture(scope="module")
def options() -> dict:
    (description,) = PUBLIC_FOLDER.glob("parity_*.json")
    return json.loads(description.read_text())["config"]


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """A whole state dict under its original names."""
    return load_file(PUBLIC_FOLDER / "weights_rest.safetensors") | load_file(
        PUBLIC_FOLDER / "weights_embed_head.safetensors"
    )


@pytest.fixture
def run(tmp_path, options):
    """Writes a state dict as a checkpoint, converts it, and returns the tensors that came out."""

    def run(tensors: dict[str, torch.Tensor], config: dict | None = None, **arguments) -> dict[str, torch.Tensor]:
        checkpoint = tmp_path / "original"
        checkpoint.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
        config_file = tmp_path / "options.json"
        config_file.write_text(json.dumps(options if config is None else config))
        convert(checkpoint, tmp_path / "converted", config_file=config_file, **arguments)
        return load_file(tmp_path / "converted" / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def expected(tmp_path_factory, options, original) -> dict[str, torch.Tensor]:
    """The converted tensors of the whole state dict."""
    folder = tmp_path_factory.mktemp("expected")
    save_file(original, folder / "model.safetensors")
    (folder / "options.json").write_text(json.dumps(options))
    convert(folder, folder / "converted", config_file=folder / "options.json")
    return load_file(folder / "converted" / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def without(tensors: dict[str, torch.Tensor], *beginnings: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(beginnings)}


# ---------------------------------------------------------------- forms of a checkpoint


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, suffix: str):
    stem, save = {"bin": ("pytorch_model", torch.save), "safetensors": ("model", save_file)}[suffix]
    names, weight_map = sorted(tensors), {}
    for index in range(3):
        filename = f"{stem}-0000{index + 1}-of-00003.{suffix}"
        weight_map |= dict.fromkeys(names[index::3], filename)
        save({name: tensors[name] for name in names[index::3]}, folder / filename)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("form", ["one .bin", "sharded .bin", "sharded safetensors"])
def test_every_form_of_a_checkpoint_gives_the_same_tensors(tmp_path, options, original, expected, form):
    if form == "one .bin":
        torch.save(original, tmp_path / "pytorch_model.bin")
    else:
        write_shards(original, tmp_path, form.removeprefix("sharded ").lstrip("."))
    config_file = tmp_path / "options.json"
    config_file.write_text(json.dumps(options))
    convert(tmp_path, tmp_path / "converted", config_file=config_file)
    assert_same(load_file(tmp_path / "converted" / "model.safetensors"), expected)


def test_a_large_checkpoint_is_written_in_shards_that_load_as_one(monkeypatch, tmp_path, options, original, expected):
    monkeypatch.setattr(convert_original_plum, "MIN_SHARD_BYTES", 300_000)
    save_file(original, tmp_path / "model.safetensors")
    (tmp_path / "options.json").write_text(json.dumps(options))
    convert(tmp_path, tmp_path / "converted", config_file=tmp_path / "options.json")
    assert len([*(tmp_path / "converted").glob("model-*.safetensors")]) > 3
    model = PlumForConditionalGeneration.from_pretrained(tmp_path / "converted")
    assert_same({name: tensor for name, tensor in model.state_dict().items() if name in expected}, expected)


def test_a_converted_folder_loads_with_its_own_code_in_half_precision(run, tmp_path, original):
    run({name: tensor.bfloat16() for name, tensor in original.items()})
    model = AutoModel.from_pretrained(tmp_path / "converted", trust_remote_code=True, dtype="auto")
    assert type(model).__name__ == "PlumForConditionalGeneration"
    assert model.dtype == torch.bfloat16
    assert model.generation_config.suppress_tokens == [model.config.vlm_config.image_token_id]
    assert model.config.mask_feedback and model.config.span_loss_scope == "sequence"


def test_unmerged_lora_comes_out_as_peft_merges_it(run, original, expected, options):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**options["llm"]))
    llama.load_state_dict({name: original[name] for name in llama.state_dict()})
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(llama, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    adapted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    others = {f"base_model.model.{name}": original[name] for name in original.keys() - llama.state_dict().keys()}
    others = {name: tensor for name, tensor in others.items() if not name.startswith("base_model.model.model.layers.")}
    others.pop("base_model.model.lm_head.weight", None)
    found = run(adapted | others, lora_alpha=6, lora_r=4)
    merged = model.merge_and_unload().state_dict()
    language_model = "vlm.model.language_model."
    for layer in range(options["llm"]["num_hidden_layers"]):
        for projection in ("q_proj", "k_proj", "v_proj"):
            name = f"layers.{layer}.self_attn.{projection}.weight"
            assert_close(found[language_model + name], merged[f"model.{name}"])
            assert torch.equal(found[language_model + name], expected[language_model + name]) == (
                projection == "k_proj"
            )
    assert torch.equal(found["vlm.lm_head.weight"][:-1], merged["lm_head.weight"])


def test_a_checkpoint_without_its_vision_tower_takes_it_from_a_clip_folder(run, tmp_path, original, options):
    clip = {**options["clip"], "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(vision_config=clip, text_config={"hidden_size": 32, "num_hidden_layers": 1}))
    model.save_pretrained(tmp_path / "clip")
    found = run(
        without(original, TOWER),
        {name: options[name] for name in ("llm", "sam", "plum")},
        vision_tower=tmp_path / "clip",
    )
    tower = model.vision_model.state_dict()
    for name in tower:
        assert torch.equal(found[f"vlm.model.vision_tower.{name}"], tower[name]), name
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["vlm_config"]["vision_config"]["num_attention_heads"] == 2


def test_options_are_read_from_a_llava_style_configuration(tmp_path, original, options):
    save_file(original, tmp_path / "model.safetensors")
    flat = {**options["llm"], **options["plum"], "mm_vision_select_layer": -1, "mm_vision_select_feature": "patch"}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with pytest.raises(ValueError, match="No tensor determines the clip's num_attention_heads"):
        convert(tmp_path, tmp_path / "converted")
    model = CLIPModel(CLIPConfig(vision_config=options["clip"], text_config={"hidden_size": 32}))
    model.save_pretrained(tmp_path / "clip")
    save_file(without(original, TOWER), tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "converted", vision_tower=tmp_path / "clip")
    config = PlumForConditionalGeneration.config_class.from_pretrained(tmp_path / "converted")
    assert config.vlm_config.vision_feature_layer == -1
    assert config.vlm_config.text_config.num_attention_heads == options["llm"]["num_attention_heads"]
    assert config.sam_config.mask_decoder_config.num_attention_heads == 8  # of every released SAM
    assert config.mask_bce_loss_weight == options["plum"]["bce_loss_weight"]


# ---------------------------------------------------------------- the way back


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_there_and_back_again_changes_no_bit(run, tmp_path, original, projector):
    if projector == "mlp2x_gelu":
        layer = {kind: original[f"model.mm_projector.{kind}"] for kind in ("weight", "bias")}
        layers = {f"model.mm_projector.{i}.{kind}": layer[kind] + i for i in (0, 2) for kind in layer}
        original = without(original, "model.mm_projector.") | layers
    converted = run(original)
    reverse(tmp_path / "converted", tmp_path / "reversed")
    back = load_file(tmp_path / "reversed" / "model.safetensors")
    assert_same(back, {name: tensor for name, tensor in original.items() if not any(part in name for part in UNUSED)})

    convert(tmp_path / "reversed", tmp_path / "again", config_file=tmp_path / "reversed" / "options.json")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), converted)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("converted", "again"))
    assert first == second


ODD_CONFIG = {
    "vlm_config": {
        "model_type": "llava",
        "image_token_index": 60,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 30,
            "patch_size": 10,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 61,
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "sam_config": {
        "vision_config": {
            "hidden_size": 36,
            "output_channels": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": 60,
            "patch_size": 12,
            "window_size": 2,
            "global_attn_indexes": [0, 2],
            "num_pos_feats": 8,
            "mlp_dim": 20,
        },
        "prompt_encoder_config": {"hidden_size": 16, "image_size": 60, "patch_size": 12, "mask_input_channels": 8},
        "mask_decoder_config": {
            "hidden_size": 16,
            "mlp_dim": 28,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_multimask_outputs": 2,
            "iou_head_depth": 4,
            "iou_head_hidden_dim": 12,
            "layer_norm_eps": 1e-5,
        },
    },
    "span_tagger_num_layers": 2,
    "span_tagger_num_heads": 4,
    "span_tagger_intermediate_size": 44,
    "span_loss_scope": "sequence",
    "mask_overlap_loss": "dice",
}


@pytest.mark.parametrize("mask_feedback", [True, False])
def test_a_model_of_other_sizes_goes_to_the_original_names_and_comes_back_the_same(tmp_path, mask_feedback):
    torch.manual_seed(0)
    config = PlumConfig(**ODD_CONFIG, mask_feedback=mask_feedback, mask_feedback_num_heads=2)
    model = PlumForConditionalGeneration(config)
    with torch.no_grad():  # the rows of the image placeholder, which the original has not
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[-1] = 0
    model.save_pretrained(tmp_path / "model")
    reverse(tmp_path / "model", tmp_path / "original")
    config_file = tmp_path / "original" / "options.json"
    convert(tmp_path / "original", tmp_path / "again", config_file=config_file)
    again = PlumForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert_same(again.state_dict(), model.state_dict())
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again"))
    assert first == second


# ---------------------------------------------------------------- the processor


@pytest.fixture
def tokenizer_dir(tmp_path, original) -> Path:
    """A tokenizer of single words with room for the two markers of an image at the end of the vocabulary."""
    template = convert_original_plum.original.CHAT_TEMPLATE
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *re.findall(r"\w+|[^\w\s]", template), "Which", "wing", "tail"])
    size = len(original["lm_head.weight"]) - 2
    vocabulary = [*words][: size - 1] + [f"filler{i}" for i in range(size - len(words))]
    ids = {word: index for index, word in enumerate(vocabulary[:size])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("center_crop", [False, True])
def test_the_processor_places_an_image_between_its_markers(
    run, tmp_path, original, options, tokenizer_dir, center_crop
):
    run(original, tokenizer=tokenizer_dir, center_crop=center_crop)
    processor = AutoProcessor.from_pretrained(tmp_path / "converted", trust_remote_code=True)
    image = Image.new("RGB", (90, 60), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 10, 60))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Which wing"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "tail"}],
        tokenize=True,
        return_dict=True,
    )
    special, count = options["special_ids"], options["num_image_tokens"]
    ids = batch["input_ids"][0].tolist()
    start = ids.index(special["im_start"])
    assert ids[0] == special["bos"] and ids[-1] == special["eos"]
    assert ids[start + 1 : start + 1 + count] == [special["im_end"] + 1] * count
    assert ids[start + 1 + count] == special["im_end"]
    assert batch["labels"][0].tolist()[:-2] == [-100] * (len(ids) - 2)

    # The stripe at the left border is seen by both encoders, unless CLIP's image is cropped as in the original.
    middle = batch["pixel_values"].shape[-1] // 2
    assert bool((batch["pixel_values"][0, 0, middle] < 0).any()) is not center_crop
    assert bool((batch["sam_pixel_values"][0, 0, 20] < 0).any())
    model = PlumForConditionalGeneration.from_pretrained(tmp_path / "converted").eval()
    answer = processor.post_process_segmentation(model.segment_answers(**batch))[0]
    assert answer.text


# ---------------------------------------------------------------- bad input


def reshape(name, shape):
    return lambda tensors: tensors | {name: torch.zeros(shape)}


BAD_TENSORS = {
    "a missing tensor": (
        lambda tensors: without(tensors, "model.norm.weight", "model.text_hidden_fcs.0.2.bias"),
        r"lacks 2 tensors: \['model.norm.weight', 'model.text_hidden_fcs.0.2.bias'\]",
    ),
    "a missing tensor that tells a size": (
        lambda tensors: without(tensors, "model.embed_tokens.weight"),
        "no tensor 'model.embed_tokens.weight'",
    ),
    "a tensor without an axis that tells a size": (
        reshape("model.embed_tokens.weight", (94,)),
        r"'model.embed_tokens.weight' is \(94,\), expected 2 axes",
    ),
    "a surplus tensor": (
        lambda tensors: tensors | {"crf.transitions": torch.zeros(3, 3)},
        r"has 1 that are not known: \['crf.transitions'\]",
    ),
    "a tensor of a wrong shape": (
        reshape("model.text_hidden_fcs.0.2.weight", (31, 32)),
        r"text_hidden_fcs.0.2.weight gives \(31, 32\) for span_projector.2.weight, expected \(32, 32\)",
    ),
    "a SAM of another width": (
        reshape("mask_pooler.queries", (64, 1, 16)),
        r"mask_pooler.queries gives \(64, 16\) for mask_feedback.queries, expected \(64, 32\)",
    ),
    "two values for one shared tensor": (
        lambda tensors: tensors | {"mask_pooler.final_conv.bias": torch.ones(32)},
        "'mask_pooler.final_conv.bias' and .*mask_downscaling.6.bias' differ",
    ),
    "no vision tower": (lambda tensors: without(tensors, TOWER), "pass the transformers folder .* as --vision_tower"),
    "LoRA without its options": (
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(4, 32)},
        "1 LoRA tensors that are not merged",
    ),
}


@pytest.mark.parametrize("problem", BAD_TENSORS)
def test_a_checkpoint_that_does_not_fit_is_one_error_and_leaves_nothing(run, tmp_path, original, problem):
    spoil, message = BAD_TENSORS[problem]
    with pytest.raises(ValueError, match=message):
        run(spoil(original))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["options.json", "original"]


@pytest.mark.parametrize(
    ("rank", "names", "message"),
    [
        (4, "AB", r"are \(8, 32\) and \(32, 8\), expected \(4, 32\) and \(32, 4\) with --lora_r 4"),
        (8, "A", "needs all of"),
    ],
)
def test_lora_that_does_not_fit_is_an_error(run, tmp_path, original, rank, names, message):
    shapes = {"A": (8, 32), "B": (32, 8)}
    name = "model.layers.0.self_attn.q_proj.lora_{}.default.weight"
    with pytest.raises(ValueError, match=message):
        run(original | {name.format(kind): torch.zeros(shapes[kind]) for kind in names}, lora_alpha=16, lora_r=rank)
    assert not (tmp_path / "converted").exists()


def test_equal_values_under_both_names_of_a_shared_tensor_are_taken_once(run, original, expected):
    stored = "model.visual_model.prompt_encoder.mask_downscaling."
    again = {
        f"mask_pooler.block2.0.{i}.{kind}": original[f"{stored}{i}.{kind}"].clone()
        for i in (3, 4)
        for kind in ("weight", "bias")
    }
    assert_same(run(original | again), expected)


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_only_a_model_with_the_layout_of_the_original_goes_back(tmp_path):
    config = PlumConfig(**ODD_CONFIG)
    config.vlm_config.image_token_id = 3
    PlumForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="image_token_index is 3, expected 60"):
        reverse(tmp_path / "model", tmp_path / "original")
    tiny_model().save_pretrained(tmp_path / "shared_vision")
    with pytest.raises(ValueError, match="is a llava that looks at sam_image_embeddings"):
        reverse(tmp_path / "shared_vision", tmp_path / "original")
    assert not (tmp_path / "original").exists()


@pytest.mark.parametrize("form", ["code", "a number", "no pickle"])
def test_a_file_that_is_not_plain_tensors_is_refused_and_its_code_not_run(tmp_path, options, original, form):
    path = tmp_path / "pytorch_model.bin"
    if form == "no pickle":
        path.write_bytes(b"\x00" * 100)
    else:
        torch.save(original | {"step": 3 if form == "a number" else RunsCode(tmp_path / "ran")}, path)
    config_file = tmp_path / "options.json"
    config_file.write_text(json.dumps(options))
    with pytest.raises(ValueError, match="not a plain file of tensors|'step', a int, expected a tensor"):
        convert(tmp_path, tmp_path / "converted", config_file=config_file)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["options.json", "pytorch_model.bin"]


def test_a_missing_shard_and_a_folder_without_weights_are_errors(tmp_path, options, original):
    with pytest.raises(ValueError, match="neither .*safetensors nor pytorch_model"):
        convert(tmp_path, tmp_path / "converted")
    write_shards(original, tmp_path, "bin")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(ValueError, match="pytorch_model-00002-of-00003.bin'], which are not in"):
        convert(tmp_path, tmp_path / "converted")


def test_another_tokenizer_and_an_output_folder_that_exists_are_errors(run, tmp_path, original, tokenizer_dir):
    rows = {name: torch.cat([original[name]] * 2) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    with pytest.raises(ValueError, match="give the tokenizer that was trained with this checkpoint"):
        run(original | rows, tokenizer=tokenizer_dir)
    assert not (tmp_path / "converted").exists()
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert(tmp_path / "original", tmp_path / "there", config_file=tmp_path / "options.json")


# ---------------------------------------------------------------- the command


def test_the_command_prints_its_peak_memory_or_one_sentence(monkeypatch, capsys, tmp_path, options, original):
    save_file(original, tmp_path / "model.safetensors")
    (tmp_path / "options.json").write_text(json.dumps(options))
    command = ["convert", "--checkpoint", str(tmp_path), "--output_dir", str(tmp_path / "converted")]
    monkeypatch.setattr(sys, "argv", [*command, "--config", str(tmp_path / "options.json")])
    convert_original_plum.main()
    printed = capsys.readouterr().out
    assert "Left out 2 tensors: FiLM of a third block" in printed
    assert re.search(r"converted: peak memory \d+\.\d+ GB for a checkpoint of 0\.00 GB", printed)
    with pytest.raises(SystemExit) as stop:
        convert_original_plum.main()
    assert stop.value.code == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_stays_under_a_third_above_the_checkpoint(tmp_path, options, original):
    """1.8 GB, so that the libraries' own half gigabyte does not hide what the conversion takes up."""
    layers, width = 8, 600_000
    tensors = {name: tensor for name, tensor in original.items() if not name.startswith("model.layers.")}
    for layer in range(layers):
        for name, tensor in original.items():
            if name.startswith("model.layers.0."):
                name = name.replace(".0.", f".{layer}.", 1)
                tensors[name] = torch.ones([width if size == 64 else size for size in tensor.shape])
    write_shards(tensors, tmp_path, "bin")
    (tmp_path / "options.json").write_text(json.dumps(options))
    script = convert_original_plum.__file__
    command = [sys.executable, script, "--checkpoint", tmp_path, "--output_dir", tmp_path / "converted"]
    # Linux counts the peak of the process that starts another as the other's own: a small one starts it.
    starter = [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"]
    result = subprocess.run(
        [*starter, *command, "--config", tmp_path / "options.json"], capture_output=True, text=True, check=True
    )
    ratio = float(re.search(r"([\d.]+)x", result.stdout)[1])
    assert ratio < 1.3
