"""Training steps of models of PLUM-7B's and plum-tiny's size, and plum-7b's recipe, for perf/gpu.py."""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from breakdown import Breakdown
from datasets import Dataset
from gpu_measure import Card, attempt, count_flops, measure, measure_alone
from gpu_model import ROWS, add_masks, draw_records, draw_rows, take_row
from measure import ROOT, result
from plum_tiny import build_plum_tiny
from transformers import BitsAndBytesConfig

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from modules_plum import count_loss_items
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.training.examples import Collator, ConversationDataset
from plum_partonomy.training.model import add_lora
from plum_partonomy.training.options import ModelArguments
from plum_partonomy.training.run import main as train
from plum_partonomy.training.trainer import MuonWithAdamW, PlumTrainer


def read_recipe(name: str) -> dict:
    return yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())


def train_on(model, optimizer, breakdown: Breakdown, counts: dict, batches: list[dict], autocast: bool = True):
    """Run an optimizer step with rate zero on the sum of these batches; return the gradients of the span projector."""
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=autocast):
            loss = model(**batch, loss_counts=counts).loss
        with breakdown.part("backward"):
            loss.backward()
    projector = [p.grad for name, p in model.named_parameters() if "span_projector" in name and p.grad is not None]
    gradients = torch.cat([gradient.float().flatten() for gradient in projector])
    with breakdown.part("optimizer"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return gradients


# ------------------------------------------------------------------------------------------------ PLUM-7B


def prepare_lora(model, config: PlumConfig, card: Card) -> tuple[torch.nn.Module, Callable, list[dict], dict]:
    """Return the model with the recipe's LoRA, its training step, a batch as single rows, and the batch."""
    recipe = read_recipe("stage2_partonomy_7b")
    lora = {name: recipe[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    breakdown = Breakdown(model, card.device)
    model.requires_grad_(False)
    trained = add_lora(model, ModelArguments(model="unused", **lora)).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.0)
    batch = add_masks(draw_rows(config, ROWS, 1, card.device), card.device)
    names = ("labels", "span_labels", "spans", "mask_labels")
    counts = count_loss_items(config, **{name: batch[name] for name in names})
    rows = [take_row(batch, row) for row in range(ROWS)]
    return trained, partial(train_on, trained, optimizer, breakdown, counts), rows, batch


def measure_lora(model, config: PlumConfig, card: Card) -> None:
    """Measure training steps of a model whose weights, trained ones included, are all in bfloat16."""
    trained, step, rows, batch = prepare_lora(model, config, card)
    # Counted on one row and without checkpointing, which computes the forward pass twice.
    flops = ROWS * count_flops(lambda: step(rows[:1]))

    def step_checkpointed(batches: list[dict]) -> torch.Tensor:
        trained.gradient_checkpointing_enable()
        gradients = step(batches)
        trained.gradient_checkpointing_disable()
        return gradients

    with attempt("training step with LoRA, batch 8"):
        measure(
            "training step with LoRA, batch 8, against its rows one by one",
            card,
            old=lambda: step_checkpointed(rows),
            new=lambda: step_checkpointed([batch]),
            flops=flops,
            breakdown=step.args[2],
        )
    with attempt("training step with LoRA, batch 8, without checkpointing"):
        measure(
            "training step with LoRA, batch 8, without gradient checkpointing against with it",
            card,
            old=lambda: step_checkpointed([batch]),
            new=lambda: step([batch]),
            flops=flops,
        )
    with attempt("training step with LoRA, batch 1"):
        measure_alone(
            "training step with LoRA, batch 1, all weights in bfloat16", card, lambda: step_checkpointed(rows[:1])
        )


def measure_few_bits(checkpoint: Path, card: Card) -> None:
    """Measure a training step of one row with the layers of the language model in 4 bits."""
    skip = list(PlumForConditionalGeneration.full_precision_modules)
    few_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    model = PlumForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=few_bits, device_map={"": card.device}
    )
    trained, step, rows, _ = prepare_lora(model, model.config, card)
    trained.gradient_checkpointing_enable()
    measure_alone("training step with LoRA, batch 1, language model in 4 bits", card, lambda: step(rows[:1]))


# ------------------------------------------------------------------------------------------------ plum-tiny


def measure_plum_tiny(card: Card, count: int) -> None:
    """Measure training steps of plum-tiny with its recipe's optimizer, in bfloat16 against float32."""
    recipe = read_recipe("plum_tiny")
    model, processor = build_plum_tiny()
    rows = [{**row, "id": str(i)} for i, row in enumerate(draw_records(count, 128))]
    rows = Dataset.from_list(rows, features=GROUNDED_CONVERSATION_FEATURES)
    examples = ConversationDataset(rows, max_spans=recipe["max_spans"])
    batch = Collator(processor)([examples[i] for i in range(count)])
    batch = {name: value for name, value in batch.items() if not name.startswith("record_")}
    batch["mask_labels"] = [mask.to(card.device) for mask in batch["mask_labels"]]
    batch |= {name: value.to(card.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model.to(card.device).train()
    breakdown = Breakdown(model, card.device)
    optimizer = MuonWithAdamW(model, 0.0, 0.0, recipe["weight_decay"], (0.9, recipe["adam_beta2"]))
    step = partial(train_on, model, optimizer, breakdown, None, [batch])
    measure(
        f"training step of plum-tiny, batch {count}, in bfloat16 against float32",
        card,
        old=lambda: step(autocast=False),
        new=step,
        flops=count_flops(step),
        breakdown=breakdown,
    )


# ------------------------------------------------------------------------------------------------ plum-7b's recipe


class Waits:
    """Seconds from one step of a training to the next, and those that it waited for its data."""

    def __init__(self):
        self.started, self.waited = [], []

    def timed(self, get_batches: Callable) -> Callable:
        def get(trainer, *args):
            self.started.append(time.perf_counter())
            batches = get_batches(trainer, *args)
            self.waited.append(time.perf_counter() - self.started[-1])
            return batches

        return get

    def summary(self, samples_per_step: int) -> dict[str, float]:
        """Return samples per second and the share of the loader, without the first quarter of the steps."""
        first = len(self.started) // 4
        seconds = self.started[-1] - self.started[first]
        samples = samples_per_step * (len(self.started) - 1 - first)
        share = sum(self.waited[first:-1]) / seconds
        return {"samples_per_second": round(samples / seconds, 3), "loader_share": round(share, 4)}


def write_recipe(folder: Path, config: PlumConfig, card: Card, changes: dict) -> tuple[Path, int]:
    """Write plum-7b's recipe for the checkpoint `folder / "model"` and drawings; return it and its samples a step."""
    recipe = read_recipe("stage2_partonomy_7b")
    if card.device == "cpu":
        recipe |= {"gradient_accumulation_steps": 1, "dataloader_num_workers": 1}
    recipe |= changes
    samples = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    records = Dataset.from_list(
        draw_records(5 * samples, config.sam_image_size), features=GROUNDED_CONVERSATION_FEATURES
    )
    (folder / "data").mkdir(exist_ok=True)
    records.to_parquet(folder / "data" / "train.parquet")
    recipe["mixture"] = [{"dataset": str(folder / "data"), "name": "default", "eval_split": None}]
    recipe |= {"model": str(folder / "model"), "output_dir": str(folder / "run"), "overwrite_output_dir": True}
    recipe |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": card.device == "cpu"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml", samples


class Trained(Exception):
    """Ends a run after its training, because the trained model would take 31 GB on the disk."""


def train_and_stop(method: Callable) -> Callable:
    def train_only(trainer, *args, **options):
        method(trainer, *args, **options)
        raise Trained

    return train_only


def measure_recipe(name: str, folder: Path, config: PlumConfig, card: Card, **changes) -> None:
    """Train plum-7b's recipe with these changes on drawings, with the function behind train.py."""
    path, samples = write_recipe(folder, config, card, changes)
    waits = Waits()
    if card.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        patch.object(PlumTrainer, "get_batch_samples", waits.timed(PlumTrainer.get_batch_samples)),
        patch.object(PlumTrainer, "train", train_and_stop(PlumTrainer.train)),
        suppress(Trained),
    ):
        train([str(path)])
    detail = waits.summary(samples) | {"samples_per_step": samples, "side": config.sam_image_size, **changes}
    detail["device"] = card.name
    if card.device == "cuda":
        detail["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    result(name, detail["samples_per_second"], None, equal=True, detail=detail)
