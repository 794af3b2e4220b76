"""
The size of PLUM-7B, LLaVA-1.5-7B and SAM ViT-H with random bfloat16 weights, on a GPU: scoring choices, segmenting a
generated answer, a training step with LoRA. Time, model FLOP utilisation and peak memory of each.

    python perf/gpu.py --peak_tflops 989          # an H100 or H200, dense bfloat16
    python perf/gpu.py --tiny                     # the same steps on a CPU at a size that only shows that they run
"""

import argparse
import time
from collections.abc import Callable

import torch
import yaml
from measure import ROOT, result
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SamConfig

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from train import ModelArguments, add_lora

QUESTIONS, CHOICES, QUESTION_TOKENS, ANSWER_TOKENS = 10, 5, 24, 28
ROWS, SPANS, NEW_TOKENS = 8, 3, 64


def build_config(tiny: bool) -> PlumConfig:
    """LLaVA-1.5-7B with SAM ViT-H, or the same with a few small layers."""
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
    sam_config = SamConfig(vision_config={**sam, **square, "initializer_range": 0.02}, prompt_encoder_config=square)
    return PlumConfig(vlm_config=llava, sam_config=sam_config)


def build_model(config: PlumConfig, device: str) -> PlumForConditionalGeneration:
    """Random weights, made on the device itself."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = PlumForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def draw_rows(config: PlumConfig, rows: int, images: int, device: str) -> dict[str, torch.Tensor]:
    """Rows of an image, a question and an answer; row r is about image r % images."""
    vision, generator = config.vlm_config.vision_config, torch.Generator().manual_seed(0)
    tokens = (vision.image_size // vision.patch_size) ** 2
    ids = torch.randint(10, 30_000, (rows, tokens + QUESTION_TOKENS + ANSWER_TOKENS), generator=generator)
    ids[:, 4 : 4 + tokens] = config.vlm_config.image_token_id
    ids[:, : 4 + tokens + QUESTION_TOKENS // 2] = ids[0, : 4 + tokens + QUESTION_TOKENS // 2]
    side = config.sam_config.vision_config.image_size
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator),
        "sam_pixel_values": torch.randn(images, 3, side, side, generator=generator),
        "sam_image_index": torch.arange(rows) % images,
    }
    return {name: value.to(device) for name, value in batch.items()}


def measure(
    name: str, step: Callable[[], None], *, peak_tflops: float, device: str, forward_share: float = 1.0
) -> None:
    """
    Prints time, FLOP utilisation and memory of a step.

    Args:
        forward_share: FLOPs that count, of those that the step makes: work that is done again does not.
    """
    on_gpu = device == "cuda"
    step()
    with FlopCounterMode(display=False) as counter:
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    seconds = []
    for _ in range(5 if on_gpu else 1):
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    flops = forward_share * counter.get_total_flops()
    detail = {
        "unit": "model FLOPs made, of those that the device could make in the same time",
        "seconds": round(min(seconds), 4),
        "tera_flops": round(flops / 1e12, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
    result(name, flops / min(seconds) / (peak_tflops * 1e12), None, equal=True, detail=detail)


@torch.no_grad()
def score_questions(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens = int((batch["input_ids"][0] == model.config.vlm_config.image_token_id).sum())
    features = model.get_vlm_image_features([tokens], pixel_values=batch["pixel_values"])
    labels = batch["input_ids"].clone()
    labels[:, :-ANSWER_TOKENS] = -100
    return model.score_choices(
        batch["input_ids"],
        labels,
        CHOICES,
        vlm_image_features=features,
        sam_image_index=torch.zeros_like(batch["sam_image_index"]),
    )


def train_step(model: nn.Module, config: PlumConfig, device: str) -> None:
    batch = draw_rows(config, ROWS, ROWS, device)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-ANSWER_TOKENS] = -100
    batch["span_labels"] = batch["labels"].clamp(max=0)
    first, side = batch["input_ids"].shape[1] - ANSWER_TOKENS, config.sam_config.vision_config.image_size
    spans = [[row, first + 4 * i, first + 4 * i + 2] for row in range(ROWS) for i in range(SPANS)]
    sizes = torch.full((ROWS, 2), side, device=device)
    masks = [torch.rand(side, side, device=device) < 0.3 for _ in spans]
    with torch.autocast(device, torch.bfloat16):
        outputs = model(
            **batch,
            spans=torch.tensor(spans, device=device),
            mask_labels=masks,
            original_sizes=sizes,
            reshaped_input_sizes=sizes,
        )
    outputs.loss.backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers on the CPU")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="what the device could make, bfloat16")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    config = build_config(options.tiny)
    model = build_model(config, device)
    shared = {"peak_tflops": options.peak_tflops, "device": device}
    batch = draw_rows(config, QUESTIONS * CHOICES, 1, device)
    measure("score ten questions of five choices", lambda: score_questions(model, batch), **shared)
    prompts = draw_rows(config, ROWS, ROWS, device)
    tokens = {"max_new_tokens": 4 if options.tiny else NEW_TOKENS, "do_sample": False}
    measure("segment eight images", lambda: model.segment(**prompts, **tokens), **shared)

    recipe = yaml.safe_load((ROOT / "recipes" / "stage2_partonomy_7b.yaml").read_text())
    lora = {name: recipe[name] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    arguments = ModelArguments(model="unused", **lora)
    model.requires_grad_(False)
    trained = add_lora(model, arguments).train()
    trained.gradient_checkpointing_enable()
    # Checkpointing makes each layer's forward pass twice: of four parts of work, three are the model's.
    measure(
        "training step with LoRA, batch 8", lambda: train_step(trained, config, device), **shared, forward_share=0.75
    )


if __name__ == "__main__":
    main()
