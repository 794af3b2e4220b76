"""
A model of the size of PLUM-7B (LLaVA-1.5-7B and SAM ViT-H, random bfloat16 weights) on a GPU: scoring choices,
answering with masks, a training step with LoRA, and plum-7b's recipe through train.py.

    python perf/gpu.py                    # all of it, on an H100 or H200
    python perf/gpu.py --tiny             # the same steps, small, on a CPU

The first three are compared with the method of the research code: time, peak memory, and the *floor*, the time that
the arithmetic alone would take at `--peak_tflops`, plus, for each decoded token, one reading of the language model's
weights at `--peak_tbytes`. A breakdown says which components take the time above the floor. In bfloat16 the two
methods differ by some hundredths; the detail contains the relative error.

The recipe runs on drawings of 1024 pixels, with a checkpoint of random weights that takes 14 GB in a temporary folder.
"""

import argparse
import dataclasses
import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from breakdown import Breakdown, take_apart
from choices import score_one_by_one, segment_span_by_span
from datasets import Dataset
from measure import ROOT, result
from plum_tiny import build_plum_tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, SamConfig, SamImageProcessor

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from modules_plum import IGNORE_INDEX, count_loss_items
from plum_partonomy.drawn import miniature
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.inference.packing import encode_conversations
from plum_partonomy.questions.conversations import converse
from plum_partonomy.records import as_row
from plum_partonomy.training.examples import Collator, ConversationDataset
from plum_partonomy.training.model import add_lora, train_tokenizer
from plum_partonomy.training.options import ModelArguments
from plum_partonomy.training.run import main as train
from plum_partonomy.training.trainer import PlumTrainer
from processing_plum import PlumProcessor

QUESTIONS, CHOICES, QUESTION_TOKENS, ANSWER_TOKENS = 10, 5, 24, 28
ROWS, SPANS = 8, 3
TOLERANCE = 0.1


def build_config(tiny: bool) -> PlumConfig:
    """Return LLaVA-1.5-7B with SAM ViT-H, or the same with a few small layers."""
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    sam = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "global_attn_indexes": [1]}
    square = {"image_size": 1024, "patch_size": 16}
    if tiny:
        vision |= {"image_size": 56, "patch_size": 14}
        square["image_size"] = 128
    else:
        text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
        sam = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16}
        sam["global_attn_indexes"] = [7, 15, 23, 31]
    llava = LlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=32_064, max_position_embeddings=4096),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=32_000,
    )
    sam_config = SamConfig(
        initializer_range=0.05,
        vision_config={**sam, **square, "initializer_range": 0.02},
        prompt_encoder_config=square,
    )
    return PlumConfig(vlm_config=llava, sam_config=sam_config)


def build_model(config: PlumConfig, device: str) -> PlumForConditionalGeneration:
    """Return a model with random weights, created on the device."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = PlumForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def draw_rows(config: PlumConfig, images: int, rows_per_image: int, device: str) -> dict[str, torch.Tensor]:
    """Return rows of an image, a question and an answer; rows of one image are adjacent, CHOICES per question."""
    vision, generator = config.vlm_config.vision_config, torch.Generator().manual_seed(0)
    tokens, rows = (vision.image_size // vision.patch_size) ** 2, images * rows_per_image
    ids = torch.randint(10, 30_000, (rows, tokens + QUESTION_TOKENS + ANSWER_TOKENS), generator=generator)
    ids[:, :tokens] = config.vlm_config.image_token_id
    questions = torch.arange(rows) // min(CHOICES, rows_per_image) * min(CHOICES, rows_per_image)
    ids[:, :-ANSWER_TOKENS] = ids[questions, :-ANSWER_TOKENS]
    side = config.sam_image_size
    batch = {
        "input_ids": ids,
        "labels": ids.clone(),
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator).bfloat16(),
        "sam_pixel_values": torch.randn(images, 3, side, side, generator=generator).bfloat16(),
        "sam_image_index": torch.arange(images).repeat_interleave(rows_per_image),
    }
    batch["labels"][:, :-ANSWER_TOKENS] = IGNORE_INDEX
    return {name: value.to(device) for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------ measuring


def run_step(step: Callable[[], torch.Tensor], device: str) -> tuple[torch.Tensor, float, float | None]:
    """Return the result of a step, its best time in seconds and its peak memory in GiB, weights included."""
    on_gpu, seconds = device == "cuda", []
    outputs = step()  # libraries choose their kernels
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if on_gpu else 1):
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return outputs, min(seconds), round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None


def count_flops(step: Callable[[], torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Card:
    """
    The device, and what it reaches.

    Attributes:
        peak_tflops: TFLOP/s of bfloat16 matrix products.
        peak_tbytes: TB/s of reading its memory.
    """

    device: str
    peak_tflops: float
    peak_tbytes: float

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def floor(self, flops: int, bytes_read: int) -> float:
        """Return the seconds of so many operations and of reading so many bytes, one after the other."""
        return flops / (self.peak_tflops * 1e12) + bytes_read / (self.peak_tbytes * 1e12)


def measure(
    name: str, card: Card, breakdown: Breakdown, *, old: Callable, new: Callable, flops: int, bytes_read: int = 0
) -> None:
    """
    Print a line of JSON: the ratio of the times of two methods for the same tensor, and of the new one to its floor;
    `flops` are the model's, `bytes_read` those of weights that are read again for each token.
    """
    found, seconds, peak = run_step(new, card.device)
    expected, old_seconds, old_peak = run_step(old, card.device)
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    floor = card.floor(flops, bytes_read)
    detail = {
        "old_seconds": round(old_seconds, 4),
        "new_seconds": round(seconds, 4),
        "old_peak_gib": old_peak,
        "new_peak_gib": peak,
        "tera_flops": round(flops / 1e12, 3),
        "giga_bytes_read": round(bytes_read / 1e9, 3),
        "floor_seconds": round(floor, 4),
        "times_the_floor": round(seconds / floor, 2),
        "breakdown": take_apart(new, breakdown),
        "relative_error": round(error, 4),
        **dataclasses.asdict(card),
        "device": card.name,
    }
    result(name, old_seconds / seconds, None, equal=error < TOLERANCE, detail=detail)


# ------------------------------------------------------------------------------------------------ the three steps


def centre(scores: torch.Tensor) -> torch.Tensor:
    """Return scores minus their mean, because random weights score everything near the logarithm of the vocabulary."""
    return scores - scores.mean()


def score_at_once(model, batch: dict) -> torch.Tensor:
    ids = batch["input_ids"]
    features = model.get_vlm_image_features([{"input_ids": ids[0].tolist()}], pixel_values=batch["pixel_values"])
    images = {"vlm_image_features": features}
    if features is None:  # this version of transformers takes pixels only, one image for each row
        images = {"pixel_values": batch["pixel_values"].expand(len(ids), -1, -1, -1)}
    states = encode_conversations(model, ids, torch.ones_like(ids), **images, sam_image_index=batch["sam_image_index"])
    return model.score_choices(batch["input_ids"], batch["labels"], CHOICES, hidden_states=states)


def tag_evenly(tagger: nn.Module, _, logits: torch.Tensor) -> torch.Tensor:
    """Return logits that tag SPANS tokens of each answer as spans, because random weights tag at random."""
    tags = torch.zeros(logits.shape[1], dtype=torch.long, device=logits.device)
    tags[-ANSWER_TOKENS + 1 :: ANSWER_TOKENS // SPANS] = 1
    return nn.functional.one_hot(tags, 3).to(logits).expand_as(logits)


def segment_at_once(model, prompts: dict, options: dict) -> torch.Tensor:
    return model.segment(**prompts, **options).pred_masks


def segment_one_by_one(model, prompts: dict, options: dict) -> torch.Tensor:
    """Generate the answer of each row, run another pass for its hidden states, and decode its spans one by one."""
    masks = []
    inputs = (prompts[name].split(1) for name in ("input_ids", "pixel_values", "sam_pixel_values"))
    for ids, pixels, sam_pixels in zip(*inputs, strict=True):
        answered = model.vlm.generate(ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **options)
        states = model.vlm.model(input_ids=answered, pixel_values=pixels, use_cache=False).last_hidden_state
        starts = model.span_tagger(states, None, answered)[0].argmax(dim=-1).nonzero()
        spans = torch.cat([torch.zeros_like(starts), starts, starts + 1], dim=1)
        masks += segment_span_by_span(model, states[0], spans, model.get_image_embeddings(sam_pixels))
    return torch.stack(masks)


def add_masks(batch: dict, device: str) -> dict:
    """Return a training batch of rows with one image each: SPANS of each answer supervised, with masks of noise."""
    rows, length = batch["input_ids"].shape
    first, side = length - ANSWER_TOKENS, batch["sam_pixel_values"].shape[-1]
    spans = [[row, first + 4 * i, first + 4 * i + 2] for row in range(rows) for i in range(SPANS)]
    sizes = torch.full((rows, 2), side, device=device)
    return batch | {
        "span_labels": batch["labels"].clamp(max=0),
        "spans": torch.tensor(spans, device=device),
        "mask_labels": [torch.rand(side, side, device=device) < 0.3 for _ in spans],
        "original_sizes": sizes,
        "reshaped_input_sizes": sizes,
    }


def take_row(batch: dict, row: int) -> dict:
    taken = {name: value[row, None] for name, value in batch.items() if name not in ("spans", "mask_labels")}
    spans = slice(row * SPANS, (row + 1) * SPANS)
    taken["spans"] = batch["spans"][spans] * torch.tensor([0, 1, 1], device=batch["spans"].device)
    return taken | {"mask_labels": batch["mask_labels"][spans], "sam_image_index": batch["sam_image_index"][:1]}


def train_on(model, optimizer, breakdown: Breakdown, counts: dict, batches: list[dict]) -> torch.Tensor:
    """Run an optimizer step with rate zero on the sum of these batches; return the gradients of the span projector."""
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            loss = model(**batch, loss_counts=counts).loss
        with breakdown.part("backward"):
            loss.backward()
    projector = [p.grad for name, p in model.named_parameters() if "span_projector" in name and p.grad is not None]
    gradients = torch.cat([gradient.float().flatten() for gradient in projector])
    with breakdown.part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return gradients


# ------------------------------------------------------------------------------------------------ plum-7b's recipe


def save_checkpoint(model, config: PlumConfig, folder: Path) -> None:
    """Save the model with a processor, so that train.py can start from it."""
    vision, side = config.vlm_config.vision_config, config.sam_image_size
    texts = [text for row in draw_records(20, 128) for text in (turn["content"] for turn in row["messages"])]
    tokenizer = train_tokenizer(texts, 1000)
    model.config.vlm_config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    square = {"height": vision.image_size, "width": vision.image_size}
    PlumProcessor(
        CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=square),
        SamImageProcessor(size={"longest_edge": side}, pad_size={"height": side, "width": side}),
        tokenizer,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
    ).save_pretrained(folder)


def draw_records(count: int, side: int) -> list[dict]:
    """Return grounded conversations about drawings of this size."""
    scene = dataclasses.replace(miniature.MINI, image_size=side)
    graph = miniature.part_graph(scene)
    examples = (miniature.draw_example("train", index, scene=scene) for index in range(count))
    return [as_row(converse(example, part_graph=graph, seed=0)) for example in examples]


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


def measure_recipe(folder: Path, config: PlumConfig, card: Card, steps: int) -> None:
    """Train plum-7b's recipe on drawings, with train.py's own function, from the checkpoint `folder / "model"`."""
    side, waits = config.sam_image_size, Waits()
    recipe = yaml.safe_load((ROOT / "recipes" / "stage2_partonomy_7b.yaml").read_text())
    if card.device == "cpu":
        recipe |= {"gradient_accumulation_steps": 1, "dataloader_num_workers": 1}
    samples = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    records = Dataset.from_list(draw_records(5 * samples, side), features=GROUNDED_CONVERSATION_FEATURES)
    (folder / "data").mkdir()
    records.to_parquet(folder / "data" / "train.parquet")
    recipe["mixture"] = [{"dataset": str(folder / "data"), "name": "default", "eval_split": None}]
    recipe |= {"model": str(folder / "model"), "output_dir": str(folder / "run"), "max_steps": steps}
    recipe |= {"save_strategy": "no", "disable_tqdm": True, "use_cpu": card.device == "cpu"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if card.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with patch.object(PlumTrainer, "get_batch_samples", waits.timed(PlumTrainer.get_batch_samples)):
        train([str(folder / "recipe.yaml")])
    detail = waits.summary(samples) | {"steps": steps, "samples_per_step": samples, "side": side, "device": card.name}
    if card.device == "cuda":
        detail["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    result("plum-7b's recipe through train.py", detail["samples_per_second"], None, equal=True, detail=detail)


# ------------------------------------------------------------------------------------------------ main


def measure_training(model, config: PlumConfig, card: Card) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "stage2_partonomy_7b.yaml").read_text())
    lora = {name: recipe[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    breakdown = Breakdown(model, card.device)
    model.requires_grad_(False)
    trained = add_lora(model, ModelArguments(model="unused", **lora)).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.0)
    batch = add_masks(draw_rows(config, ROWS, 1, card.device), card.device)
    names = ("labels", "span_labels", "spans", "mask_labels")
    counts = count_loss_items(config, **{name: batch[name] for name in names})
    rows = [take_row(batch, row) for row in range(ROWS)]
    step = partial(train_on, trained, optimizer, breakdown, counts)
    # Counted on one row and without checkpointing, which computes the forward pass twice.
    flops = ROWS * count_flops(lambda: step(rows[:1]))
    trained.gradient_checkpointing_enable()
    measure(
        "training step with LoRA, batch 8, against its rows one by one",
        card,
        breakdown,
        old=lambda: step(rows),
        new=lambda: step([batch]),
        flops=flops,
    )
    _, seconds, peak = run_step(lambda: step(rows[:1]), card.device)
    detail = {"seconds": round(seconds, 4), "peak_gib": peak, "device": card.name}
    result(
        "training step with LoRA, batch 1, frozen weights in bfloat16", 1 / seconds, None, equal=True, detail=detail
    )


@torch.no_grad()
def measure_inference(model, config: PlumConfig, card: Card) -> None:
    breakdown = Breakdown(model, card.device)
    batch = draw_rows(config, 1, QUESTIONS * CHOICES, card.device) | {"choices": CHOICES}
    measure(
        "score ten questions of five choices",
        card,
        breakdown,
        old=lambda: centre(score_one_by_one(model, batch, batch["pixel_values"])),
        new=lambda: centre(score_at_once(model, batch)),
        flops=count_flops(lambda: score_at_once(model, batch)),
    )

    prompts = draw_rows(config, ROWS, 1, card.device)
    prompts["input_ids"] = prompts["input_ids"][:, :-ANSWER_TOKENS]
    del prompts["labels"]
    # With random weights the most likely token depends on rounding, so every answer consists of the same tokens.
    options = {"max_new_tokens": ANSWER_TOKENS, "prefix_allowed_tokens_fn": lambda row, ids: [10 + len(ids)]}
    handle = model.span_tagger.register_forward_hook(tag_evenly)
    read = [*model.vlm.get_decoder().layers.parameters(), *model.vlm.get_output_embeddings().parameters()]
    measure(
        "answer about eight images and segment",
        card,
        breakdown,
        old=lambda: segment_one_by_one(model, prompts, options),
        new=lambda: segment_at_once(model, prompts, options),
        flops=count_flops(lambda: segment_at_once(model, prompts, options)),
        bytes_read=ANSWER_TOKENS * sum(weights.nbytes for weights in read),
    )
    handle.remove()


def measure_plum_tiny(card: Card, count: int) -> None:
    """Measure training steps a second of plum-tiny's size: launches of small kernels bound it on a GPU."""
    model, processor = build_plum_tiny()
    rows = [{**row, "id": str(i)} for i, row in enumerate(draw_records(count, 128))]
    examples = ConversationDataset(Dataset.from_list(rows, features=GROUNDED_CONVERSATION_FEATURES), max_spans=6)
    batch = Collator(processor)([examples[i] for i in range(count)])
    batch = {name: value for name, value in batch.items() if not name.startswith("record_")}
    batch["mask_labels"] = [mask.to(card.device) for mask in batch["mask_labels"]]
    batch |= {name: value.to(card.device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    model.to(card.device).train()
    breakdown = Breakdown(model, card.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    step = partial(train_on, model, optimizer, breakdown, None, [batch])
    _, seconds, peak = run_step(step, card.device)
    detail = {"seconds": round(seconds, 4), "peak_gib": peak, "breakdown": take_apart(step, breakdown)}
    result(f"training steps of plum-tiny a second, batch {count}", 1 / seconds, 20.0, equal=True, detail=detail)


# ------------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers on the CPU")
    parser.add_argument("--peak_tflops", type=float, default=790.0, help="bfloat16 TFLOP/s that the device reaches")
    parser.add_argument("--peak_tbytes", type=float, default=4.3, help="TB/s that it reads from its memory")
    parser.add_argument("--steps", type=int, default=30, help="steps of plum-7b's recipe, 0 to leave it out")
    options = parser.parse_args()
    card = Card("cpu" if options.tiny else "cuda", options.peak_tflops, options.peak_tbytes)
    config = build_config(options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(config, card.device)
        measure_inference(model, config, card)
        if options.steps:
            save_checkpoint(model, config, Path(folder, "model"))
        measure_training(model, config, card)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        measure_plum_tiny(card, 2 if options.tiny else 32)
        if options.steps:
            measure_recipe(Path(folder), config, card, options.steps)


if __name__ == "__main__":
    main()
