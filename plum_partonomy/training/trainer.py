"""Train PLUM: a Trainer with losses normalised over the global batch, its optimizer and its curves."""

import copy
import csv
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import DynamoBackend
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from configuration_plum import PlumConfig
from modules_plum import IGNORE_INDEX, count_loss_items, decode_spans
from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.masks import DataError
from plum_partonomy.training.resume import seal
from segmenters_plum import upscale_masks


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (as in torch) for weight matrices and AdamW for the rest, as one optimizer."""

    def __init__(
        self, model: nn.Module, muon_learning_rate: float, learning_rate: float, weight_decay: float, betas, eps=1e-8
    ):
        matrices, others, undecayed = self._split(model)
        muon = torch.optim.Muon(
            matrices, lr=muon_learning_rate, weight_decay=weight_decay, ns_steps=4, adjust_lr_fn="match_rms_adamw"
        )
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        self.optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps), muon]
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self._share_groups()

    @staticmethod
    def _split(model: nn.Module) -> tuple[list, list, list]:
        head = model.get_output_embeddings()
        linear = (nn.Linear, nn.MultiheadAttention)
        modules = [module for module in model.modules() if isinstance(module, linear) and module is not head]
        matrices = {id(p): p for module in modules for p in module.parameters(recurse=False) if p.ndim == 2}
        matrices = {key: p for key, p in matrices.items() if p.requires_grad and p is not head.weight}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in matrices]
        return list(matrices.values()), [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]

    def _share_groups(self):
        """Share the group dictionaries, so that a scheduler sets the rates of both."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict):
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def build_teacher(model: nn.Module) -> Callable[..., ModelOutput] | None:
    """
    Return the frozen language model from before the training, or None if `teacher_kl_loss_weight` is 0. With LoRA it
    is the model's language model with its adapter disabled; without LoRA it is a copy on the device of its inputs,
    because nothing else moves it there when weights are sharded.
    """
    if not model.config.teacher_kl_loss_weight:
        return None
    if not isinstance(model, PeftModel):
        frozen = copy.deepcopy(model.get_decoder()).eval().requires_grad_(False)
        return lambda **inputs: frozen.to(inputs["inputs_embeds"].device)(**inputs)

    def without_adapter(**inputs) -> ModelOutput:
        with model.disable_adapter():
            return model.get_base_model().get_decoder()(**inputs)

    return without_adapter


def merge_lora(model: PeftModel) -> nn.Module:
    """Return the model with its adapter merged into its weights; tied embeddings and head are no longer tied."""
    model = model.merge_and_unload()
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.vlm_config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return model


def copy_model(model: nn.Module, new_weight: Callable[[str, torch.Tensor], torch.Tensor]) -> nn.Module:
    """Return a copy with the weights `new_weight(name, weight)`; weights shared within the model stay shared."""
    weights = {id(p): nn.Parameter(new_weight(name, p.data), p.requires_grad) for name, p in model.named_parameters()}
    return copy.deepcopy(model, weights)


class PlumTrainer(Trainer):
    """
    A Trainer with losses normalised by the counts of the global batch (over accumulation steps and processes) and
    logged by name, which also measures masks and tags during training.
    """

    def __init__(self, *args, embedding_cache: EmbeddingCache | None = None, run: dict | None = None, **kwargs):
        """`run` contains the settings that a resumed run must match (plum_partonomy/training/resume.py)."""
        try:
            super().__init__(*args, **kwargs, compute_metrics=_summarise_counts)
        except ValueError as error:  # options that exclude each other or need a launcher
            raise DataError(f"The training cannot start: {error}") from error
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise DataError("frozen_modules freezes all weights; leave one out.")
        self.embedding_cache, self.run = embedding_cache, run or {}
        self.teacher = build_teacher(self.model)
        self.add_callback(EpochSetter)
        if embedding_cache is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            embedding_cache.copy_sam()
        self._outline = None
        if self.is_fsdp_enabled:
            self._outline = self._prepare_for_fsdp()
        else:
            self.model.register_forward_hook(_use_a_parameter)
        if self.args.torch_compile:
            self._compile_layers()
        # The losses are already divided by the counts of the global batch; the Trainer must not divide them again.
        self.model_accepts_loss_kwargs = True
        self._named_losses, self._steps_summed = {}, 0
        self._rows = {"cut": 0, "left_out": 0}  # conversations beyond max_length since the last log

    def _prepare_for_fsdp(self) -> nn.Module | None:
        """Return the model without its weights if it has an adapter; sharded weights are merged into a new copy."""
        self.model.register_forward_hook(_use_every_parameter, with_kwargs=True)
        if len({weight.dtype for weight in self.model.parameters()}) > 1:
            raise DataError(
                "FSDP2 needs one precision for all weights, but frozen_dtype stores some in bfloat16; leave it out or "
                "train with recipes/accelerate/ddp.yaml."
            )
        if not isinstance(self.model, PeftModel):
            return None
        if self.model.config.get_text_config().tie_word_embeddings:
            raise DataError(
                "LoRA with FSDP2 needs separate input and output embeddings, but this language model ties them; train "
                "it with recipes/accelerate/ddp.yaml."
            )
        return copy_model(self.model, lambda _, weight: weight.to("meta"))

    def _compile_layers(self):
        """
        Apply `torch_compile` to the layers of SAM's encoder and of the language model. The Trainer would compile
        the whole model, which would recompile for each number of spans and image size.
        """
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        encoder = [m for m in self.model.sam.vision_encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in [*encoder, *self.model.get_decoder().layers]:
            layer.compile(backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            raise DataError(
                "dataloader_drop_last leaves no batch of an epoch: it has fewer records than one batch of all "
                "processes; lower per_device_train_batch_size."
            )
        self._steps_summed += 1
        for batch in batches:
            self._rows = {name: self._rows[name] + count for name, count in batch["record_counts"].items()}
        config = self.accelerator.unwrap_model(self.model).config
        names = ("labels", "span_labels", "spans", "mask_labels", "prompt_rounds")
        counts = [count_loss_items(config, **{name: batch[name] for name in names}) for batch in batches]
        total = {name: sum(count[name] for count in counts).to(device) for name in counts[0]}
        return batches, self.accelerator.reduce(total, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        record_ids = inputs["record_ids"]
        outputs = model(**self._model_inputs(inputs), loss_counts=num_items_in_batch, teacher=self.teacher)
        loss = outputs["loss"]
        if not loss.isfinite():
            values = ", ".join(f"{name} {value.item():.3g}" for name, value in outputs["losses"].items())
            raise DataError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()} ({values}) on the records "
                f"{', '.join(record_ids)}; look at these, or lower the learning rate."
            )
        if num_items_in_batch is not None:
            for name, value in outputs["losses"].items():
                self._named_losses[name] = self._named_losses.get(name, 0.0) + value.detach()
            # Gradients are averaged over the processes; the counts are already summed over all.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs and self._named_losses:
            totals = self.accelerator.reduce(self._named_losses, "sum")
            logs |= {f"{name}_loss": float(total) / self._steps_summed for name, total in totals.items()}
            self._named_losses, self._steps_summed = {}, 0
            if self.data_collator.max_length is not None:
                rows = {name: torch.tensor(count, device=self.args.device) for name, count in self._rows.items()}
                logs |= {name: int(total) for name, total in self.accelerator.reduce(rows, "sum").items()}
                self._rows = dict.fromkeys(rows, 0)
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        found = type(self.model)
        if self.args.should_save and isinstance(self.model, FSDPModule):
            # FSDP2 replaces the class of the model, whose code would be saved instead; and it gathers tied weights
            # under each of their names.
            self.model.__class__ = found.__bases__[1]
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: value for name, value in state_dict.items() if name not in tied}
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = found

    def create_model_card(self, *args, **kwargs):
        """Write nothing in a push to the Hub: run.py writes the card, which shows the recipe, after the training."""

    def _save_rng_state(self, output_dir):
        """Save the last file needed for a resume; the Trainer's state follows, and older checkpoints are deleted."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # all processes have written their files
        if self.args.should_save:
            seal(Path(output_dir), self.run)

    def merge_adapter(self):
        """
        Merge LoRA into the weights of the model after the training. Sharded weights are then complete on the
        process that saves them; the others have nothing to save.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self._outline is not None:
            weights = self.accelerator.get_state_dict(self.model)
            model = copy_model(self._outline, lambda name, _: weights[name]) if self.args.should_save else None
        # From here on complete weights are saved.
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        if model is not None:
            self.model = merge_lora(model)

    def _issue_warnings_after_load(self, load_result):
        # Tied weights are saved under one name; the other names are not missing.
        missing = [name for name in load_result.missing_keys if name not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_optimizer(self, model=None):
        args = self.args
        try:
            if args.muon_learning_rate is None:
                return super().create_optimizer(model)
            if self.optimizer is None:
                self.optimizer = MuonWithAdamW(
                    self.model,
                    args.muon_learning_rate,
                    args.learning_rate,
                    args.weight_decay,
                    (args.adam_beta1, args.adam_beta2),
                    args.adam_epsilon,
                )
        except (ImportError, ValueError) as error:  # a package or a number that the optimizer needs
            raise DataError(f"The optimizer {args.optim.value} cannot be made: {error}.") from error
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            kind, options = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs or {}
            raise DataError(
                f"lr_scheduler_type={kind.value} cannot be used with lr_scheduler_kwargs={options}: {error}."
            ) from error

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """
        Return no loss, whose mean over batches depends on the batch size, but the counts per record that
        [`_summarise_counts`] sums: counts are gathered, masks are not.
        """
        inputs = self._prepare_inputs(inputs)
        # True masks only determine the target of each span among equal words; all fed back masks are predicted.
        unsupervised = {**self._model_inputs(inputs), "labels": None, "span_labels": None}
        unsupervised["teacher_forced"] = None
        with self.compute_loss_context_manager():
            outputs = model(**unsupervised)
        counts = _count_record_results(inputs, outputs, self.accelerator.unwrap_model(self.model).config)
        return None, counts, counts[:, :1]

    def _model_inputs(self, batch: dict) -> dict:
        """Return a batch without the fields of the training code, and with the cached embeddings of its images."""
        inputs = {name: value for name, value in batch.items() if not name.startswith("record_")}
        if self.embedding_cache is not None and "sam_pixel_values" in inputs:
            with self.accelerator.autocast():
                inputs["sam_image_embeddings"] = self.embedding_cache.embed(inputs["sam_pixel_values"])
        return inputs


def _use_a_parameter(model: nn.Module, _, outputs: ModelOutput):
    """
    A batch may have no loss that depends on a trained weight, such as one without masks where only the mask branch is
    trained. Its gradient is zero.
    """
    if model.training and outputs.loss is not None and not outputs.loss.requires_grad:
        outputs["loss"] = outputs.loss + 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()


def _use_every_parameter(model: nn.Module, _, inputs: dict, outputs: ModelOutput):
    """
    FSDP2 needs a gradient, even zero, of the same parameters and runs of the same layers on every rank. A rank without
    images or spans would omit some, and the ranks would wait for each other.
    """
    if outputs.loss is None or not model.training:
        return
    # Layers that are sharded separately are used by all ranks.
    whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    outputs["loss"] = outputs.loss + 0.0 * sum(parameter.sum() for parameter in whole)
    if isinstance(model, PeftModel) and inputs["teacher"] is not None and not len(inputs["spans"]):
        # Without spans the teacher, which runs the same layers again, was not called.
        with torch.no_grad():
            inputs["teacher"](inputs_embeds=outputs.loss.new_zeros(1, 1, model.config.get_text_config().hidden_size))


def _count_record_results(inputs: dict, outputs: dict, config: PlumConfig) -> torch.Tensor:
    """Return `(records, 7)`: summed IoU, masks; correct, predicted, true spans; summed NLL, answer tokens."""
    size = config.sam_image_size
    record_of_row = inputs["record_index"].tolist()
    # Also for records without a row, which max_length left out: processes gather equal numbers.
    counts = torch.zeros(len(inputs["record_ids"]), 7, device=inputs["input_ids"].device)
    targets = outputs.get("mask_targets")  # absent without spans
    for i, target in enumerate([] if targets is None else targets.tolist()):
        mask, row = inputs["mask_labels"][target], int(inputs["spans"][i, 0])
        image = inputs["sam_image_index"][row]
        reshaped = inputs["reshaped_input_sizes"][image].tolist()
        predicted = upscale_masks(outputs["pred_masks"][i, None].float(), size, reshaped, mask.shape)[0] > 0
        union = (predicted | mask).sum()
        counts[record_of_row[row], 0] += (predicted & mask).sum() / union if union else 1.0
        counts[record_of_row[row], 1] += 1
    supervised = inputs["span_labels"] >= 0
    predicted = {tuple(span) for span in decode_spans(outputs["span_logits"].argmax(-1), supervised).tolist()}
    true = {tuple(span) for span in decode_spans(inputs["span_labels"], supervised).tolist()}
    for column, spans in ((2, predicted & true), (3, predicted), (4, true)):
        for row, _, _ in spans:
            counts[record_of_row[row], column] += 1
    targets = inputs["labels"][:, 1:]
    logits = outputs["logits"][:, :-1].float().transpose(1, 2)
    likelihoods = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none").sum(1)
    counts[:, 5].index_add_(0, inputs["record_index"], likelihoods)
    counts[:, 6].index_add_(0, inputs["record_index"], (targets != IGNORE_INDEX).sum(1).float())
    return counts


def _summarise_counts(prediction) -> dict[str, float]:
    iou, masks, right, predicted, true, likelihoods, tokens = np.asarray(prediction.predictions, dtype=np.float64).T
    grounded = masks > 0
    return {
        "strict_macro_giou": float((iou[grounded] / masks[grounded]).mean()) if grounded.any() else float("nan"),
        "strict_micro_giou": float(iou.sum() / max(1.0, masks.sum())),
        "span_f1": float(2 * right.sum() / max(1.0, predicted.sum() + true.sum())),
        "language_modeling_loss": float(likelihoods.sum() / tokens.sum()) if tokens.any() else float("nan"),
    }


class EpochSetter(TrainerCallback):
    """
    Sets the epoch of the data set. accelerate sets it only on the sampler with several processes, and in the rest of a
    resumed epoch.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch))


class TrainingCurves(TrainerCallback):
    """Keeps `training_curves.csv` and `training_curves.png` in the output folder up to date."""

    def on_evaluate(self, args, state, control, **kwargs):
        self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write(args, state)

    def _write(self, args, state):
        if not state.is_world_process_zero:
            return
        rows = {}
        for entry in state.log_history:
            rows.setdefault(entry["step"], {}).update(entry)
        shown = [name for row in rows.values() for name in row if "loss" in name or "giou" in name or "f1" in name]
        names = ["step", "learning_rate", *dict.fromkeys(name for name in shown if name != "train_loss")]
        path = Path(args.output_dir, "training_curves.csv")
        with path.with_suffix(".tmp").open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows.values())
        os.replace(path.with_suffix(".tmp"), path)
        self._draw(list(rows.values()), names, path.with_suffix(".png"))

    def _draw(self, rows, names, path):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        losses, metrics = figure.subplots(1, 2)
        for name in names[2:]:
            steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
            (losses if "loss" in name else metrics).plot(steps, values, label=name)
        losses.set(yscale="log", xlabel="step", title="losses")
        metrics.set(ylim=(0, 1), xlabel="step", title="validation")
        for axes in (losses, metrics):
            if axes.lines:
                axes.legend(fontsize="small")
        figure.savefig(path, dpi=110)
