"""Whole runs of train.py on tiny models: options, outputs, resumed and killed runs, input that is refused."""

import copy
import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoProcessor, LlamaConfig

from configuration_plum import PlumConfig
from plum_partonomy.inference.checkpoint import check_config_fields, load_checkpoint
from plum_partonomy.masks import DataError
from plum_partonomy.training.model import build_from_scratch, freeze, load_model
from plum_partonomy.training.options import ModelArguments, parse_arguments
from plum_partonomy.training.resume import find_problem
from plum_partonomy.training.run import make_eval_dataset
from processing_plum import PlumProcessor
from tests import forks
from tests.hub_stub import HubStub
from tests.runs import EVALUATED, ROOT, base_options, batch_of, losses_by_step, make_records, record, run_main
from tests.tiny import CORPUS, tiny_config, tiny_model, tiny_processor

# ------------------------------------------------------------------------------------------------ options


def parse(tmp_path, content, *words):
    (tmp_path / "recipe.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return parse_arguments([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), *words])


def test_the_command_line_goes_over_the_recipe_which_goes_over_the_defaults(tmp_path):
    recipe = {"model": "folder", "learning_rate": 0.5, "max_steps": 7, "color_jitter": 0.5, "bf16": False}
    model, data, training = parse(tmp_path, recipe, "--learning_rate", "0.25", "--color_jitter", "0")
    assert (training.learning_rate, training.max_steps) == (0.25, 7)
    assert (model.model, model.lora_r) == ("folder", 0)
    assert (data.color_jitter, data.name) == (0.0, "mini")


def test_a_model_config_is_a_mapping_in_the_recipe_and_json_on_the_command_line(tmp_path):
    recipe = {"model_config": {"sam_config": {"vision_config": {"image_size": 64}}}}
    assert parse(tmp_path, recipe)[0].model_config == recipe["model_config"]
    assert parse(tmp_path, recipe, "--model_config", '{"mask_feedback": false}')[0].model_config == {
        "mask_feedback": False
    }


def test_a_recipe_is_unicode_text(tmp_path, capsys):
    recipe, words = tmp_path / "recipe.yaml", [str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        recipe.write_text("model: café\n", encoding=encoding)
        assert parse_arguments(words)[0].model == "café"
    recipe.write_text("model: café\n", encoding="latin-1")
    with pytest.raises(SystemExit):
        parse_arguments(words)
    assert "recipe.yaml is not valid yaml" in capsys.readouterr().err


def test_no_in_yaml_is_the_choice_of_that_name(tmp_path):
    training = parse(tmp_path, "model: m\neval_strategy: no\nsave_strategy: no\nbf16: no\n")[2]
    assert (training.eval_strategy, training.save_strategy, training.bf16) == ("no", "no", False)


def test_whole_numbers_may_stand_for_floats(tmp_path):
    sam = {"vision_config": {"mlp_ratio": 4, "layer_norm_eps": 1}}
    vlm = {"model_type": "llava", "text_config": {"model_type": "qwen2", "rms_norm_eps": 1, "num_hidden_layers": 2}}
    recipe = {"model_config": {"mask_bce_loss_weight": 2, "sam_config": sam, "vlm_config": vlm}, "learning_rate": 1}
    model, _, training = parse(tmp_path, recipe)
    config = PlumConfig(**model.model_config)
    assert (config.mask_bce_loss_weight, config.sam_config.vision_config.mlp_ratio) == (2.0, 4.0)
    assert (config.vlm_config.text_config.rms_norm_eps, config.vlm_config.text_config.num_hidden_layers) == (1.0, 2)
    assert training.learning_rate == 1.0


@pytest.mark.parametrize(
    "content, words, message",
    [
        ({"model": "m", "learning_rat": 1}, [], "unknown option 'learning_rat'; did you mean learning_rate?"),
        ({"model": "m"}, ["--learning_rat", "1"], "--learning_rat"),
        ({"model": "m", "learning_rate": "fast"}, [], "learning-rate: invalid float value: 'fast'"),
        ({"model": "m", "max_steps": 1.5}, [], "max-steps: invalid int value: '1.5'"),
        ({"model": "m", "bf16": "perhaps"}, [], "bf16"),
        ({"model": "m", "max_spans": None}, [], "'max_spans' no value"),
        ("- model\n- learning_rate", [], "must be a yaml mapping of options, found list"),
        ("model: [", [], "recipe.yaml is not valid yaml"),
        ({"learning_rate": 1.0}, [], "Give model (a checkpoint), vlm and sam (backbones) or --model_config"),
        ({"model_config": 5}, [], "--model_config must be a mapping, found 5"),
        ({"model_config": "tiny"}, [], "model_config must be a mapping"),
        ({"model": "m", "turns_per_record": -1}, [], "--turns_per_record must be an integer of at least 0, found -1."),
        ({"model": "m", "max_spans": 0}, [], "--max_spans must be an integer of at least 1, found 0."),
        ({"model": "m", "max_length": 0}, [], "--max_length must be an integer of at least 1, found 0."),
        ({"model": "m", "color_jitter": float("nan")}, [], "color_jitter must be a finite number of at least 0"),
        ({"model": "m", "lora_r": -2}, [], "--lora_r must be an integer of at least 0, found -2."),
        ({"model": "m", "lora_dropout": 1.0}, [], "--lora_dropout must be at least 0 and below 1, found 1.0."),
        ({"model": "m", "muon_learning_rate": -0.1}, [], "muon_learning_rate must be a finite number of at least 0"),
        ("model: m\nlearning_rate: 0.1\nlearning_rate: 0.2\n", [], "'learning_rate' is given twice"),
        ("model: m\nmodel_config: {span_loss_weight: 1.0, span_loss_weight: 2.0}\n", [], "given twice"),
        ("model: m\n1: 2\n", [], "has the unknown option '1'"),
        ({"model": "m", "learning_rate": [0.1, 0.2]}, [], "gives option 'learning_rate' a list; it takes one value"),
        ({"model": "m", "mixture": []}, [], "mixture must name at least one data set"),
        ({"model": "m"}, ["other.yaml"], "'other.yaml' belongs to no option; a recipe comes first"),
        ({"model": "m", "streaming": True}, [], "streaming never ends and needs --max_steps above 0"),
        ({"model": "m", "frozen_dtype": "bfloat16", "lora_r": 2}, [], "--frozen_dtype needs autocast to the same"),
        (
            {"model": "m", "frozen_dtype": "bfloat16", "bf16": True},
            ["--use_cpu"],
            "--frozen_dtype needs frozen layers",
        ),
        (
            {"model": "m", "eval_strategy": "epoch", "mixture": [{"eval_split": None}]},
            [],
            "needs an --eval_split",
        ),
        ({"model": "m", "lora_r": 2, "push_to_hub": True}, [], "--hub_strategy must be end with LoRA"),
        ({"model": "m", "label_smoothing_factor": 0.1}, [], "--label_smoothing_factor must be 0.0, found 0.1"),
        ({"model": "m", "remove_unused_columns": True}, [], "--remove_unused_columns must be False"),
        ({"model": "m", "prediction_loss_only": True}, [], "--prediction_loss_only must be False"),
        ({"model": "m", "train_sampling_strategy": "group_by_length"}, [], "must be random or sequential"),
        (
            {"model": "m", "metric_for_best_model": "loss"},
            [],
            "--metric_for_best_model must be one of strict_macro",
        ),
        ({"model": "m", "muon_learning_rate": 0.1, "optim": "sgd"}, [], "--muon_learning_rate trains with Muon"),
        (
            {"model": "m", "torch_compile_mode": "fast"},
            [],
            "--torch_compile_mode must be one of default",
        ),
        ({"model": "m", "torch_compile_backend": "inducter"}, [], "--torch_compile_backend must be one of"),
        ({"model": "m", "dataloader_persistent_workers": True}, [], "--dataloader_persistent_workers needs workers"),
        ({"model": "m", "accelerator_config": {"dispatch_batches": True}}, [], "cannot dispatch batches"),
        ({"model": "m", "accelerator_config": {"dispatch": True}}, [], "unexpected keyword argument 'dispatch'"),
        ({"model": "m", "report_to": "tensorbord"}, [], "--report_to has 'tensorbord', which is misspelt or not inst"),
        (
            {"model": "m", "gradient_accumulation_steps": 0},
            [],
            "--gradient_accumulation_steps must be an integer",
        ),
        ({"model": "m", "max_steps": 0}, [], "--max_steps must be at least 1, or -1 for --num_train_epochs, found 0"),
        ({"model": "m", "num_train_epochs": -1}, [], "--num_train_epochs must be a finite number of at least 0"),
        ({"model": "m", "seed": 2**32}, [], "seed must be below 2**32"),
        ({"model": "m", "random_crop": 1}, [], "random_crop must be at least 0 and below 1, found 1"),
        (
            {"model": "m", "teacher_forcing_probability": 1.5},
            [],
            "teacher_forcing_probability must be between 0 and 1, found 1.5",
        ),
        ({"model": "m", "follow_up_probability": 0.5}, [], "--follow_up_probability needs --turns_per_record"),
        ({"model": "m", "mirror": True}, [], "mirror needs --fresh_records true"),
        ({"model": "m", "fresh_records": True, "streaming": True}, [], "fresh_records makes records by their number"),
    ],
    ids=str,
)
def test_a_wrong_recipe_or_option_ends_with_one_error_that_names_it(tmp_path, capsys, content, words, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, content, *words)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_several_trackers_may_be_given(tmp_path):
    assert parse(tmp_path, {"model": "m"})[2].report_to == []
    assert parse(tmp_path, {"model": "m", "report_to": "none"})[2].report_to == []
    assert parse(tmp_path, {"model": "m", "report_to": ["tensorboard"]})[2].report_to == ["tensorboard"]
    assert (
        parse(tmp_path, {"model": "m"}, "--report_to", "tensorboard", "tensorboard")[2].report_to
        == ["tensorboard"] * 2
    )


def test_recipes_have_numbers_as_in_yaml_1_2_and_empty_lists(tmp_path):
    recipe = "model: m\nlr_scheduler_kwargs: {min_lr: 1e-5}\nweight_decay: 1E+2\n"
    recipe += "frozen_modules: []\nlora_trained_whole: []\n"
    model, _, training = parse(tmp_path, recipe)
    assert (model.frozen_modules, model.lora_trained_whole) == ([], [])
    assert (training.lr_scheduler_kwargs, training.weight_decay) == ({"min_lr": 1e-5}, 100.0)


@pytest.mark.parametrize(("metric", "mode"), [("span_f1", "max"), ("language_modeling_loss", "min")])
def test_a_scheduler_of_a_metric_knows_whether_more_is_better(tmp_path, metric, mode):
    recipe = {"model": "m", "eval_strategy": "epoch", "metric_for_best_model": metric}
    recipe |= {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 2}}
    assert parse(tmp_path, recipe)[2].lr_scheduler_kwargs == {"mode": mode, "patience": 2}


def test_a_best_checkpoint_by_masks_needs_masks(data_folder, tmp_path):
    recipe = {"model": "m", "dataset": str(data_folder), "name": "default", "eval_split": "validation[2:3]"}
    recipe |= {"eval_strategy": "epoch", "save_strategy": "best"}
    with pytest.raises(DataError, match="metric_for_best_model=strict_macro_giou needs masks.*language_modeling_loss"):
        make_eval_dataset(*parse(tmp_path, recipe)[1:])
    recipe["metric_for_best_model"] = "language_modeling_loss"
    assert len(make_eval_dataset(*parse(tmp_path, recipe)[1:])) == 1


def test_a_bad_record_for_validation_is_named_before_the_training(tmp_path):
    make_records([record(0, 1), record(1, 2) | {"masks": []}]).to_parquet(tmp_path / "validation.parquet")
    recipe = {"model": "m", "dataset": str(tmp_path), "name": "default", "eval_strategy": "epoch"}
    with pytest.raises(DataError, match="record record-1, field 'masks': 2 span tags, but 0 masks"):
        make_eval_dataset(*parse(tmp_path, recipe)[1:])


def test_a_missing_recipe_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["recipes/none.yaml"])
    assert "recipes/none.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_understood(recipe, tmp_path):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    model, _, training = parse_arguments([str(recipe), *words])
    assert training.output_dir == str(tmp_path)
    if model.model is None:
        config = PlumConfig(**copy.deepcopy(model.model_config))
        check_config_fields(model.model_config, config)


def test_a_field_that_no_config_knows_is_refused_wherever_it_stands():
    with pytest.raises(
        ValueError, match=r"model_config has fields \['span_tagger_layers'\], which PlumConfig does not"
    ):
        build_from_scratch({"span_tagger_layers": 2}, 300, CORPUS)
    wrong = tiny_config().to_dict()
    wrong["vlm_config"]["text_config"]["hiden_size"] = 32
    with pytest.raises(ValueError, match=r"model_config.vlm_config.text_config has fields \['hiden_size'\].*LlamaC"):
        build_from_scratch(wrong, 300, CORPUS)


def test_frozen_modules_keep_their_weights_and_the_others_learn(trained, data_folder, tmp_path):
    options = {"model": trained, "frozen_modules": "sam.vision_encoder"}
    run_main(base_options(data_folder, tmp_path) | options | {"eval_split": "none"})  # unused without evaluation
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (trained, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("sam.vision_encoder.") for name in changed)
    assert any(name.startswith("sam.mask_decoder.") for name in changed)


def test_the_model_config_of_a_recipe_from_scratch_changes_a_checkpoint_of_its_sizes_and_fits_no_other(trained):
    config, records = tiny_config().to_dict() | {"span_loss_weight": 3}, make_records([record(0, 1)])
    with pytest.raises(
        DataError, match=r"does not fit .*'vlm.*', which is \(400, 32\) by model_config and \(3\d\d, 32"
    ):
        load_model(ModelArguments(model=str(trained), model_config=config), records)
    del config["vlm_config"]["text_config"]["vocab_size"]
    model, processor = load_model(ModelArguments(model=str(trained), model_config=config), records)
    assert model.config.span_loss_weight == 3
    assert model.config.get_text_config().vocab_size == len(processor.tokenizer) != 400


def test_a_frozen_module_that_the_model_does_not_have_is_named():
    with pytest.raises(ValueError, match="frozen_modules has 'sam.encoder', which is not a module of the model"):
        freeze(tiny_model(shared_vision=True), ["sam.encoder"])


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model, _ = load_model(ModelArguments(model=str(tmp_path)), make_records([record(0, 1)]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"muon_learning_rate": 0.01, "turns_per_record": 2, "follow_up_probability": 0.5},
        {"teacher_forcing_probability": 0.5, "order_free_targets": True, "prompt_probability": 0.7},
        {"lora_r": 2, "lora_dropout": 0.2},
        {"streaming": True, "dataloader_num_workers": 1},
    ],
    ids=["adamw", "muon_turns", "forcing", "lora", "streaming"],
)
def test_a_run_that_goes_on_from_the_middle_of_an_epoch_ends_bit_for_bit_as_if_never_stopped(
    trained, data_folder, tmp_path, monkeypatch, options
):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # of a worker that reads a stream
    options = base_options(data_folder, tmp_path / "whole") | {"model": trained} | options
    run_main(options)
    # What a run leaves that is killed after its eighth step, in the middle of its second epoch or of a stream.
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")
    run_main(options | {"output_dir": tmp_path / "killed", "resume_from_checkpoint": True})

    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    whole, killed = (
        losses_by_step(json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"])
        for name in ("whole", "killed")
    )
    assert whole == killed and len(whole) == 6


KILLED_WHILE_SAVING = """
import os, signal, sys
import torch
from plum_partonomy.training.run import main as train

save, step = torch.save, sys.argv[1]

def save_half(content, path, **options):
    save(content, path, **options)
    if f"checkpoint-{step}" in str(path) and str(path).endswith("optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
train(sys.argv[2:])
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(data_folder, trained, tmp_path, capsys):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 2, "save_steps": 1, "seed": 3}
    words = [str(word) for name in options for word in (f"--{name}", options[name])]
    run = forks.run("-c", KILLED_WHILE_SAVING, "2", *words)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists() and not (tmp_path / "model.safetensors").exists()
    capsys.readouterr()
    run_main(options | {"resume_from_checkpoint": True})
    said = capsys.readouterr().err
    assert f"Resuming from {tmp_path / 'checkpoint-1'}, as checkpoint-2 is not whole" in said
    run_main(options | {"output_dir": tmp_path / "unbroken"})
    resumed, unbroken = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "unbroken"))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


@pytest.fixture(scope="module")
def two_checkpoints(trained, data_folder, tmp_path_factory) -> dict:
    """The options of a run whose folder holds its checkpoints 2 and 4, and one that is none."""
    folder = tmp_path_factory.mktemp("run")
    options = base_options(data_folder, folder) | {"model": trained, "max_steps": 4, "save_steps": 2}
    run_main(options)
    (folder / "checkpoint-x").mkdir()
    return options


def resume(options: dict, copy: Path, damage, **changes) -> Path:
    """Resumes the run in a copy of its folder, once that has been damaged; returns the copy."""
    shutil.copytree(options["output_dir"], copy)
    damage(copy)
    run_main(options | {"output_dir": copy, "resume_from_checkpoint": True} | changes)
    return copy


def same_weights(one: Path, other: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


SAVED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "resume.json"]


def cut(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def name_the_step(path: Path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"global_step": "four"}))


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        *((cut, name) for name in SAVED),
        *((flip, name) for name in SAVED[:4]),
        *((Path.unlink, name) for name in SAVED),
        (name_the_step, "trainer_state.json"),
    ],
)
def test_a_damaged_last_checkpoint_is_passed_over_by_name_and_the_run_ends_the_same(
    damage, name, two_checkpoints, tmp_path, capsys
):
    copy = resume(two_checkpoints, tmp_path / "run", lambda folder: damage(folder / "checkpoint-4" / name))
    assert f"Resuming from {copy / 'checkpoint-2'}, as checkpoint-4 is " in (said := capsys.readouterr().err)
    assert name in said or damage is cut and name.endswith(".json")
    assert same_weights(copy, Path(two_checkpoints["output_dir"]))


def test_a_checkpoint_that_is_not_a_folder_is_named(tmp_path):
    (tmp_path / "checkpoint-4").write_text("")
    assert {find_problem(tmp_path / name, {}) for name in ("checkpoint-4", "none")} == {"is not a folder"}


def test_where_every_checkpoint_is_damaged_each_is_named(two_checkpoints, tmp_path):
    def damage(folder: Path):
        (folder / "checkpoint-2" / "optimizer.pt").unlink()
        cut(folder / "checkpoint-4" / "model.safetensors")

    with pytest.raises(
        DataError, match="checkpoint-4 is damaged: model.safetensors .*; checkpoint-2 is .*optimizer.pt"
    ):
        resume(two_checkpoints, tmp_path / "run", damage)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.01}, "learning_rate was 0.003, is 0.01"),
        ({"seed": 7}, "seed was 42, is 7"),
        ({"max_steps": 6}, "max_steps was 4, is 6"),
        ({"max_spans": 1, "color_jitter": 0}, "color_jitter was 0.2, is 0.0; max_spans was 2, is 1"),
        ({"frozen_modules": "sam.vision_encoder"}, "frozen_modules was"),
        ({"train_split": "validation"}, "training records was"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was False, is True"),
    ],
)
def test_a_run_of_other_options_or_records_is_not_resumed_and_the_difference_is_named(
    changes, message, two_checkpoints, tmp_path
):
    with pytest.raises(DataError, match=f"checkpoint-4 is of another run .*{message}"):
        resume(two_checkpoints, tmp_path / "run", lambda folder: None, **changes)
    assert same_weights(tmp_path / "run", Path(two_checkpoints["output_dir"]))


def test_an_older_run_in_the_same_folder_is_passed_over(two_checkpoints, tmp_path, capsys):
    other = two_checkpoints | {"learning_rate": 0.01, "output_dir": tmp_path / "other"}
    run_main(other)

    def replace(folder: Path):
        shutil.rmtree(folder / "checkpoint-2")
        shutil.copytree(tmp_path / "other" / "checkpoint-2", folder / "checkpoint-2")

    copy = resume(two_checkpoints, tmp_path / "run", replace, learning_rate=0.01)
    assert "checkpoint-4 is of another run (learning_rate was 0.003, is 0.01)" in capsys.readouterr().err
    assert same_weights(copy, tmp_path / "other")


def test_what_only_says_keeps_or_measures_may_change_on_resume(two_checkpoints, tmp_path):
    changes = {"logging_steps": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "run_name": "again"}
    copy = resume(two_checkpoints, tmp_path / "run", lambda folder: shutil.rmtree(folder / "checkpoint-4"), **changes)
    assert same_weights(copy, Path(two_checkpoints["output_dir"]))


def test_no_token_is_saved_with_a_checkpoint(data_folder, trained, tmp_path):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 1, "save_steps": 1}
    run_main(options | {"hub_token": "hf_a_secret"})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert not [path for path in files if b"hf_a_secret" in path.read_bytes()]


def test_resuming_without_a_checkpoint_is_an_error(trained, data_folder, tmp_path):
    options = base_options(data_folder, tmp_path / "out") | {"model": trained, "resume_from_checkpoint": True}
    with pytest.raises(ValueError, match="out contains no checkpoint"):
        run_main(options)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ outputs


def log_history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def test_the_curves_hold_every_named_loss_and_metric_of_the_log(trained):
    with (trained / "training_curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6", "8"]
    losses = ["language_modeling", "span_tagging", "mask_overlap", "mask_bce", "mask_iou", "teacher_kl"]
    names = ["loss", *(f"{name}_loss" for name in losses), *EVALUATED]
    logged = {}
    for entry in log_history(trained):
        logged.setdefault(entry["step"], {}).update(entry)
    for row in rows:
        assert {name: float(row[name]) for name in names} == {name: logged[int(row["step"])][name] for name in names}
        weights = tiny_model().loss_weights
        total = sum(weights[name] * float(row[f"{name}_loss"]) for name in losses)
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
    with Image.open(trained / "training_curves.png") as image:
        assert image.format == "PNG" and image.width > image.height > 100


@pytest.mark.parametrize(("max_length", "fits"), [(30, False), (45, True)])
def test_the_log_counts_the_conversations_that_max_length_cuts_or_leaves_out(
    max_length, fits, trained, data_folder, tmp_path
):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 2, "logging_steps": 1}
    run_main(options | {"max_length": max_length, "eval_strategy": "steps", "eval_steps": 2})
    counted = [(entry["cut"], entry["left_out"]) for entry in log_history(tmp_path) if "loss" in entry]
    assert len(counted) == 2 and all((cut > 0, left_out > 0) == (fits, not fits) for cut, left_out in counted)


def test_what_cannot_be_trained_on_is_one_sentence(trained, data_folder, tmp_path):
    options = base_options(data_folder, tmp_path / "out") | {"model": tmp_path, "max_steps": 1}
    words = [str(word) for name in options for word in (f"--{name}", options[name])]
    run = forks.run("train.py", *words)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"train.py: {tmp_path / 'config.json'} cannot be read")


def test_tensorboard_shows_every_figure_of_the_log(data_folder, trained, tmp_path):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 4, "report_to": "tensorboard"}
    run_main(options | {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2})
    (events,) = tmp_path.glob("runs/*/events.*")
    shown = EventAccumulator(str(events)).Reload()
    found = {(tag, event.step): event.value for tag in shown.Tags()["scalars"] for event in shown.Scalars(tag)}
    expected = {}
    for entry in log_history(tmp_path):
        step = entry.pop("step")
        for name, value in entry.items():
            tag = name.replace("eval_", "eval/", 1) if name.startswith("eval_") else f"train/{name}"
            expected[tag, step] = value
    assert found == pytest.approx(expected, rel=1e-5)
    assert {"train/mask_bce_loss", "eval/strict_macro_giou"} <= {tag for tag, _ in found}


def test_few_checkpoints_are_kept_and_the_best_one_is_the_result(trained):
    scores = {
        entry["step"]: entry["eval_strict_macro_giou"] for entry in log_history(trained) if EVALUATED[0] in entry
    }
    assert len(set(scores.values())) > 1
    best = trained / f"checkpoint-{max(scores, key=scores.get)}"
    kept = sorted(trained.glob("checkpoint-*"))
    assert best in kept and len(kept) == 2
    result, weights = (load_file(folder / "model.safetensors") for folder in (trained, best))
    assert result.keys() == weights.keys()
    assert all(torch.equal(result[name], weights[name]) for name in result)


def test_the_output_folder_loads_with_the_auto_classes(trained):
    processor = AutoProcessor.from_pretrained(trained, trust_remote_code=True)
    model = AutoModel.from_pretrained(trained, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules")
    outputs = model.segment_spans(**batch_of([record(0, 2)], processor))
    answer = processor.post_process_segmentation(outputs)[0]
    assert answer.text == "I can see a wheel, a left wing."
    assert [(span.text, span.mask.shape) for span in answer.spans] == [("wheel", (40, 70)), ("left wing", (40, 70))]
    assert (trained / "recipe.yaml").read_text() in ModelCard.load(trained / "README.md").text


def test_a_push_to_the_hub_is_the_output_folder_with_its_card(data_folder, trained, tmp_path, monkeypatch):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 1, "save_steps": 1}
    options |= {"lora_r": 2, "hub_strategy": "end"}
    with HubStub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it keeps its endpoint
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        run_main(options | {"push_to_hub": True, "hub_model_id": "user/plum", "hub_token": "any"})
        pushed = hub.files("model", "user/plum")
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} <= pushed.keys()
    assert pushed["README.md"] == (tmp_path / "README.md").read_bytes()
    assert b"any" not in pushed["recipe.yaml"] and not [name for name in pushed if "adapter" in name]


# ------------------------------------------------------------------------------------------------ bad input


def test_an_empty_split_and_a_split_of_other_records_are_errors_before_any_training(trained, data_folder, tmp_path):
    options = base_options(data_folder, tmp_path / "out") | {"model": trained}
    with pytest.raises(ValueError, match=r"validation\[:0\]"):
        run_main(options | {"eval_split": "validation[:0]", "eval_strategy": "epoch"})
    Dataset.from_dict({"id": ["a"], "question": ["b"]}).to_parquet(tmp_path / "questions" / "train.parquet")
    with pytest.raises(ValueError, match=r"has no columns \['image', 'masks', 'messages'\]"):
        run_main(options | {"dataset": tmp_path / "questions"})
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contains a 'llama' model, expected 'plum'"):
        load_checkpoint(tmp_path)


def test_a_processor_with_another_image_token_than_its_model_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    processor = PlumProcessor.from_pretrained(trained)
    processor.image_token = "</s>"
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has id 2, the model expects 3; save the processor that"):
        load_checkpoint(tmp_path / "model")
