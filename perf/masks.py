"""
Masks of eight conversations with six spans each, feedback on: all conversations in step, against span by span.

    python perf/masks.py
"""

import torch
from choices import build_model, segment_span_by_span
from measure import compare

CONVERSATIONS, SPANS, LENGTH = 8, 6, 64


@torch.no_grad()
def main() -> list[dict]:
    model = build_model(layers=1)
    generator = torch.Generator().manual_seed(0)
    width = model.config.get_text_config().hidden_size
    states = torch.randn(CONVERSATIONS, LENGTH, width, generator=generator)
    embeddings = torch.randn(CONVERSATIONS, 256, 16, 16, generator=generator)
    results = []
    for count, target in ((1, None), (2, None), (SPANS, 2.0)):
        spans = torch.tensor([[row, 4 * i, 4 * i + 2] for row in range(CONVERSATIONS) for i in range(count)])

        def span_by_span(spans=spans):
            masks = []
            for row in range(CONVERSATIONS):
                masks += segment_span_by_span(model, states[row], spans[spans[:, 0] == row], embeddings[row, None])
            return torch.stack(masks)

        def in_step(spans=spans):
            return model.decode_masks(states, spans, embeddings, torch.arange(CONVERSATIONS))[0]

        results += compare(
            f"8 conversations x {count} spans with feedback, mask part, 256 px",
            old=span_by_span,
            new=in_step,
            target=target,
            conversations=CONVERSATIONS,
            spans=count,
            grid="16 x 16",
        )
    return results


if __name__ == "__main__":
    main()
