"""
The Trainer on tiny models: the same gradients however a batch is cut up, figures during training, Muon.

`run_in_two_processes` makes the runs of two processes, with the environment that `torchrun` gives them.
"""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from torch.testing import assert_close
from transformers import TrainerCallback

from plum_partonomy.masks import DataError
from plum_partonomy.training.examples import Collator, ConversationDataset, stream_examples
from plum_partonomy.training.mixture import mix
from plum_partonomy.training.model import freeze
from plum_partonomy.training.options import PlumTrainingArguments
from plum_partonomy.training.trainer import MuonWithAdamW, PlumTrainer
from tests import forks
from tests.runs import CLOSE, EVALUATED, batch_of, losses_by_step, make_records, record, uneven_records
from tests.tiny import tiny_model, tiny_processor

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
    args = PlumTrainingArguments(str(output_dir), **{**settings, **options})
    changes = {"jitter": 0.2, "max_spans": 2, "teacher_forcing_probability": 0.5} if augmented else {}
    changes["prompt_probability"] = 0.7
    dataset = ConversationDataset(uneven_records(), seed=3, **changes)
    recorder, model = GradientRecorder(), tiny_model(correction_window=1.5 if augmented else None)
    # At its small initial weights the feedback would have gradients that vanish in rounding.
    for parameter in model.mask_feedback.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    trainer = PlumTrainer(
        model=model,
        args=args,
        train_dataset=streamed_mixture(**changes) if streamed else dataset,
        eval_dataset=ConversationDataset(make_records([record(number, number % 4) for number in range(30, 37)])),
        data_collator=Collator(tiny_processor(), order_free_targets=augmented),
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


@pytest.fixture(scope="session")
def whole_batches(tmp_path_factory) -> dict:
    """One process that sees each batch at once."""
    return run_trainer(tmp_path_factory.mktemp("whole"))


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


RUN_IN_TWO_PROCESSES = """
import sys
from pathlib import Path
from tests.training.test_trainer import run_in_two_processes
run_in_two_processes(Path(sys.argv[1]))
"""


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> dict:
    """The runs of `run_in_two_processes`, by name."""
    folder = tmp_path_factory.mktemp("two_processes")
    forks.run_distributed("-c", RUN_IN_TWO_PROCESSES, folder)
    return torch.load(folder / "runs.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------ parts of a batch


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


@pytest.mark.slow
def test_compiled_layers_give_the_gradients_weights_and_losses_of_the_model_as_it_is(
    whole_batches, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # the options set it for the rest of the process
    torch._dynamo.reset()
    compiled = run_trainer(tmp_path, torch_compile_backend="aot_eager")
    assert_same_run(compiled, whole_batches)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_records(tmp_path):
    trainer = make_trainer(tmp_path, [record(number, 1) for number in range(3)], per_device_train_batch_size=3)
    torch.nn.init.constant_(trainer.model.span_projector[0].bias, float("nan"))
    with pytest.raises(DataError, match=r"loss of step 1 is nan .*mask_bce nan.* on the records record-\d, rec"):
        trainer.train()


def test_batches_without_masks_change_nothing_where_only_the_mask_branch_is_trained(tmp_path):
    options = {"per_device_train_batch_size": 1, "max_steps": 3, "save_strategy": "no", "weight_decay": 0.0}
    trainer = make_trainer(tmp_path, [record(number, 0) for number in range(3)], **options)
    freeze(trainer.model, ["vlm", "span_tagger", "sam.vision_encoder", "sam.shared_image_embedding"])
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 1.5}, "optimizer adamw_torch.* cannot be made: Invalid beta parameter at index 0: 1.5."),
        ({"muon_learning_rate": 0.1, "adam_beta1": 1.5}, "cannot be made: Invalid beta parameter at index 0: 1.5."),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type=warmup_stable_decay .*num_decay_steps"),
        ({"lr_scheduler_kwargs": {"rate": 1}}, "lr_scheduler_type=linear .*kwargs={'rate': 1}: .*argument 'rate'"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last leaves no batch of an epoch"),
    ],
    ids=str,
)
def test_options_that_no_training_can_use_are_one_sentence(tmp_path, options, message):
    trainer = make_trainer(tmp_path, [record(0, 1)], max_steps=1, **options)
    with pytest.raises(DataError, match=message):
        trainer.train()


def test_a_model_without_weights_to_train_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, [record(0, 1)])
    with pytest.raises(DataError, match="frozen_modules freezes all weights"):
        PlumTrainer(trainer.model.requires_grad_(False), trainer.args, data_collator=trainer.data_collator)


# ------------------------------------------------------------------------------------------------ evaluation


def make_trainer(output_dir, rows, **options) -> PlumTrainer:
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, **options}
    model = tiny_model()
    # Tags that differ from token to token without any training.
    torch.nn.init.normal_(model.span_tagger.classifier[-1].weight, std=1.0)
    return PlumTrainer(
        model=model,
        args=PlumTrainingArguments(str(output_dir), **options),
        train_dataset=ConversationDataset(make_records(rows)),
        eval_dataset=ConversationDataset(make_records(rows)),
        data_collator=Collator(tiny_processor()),
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
                [outputs.pred_masks[i][None, None]], [target.shape], batch["reshaped_input_sizes"]
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


def test_every_record_has_counts_also_one_that_max_length_leaves_out(tmp_path):
    long, short = record(0, 1), record(1, 2)
    long["messages"][0]["content"] = "What? " * 200
    trainer = make_trainer(tmp_path, [long, short])
    collator = Collator(
        tiny_processor(), max_length=trainer.data_collator([trainer.eval_dataset[1]])["labels"].shape[1]
    )
    for order in ([0, 1], [1, 0]):
        batch = collator([trainer.eval_dataset[i] for i in order])
        assert batch["record_counts"] == {"cut": 0, "left_out": 1}
        _, counts, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
        assert counts[:, 1].tolist() == [2 * i for i in order]


# ------------------------------------------------------------------------------------------------ optimizer


def muon_with_adamw(model) -> MuonWithAdamW:
    return MuonWithAdamW(model, 0.02, 0.001, 0.05, (0.9, 0.98))


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


def test_muon_with_adamw_takes_the_numbers_of_the_options(tmp_path):
    numbers = {"learning_rate": 0.1, "weight_decay": 0.2, "adam_beta1": 0.5, "adam_epsilon": 0.3}
    adamw, _, muon = (
        make_trainer(tmp_path, [record(0, 1)], muon_learning_rate=0.4, **numbers).create_optimizer().param_groups
    )
    assert (adamw["lr"], adamw["weight_decay"], adamw["betas"], adamw["eps"]) == (0.1, 0.2, (0.5, 0.999), 0.3)
    assert (muon["lr"], muon["weight_decay"]) == (0.4, 0.2)


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
