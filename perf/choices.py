"""
Questions about one image, five choices each, and the masks of the true answers: computed as one tree of tokens,
against one forward pass with the image per choice, as in the research code.

    python perf/choices.py

A model of random weights in the shape of Llava: 256 image tokens, a language model of 4 layers x 512, SAM ViT-B at
256 px.
"""

import torch
import torch.nn.functional as F
from measure import compare

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.packing import encode_conversations

IMAGE_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 256, 24, 28
COMMON_ANSWER_TOKENS = 11  # "The object in the image has the following visible parts:"
CHOICES, SPANS = 5, 4
QUESTIONS_AT_ONCE = 2  # memory grows with the rows at once
IMAGE_TOKEN, VOCABULARY = 31_999, 32_000


def build_model(
    layers: int = 4, width: int = 512, side: int = 256, sam_vision: dict | None = None
) -> PlumForConditionalGeneration:
    """Return Llava with a small CLIP of 224 px and 256 patches, and SAM ViT-B at 256 px or the given SAM."""
    text_config = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 11 * width // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 224,
        "patch_size": 14,
    }
    sizes = {"image_size": side, "patch_size": 16}
    config = PlumConfig(
        vlm_config={
            "model_type": "llava",
            "image_token_index": IMAGE_TOKEN,
            "text_config": text_config,
            "vision_config": vision_config,
        },
        sam_config={
            "initializer_range": 0.05,
            "vision_config": {**sizes, "initializer_range": 0.02, **(sam_vision or {})},
            "prompt_encoder_config": sizes,
        },
        span_tagger_intermediate_size=width,
    )
    torch.manual_seed(0)
    return PlumForConditionalGeneration(config).eval()


def draw_questions(questions: int, choices: int = CHOICES) -> dict:
    """Return rows of `questions` x `choices` token ids, their labels, and spans of each question's first choice."""
    generator = torch.Generator().manual_seed(0)

    def words(*shape):
        return torch.randint(10, 30_000, shape, generator=generator)

    image = torch.full((IMAGE_TOKENS,), IMAGE_TOKEN)
    start, common = words(5), words(COMMON_ANSWER_TOKENS)
    rows = [
        torch.cat([start, image, question, common, words(ANSWER_TOKENS - COMMON_ANSWER_TOKENS)])
        for question in words(questions, QUESTION_TOKENS)
        for _ in range(choices)
    ]
    input_ids = torch.stack(rows)
    labels = input_ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    first = input_ids.shape[1] - ANSWER_TOKENS + COMMON_ANSWER_TOKENS
    spans = [[q, first + 4 * i, first + 4 * i + 2] for q in range(questions) for i in range(SPANS)]
    return {"input_ids": input_ids, "labels": labels, "spans": torch.tensor(spans), "choices": choices}


def score_one_by_one(model, batch, pixels) -> torch.Tensor:
    """Score with one pass over image, question and choice per choice, and logits of the whole sequence."""
    scores = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        outputs = model.vlm(input_ids=ids[None], pixel_values=pixels, use_cache=False)
        scores.append(F.cross_entropy(outputs.logits[0, :-1].float(), labels[1:]))
    return torch.stack(scores).view(-1, batch["choices"])


def score_and_segment_one_by_one(model, batch, pixels, sam_pixels):
    """Score one by one; then, per question, run SAM's encoder, another pass over the true answer, and single spans."""
    scores, masks = score_one_by_one(model, batch, pixels), []
    for question in range(len(scores)):
        embeddings = model.get_image_embeddings(sam_pixels)
        ids = batch["input_ids"][question * batch["choices"], None]
        states = model.vlm.model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
        masks += segment_span_by_span(model, states[0], batch["spans"][batch["spans"][:, 0] == question], embeddings)
    return scores, torch.stack(masks)


def segment_span_by_span(model, states, spans, embeddings) -> list[torch.Tensor]:
    """Decode one conversation span by span, with all earlier masks embedded again for each span."""
    queries = model.span_projector(states)
    positions, prompt_encoder = model.sam.get_image_wide_positional_embeddings(), model.sam.prompt_encoder
    masks, used = [], []
    for _, start, end in spans.tolist():
        query = queries[start:end].mean(dim=0)
        dense = model._no_mask_prompt(query[None])
        if masks:
            embedded = [
                model.mask_feedback.embed(mask[None], earlier[None], positions, prompt_encoder.mask_embed)
                for mask, earlier in zip(masks, used, strict=True)
            ]
            keys, values = (torch.cat(part)[None] for part in zip(*embedded, strict=True))
            dense = model.mask_feedback(keys, values)
        mask, _ = model.sam.mask_decoder(
            embeddings,
            image_positional_embeddings=positions,
            sparse_prompt_embeddings=query[None, None, None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        masks.append(mask[0, 0, 0])
        used.append(query)
    return masks


def score_and_segment(model, batch, pixels, sam_pixels, *, masks: bool = True):
    """Score image, question and choices as one tree; decode the true answers' masks from the same states."""
    (features,) = model.get_vlm_image_features(
        [{"input_ids": IMAGE_TOKENS * [model.config.vlm_config.image_token_id]}], pixel_values=pixels
    )
    embeddings = model.get_image_embeddings(sam_pixels) if masks else None
    scores, decoded, choices = [], [], batch["choices"]
    for start in range(0, len(batch["input_ids"]) // choices, QUESTIONS_AT_ONCE):
        rows = slice(start * choices, (start + QUESTIONS_AT_ONCE) * choices)
        ids, labels = batch["input_ids"][rows], batch["labels"][rows]
        images = torch.zeros(len(ids), dtype=torch.long)
        inputs = {"vlm_image_features": [features], "sam_image_index": images}
        states = encode_conversations(model, ids, torch.ones_like(ids), **inputs)
        scores.append(model.score_choices(ids, labels, choices, hidden_states=states))
        if masks:
            question = batch["spans"][:, 0]
            spans = batch["spans"][(question >= start) & (question < start + QUESTIONS_AT_ONCE)]
            spans = spans - torch.tensor([start, 0, 0])
            decoded.append(model.decode_masks(states[::choices], spans, embeddings, images[::choices])[0])
    return (torch.cat(scores), torch.cat(decoded)) if masks else torch.cat(scores)


@torch.no_grad()
def main() -> list[dict]:
    model = build_model()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 224, 224, generator=generator)
    sam_pixels = torch.randn(1, 3, 256, 256, generator=generator)
    ten, one = draw_questions(10), draw_questions(1)
    shape = "4 layers x 512, 256 image tokens, SAM ViT-B at 256 px"
    return [
        *compare(
            "ten questions on one image, five choices, masks of the true answer",
            old=lambda: score_and_segment_one_by_one(model, ten, pixels, sam_pixels),
            new=lambda: score_and_segment(model, ten, pixels, sam_pixels),
            target=6.0,
            old_part=lambda: score_and_segment_one_by_one(model, one, pixels, sam_pixels),
            memory_target=0.6,
            rounds=1,
            shape=shape,
            questions=10,
            questions_at_once=QUESTIONS_AT_ONCE,
            choices=CHOICES,
            spans_per_question=SPANS,
        ),
        *compare(
            "one question, five choices, language part",
            old=lambda: score_one_by_one(model, one, pixels),
            new=lambda: score_and_segment(model, one, pixels, sam_pixels, masks=False),
            target=3.0,
            shape=shape,
            choices=CHOICES,
        ),
    ]


if __name__ == "__main__":
    main()
