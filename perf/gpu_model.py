"""The model of perf/gpu.py, of the size of PLUM-7B with random weights, and inputs for it."""

import dataclasses
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, SamConfig, SamImageProcessor

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from modules_plum import IGNORE_INDEX
from plum_partonomy.drawn import miniature
from plum_partonomy.questions.conversations import converse
from plum_partonomy.records import as_row
from plum_partonomy.training.model import train_tokenizer
from processing_plum import PlumProcessor

QUESTIONS, CHOICES, QUESTION_TOKENS, ANSWER_TOKENS = 10, 5, 24, 28
ROWS, SPANS = 8, 3


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
