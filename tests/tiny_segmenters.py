"""Segmenters of every family with random weights, as folders in the form of their releases."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2Config,
    Sam3TrackerConfig,
    SamHQConfig,
    SamImageProcessor,
)
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig

from tests.tiny import IMAGE_SIZE, tiny_config
from tests.tiny_backbones import tiny_sam

GRID, WIDTH, PATCH = 8, 32, 8
LEVELS = [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2]
PROMPTS = {"hidden_size": WIDTH}
DECODER = {"hidden_size": WIDTH, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def save_model(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    """Save a model with random weights, scaled so that masks differ visibly without any training."""
    torch.manual_seed(1)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_encoder" not in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return model


def save_square_processor(folder: Path, kind: str, side: int, mean: list[float], std: list[float]):
    """Write the settings of an image processor that cannot be built without torchvision."""
    size = {"height": side, "width": side}
    settings = {"image_processor_type": kind, "size": size, "image_mean": mean, "image_std": std, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def sam(folder: Path) -> Path:
    return tiny_sam(folder)


def sam_hq(folder: Path) -> Path:
    parts = tiny_config().sam_config.to_dict()
    vision, prompts = ({**parts[name], "model_type": None} for name in ("vision_config", "prompt_encoder_config"))
    del vision["model_type"], prompts["model_type"]
    decoder = {**DECODER, "vit_dim": vision["hidden_size"]}
    save_model(SamHQConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder), folder)
    SamImageProcessor(size={"longest_edge": IMAGE_SIZE}, pad_size=SQUARE).save_pretrained(folder)
    return folder


def hiera() -> dict:
    """Return the configuration of a small SAM 2 image encoder whose grid has 8 x 8 cells."""
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 16,
        "image_size": [2 * IMAGE_SIZE, 2 * IMAGE_SIZE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 1, 2, 4],
        "window_size_per_stage": [4, 4, 4, 4],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [3],
    }
    return {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": LEVELS,
        "fpn_hidden_size": WIDTH,
    }


def sam2(folder: Path) -> Path:
    prompts = {**PROMPTS, "image_size": 2 * IMAGE_SIZE, "patch_size": 16}
    save_model(Sam2Config(vision_config=hiera(), prompt_encoder_config=prompts, mask_decoder_config=DECODER), folder)
    save_square_processor(folder, "Sam2ImageProcessorFast", 2 * IMAGE_SIZE, *IMAGENET)
    return folder


def sam2_video(folder: Path) -> Path:
    """SAM 2.1 as it is released: a model of videos, which contains that of images."""
    prompts = {**PROMPTS, "image_size": 2 * IMAGE_SIZE, "patch_size": 16}
    memory = {
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": 32,
        "memory_attention_rope_feat_sizes": [GRID, GRID],
        "memory_encoder_hidden_size": WIDTH,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 64,
    }
    config = Sam2VideoConfig(
        vision_config=hiera(),
        prompt_encoder_config=prompts,
        mask_decoder_config=DECODER,
        image_size=2 * IMAGE_SIZE,
        **memory,
    )
    save_model(config, folder)
    save_square_processor(folder, "Sam2ImageProcessorFast", 2 * IMAGE_SIZE, *IMAGENET)
    return folder


def vit() -> dict:
    """Return the configuration of a small SAM 3 image encoder whose grid has 8 x 8 cells."""
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "pretrain_image_size": IMAGE_SIZE,
        "window_size": 4,
        "global_attn_indexes": [1],
    }
    return {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "backbone_feature_sizes": LEVELS,
        "fpn_hidden_size": WIDTH,
    }


def sam3_tracker(folder: Path) -> Path:
    prompts = {**PROMPTS, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    save_model(
        Sam3TrackerConfig(vision_config=vit(), prompt_encoder_config=prompts, mask_decoder_config=DECODER), folder
    )
    save_square_processor(folder, "Sam3ImageProcessorFast", IMAGE_SIZE, [0.5] * 3, [0.5] * 3)
    return folder
