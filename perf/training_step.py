"""
A training step with the frozen image encoder's embeddings from disk, against one that encodes its image.

    python perf/training_step.py

A model of random weights: SAM ViT-B at 1024 px, a language model of 4 layers x 512 that looks through SAM's encoder,
masks decoded with feedback. One conversation of 256 image tokens, 64 further tokens and three masks; forward and
backward pass, the encoder frozen in both. The loss is that of the same image up to the rounding to bfloat16.
"""

import tempfile

import torch
from measure import compare

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.embedding_cache import EmbeddingCache

SIDE, HEIGHT, WIDTH = 1024, 768, 1024
IMAGE_TOKENS, TEXT_TOKENS = 256, 64
SPANS = torch.tensor([[0, 280, 283], [0, 290, 292], [0, 300, 303]])
IMAGE_TOKEN, VOCABULARY = 31_999, 32_000


def build_model() -> PlumForConditionalGeneration:
    vlm_config = {
        "model_type": "internvl",
        "image_token_id": IMAGE_TOKEN,
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "vision_config": {
            "model_type": "internvl_vision",
            "num_channels": 256,
            "image_size": 64,
            "patch_size": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "use_mean_pooling": False,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
        },
    }
    torch.manual_seed(0)
    config = PlumConfig(
        vlm_config=vlm_config,
        sam_config={"initializer_range": 0.05, "vision_config": {"initializer_range": 0.02}},
        vlm_image_input="sam_image_embeddings",
        span_tagger_intermediate_size=512,
    )
    model = PlumForConditionalGeneration(config)
    model.sam.vision_encoder.requires_grad_(False)
    return model


def draw_batch() -> dict:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(10, 30_000, (1, TEXT_TOKENS), generator=generator)
    input_ids = torch.cat([torch.full((1, IMAGE_TOKENS), IMAGE_TOKEN), words], dim=1)
    labels = input_ids.clone()
    labels[:, : IMAGE_TOKENS + TEXT_TOKENS // 4] = -100
    span_labels = torch.where(labels == -100, -100, 0)
    for row, start, end in SPANS.tolist():
        span_labels[row, start:end] = 2
        span_labels[row, start] = 1
    return {
        "input_ids": input_ids,
        "labels": labels,
        "span_labels": span_labels,
        "spans": SPANS,
        "mask_labels": list(torch.rand(len(SPANS), HEIGHT, WIDTH, generator=generator) > 0.5),
        "original_sizes": torch.tensor([[HEIGHT, WIDTH]]),
        "reshaped_input_sizes": torch.tensor([[HEIGHT, WIDTH]]),
        "sam_image_index": torch.tensor([0]),
    }


@torch.enable_grad()
def step(model: PlumForConditionalGeneration, **inputs) -> torch.Tensor:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach()


def main() -> list[dict]:
    model, batch = build_model(), draw_batch()
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(folder, model)
        return compare(
            "training step with cached image embeddings, SAM ViT-B at 1024 px",
            old=lambda: step(model, **batch, sam_pixel_values=pixels),
            new=lambda: step(model, **batch, sam_image_embeddings=cache.embed(pixels)),
            target=4.0,
            tolerance=1e-2,
            rounds=2,
            image_pixels=SIDE,
            spans=len(SPANS),
            tokens=IMAGE_TOKENS + TEXT_TOKENS,
        )


if __name__ == "__main__":
    main()
