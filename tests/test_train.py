"""
Training of tiny models: the same gradients however a batch is cut up, the same weights after a resume, the outputs.

Run as a script by `torchrun` (see `two_processes`) the module makes the runs of two processes.
"""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, LlamaConfig, TrainerCallback

import plumkit.trainer
import train
from modeling_plum import PlumForConditionalGeneration
from partkit.masks import DataError, encode
from partkit.schema import GROUNDED_CONVERSATION_FEATURES
from plumkit.checkpoint import load_checkpoint
from plumkit.data import stream_examples
from plumkit.mixture import mix
from processing_plum import PlumProcessor
from tests.tiny import CORPUS, random_image, random_mask, tiny_config, tiny_model, tiny_processor
from tests.tiny_backbones import idefics3, tiny_sam

ROOT = Path(__file__).parents[1]
# Sums of the same numbers in another order.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
PARTS = ("wheel", "left wing", "tail")
EVALUATED = tuple(
    f"eval_{name}" for name in ("strict_macro_giou", "strict_micro_giou", "span_f1", "language_modeling_loss")
)


# ------------------------------------------------------------------------------------------------ data


def record(number: int, spans: int, has_image: bool = True) -> dict:
    """A grounded conversation with as many tagged parts as asked for, the third of them in a turn of its own."""
    height, width = 40 + number % 3 * 10, 70 - number % 2 * 10
    answer = ", ".join(f"a <p>{part}</p>" for part in PARTS[: min(spans, 2)])
    messages = [
        {"role": "user", "content": "Which parts can you see?" if number % 2 else "What is there?"},
        {"role": "assistant", "content": f"I can see {answer}." if spans else "It is red."},
        {"role": "user", "content": "And what else?"},
        {"role": "assistant", "content": "It has a <p>tail</p>."},
    ]
    return {
        "id": f"record-{number}",
        "image": random_image(height, width, seed=number) if has_image else None,
        "image_id": str(number),
        "image_label": "bird",
        "messages": messages if spans == 3 else messages[:2],
        "masks": [
            {"label": part, "rle": encode(random_mask(height, width, seed=10 * number + i))}
            for i, part in enumerate(PARTS[:spans])
        ],
        "source": "random",
        "licence": "CC0-1.0",
    }


def make_records(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=GROUNDED_CONVERSATION_FEATURES)


def uneven_records() -> Dataset:
    """
    Three batches of four; of each, two processes get two rows, here in brackets by their numbers of spans: [3 1][2 0],
    [1 2][no image], [none][1 3].
    """
    spans = [3, 1, 2, 0, 1, 2, 0, 0, 0, 0, 1, 3]
    return make_records([record(number, count, number not in (6, 7)) for number, count in enumerate(spans)])


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [record(number, number % 4, number % 8 != 0) for number in range(24)]
    make_records(rows).to_parquet(folder / "train.parquet")
    make_records([record(number, number % 4) for number in range(30, 37)]).to_parquet(folder / "validation.parquet")
    return folder


# ------------------------------------------------------------------------------------------------ runs


class GradientRecorder(TrainerCallback):
    """Copies the gradients of every step before the optimizer uses them."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def run_trainer(
    output_dir, resume: str | None = None, augmented: bool = False, streamed: bool = False, **options
) -> dict:
    """
    Trains the tiny model for three steps in order, or six shuffled and augmented ones, or those of a streamed mixture;
    what came of it.
    """
    settings = {
        "optim": "sgd",
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 2 if augmented else 1,
        "train_sampling_strategy": "random" if augmented else "sequential",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = train.PlumTrainingArguments(str(output_dir), **{**settings, **options})
    changes = {"jitter": 0.2, "max_spans": 2} if augmented else {}
    dataset = train.ConversationDataset(uneven_records(), seed=3, **changes)
    recorder, model = GradientRecorder(), tiny_model()
    # At its small initial weights the feedback would have gradients that vanish in rounding.
    for parameter in model.mask_feedback.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    trainer = train.PlumTrainer(
        model=model,
        args=args,
        train_dataset=streamed_mixture(**changes) if streamed else dataset,
        eval_dataset=train.ConversationDataset(make_records([record(number, number % 4) for number in range(30, 37)])),
        data_collator=train.Collator(tiny_processor()),
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=resume)
    return {
        "processes": trainer.accelerator.num_processes,
        "gradients": recorder.gradients,
        "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "losses": losses_by_step(trainer.state.log_history),
        "metrics": trainer.evaluate(),
    }


def streamed_mixture(**changes) -> IterableDataset:
    """The uneven records and others, three to one, in two shards each."""
    parts = [uneven_records(), make_records([record(number, 2) for number in range(40, 46)])]
    stream = mix([part.to_iterable_dataset(num_shards=2) for part in parts], [3, 1], seed=3)
    return stream_examples(stream, seed=3, **changes)


def losses_by_step(log_history: list[dict]) -> list[dict]:
    """The log without what depends on the clock."""
    ignored = ("runtime", "per_second", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not any(word in k for word in ignored)} for entry in log_history]


def run_in_two_processes(folder: Path):
    runs = {
        "plain": run_trainer(folder / "plain", per_device_train_batch_size=2),
        "checkpointing": run_trainer(
            folder / "checkpointing", per_device_train_batch_size=2, gradient_checkpointing=True
        ),
        "augmented": run_trainer(
            folder / "augmented", per_device_train_batch_size=2, augmented=True, save_strategy="steps", save_steps=4
        ),
        "resumed": run_trainer(
            folder / "resumed",
            per_device_train_batch_size=2,
            augmented=True,
            resume=str(folder / "augmented" / "checkpoint-4"),
        ),
    }
    streamed = {"per_device_train_batch_size": 2, "augmented": True, "streamed": True, "max_steps": 5}
    runs["streamed"] = run_trainer(folder / "streamed", save_strategy="steps", save_steps=3, **streamed)
    checkpoint = str(folder / "streamed" / "checkpoint-3")
    runs["streamed_resumed"] = run_trainer(folder / "streamed_resumed", resume=checkpoint, **streamed)
    if int(os.environ["RANK"]) == 0:
        torch.save(runs, folder / "runs.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> dict:
    """The runs of `run_in_two_processes`, by name."""
    folder = tmp_path_factory.mktemp("two_processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*launcher, "-m", "tests.test_train", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "runs.pt", weights_only=True)


def base_options(data_folder: Path, output_dir: Path) -> dict:
    return {
        "dataset": str(data_folder),
        "name": "default",
        "output_dir": str(output_dir),
        "use_cpu": True,
        "color_jitter": 0.2,
        "max_spans": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.003,
        "max_steps": 10,
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_main(options: dict):
    train.main([word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.fixture(scope="session")
def trained(data_folder, tmp_path_factory) -> Path:
    """The output folder of a model trained from scratch by a recipe."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config().to_dict()
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "strict_macro_giou"}
    recipe = base_options(data_folder, folder / "out") | {"model_config": config, "tokenizer_vocab_size": 300}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps({**recipe, **evaluated, **best}))))
    train.main([str(folder / "recipe.yaml"), "--max_steps", "8"])
    return folder / "out"


# ------------------------------------------------------------------------------------------------ options


def parse(tmp_path, content, *words):
    (tmp_path / "recipe.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return train.parse_arguments([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), *words])


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


@pytest.mark.parametrize(
    "content, words, message",
    [
        ({"model": "m", "learning_rat": 1}, [], "unknown options ['learning_rat']"),
        ({"model": "m"}, ["--learning_rat", "1"], "--learning_rat"),
        ({"model": "m", "learning_rate": "fast"}, [], "learning-rate: invalid float value: 'fast'"),
        ({"model": "m", "max_steps": 1.5}, [], "max-steps: invalid int value: '1.5'"),
        ({"model": "m", "bf16": "perhaps"}, [], "bf16"),
        ({"model": "m", "max_spans": None}, [], "'max_spans' no value"),
        ("- model\n- learning_rate", [], "must be a yaml mapping of options, found list"),
        ("model: [", [], "recipe.yaml is not valid yaml"),
        ({"learning_rate": 1.0}, [], "Give model (a checkpoint), vlm and sam (backbones) or model_config"),
        ({"model_config": 5}, [], "model_config must be a mapping, found 5"),
        ({"model_config": "tiny"}, [], "model_config must be a mapping"),
        ({"model": "m", "random_crop": 1}, [], "random_crop must be at least 0 and below 1, found 1"),
    ],
    ids=str,
)
def test_a_wrong_recipe_or_option_ends_with_one_error_that_names_it(tmp_path, capsys, content, words, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, content, *words)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_named(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["recipes/none.yaml"])
    assert "recipes/none.yaml does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_understood(recipe, tmp_path):
    words = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    model, _, training = train.parse_arguments([str(recipe), *words])
    assert training.output_dir == str(tmp_path)
    if model.model is None:
        config = train.PlumConfig(**copy.deepcopy(model.model_config))
        train.check_config_fields(model.model_config, config)


def test_a_field_that_no_config_knows_is_refused_wherever_it_stands():
    with pytest.raises(
        ValueError, match=r"model_config has fields \['span_tagger_layers'\], which PlumConfig does not"
    ):
        train.build_from_scratch({"span_tagger_layers": 2}, 300, CORPUS)
    wrong = tiny_config().to_dict()
    wrong["vlm_config"]["text_config"]["hiden_size"] = 32
    with pytest.raises(ValueError, match=r"model_config.vlm_config.text_config has fields \['hiden_size'\].*LlamaC"):
        train.build_from_scratch(wrong, 300, CORPUS)


def test_frozen_modules_keep_their_weights_and_the_others_learn(trained, data_folder, tmp_path):
    run_main(base_options(data_folder, tmp_path) | {"model": trained, "frozen_modules": "sam.vision_encoder"})
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (trained, tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("sam.vision_encoder.") for name in changed)
    assert any(name.startswith("sam.mask_decoder.") for name in changed)


def test_a_frozen_module_that_the_model_does_not_have_is_named():
    with pytest.raises(ValueError, match="frozen_modules has 'sam.encoder', which is no module of the model"):
        train.freeze(tiny_model(shared_vision=True), ["sam.encoder"])


# ------------------------------------------------------------------------------------------------ parts of a batch


@pytest.fixture(scope="session")
def whole_batches(tmp_path_factory) -> dict:
    """One process that sees each batch at once."""
    return run_trainer(tmp_path_factory.mktemp("whole"))


def assert_same_run(found: dict, expected: dict, tolerance: float = 1e-3):
    """Gradients of every step equal up to a fraction of the largest, weights and losses closely."""
    assert len(found["gradients"]) == len(expected["gradients"])
    for step, (gradients, wanted) in enumerate(zip(found["gradients"], expected["gradients"], strict=True)):
        for name in wanted:
            scale = max(float(wanted[name].abs().max()), 1e-3)
            difference = float((gradients[name] - wanted[name]).abs().max())
            where = f"step {step}, {name}"
            assert difference < tolerance * scale, f"{where}: gradients up to {scale} differ by {difference}"
        assert all(not gradients[name].any() for name in gradients.keys() - wanted.keys())
    assert_close(found["weights"], expected["weights"], **CLOSE)
    assert_close(found["losses"], expected["losses"], **CLOSE)


def test_gradients_of_whole_batches_differ_from_step_to_step_and_reach_every_module(whole_batches):
    first, _, last = whole_batches["gradients"]
    assert whole_batches["processes"] == 1 and whole_batches["losses"][0]["mask_bce_loss"] > 0
    for name in ("vlm.lm_head.weight", "span_tagger.classifier.0.weight", "mask_feedback.queries"):
        assert first[name].abs().max() > 1e-6
        assert not torch.allclose(first[name], last[name], rtol=0.01, atol=1e-6)


def test_accumulated_half_batches_give_the_gradients_weights_and_losses_of_whole_batches(whole_batches, tmp_path):
    halves = run_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert_same_run(halves, whole_batches)


@pytest.mark.parametrize("name", ["plain", "checkpointing"])
def test_two_processes_give_the_gradients_weights_and_losses_of_one(whole_batches, two_processes, name):
    assert two_processes[name]["processes"] == 2
    assert_same_run(two_processes[name], whole_batches)


def test_two_processes_shuffle_and_augment_as_one_in_every_epoch(two_processes, tmp_path):
    one = run_trainer(tmp_path, augmented=True)
    assert len(one["losses"]) == 7 and one["losses"][0]["loss"] != one["losses"][3]["loss"]
    # Sums over other parts of a batch round differently, which six steps of training amplify.
    assert_same_run(two_processes["augmented"], one, tolerance=1e-2)


@pytest.mark.parametrize("names", [("augmented", "resumed"), ("streamed", "streamed_resumed")], ids=lambda n: n[0])
def test_two_processes_that_resume_within_an_epoch_or_stream_end_with_equal_weights(two_processes, names):
    whole, resumed = (two_processes[name] for name in names)
    assert whole["losses"] == resumed["losses"]
    assert all(torch.equal(resumed["weights"][name], whole["weights"][name]) for name in whole["weights"])


def test_two_processes_measure_what_one_measures_on_a_split_they_cannot_share_evenly(whole_batches, two_processes):
    for name in EVALUATED:
        assert two_processes["plain"]["metrics"][name] == pytest.approx(whole_batches["metrics"][name], abs=1e-4)
    assert whole_batches["metrics"]["eval_strict_macro_giou"] > 0


def test_gradients_are_clipped_to_the_largest_norm_and_their_own_is_logged(whole_batches, tmp_path):
    clipped = run_trainer(tmp_path, max_grad_norm=0.01)
    for step, (small, whole) in enumerate(zip(clipped["gradients"], whole_batches["gradients"], strict=True)):
        norm = torch.stack([gradient.norm() for gradient in small.values()]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)
        if not step:
            own = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
            assert clipped["losses"][0]["grad_norm"] == pytest.approx(float(own), rel=1e-3)
            assert_close(small, {name: gradient * 0.01 / own for name, gradient in whole.items()}, **CLOSE)


def test_bfloat16_computes_nearly_the_same_losses_and_keeps_the_weights_in_float32(whole_batches, tmp_path):
    run = run_trainer(tmp_path, bf16=True)
    assert all(weight.dtype == torch.float32 for weight in run["weights"].values() if weight.is_floating_point())
    for found, expected in zip(run["losses"][:3], whole_batches["losses"][:3], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.03) and found["loss"] != expected["loss"]


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    model, _ = train.load_model(train.ModelArguments(model=str(tmp_path)), make_records([record(0, 1)]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_records(tmp_path):
    trainer = make_trainer(tmp_path, [record(number, 1) for number in range(3)], per_device_train_batch_size=3)
    torch.nn.init.constant_(trainer.model.span_projector[0].bias, float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"loss of step 1 is nan .*mask_bce nan.* on the records record-\d, rec"
    ):
        trainer.train()


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"muon_learning_rate": 0.01, "turns_per_record": 2},
        {"lora_r": 2, "lora_dropout": 0.2},
        {"streaming": True, "dataloader_num_workers": 1},
    ],
    ids=["adamw", "muon_turns", "lora", "streaming"],
)
def test_a_run_that_goes_on_from_the_middle_of_an_epoch_ends_bit_for_bit_as_if_never_stopped(
    trained, data_folder, tmp_path, options
):
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
import torch, train

save, step = torch.save, sys.argv[1]

def save_half(content, path, **options):
    save(content, path, **options)
    if f"checkpoint-{step}" in str(path) and str(path).endswith("optimizer.pt"):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
train.main(sys.argv[2:])
"""


def test_a_run_killed_while_it_saves_goes_on_from_the_last_whole_checkpoint(data_folder, trained, tmp_path):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 2, "save_steps": 1, "seed": 3}
    words = [str(word) for name in options for word in (f"--{name}", options[name])]
    run = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, "2", *words], cwd=ROOT, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists() and not (tmp_path / "model.safetensors").exists()
    arguments = train.PlumTrainingArguments(str(tmp_path), resume_from_checkpoint="true", use_cpu=True)
    assert train.find_checkpoint(arguments) == str(tmp_path / "checkpoint-1")
    run_main(options | {"resume_from_checkpoint": True})
    assert train.find_checkpoint(arguments) == str(tmp_path / "checkpoint-2")
    run_main(options | {"output_dir": tmp_path / "unbroken"})
    resumed, unbroken = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "unbroken"))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_resuming_without_a_checkpoint_is_an_error(trained, data_folder, tmp_path):
    options = base_options(data_folder, tmp_path / "out") | {"model": trained, "resume_from_checkpoint": True}
    with pytest.raises(ValueError, match="out holds no checkpoint"):
        run_main(options)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ LoRA


def batch_of(rows: list[dict], processor) -> dict:
    examples = train.ConversationDataset(make_records(rows))
    return train.Collator(processor)([examples[i] for i in range(len(rows))])


def lora_arguments(**changes) -> train.ModelArguments:
    return train.ModelArguments(model="unused", lora_r=2, **changes)


def test_with_lora_only_its_matrices_and_the_modules_trained_whole_have_gradients():
    model = train.add_lora(tiny_model(), lora_arguments())
    model(**batch_of([record(0, 3), record(1, 2)], tiny_processor())).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in with_gradient:
        attention = ".language_model.layers." in name and name.split(".")[-4] in ("q_proj", "v_proj")
        assert attention or any(f"{whole}.modules_to_save" in name for whole in train.LORA_TRAINED_WHOLE), name
    for whole in train.LORA_TRAINED_WHOLE:
        assert any(f"{whole}.modules_to_save" in name for name in with_gradient), whole
    assert any("lora_A" in name for name in with_gradient) and any("lora_B" in name for name in with_gradient)


def test_the_teacher_under_lora_gives_the_loss_and_gradients_of_an_explicit_frozen_copy():
    plain = tiny_model(teacher_kl_loss_weight=1.0)
    copied_teacher = plumkit.trainer.build_teacher(plain)
    batch = batch_of([record(0, 3), record(1, 2)], tiny_processor())
    wrapped = train.add_lora(copy.deepcopy(plain), lora_arguments(lora_dropout=0.0))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or name.endswith("embed_tokens.modules_to_save.default.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    found = {}
    for name, teacher in (("adapter off", plumkit.trainer.build_teacher(wrapped)), ("copy", copied_teacher)):
        wrapped.zero_grad()
        outputs = wrapped(**batch, teacher=teacher)
        outputs.loss.backward()
        found[name] = {key: p.grad.clone() for key, p in wrapped.named_parameters() if p.grad is not None}
        found[name]["teacher_kl"] = outputs.losses["teacher_kl"].detach()
    assert float(found["copy"]["teacher_kl"]) > 0.01
    assert found["adapter off"].keys() == found["copy"].keys()
    assert_close(found["adapter off"], found["copy"])


def test_without_its_loss_there_is_no_teacher():
    assert plumkit.trainer.build_teacher(tiny_model(teacher_kl_loss_weight=0.0)) is None


def test_a_model_wrapped_for_lora_computes_and_segments_as_the_model_itself():
    plain, wrapped = tiny_model(), train.add_lora(tiny_model(), lora_arguments()).eval()
    batch = batch_of([record(0, 3), record(1, 2)], tiny_processor())
    with torch.no_grad():
        found, expected = wrapped(**batch), plain(**batch)
    assert_close(found.losses, expected.losses, rtol=0, atol=0)
    assert_close(wrapped.segment(**batch).pred_masks, plain.segment(**batch).pred_masks, rtol=0, atol=0)


def test_lora_finds_the_language_model_under_any_name_and_leaves_vision_towers_alone(tmp_path):
    backbones = {"vlm": idefics3(tmp_path / "vlm"), "sam": tiny_sam(tmp_path / "sam")}
    model = PlumForConditionalGeneration.from_backbones(**backbones, span_tagger_num_heads=4)
    names = {name for name, p in train.add_lora(model, lora_arguments()).named_parameters() if "lora_A" in name}
    assert len(names) == 2 * model.config.get_text_config().num_hidden_layers
    assert all(".text_model.layers." in name for name in names)


def test_frozen_encoders_leave_nothing_for_the_backward_pass_also_with_gradient_checkpointing():
    gradients = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = train.add_lora(tiny_model(shared_vision=False), lora_arguments(lora_dropout=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        plum, outputs = model.get_base_model(), {}
        for encoder in (plum.sam.vision_encoder, plum.vlm.model.vision_tower):
            encoder.register_forward_hook(lambda module, _, output, kept=outputs: kept.update({module: output}))
        batch = batch_of([record(0, 3), record(1, 2)], tiny_processor(shared_vision=False))
        model(**batch).loss.backward()
        assert [output.last_hidden_state.requires_grad for output in outputs.values()] == [False, False]
        gradients[checkpointing] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(gradients[True], gradients[False])


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_the_merged_model_is_the_adapted_one_and_the_frozen_weights_are_as_before(data_folder, tmp_path, tied):
    config = tiny_config()
    config.vlm_config.tie_word_embeddings = config.vlm_config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    PlumForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    options = base_options(data_folder, tmp_path / "out") | {"model": tmp_path / "base", "lora_r": 4, "max_steps": 4}
    run_main(options | {"learning_rate": 0.01})

    merged = PlumForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert not (merged.config.vlm_config.tie_word_embeddings or merged.config.get_text_config().tie_word_embeddings)
    base = PlumForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    before = copy.deepcopy(base.state_dict())
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4").eval()
    batch = batch_of([record(0, 3), record(1, 2)], tiny_processor())
    with torch.no_grad():
        found, expected = merged(**batch), adapted(**batch)
    assert_close(found.logits, expected.logits, **CLOSE)
    assert_close(found.span_logits, expected.span_logits, **CLOSE)
    assert_close(found.pred_masks, expected.pred_masks, **CLOSE)

    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    trained_whole = {name for name in before if any(f".{whole}." in f".{name}" for whole in train.LORA_TRAINED_WHOLE)}
    attention = {name for name in before if "language_model" in name and name.split(".")[-2] in ("q_proj", "v_proj")}
    assert changed <= trained_whole | attention
    assert attention <= changed
    for whole in train.LORA_TRAINED_WHOLE:
        assert any(f".{whole}." in f".{name}" for name in changed), whole


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
    outputs = model.segment(**batch_of([record(0, 2)], processor))
    answer = processor.post_process_segmentation(outputs)[0]
    assert answer.text == "I can see a wheel, a left wing."
    assert [(span.text, span.mask.shape) for span in answer.spans] == [("wheel", (40, 70)), ("left wing", (40, 70))]
    assert (trained / "recipe.yaml").read_text() in ModelCard.load(trained / "README.md").text


def test_training_says_nothing_but_its_figures(data_folder, trained, tmp_path):
    options = base_options(data_folder, tmp_path) | {"model": trained, "max_steps": 2, "save_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = subprocess.run(
        [sys.executable, "train.py", *(str(word) for name in options for word in (f"--{name}", options[name]))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    table = [line for line in lines if line.startswith("|")]
    assert lines[: len(table)] == table and len(table) == 3
    assert [line.startswith("{") for line in lines[len(table) :]] == [True, True, True, False]
    assert lines[-1] == f"The trained model, its processor and its curves are in {tmp_path}"
    for word in ("missing keys", "tokens that differ", "custom code", "Traceback"):
        assert word not in run.stderr


# ------------------------------------------------------------------------------------------------ evaluation


def make_trainer(output_dir, rows, **options) -> train.PlumTrainer:
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, **options}
    model = tiny_model()
    # Tags that differ from token to token without any training.
    torch.nn.init.normal_(model.span_tagger.classifier[-1].weight, std=1.0)
    return train.PlumTrainer(
        model=model,
        args=train.PlumTrainingArguments(str(output_dir), **options),
        train_dataset=train.ConversationDataset(make_records(rows)),
        eval_dataset=train.ConversationDataset(make_records(rows)),
        data_collator=train.Collator(tiny_processor()),
    )


def naive_metrics(model, rows) -> dict:
    """The metrics from one record at a time, masks and spans compared in plain loops."""
    processor, ious, right, predicted_count, true_count = tiny_processor(), [], 0, 0, 0
    likelihoods = []
    for row in rows:
        batch = batch_of([row], processor)
        with torch.no_grad():
            outputs = model(**batch)
        row_ious = []
        for i, target in enumerate(batch["mask_labels"]):
            mask = processor.sam_image_processor.post_process_masks(
                [outputs.pred_masks[i][None, None]], batch["original_sizes"], batch["reshaped_input_sizes"]
            )[0][0, 0]
            row_ious.append(float((mask & target).sum() / (mask | target).sum()))
        ious.append(row_ious)
        for position, label in enumerate(batch["labels"][0].tolist()):
            if label >= 0:
                likelihoods.append(-float(outputs.logits[0, position - 1].log_softmax(-1)[label]))
        supervised = [i for i, label in enumerate(batch["span_labels"][0].tolist()) if label >= 0]
        predicted = naive_spans(outputs.span_logits[0].argmax(-1).tolist(), supervised)
        true = naive_spans(batch["span_labels"][0].tolist(), supervised)
        right += len(predicted & true)
        predicted_count, true_count = predicted_count + len(predicted), true_count + len(true)
    precision, recall = right / predicted_count, right / true_count
    return {
        "eval_strict_macro_giou": np.mean([np.mean(row_ious) for row_ious in ious if row_ious]),
        "eval_strict_micro_giou": np.mean(sum(ious, [])),
        "eval_span_f1": 2 * precision * recall / (precision + recall),
        "eval_language_modeling_loss": np.mean(likelihoods),
    }


def naive_spans(tags: list[int], supervised: list[int]) -> set[tuple[int, int]]:
    spans = set()
    for start in supervised:
        if tags[start] == 1:
            end = start + 1
            while end in supervised and tags[end] == 2:
                end += 1
            spans.add((start, end))
    return spans


def test_metrics_during_training_equal_naive_ones_whatever_the_batch_size(tmp_path):
    rows = [record(number, number % 4, number != 4) for number in range(12)]
    expected = None
    for size in (1, 5, 12):
        trainer = make_trainer(tmp_path, rows, per_device_eval_batch_size=size)
        expected = expected or naive_metrics(trainer.model, rows)
        assert 0 < expected["eval_span_f1"] < 1 and 0 < expected["eval_strict_macro_giou"] < 1
        found = trainer.evaluate()
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_a_split_without_masks_has_no_macro_giou(tmp_path):
    metrics = make_trainer(tmp_path, [record(0, 0), record(1, 0, has_image=False)]).evaluate()
    assert np.isnan(metrics["eval_strict_macro_giou"]) and np.isfinite(metrics["eval_language_modeling_loss"])


# ------------------------------------------------------------------------------------------------ optimizer


def muon_with_adamw(model) -> plumkit.trainer.MuonWithAdamW:
    return plumkit.trainer.MuonWithAdamW(model, 0.02, 0.001, 0.05, (0.9, 0.98))


def test_muon_gets_the_matrices_of_layers_and_adamw_embeddings_head_and_the_rest():
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed, muon = (
        {names[id(parameter)] for parameter in group["params"]} for group in muon_with_adamw(model).param_groups
    )
    assert decayed | undecayed | muon == set(names.values())
    assert len(decayed) + len(undecayed) + len(muon) == len(names)
    assert {"vlm.lm_head.weight", "vlm.model.language_model.embed_tokens.weight", "mask_feedback.queries"} <= decayed
    assert "sam.vision_encoder.patch_embed.projection.weight" in decayed
    assert all(model.get_parameter(name).ndim == 1 for name in undecayed)
    assert all(model.get_parameter(name).ndim == 2 and name.endswith("weight") for name in muon)
    assert {"span_projector.0.weight", "span_tagger.layers.0.self_attn.in_proj_weight"} <= muon


def optimise(model, optimizer, scheduler, steps: range):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def test_one_scheduler_moves_both_rates_and_a_restored_state_goes_on_identically():
    model = tiny_model()
    optimizer = muon_with_adamw(model)
    scheduler = halving(optimizer)
    optimise(model, optimizer, scheduler, range(2))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.00025, 0.00025, 0.005])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0, 0.05]

    other = copy.deepcopy(model)
    restored = muon_with_adamw(other)
    restored_scheduler = halving(restored)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    restored_scheduler.load_state_dict(scheduler.state_dict())
    optimise(model, optimizer, scheduler, range(2, 5))
    before = copy.deepcopy(other.state_dict())
    optimise(other, restored, restored_scheduler, range(2, 5))
    assert [group["lr"] for group in restored.param_groups] == [group["lr"] for group in optimizer.param_groups]
    for name, tensor in model.named_parameters():
        assert torch.equal(other.get_parameter(name), tensor) and not torch.equal(before[name], tensor), name


# ------------------------------------------------------------------------------------------------ examples


def chosen_masks(example: dict) -> list[list[int]]:
    return [conversation["chosen"].tolist() for conversation in example["conversations"]]


def test_an_example_depends_on_seed_epoch_and_index_alone():
    records = make_records([record(number, 3) for number in range(6)])

    def pixels(seed, epoch, indices=range(6)):
        examples = train.ConversationDataset(records, seed=seed, jitter=0.2, crop=0.2, max_spans=2)
        examples.set_epoch(epoch)
        return {i: (np.asarray(examples[i]["image"]).tobytes(), chosen_masks(examples[i])[0]) for i in indices}

    first = pixels(0, 0)
    assert first == pixels(0, 0, [5, 3, 1, 0, 2, 4])
    assert all(first[i] != pixels(0, 1)[i] and first[i] != pixels(1, 0)[i] for i in range(6))
    assert all(len(chosen) == 2 and chosen == sorted(chosen) for _, chosen in first.values())
    assert len({tuple(chosen) for _, chosen in first.values()}) > 1


def test_a_random_crop_cuts_image_and_masks_alike_and_keeps_half_of_each_mask():
    record_of_stripes = record(0, 2)
    stripes = [np.zeros((40, 70), dtype=bool) for _ in range(2)]
    stripes[0][:, :35], stripes[1][30:] = True, True
    record_of_stripes["image"] = Image.fromarray(np.stack([*stripes, stripes[0] | stripes[1]], 2) * np.uint8(255))
    record_of_stripes["masks"] = [{"label": "wheel", "rle": encode(stripe)} for stripe in stripes]
    examples = train.ConversationDataset(make_records([record_of_stripes]), crop=0.6)
    sizes = set()
    for epoch in range(30):
        examples.set_epoch(epoch)
        image, masks = examples[0]["image"], examples[0]["conversations"][0]["masks"]
        sizes.add(image.size)
        for channel, (mask, stripe) in enumerate(zip(masks, stripes, strict=True)):
            assert np.array_equal(np.asarray(image)[..., channel] > 0, mask)
            assert 2 * mask.sum() >= stripe.sum()
    assert len(sizes) > 10
    assert min(width for width, _ in sizes) >= 28 and min(height for _, height in sizes) >= 16


def test_masks_beyond_the_largest_number_are_left_out_of_the_batch_with_their_spans():
    rows, processor = [record(0, 3), record(1, 0), record(2, 3)], tiny_processor()
    everything = batch_of(rows, processor)
    examples = [train.ConversationDataset(make_records(rows), max_spans=2)[i] for i in range(3)]
    batch = train.Collator(processor)(examples)
    kept = [*chosen_masks(examples[0])[0], *(3 + i for i in chosen_masks(examples[2])[0])]
    assert torch.equal(batch["spans"], everything["spans"][kept]) and len(kept) == 4
    assert all(torch.equal(batch["mask_labels"][i], everything["mask_labels"][k]) for i, k in enumerate(kept))
    assert torch.equal(batch["span_labels"], everything["span_labels"])


def test_split_turns_are_rows_of_their_own_with_their_own_masks_and_the_image_they_share():
    rows, processor = [record(0, 3), record(1, 2)], tiny_processor()
    together = batch_of(rows, processor)
    examples = train.ConversationDataset(make_records(rows), turns_per_record=0)
    batch = train.Collator(processor)([examples[0], examples[1]])
    assert batch["record_index"].tolist() == [0, 0, 1] and together["record_index"].tolist() == [0, 1]
    assert batch["sam_image_index"].tolist() == [0, 0, 1] and len(batch["sam_pixel_values"]) == 2
    words = [processor.decode(batch["input_ids"][row, start:end]) for row, start, end in batch["spans"].tolist()]
    assert [word.strip() for word in words] == ["wheel", "left wing", "tail", "wheel", "left wing"]
    assert batch["spans"][:, 0].tolist() == [0, 0, 1, 2, 2]
    for found, expected in zip(batch["mask_labels"], together["mask_labels"], strict=True):
        assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------ bad input


def changed_record(**changes) -> dict:
    return {**record(7, 2), **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"masks": record(7, 3)["masks"]},
            "record record-7, field 'masks': 2 span tags, but 3 masks; give each tag one mask",
        ),
        ({"image": None}, "record record-7, field 'image': expected an image for 2 masks, found none"),
        (
            {"image": {"bytes": b"no image", "path": None}},
            "record record-7, field 'image': the image cannot be read",
        ),
        (
            {"masks": [{"label": "wheel", "rle": {"size": [50, 60], "counts": "0"}}] * 2},
            r"record record-7, field 'masks\[0\]': the counts decode to 0 pixels, but size \[50, 60\] has 3000",
        ),
        (
            {"masks": [{"label": "wheel", "rle": encode(random_mask(9, 9))}] * 2},
            r"record record-7, field 'masks\[0\]': the mask has size \[9, 9\], but its image .* \[50, 60\]",
        ),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A <p>wheel."}]},
            r"record record-7, field 'messages\[1\]': span tags <p> and </p> must alternate",
        ),
        ({"masks": record(7, 1)["masks"]}, "record record-7, field 'masks': 2 span tags, but 1 masks"),
        (
            {"messages": [*record(7, 2)["messages"], {"role": "user", "content": "And?"}]},
            r"record record-7, field 'messages\[2\]': the conversation ends with the user; add the answer",
        ),
    ],
    ids=[
        "mask_without_phrase",
        "no_image",
        "corrupt_image",
        "corrupt_rle",
        "mask_of_another_size",
        "open_tag",
        "phrase_without_mask",
        "ends_with_the_user",
    ],
)
def test_a_bad_record_is_named_with_its_field(changes, message):
    examples = train.ConversationDataset(make_records([record(0, 1), changed_record(**changes)]))
    assert examples[0]["id"] == "record-0"
    with pytest.raises(DataError, match=message):
        examples[1]
    if "image" not in changes:
        stream = stream_examples(make_records([changed_record(**changes)]).to_iterable_dataset())
        with pytest.raises(DataError, match=message):
            next(iter(stream))


def test_an_empty_split_and_a_split_of_other_records_are_errors_before_any_training(trained, data_folder, tmp_path):
    options = base_options(data_folder, tmp_path / "out") | {"model": trained}
    with pytest.raises(ValueError, match=r"validation\[:0\]"):
        run_main(options | {"eval_split": "validation[:0]"})
    Dataset.from_dict({"id": ["a"], "question": ["b"]}).to_parquet(tmp_path / "questions" / "train.parquet")
    with pytest.raises(ValueError, match=r"has no columns \['image', 'masks', 'messages'\]"):
        run_main(options | {"dataset": tmp_path / "questions"})
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'llama' model, expected 'plum'"):
        load_checkpoint(tmp_path)


def test_a_processor_with_another_image_token_than_its_model_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    processor = PlumProcessor.from_pretrained(trained)
    processor.image_token = "</s>"
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has id 2, the model expects 3; save the processor that"):
        load_checkpoint(tmp_path / "model")


if __name__ == "__main__":
    run_in_two_processes(Path(sys.argv[1]))
