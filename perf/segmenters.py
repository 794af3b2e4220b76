"""
SAM through PLUM's interface of segmenters, against transformers' own modules called directly.

    python perf/segmenters.py
"""

import torch
from choices import build_model
from masks import LENGTH, draw_conversations, draw_spans
from measure import compare

from segmentation_plum import mean_over_spans

CONVERSATIONS, SPANS, IMAGES = 8, 2, 4


def decode_directly(model, states, spans, embeddings) -> torch.Tensor:
    """Return the masks `(S, 4G, 4G)` of spans, each decoded with its query alone, by SAM's own modules."""
    sam = model.sam
    queries = mean_over_spans(model.span_projector(states), spans)
    positions, masks = sam.get_image_wide_positional_embeddings(), []
    dense = sam.prompt_encoder.no_mask_embed.weight[..., None, None].expand(-1, -1, *positions.shape[2:])
    for some, their_spans in zip(queries.split(16), spans.split(16), strict=True):
        decoded, _ = sam.mask_decoder(
            embeddings[their_spans[:, 0]],
            image_positional_embeddings=positions.expand(len(some), -1, -1, -1),
            sparse_prompt_embeddings=some[:, None, None],
            dense_prompt_embeddings=dense.expand(len(some), -1, -1, -1),
            multimask_output=False,
        )
        masks.append(decoded[:, 0, 0])
    return torch.cat(masks)


@torch.no_grad()
def main() -> list[dict]:
    model = build_model(layers=1)
    side = model.config.sam_image_size
    pixels = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    results = compare(
        "SAM's encoder through the interface of segmenters, 256 px",
        old=lambda: model.sam.vision_encoder(pixels).last_hidden_state,
        new=lambda: model.get_image_embeddings(pixels),
        target=0.98,
        rounds=20,
        images=IMAGES,
    )
    model.mask_feedback = None
    states, embeddings = draw_conversations(model, CONVERSATIONS)
    spans, index = draw_spans(CONVERSATIONS, SPANS), torch.arange(CONVERSATIONS)
    return results + compare(
        "SAM's mask decoder through the interface of segmenters, 256 px",
        old=lambda: decode_directly(model, states, spans, embeddings),
        new=lambda: model.decode_masks(states, spans, embeddings, index)[0],
        target=0.98,
        rounds=50,
        conversations=CONVERSATIONS,
        spans=SPANS,
        tokens=LENGTH,
    )


if __name__ == "__main__":
    main()
