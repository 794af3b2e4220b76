"""PLUM's own modules against tensors recorded from the authors' code, number by number."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import SamModel

from configuration_plum import PlumConfig
from modeling_plum import (
    PlumForConditionalGeneration,
    PlumMaskFeedback,
    PlumSpanTagger,
    decode_spans,
    dice_loss,
    focal_tversky_loss,
    upscale_masks,
)

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recorded(fixtures_dir):
    """Configuration, pieces and weights of whichever set lies in the folder."""
    folder = fixtures_dir / "parity"
    (description,) = folder.glob("parity_*.json")
    return (
        json.loads(description.read_text()),
        load_file(folder / "pieces.safetensors"),
        load_file(folder / "weights_rest.safetensors"),
    )


@pytest.fixture(scope="module")
def config(recorded) -> PlumConfig:
    options = recorded[0]["config"]
    sam, llm, clip = options["sam"], options["llm"], options["clip"]
    width = sam["prompt_embed_dim"]
    return PlumConfig(
        sam_config={
            "vision_config": {
                "hidden_size": sam["encoder_embed_dim"],
                "output_channels": width,
                "num_hidden_layers": sam["encoder_depth"],
                "num_attention_heads": sam["encoder_num_heads"],
                "image_size": sam["image_size"],
                "patch_size": sam["patch_size"],
                "window_size": sam["window_size"],
                "global_attn_indexes": sam["global_attn_indexes"],
                "num_pos_feats": width // 2,
            },
            "prompt_encoder_config": {
                "hidden_size": width,
                "image_size": sam["image_size"],
                "patch_size": sam["patch_size"],
                "mask_input_channels": sam["mask_in_chans"],
            },
            "mask_decoder_config": {
                "hidden_size": width,
                "mlp_dim": sam["decoder_mlp_dim"],
                "num_attention_heads": sam["decoder_num_heads"],
                "iou_head_hidden_dim": sam["iou_head_hidden_dim"],
            },
        },
        vlm_config={
            "model_type": "llava",
            "text_config": {"model_type": "llama", **llm},
            "vision_config": {
                "model_type": "clip_vision_model",
                **{name: value for name, value in clip.items() if not name.startswith("select")},
            },
        },
        span_tagger_num_heads=options["plum"]["bio_encoder_nhead"],
        span_tagger_intermediate_size=options["plum"]["bio_encoder_ffn_dim_effective"],
        mask_feedback_num_heads=options["plum"]["pooler_num_heads"],
    )


def test_the_span_tagger_equals_the_recorded_one(recorded, config):
    _, pieces, weights = recorded
    tagger = PlumSpanTagger(config).eval()
    prefix = "bio_encoder.encoder.layers.0."
    layer = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    tagger.layers[0].load_state_dict(layer)
    mask = pieces["bio_encoder.attention_mask"]
    with torch.no_grad():
        padded = tagger.layers[0](pieces["bio_encoder.in"], src_key_padding_mask=mask == 0)
        full = tagger.layers[0](pieces["bio_encoder.in"])
        for index in (0, 2):
            for kind in ("weight", "bias"):
                value = weights[f"model.token_to_mask_fcs.0.{index}.{kind}"]
                getattr(tagger.classifier[index], kind).copy_(value)
        logits = tagger.classifier(pieces["token_to_mask_fcs.in"])
    assert_close(padded[mask.bool()], pieces["bio_encoder.out"][mask.bool()], **CLOSE)
    assert_close(full, pieces["bio_encoder.out_nomask"], **CLOSE)
    assert_close(logits, pieces["token_to_mask_fcs.out"], **CLOSE)


def test_the_span_projector_equals_the_recorded_one(recorded, config):
    _, pieces, weights = recorded
    projector = PlumForConditionalGeneration(config).span_projector
    with torch.no_grad():
        for index in (0, 2):
            for kind in ("weight", "bias"):
                getattr(projector[index], kind).copy_(weights[f"model.text_hidden_fcs.0.{index}.{kind}"])
        projected = projector(pieces["text_hidden_fcs.in"])
    assert_close(projected, pieces["text_hidden_fcs.out"], **CLOSE)


def test_mask_feedback_equals_the_recorded_pooler_for_one_and_for_several_earlier_masks(recorded, config):
    _, pieces, weights = recorded
    feedback, mask_embed = PlumMaskFeedback(config), SamModel(config.sam_config).prompt_encoder.mask_embed
    downscaling = "model.visual_model.prompt_encoder.mask_downscaling."
    attention = {kind: weights[f"mask_pooler.attn.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias")}
    with torch.no_grad():
        feedback.queries.copy_(weights["mask_pooler.queries"][:, 0])
        for kind in ("weight", "bias"):
            for index in (0, 1):
                value = weights[f"mask_pooler.mask_modulator.projections.{index}.{kind}"]
                getattr(feedback.film[index], kind).copy_(value)
            for index, layer in enumerate((feedback.q_proj, feedback.k_proj, feedback.v_proj)):
                getattr(layer, kind).copy_(attention[kind][index])
            getattr(feedback.out_proj, kind).copy_(weights[f"mask_pooler.attn.out_proj.{kind}"])
            for name, index in (("conv1", 0), ("layer_norm1", 1), ("conv2", 3), ("layer_norm2", 4), ("conv3", 6)):
                getattr(getattr(mask_embed, name), kind).copy_(weights[f"{downscaling}{index}.{kind}"])
        masks, queries = pieces["pooler.prev_low_res_masks"], pieces["pooler.prev_span_embeds"]
        keys, values = feedback.embed(masks, queries, pieces["prompt_encoder.dense_pe"], mask_embed)
        for name in (name for name in pieces if name.startswith("pooler.out.") and name != "pooler.out.0"):
            count = int(name.rsplit(".", 1)[1])
            assert_close(feedback(keys[None, :count], values[None, :count])[0], pieces[name], **CLOSE)
        for index in (0, 1):
            modulated = feedback._modulate(
                pieces[f"film.in.{index}"], feedback.film[index](pieces["film.span_embeds"])
            )
            assert_close(modulated, pieces[f"film.out.{index}"], **CLOSE)


def test_overlap_losses_equal_the_recorded_values(recorded):
    description, pieces, _ = recorded
    values = description["pieces"]["losses"]
    logits, targets = pieces["loss.inputs"], pieces["loss.targets"].float()
    for alpha, beta, gamma in ((0.7, 0.3, 0.75), (0.3, 0.7, 0.75)):
        expected = values[f"focal_tversky_loss alpha={alpha} beta={beta} gamma={gamma} num_masks=1"]
        assert float(focal_tversky_loss(logits, targets, alpha, beta, gamma).sum()) == pytest.approx(
            expected, abs=1e-4
        )
    assert float(dice_loss(logits, targets).sum()) == pytest.approx(
        values["dice_loss scale=1000 num_masks=1"], abs=1e-4
    )


def test_upscaled_masks_equal_the_recorded_ones(recorded):
    description, pieces, _ = recorded
    low_res = pieces["mask_decoder.low_res_masks.multimask_False"][:, 0]
    side = description["config"]["sam"]["image_size"]
    for index, sizes in enumerate(description["pieces"]["postprocess"]):
        masks = upscale_masks(low_res, side, sizes["input_size"], sizes["original_size"])
        assert_close(masks, pieces[f"postprocess.out.{index}"][:, 0], **CLOSE)


def test_spans_decoded_from_the_recorded_tag_logits_are_the_recorded_spans(recorded, fixtures_dir):
    case = recorded[0]["eval"]["eval_mc_pred_spans"]
    logits = load_file(fixtures_dir / "parity" / "eval_mc_pred_spans.safetensors")["seg_logits"]
    expected = [[row, *span] for row, spans in enumerate(case["spans"]) for span in spans]
    assert decode_spans(logits.argmax(dim=-1)).tolist() == expected
