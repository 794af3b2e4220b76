"""Map the tensor names and options of the authors' PLUM (github.com/AnselBlume/partonomy) to those of this project.

A pair of names that ends in a dot stands for all names with this prefix; `*` is any number. The first matching pair
applies. The same table is used in both directions.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig

from configuration_plum import PlumConfig

VISION_TOWER = "model.vision_tower.vision_tower."
SAM = "model.visual_model."
IMAGE_TOKEN = "<image>"
IMAGE_MARKERS = ("<im_start>", "<im_end>")

CHAT_TEMPLATE = """\
{{- bos_token -}}
{{- "A chat between a curious human and an artificial intelligence assistant. " -}}
{{- "The assistant gives helpful, detailed, and polite answers to the human's questions. " -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'USER: ' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{- '<im_start><image><im_end>\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{{- ' ' -}}
{%- else -%}
{{- 'ASSISTANT:' -}}
{%- generation -%}
{%- if message.content is string -%}{{- ' ' + message.content + eos_token -}}
{%- else -%}{{- ' ' + message.content[0].text + eos_token -}}
{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
"""The conversation format `llava_v1` of the original, with the image marked at its start and end."""

UNUSED = {
    r"^mask_pooler\.mask_modulator\.projections\.2\.": "FiLM of a third block, never called in the original",
    r"\.rotary_emb\.inv_freq$": "a constant that the model computes",
    r"\.embeddings\.position_ids$": "a constant that the model computes",
    r"(^|\.)teacher_llm\.": "the frozen language model of the KL loss, a second copy",
    r"\.original_module\.": "weights that a trained copy (modules_to_save) replaces",
}
"""Tensors of the original without a counterpart here, with the reason."""

SHARED = (
    ("mask_pooler.prompt_encoder.", SAM + "prompt_encoder."),
    ("mask_pooler.block1.0.", SAM + "prompt_encoder.mask_downscaling."),
    ("mask_pooler.block2.0.", SAM + "prompt_encoder.mask_downscaling."),
    ("mask_pooler.final_conv.", SAM + "prompt_encoder.mask_downscaling.6."),
)
"""Additional names of tensors that the original's mask pooler shares with SAM's prompt encoder."""

LANGUAGE_SIDE = (
    ("lm_head.", "vlm.lm_head."),
    ("model.embed_tokens.", "vlm.model.language_model.embed_tokens."),
    ("model.layers.", "vlm.model.language_model.layers."),
    ("model.norm.", "vlm.model.language_model.norm."),
    (VISION_TOWER + "vision_model.", "vlm.model.vision_tower."),
    ("model.mm_projector.0.", "vlm.model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "vlm.model.multi_modal_projector.linear_2."),
)

SPAN_SIDE = (
    ("bio_encoder.encoder.layers.", "span_tagger.layers."),
    ("model.token_to_mask_fcs.0.", "span_tagger.classifier."),
    ("model.text_hidden_fcs.0.", "span_projector."),
    ("mask_pooler.queries", "mask_feedback.queries"),
    ("mask_pooler.mask_modulator.projections.0.", "mask_feedback.film.0."),
    ("mask_pooler.mask_modulator.projections.1.", "mask_feedback.film.1."),
    ("mask_pooler.attn.out_proj.", "mask_feedback.out_proj."),
)

SAM_ENCODERS = (
    (SAM + "image_encoder.patch_embed.proj.", "sam.vision_encoder.patch_embed.projection."),
    (SAM + "image_encoder.pos_embed", "sam.vision_encoder.pos_embed"),
    (SAM + "image_encoder.blocks.*.norm1.", "sam.vision_encoder.layers.*.layer_norm1."),
    (SAM + "image_encoder.blocks.*.norm2.", "sam.vision_encoder.layers.*.layer_norm2."),
    (SAM + "image_encoder.blocks.*.attn.", "sam.vision_encoder.layers.*.attn."),
    (SAM + "image_encoder.blocks.*.mlp.", "sam.vision_encoder.layers.*.mlp."),
    (SAM + "image_encoder.neck.0.", "sam.vision_encoder.neck.conv1."),
    (SAM + "image_encoder.neck.1.", "sam.vision_encoder.neck.layer_norm1."),
    (SAM + "image_encoder.neck.2.", "sam.vision_encoder.neck.conv2."),
    (SAM + "image_encoder.neck.3.", "sam.vision_encoder.neck.layer_norm2."),
    (
        SAM + "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "sam.shared_image_embedding.positional_embedding",
    ),
    (SAM + "prompt_encoder.point_embeddings.*.", "sam.prompt_encoder.point_embed.*."),
    (SAM + "prompt_encoder.not_a_point_embed.", "sam.prompt_encoder.not_a_point_embed."),
    (SAM + "prompt_encoder.no_mask_embed.", "sam.prompt_encoder.no_mask_embed."),
    (SAM + "prompt_encoder.mask_downscaling.0.", "sam.prompt_encoder.mask_embed.conv1."),
    (SAM + "prompt_encoder.mask_downscaling.1.", "sam.prompt_encoder.mask_embed.layer_norm1."),
    (SAM + "prompt_encoder.mask_downscaling.3.", "sam.prompt_encoder.mask_embed.conv2."),
    (SAM + "prompt_encoder.mask_downscaling.4.", "sam.prompt_encoder.mask_embed.layer_norm2."),
    (SAM + "prompt_encoder.mask_downscaling.6.", "sam.prompt_encoder.mask_embed.conv3."),
)

SAM_DECODER = (
    (SAM + "mask_decoder.iou_token.", "sam.mask_decoder.iou_token."),
    (SAM + "mask_decoder.mask_tokens.", "sam.mask_decoder.mask_tokens."),
    (SAM + "mask_decoder.transformer.layers.*.norm1.", "sam.mask_decoder.transformer.layers.*.layer_norm1."),
    (SAM + "mask_decoder.transformer.layers.*.norm2.", "sam.mask_decoder.transformer.layers.*.layer_norm2."),
    (SAM + "mask_decoder.transformer.layers.*.norm3.", "sam.mask_decoder.transformer.layers.*.layer_norm3."),
    (SAM + "mask_decoder.transformer.layers.*.norm4.", "sam.mask_decoder.transformer.layers.*.layer_norm4."),
    (SAM + "mask_decoder.transformer.layers.", "sam.mask_decoder.transformer.layers."),
    (
        SAM + "mask_decoder.transformer.final_attn_token_to_image.",
        "sam.mask_decoder.transformer.final_attn_token_to_image.",
    ),
    (SAM + "mask_decoder.transformer.norm_final_attn.", "sam.mask_decoder.transformer.layer_norm_final_attn."),
    (SAM + "mask_decoder.output_upscaling.0.", "sam.mask_decoder.upscale_conv1."),
    (SAM + "mask_decoder.output_upscaling.1.", "sam.mask_decoder.upscale_layer_norm."),
    (SAM + "mask_decoder.output_upscaling.3.", "sam.mask_decoder.upscale_conv2."),
)


def name_pairs(config: PlumConfig) -> list[tuple[str, str]]:
    """Return (original, here) for each tensor that differs only in its name."""
    decoder = "mask_decoder.output_hypernetworks_mlps.*."
    head, depth = "mask_decoder.iou_prediction_head.", config.sam_config.mask_decoder_config.iou_head_depth
    pairs = [*LANGUAGE_SIDE, *SPAN_SIDE, *SAM_ENCODERS, *SAM_DECODER]
    for module, layers in ((decoder, 3), (head, depth)):
        names = ["proj_in.", *(f"layers.{i}." for i in range(layers - 2)), "proj_out."]
        pairs += [(f"{SAM}{module}layers.{i}.", f"sam.{module}{name}") for i, name in enumerate(names)]
    if config.vlm_config.projector_hidden_act == "linear":
        pairs.append(("model.mm_projector.", "vlm.model.multi_modal_projector.linear_1."))
        pairs.remove(("model.mm_projector.0.", "vlm.model.multi_modal_projector.linear_1."))
    return pairs


def rename(name: str, pairs: list[tuple[str, str]]) -> str | None:
    """Return the second name of the first pair whose first name matches, or None."""
    for source, destination in pairs:
        pattern = re.escape(source).replace(r"\*", r"(\d+)") + ("(?P<rest>.*)" if source.endswith(".") else "")
        if match := re.fullmatch(pattern, name):
            rest = match.groupdict().get("rest", "")
            return (destination.replace("*", match[1]) if "*" in destination else destination) + rest
    return None


# ------------------------------------------------------------------------------------------------ configuration

LLAMA_OPTIONS = (
    "num_attention_heads",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
CLIP_OPTIONS = ("hidden_act", "projection_dim", "layer_norm_eps")
PLUM_OPTIONS = {
    "bidir_nhead": "span_tagger_num_heads",
    "pooler_num_heads": "mask_feedback_num_heads",
    "seg_cls_loss_weight": "span_loss_weight",
    "seg_cls_loss_per_cls_weight": "span_class_weights",
    "dice_type": "mask_overlap_loss",
    "dice_loss_weight": "mask_overlap_loss_weight",
    "bce_loss_weight": "mask_bce_loss_weight",
    "kld_loss_weight": "teacher_kl_loss_weight",
    "focal_tversky_alpha": "tversky_false_negative_weight",
    "focal_tversky_beta": "tversky_false_positive_weight",
}
"""Options of the original that no tensor shape determines -> names here. Its KL sigma is missing because the original
never used it, which equals the default of 1."""


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} contains a JSON {type(content).__name__}, expected an object.")
    return content


def read_options(checkpoint: Path, config_file: Path | None) -> dict[str, dict]:
    """
    Return the options that tensor shapes do not determine, with the keys `llm`, `clip`, `sam` and `plum`: from a
    file of this form, or from the checkpoint's LLaVA-style config.json, which has all of them on one level.
    """
    if config_file is not None:
        return read_json(config_file)
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"{checkpoint} has no config.json; give a JSON file of its options as --config.")
    options = read_json(checkpoint / "config.json")
    clip = {"select_layer": "mm_vision_select_layer", "select_feature": "mm_vision_select_feature"}
    return {
        "llm": options,
        "clip": {name: options[there] for name, there in clip.items() if there in options},
        "plum": options,
    }


class Shapes(dict):
    """Tensors by their original names, used for their shapes only."""

    def size(self, name: str, axes: int) -> torch.Size:
        if name not in self:
            raise ValueError(f"The checkpoint has no tensor {name!r}, from which sizes are read; is it complete?")
        if self[name].ndim != axes:
            raise ValueError(f"The tensor {name!r} is {tuple(self[name].shape)}, expected {axes} axes.")
        return self[name].shape

    def count(self, pattern: str) -> int:
        """Return the number of different values of the `*` in a name prefix."""
        pattern = re.escape(pattern).replace(r"\*", r"(\d+)")
        return len({match[1] for name in self if (match := re.match(pattern, name))})


def read_config(shapes: Shapes, options: dict[str, dict], tower: CLIPVisionConfig | None) -> PlumConfig:
    """
    Return the configuration of a checkpoint.

    Args:
        shapes: Its tensors, LoRA merged.
        options: Options that shapes do not determine, with the keys `llm`, `clip`, `sam`, `plum`; see below.
        tower: Configuration of the vision tower, if the checkpoint does not contain its tensors.

    Raises:
        ValueError: A tensor that determines a size, or an option that no tensor determines, is missing.
    """
    plum = options.get("plum", {})
    single = "model.mm_projector.weight" in shapes
    clip = options.get("clip", {})
    return PlumConfig(
        vlm_config={
            "model_type": "llava",
            "text_config": _text_config(shapes, options.get("llm", {})),
            "vision_config": tower.to_dict() if tower is not None else _vision_config(shapes, clip),
            "image_token_index": shapes.size("model.embed_tokens.weight", 2)[0],
            "projector_hidden_act": "linear" if single else "gelu",
            "vision_feature_layer": clip.get("select_layer", -2),
            "vision_feature_select_strategy": {"patch": "default", "cls_patch": "full"}[
                clip.get("select_feature", "patch")
            ],
        },
        sam_config=_sam_config(shapes, options.get("sam", {})),
        span_tagger_num_layers=shapes.count("bio_encoder.encoder.layers.*."),
        span_tagger_intermediate_size=_tagger_width(shapes),
        # Not read from its configuration: the original saves merged checkpoints with this option reset.
        mask_feedback="mask_pooler.queries" in shapes,
        span_loss_scope="sequence",
        **{name: plum[original] for original, name in PLUM_OPTIONS.items() if plum.get(original) is not None},
    )


def _tagger_width(shapes: Shapes) -> int:
    name = "bio_encoder.encoder.layers.0.linear1.weight"
    return shapes.size(name, 2)[0] if name in shapes else PlumConfig.span_tagger_intermediate_size


def _required(options: dict, name: str, part: str) -> Any:
    if options.get(name) is None:
        raise ValueError(
            f"No tensor determines the {part}'s {name}: put it into the `{part}` object of a JSON file and pass it as "
            "--config, or add the checkpoint's config.json."
        )
    return options[name]


def _text_config(shapes: Shapes, options: dict) -> dict:
    vocab_size, width = shapes.size("model.embed_tokens.weight", 2)
    heads = _required(options, "num_attention_heads", "llm")
    _required(options, "rms_norm_eps", "llm")
    return {
        "model_type": "llama",
        **{name: options[name] for name in LLAMA_OPTIONS if options.get(name) is not None},
        "vocab_size": vocab_size + 1,  # the image placeholder, outside the vocabulary of the original
        "hidden_size": width,
        "intermediate_size": shapes.size("model.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": shapes.count("model.layers.*."),
        "num_key_value_heads": shapes.size("model.layers.0.self_attn.k_proj.weight", 2)[0] * heads // width,
    }


def _vision_config(shapes: Shapes, options: dict) -> dict:
    embeddings, layers = VISION_TOWER + "vision_model.embeddings.", VISION_TOWER + "vision_model.encoder.layers."
    if embeddings + "patch_embedding.weight" not in shapes:
        raise ValueError(
            "The checkpoint has no vision tower; pass the transformers folder of the CLIP model that it was "
            "trained with (mm_vision_tower in its config.json) as --vision_tower."
        )
    width, _, patch_size, _ = shapes.size(embeddings + "patch_embedding.weight", 4)
    cells = shapes.size(embeddings + "position_embedding.weight", 2)[0] - 1
    return {
        "model_type": "clip_vision_model",
        **{name: options[name] for name in CLIP_OPTIONS if name in options},
        "num_attention_heads": _required(options, "num_attention_heads", "clip"),
        "hidden_size": width,
        "intermediate_size": shapes.size(layers + "0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": shapes.count(layers + "*."),
        "image_size": round(cells**0.5) * patch_size,
        "patch_size": patch_size,
    }


def _sam_config(shapes: Shapes, options: dict) -> dict:
    encoder, decoder = SAM + "image_encoder.", SAM + "mask_decoder."
    width, _, patch_size, _ = shapes.size(encoder + "patch_embed.proj.weight", 4)
    grid = shapes.size(encoder + "pos_embed", 4)[1]
    channels = shapes.size(encoder + "neck.0.weight", 4)[0]
    depth = shapes.count(encoder + "blocks.*.")
    # Relative positions cover 2w - 1 cells in a window of w, and the whole grid without one.
    reach = [(shapes.size(f"{encoder}blocks.{i}.attn.rel_pos_h", 2)[0] + 1) // 2 for i in range(depth)]
    return {
        "vision_config": {
            "hidden_size": width,
            "output_channels": channels,
            "num_hidden_layers": depth,
            "num_attention_heads": width // shapes.size(encoder + "blocks.0.attn.rel_pos_h", 2)[1],
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "window_size": min(reach),
            "global_attn_indexes": [i for i, cells in enumerate(reach) if cells == grid],
            "mlp_dim": shapes.size(encoder + "blocks.0.mlp.lin1.weight", 2)[0],
            "num_pos_feats": channels // 2,
        },
        "prompt_encoder_config": {
            "hidden_size": channels,
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "mask_input_channels": shapes.size(SAM + "prompt_encoder.mask_downscaling.3.weight", 4)[0],
            "num_point_embeddings": shapes.count(SAM + "prompt_encoder.point_embeddings.*."),
        },
        "mask_decoder_config": {
            "hidden_size": channels,
            "mlp_dim": shapes.size(decoder + "transformer.layers.0.mlp.lin1.weight", 2)[0],
            "num_hidden_layers": shapes.count(decoder + "transformer.layers.*."),
            "num_attention_heads": options.get("decoder_num_heads", 8),
            "attention_downsample_rate": channels
            // shapes.size(decoder + "transformer.final_attn_token_to_image.q_proj.weight", 2)[0],
            "num_multimask_outputs": shapes.size(decoder + "mask_tokens.weight", 2)[0] - 1,
            "iou_head_depth": shapes.count(decoder + "iou_prediction_head.layers.*."),
            "iou_head_hidden_dim": shapes.size(decoder + "iou_prediction_head.layers.0.weight", 2)[0],
            "layer_norm_eps": 1e-5,  # of PyTorch, as in Meta's SAM; transformers' default is 1e-6
        },
    }


def original_options(config: PlumConfig) -> dict[str, dict]:
    """Return the options from which [`read_config`] makes the same configuration again."""
    text, vision = config.vlm_config.text_config, config.vlm_config.vision_config
    llm = {name: getattr(text, name, None) for name in LLAMA_OPTIONS if name != "rope_theta"}
    return {
        "llm": {**llm, "rope_theta": text.rope_parameters["rope_theta"]},
        "clip": {
            **{
                name: getattr(vision, name)
                for name in ("num_attention_heads", "hidden_act", "projection_dim", "layer_norm_eps")
            },
            "select_layer": config.vlm_config.vision_feature_layer,
            "select_feature": {"default": "patch", "full": "cls_patch"}[
                config.vlm_config.vision_feature_select_strategy
            ],
        },
        "sam": {"decoder_num_heads": config.sam_config.mask_decoder_config.num_attention_heads},
        "plum": {original: getattr(config, name) for original, name in PLUM_OPTIONS.items()},
    }
