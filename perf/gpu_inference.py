"""Scoring, answering and encoding images with a model of PLUM-7B's size, for perf/gpu.py."""

import copy

import torch
from breakdown import Breakdown
from choices import score_one_by_one, segment_span_by_span
from gpu_measure import Card, attempt, count_flops, measure
from gpu_model import ANSWER_TOKENS, CHOICES, QUESTIONS, ROWS, SPANS, draw_rows
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration_plum import PlumConfig
from plum_partonomy.inference.packing import encode_conversations


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


@torch.no_grad()
def measure_inference(model, config: PlumConfig, card: Card) -> None:
    with attempt("score ten questions of five choices"):
        measure_choices(model, config, card)
    with attempt("answer about eight images and segment"):
        measure_answers(model, config, card)
    with attempt("encode eight images for SAM, compiled layers"):
        measure_image_encoder(model, config, card)


def measure_choices(model, config: PlumConfig, card: Card) -> None:
    batch = draw_rows(config, 1, QUESTIONS * CHOICES, card.device) | {"choices": CHOICES}
    measure(
        "score ten questions of five choices",
        card,
        old=lambda: centre(score_one_by_one(model, batch, batch["pixel_values"])),
        new=lambda: centre(score_at_once(model, batch)),
        flops=count_flops(lambda: score_at_once(model, batch)),
        breakdown=Breakdown(model, card.device),
    )


def measure_answers(model, config: PlumConfig, card: Card) -> None:
    """Measure answers in a batch against one by one, and with the static cache, compiled on a GPU, against without."""
    prompts = draw_rows(config, ROWS, 1, card.device)
    prompts["input_ids"] = prompts["input_ids"][:, :-ANSWER_TOKENS]
    del prompts["labels"]
    # With random weights the most likely token depends on rounding, so every answer consists of the same tokens.
    options = {"max_new_tokens": ANSWER_TOKENS, "prefix_allowed_tokens_fn": lambda row, ids: [10 + len(ids)]}
    read = [*model.get_decoder().layers.parameters(), *model.vlm.get_output_embeddings().parameters()]
    handle = model.span_tagger.register_forward_hook(tag_evenly)
    try:
        floor = {
            "flops": count_flops(lambda: segment_at_once(model, prompts, options)),
            "bytes_read": ANSWER_TOKENS * sum(weights.nbytes for weights in read),
        }
        measure(
            "answer about eight images and segment",
            card,
            old=lambda: segment_one_by_one(model, prompts, options),
            new=lambda: segment_at_once(model, prompts, options),
            breakdown=Breakdown(model, card.device),
            **floor,
        )
        static = options | {"cache_implementation": "static"}
        with attempt("answer about eight images and segment, static cache"):
            measure(
                "answer about eight images and segment, static cache against the plain one",
                card,
                old=lambda: segment_at_once(model, prompts, options),
                new=lambda: segment_at_once(model, prompts, static),
                **floor,
            )
    finally:
        handle.remove()


def measure_image_encoder(model, config: PlumConfig, card: Card) -> None:
    pixels = draw_rows(config, ROWS, 1, card.device)["sam_pixel_values"]
    compiled = copy.deepcopy(model.sam.vision_encoder)
    for layer in compiled.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(backend="inductor" if card.device == "cuda" else "eager")
    measure(
        "encode eight images for SAM, compiled layers against plain ones",
        card,
        old=lambda: model.get_image_embeddings(pixels),
        new=lambda: compiled(pixels).last_hidden_state,
        flops=count_flops(lambda: model.get_image_embeddings(pixels)),
    )
