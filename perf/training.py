"""
A training step of plum-tiny on eight conversations: as one batch, against a loop over rows and their spans.

    python perf/training.py
"""

from collections.abc import Callable

import torch
from measure import compare
from plum_tiny import build_plum_tiny, draw_images

from modules_plum import count_loss_items, mask_losses
from plum_partonomy.records import as_chat
from plum_partonomy.seeding import seeded_generator

ROWS, SPANS = 8, 4
ANSWER = "I can see a <p>wing</p>, a <p>tail</p>, a <p>wheel</p> and a <p>hull</p>."


def build_batch(processor, rows: int = ROWS) -> dict:
    """Return this number of images, each with a question, an answer of four tagged parts and their masks."""
    generator = seeded_generator(0, "benchmark masks")
    images = draw_images(rows)
    chats = [
        as_chat([{"role": "user", "content": "Which parts?"}, {"role": "assistant", "content": ANSWER}], image)
        for image in images
    ]
    masks = [[generator.random((image.height, image.width)) < 0.3 for _ in range(SPANS)] for image in images]
    return dict(processor.apply_chat_template(chats, masks=masks, tokenize=True, return_dict=True))


def loop_over_rows(model, batch: dict, counts: dict, rows: int) -> None:
    """Compute the gradients of the batch row by row, and the masks of a row span by span, each in a separate pass."""
    shared = ("input_ids", "attention_mask", "labels", "span_labels", "sam_pixel_values")
    sizes = ("original_sizes", "reshaped_input_sizes")
    for row in range(rows):
        inputs = {name: batch[name][row, None] for name in shared + sizes}
        model(**inputs, loss_counts=counts).loss.backward()
        del inputs["labels"], inputs["span_labels"]
        members = (batch["spans"][:, 0] == row).nonzero()[:, 0]
        spans = batch["spans"][members] * torch.tensor([0, 1, 1])
        for last in range(SPANS):
            # The loss of one mask; the earlier ones are decoded again as its feedback.
            outputs = model(**inputs, spans=spans[: last + 1])
            losses = mask_losses(
                model.config,
                outputs.pred_masks[last:],
                outputs.iou_scores[last:],
                [batch["mask_labels"][members[last]]],
                torch.cat([inputs[name] for name in sizes], dim=1),
                counts["masks"],
            )
            weights = model.loss_weights
            sum(weights[name] * value for name, value in losses.items()).backward()


@torch.enable_grad()
def gradients(model, step: Callable[[], None]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    step()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def step_by_rows(model, batch: dict, rows: int | None = None) -> dict[str, torch.Tensor]:
    """Return the gradients of [`loop_over_rows`], of all rows or of the first few."""
    items = {name: batch[name] for name in ("labels", "span_labels", "spans", "mask_labels")}
    counts = count_loss_items(model.config, **items)
    return gradients(model, lambda: loop_over_rows(model, batch, counts, rows or len(batch["input_ids"])))


def step_at_once(model, batch: dict) -> dict[str, torch.Tensor]:
    return gradients(model, lambda: model(**batch).loss.backward())


def main() -> list[dict]:
    model, processor = build_plum_tiny()
    batch = build_batch(processor)
    return compare(
        "training step, plum-tiny, batch 8, against a loop over rows and spans",
        old=lambda: step_by_rows(model, batch),
        new=lambda: step_at_once(model, batch),
        old_part=lambda: step_by_rows(model, batch, rows=1),
        target=2.0,
        rounds=2,
        tolerance=1e-3,
        rows=ROWS,
        spans_per_row=SPANS,
    )


if __name__ == "__main__":
    main()
