"""
Masks of eight conversations with six spans each, feedback on: all conversations in step, against span by span.

    python perf/masks.py
"""

from functools import partial

import torch
from choices import build_model, segment_span_by_span
from measure import compare

CONVERSATIONS, SPANS, LENGTH = 8, 6, 64


def draw_conversations(model, conversations: int = CONVERSATIONS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states of this number of conversations, and the embedding of an image for each."""
    generator = torch.Generator().manual_seed(0)
    width, grid = model.config.get_text_config().hidden_size, model.config.sam_grid_size
    states = torch.randn(conversations, LENGTH, width, generator=generator)
    return states, torch.randn(conversations, 256, grid, grid, generator=generator)


def draw_spans(conversations: int, spans: int) -> torch.Tensor:
    return torch.tensor([[row, 4 * i, 4 * i + 2] for row in range(conversations) for i in range(spans)])


def decode_span_by_span(model, states, spans, embeddings) -> torch.Tensor:
    masks = []
    for row in range(len(states)):
        masks += segment_span_by_span(model, states[row], spans[spans[:, 0] == row], embeddings[row, None])
    return torch.stack(masks)


def decode_in_step(model, states, spans, embeddings) -> torch.Tensor:
    return model.decode_masks(states, spans, embeddings, torch.arange(len(states)))[0]


@torch.no_grad()
def main() -> list[dict]:
    model = build_model(layers=1)
    states, embeddings = draw_conversations(model)
    results = []
    for count, target in ((1, None), (2, None), (SPANS, 2.0)):
        inputs = (model, states, draw_spans(CONVERSATIONS, count), embeddings)
        results += compare(
            f"8 conversations x {count} spans with feedback, mask part, 256 px",
            old=partial(decode_span_by_span, *inputs),
            new=partial(decode_in_step, *inputs),
            target=target,
            rounds=10,
            conversations=CONVERSATIONS,
            spans=count,
            grid="16 x 16",
        )
    return results


if __name__ == "__main__":
    main()
