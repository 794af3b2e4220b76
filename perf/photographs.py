"""
Memory of a training step and of results on photographs of 12 megapixels: 8 images with 6 spans each.

    python perf/photographs.py

The model has SAM's input size and grid (1024 px, 64 x 64) and is otherwise small, so that masks and images dominate
the memory. The images are coarse noise, enlarged, because this repository contains no photographs.
"""

import resource

import numpy as np
import torch
from measure import ROOT, result
from PIL import Image

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.training.model import build_processor
from processing_plum import PlumProcessor

SIDE, HEIGHT, WIDTH = 1024, 3000, 4000
IMAGES, SPANS = 8, 6
LIMIT_GB = 3.0
ANSWER = "It has " + ", ".join(["a <p>wheel</p>"] * SPANS) + "."


def build() -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """Return a model with random weights that looks through SAM's encoder, and its processor."""
    tokenizer = PlumProcessor.from_pretrained(ROOT / "checkpoints" / "plum-tiny").tokenizer
    vlm_config = {
        "model_type": "internvl",
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "downsample_ratio": 0.5,
        "vision_feature_layer": -1,
        "vision_config": {
            "model_type": "internvl_vision",
            "num_channels": 32,
            "image_size": 64,
            "patch_size": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "use_mean_pooling": False,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
        },
    }
    encoder = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam_config = {
        "vision_config": {**encoder, "window_size": 14, "num_pos_feats": 16, "initializer_range": 0.02},
        "prompt_encoder_config": {"hidden_size": 32},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        "initializer_range": 0.05,
    }
    torch.manual_seed(0)
    model = PlumForConditionalGeneration(
        PlumConfig(
            vlm_config=vlm_config,
            sam_config=sam_config,
            vlm_image_input="sam_image_embeddings",
            span_tagger_intermediate_size=64,
        )
    )
    return model, build_processor(model, tokenizer)


def draw(generator: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """Return an image, and a box for each span as run lengths, as in records."""
    pixels = generator.integers(0, 256, (HEIGHT // 50, WIDTH // 50, 3), dtype=np.uint8)
    masks = []
    for _ in range(SPANS):
        top, left = int(generator.integers(0, HEIGHT // 2)), int(generator.integers(0, WIDTH // 2))
        runs = [left * HEIGHT + top] + [HEIGHT // 4, HEIGHT - HEIGHT // 4] * (WIDTH // 4)
        masks.append({"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH - sum(runs)]})
    return Image.fromarray(pixels).resize((WIDTH, HEIGHT)), masks


def peak_gb() -> float:
    """Return the peak memory of the process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> list[dict]:
    model, processor = build()
    start = peak_gb()
    drawn = [draw(np.random.default_rng(seed)) for seed in range(IMAGES)]
    question = {"type": "text", "text": "What visible parts does the object in the image have?"}
    chats = [
        [
            {"role": "user", "content": [{"type": "image", "image": image}, question]},
            {"role": "assistant", "content": ANSWER},
        ]
        for image, _ in drawn
    ]
    batch = processor.apply_chat_template(chats, masks=[masks for _, masks in drawn], tokenize=True, return_dict=True)
    loss = model.train()(**batch).loss
    loss.backward()
    training = peak_gb()
    # Results are read one image at a time; a mask takes 12 MB.
    counts = []
    for chat in chats:
        outputs = model.eval().segment_spans(**processor.apply_chat_template(chat, tokenize=True, return_dict=True))
        (answer,) = processor.post_process_segmentation(outputs)
        counts += [span.mask.shape == (HEIGHT, WIDTH) for span in answer.spans]
    complete = bool(loss.isfinite()) and counts == [True] * IMAGES * SPANS
    sizes = {"images": IMAGES, "spans": SPANS, "megapixels": HEIGHT * WIDTH / 1e6, "gb_before": round(start, 2)}
    return [
        result(f"{name}, {IMAGES} x {SPANS} spans at 12 megapixels, peak memory in GB", peak, LIMIT_GB, better="lower",
               equal=complete, detail=sizes)
        for name, peak in (("training step", training), ("training step and results", peak_gb()))
    ]  # fmt: skip


if __name__ == "__main__":
    main()
