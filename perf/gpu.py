"""
A model of the size of PLUM-7B (LLaVA-1.5-7B and SAM ViT-H, random bfloat16 weights) on a GPU: scoring choices,
answering with masks, a training step with LoRA. Each is compared with the method of the research code: time, model
FLOP utilisation, peak memory.

    python perf/gpu.py --peak_tflops 989          # an H100 or H200, dense bfloat16
    python perf/gpu.py --tiny                     # the same steps, small, on a CPU

In bfloat16 the two methods differ by some hundredths; the detail contains the relative error.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import yaml
from choices import score_one_by_one, segment_span_by_span
from measure import ROOT, result
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SamConfig

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from modules_plum import IGNORE_INDEX, count_loss_items
from plum_partonomy.inference.packing import encode_conversations
from plum_partonomy.training.model import add_lora
from plum_partonomy.training.options import ModelArguments

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


def measure(name: str, *, old: Callable, new: Callable, flops: int, peak_tflops: float, device: str) -> None:
    """Print a line of JSON: the ratio of the times of two methods for the same tensor; `flops` are the model's."""
    found, seconds, peak = run_step(new, device)
    expected, old_seconds, old_peak = run_step(old, device)
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    detail = {
        "old_seconds": round(old_seconds, 4),
        "new_seconds": round(seconds, 4),
        "old_peak_gib": old_peak,
        "new_peak_gib": peak,
        "tera_flops": round(flops / 1e12, 3),
        "model_flop_utilisation": round(flops / seconds / (peak_tflops * 1e12), 4),
        "relative_error": round(error, 4),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    result(name, old_seconds / seconds, None, equal=error < TOLERANCE, detail=detail)


# ------------------------------------------------------------------------------------------------ the three steps


def centre(scores: torch.Tensor) -> torch.Tensor:
    """Return scores minus their mean, because random weights score everything near the logarithm of the vocabulary."""
    return scores - scores.mean()


def score_at_once(model, batch: dict) -> torch.Tensor:
    tokens = {"input_ids": batch["input_ids"][0].tolist()}
    states = encode_conversations(
        model,
        batch["input_ids"],
        torch.ones_like(batch["input_ids"]),
        vlm_image_features=model.get_vlm_image_features([tokens], pixel_values=batch["pixel_values"]),
        sam_image_index=batch["sam_image_index"],
    )
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
        starts = model.span_tagger(states, None)[0].argmax(dim=-1).nonzero()
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


def train_on(model, optimizer, counts: dict, batches: list[dict]) -> torch.Tensor:
    """Run an optimizer step with rate zero on the sum of these batches; return the gradients of the span projector."""
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            loss = model(**batch, loss_counts=counts).loss
        loss.backward()
    projector = [p.grad for name, p in model.named_parameters() if "span_projector" in name and p.grad is not None]
    gradients = torch.cat([gradient.float().flatten() for gradient in projector])
    optimizer.step()
    optimizer.zero_grad()
    return gradients


# ------------------------------------------------------------------------------------------------ main


def measure_training(model, config: PlumConfig, **shared) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "stage2_partonomy_7b.yaml").read_text())
    lora = {name: recipe[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    model.requires_grad_(False)
    trained = add_lora(model, ModelArguments(model="unused", **lora)).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.0)
    batch = add_masks(draw_rows(config, ROWS, 1, shared["device"]), shared["device"])
    names = ("labels", "span_labels", "spans", "mask_labels")
    counts = count_loss_items(config, **{name: batch[name] for name in names})
    rows = [take_row(batch, row) for row in range(ROWS)]
    step = partial(train_on, trained, optimizer, counts)
    # Counted on one row and without checkpointing, which computes the forward pass twice.
    flops = ROWS * count_flops(lambda: step(rows[:1]))
    trained.gradient_checkpointing_enable()
    measure(
        "training step with LoRA, batch 8, against its rows one by one",
        old=lambda: step(rows),
        new=lambda: step([batch]),
        flops=flops,
        **shared,
    )


@torch.no_grad()
def measure_inference(model, config: PlumConfig, **shared) -> None:
    batch = draw_rows(config, 1, QUESTIONS * CHOICES, shared["device"]) | {"choices": CHOICES}
    measure(
        "score ten questions of five choices",
        old=lambda: centre(score_one_by_one(model, batch, batch["pixel_values"])),
        new=lambda: centre(score_at_once(model, batch)),
        flops=count_flops(lambda: score_at_once(model, batch)),
        **shared,
    )

    prompts = draw_rows(config, ROWS, 1, shared["device"])
    prompts["input_ids"] = prompts["input_ids"][:, :-ANSWER_TOKENS]
    del prompts["labels"]
    # With random weights the most likely token depends on rounding, so every answer consists of the same tokens.
    options = {"max_new_tokens": ANSWER_TOKENS, "prefix_allowed_tokens_fn": lambda row, ids: [10 + len(ids)]}
    handle = model.span_tagger.register_forward_hook(tag_evenly)
    measure(
        "answer about eight images and segment",
        old=lambda: segment_one_by_one(model, prompts, options),
        new=lambda: segment_at_once(model, prompts, options),
        flops=count_flops(lambda: segment_at_once(model, prompts, options)),
        **shared,
    )
    handle.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers on the CPU")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="peak bfloat16 TFLOP/s of the device")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    config = build_config(options.tiny)
    model = build_model(config, device)
    shared = {"peak_tflops": options.peak_tflops, "device": device}
    measure_inference(model, config, **shared)
    measure_training(model, config, **shared)


if __name__ == "__main__":
    main()
