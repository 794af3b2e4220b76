"""
Growth of cost with choices, questions about an image, spans, image size and batch: the method of the research code and
that of this project, at a few points each.

    python perf/growth.py

Prints the ratio at each point and draws docs/growth.png. The first four are measured on a model in the shape of Llava
with 256 image tokens (language model of 2 layers x 256, SAM of 6 layers x 384), the batch on training steps of
plum-tiny.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from choices import build_model, draw_questions, score_and_segment, score_and_segment_one_by_one, score_one_by_one
from masks import decode_in_step, decode_span_by_span, draw_conversations, draw_spans
from matplotlib.figure import Figure
from measure import ROOT, is_close, peak_memory, result, take_turns
from plum_tiny import build_plum_tiny
from training import build_batch, step_at_once, step_by_rows

SAM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "global_attn_indexes": [2, 5]}
SIDE = 256
Point = tuple[
    int, Callable[[], Any], Callable[[], Any]
]  # position, the method of the research code, that of this project


def build_small_model(side: int = SIDE):
    return build_model(layers=2, width=256, side=side, sam_vision=SAM)


def draw_pixels(side: int = SIDE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image for CLIP and for SAM."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, 3, size, size, generator=generator) for size in (224, side))


def with_choices() -> Iterator[Point]:
    """Yield the language part of one question."""
    model, (pixels, sam_pixels) = build_small_model(), draw_pixels()
    for choices in (2, 5, 10):
        batch = draw_questions(1, choices)
        new = partial(score_and_segment, model, batch, pixels, sam_pixels, masks=False)
        yield choices, partial(score_one_by_one, model, batch, pixels), new


def with_questions() -> Iterator[Point]:
    """Yield questions of three choices about one image, and the masks of their true answers."""
    model, pixels = build_small_model(), draw_pixels()
    for questions in (1, 2, 4):
        inputs = (model, draw_questions(questions, choices=3), *pixels)
        yield questions, partial(score_and_segment_one_by_one, *inputs), partial(score_and_segment, *inputs)


def with_spans() -> Iterator[Point]:
    """Yield the masks of four conversations, with feedback."""
    model = build_small_model()
    states, embeddings = draw_conversations(model, 4)
    for spans in (1, 2, 4, 8):
        inputs = (model, states, draw_spans(len(states), spans), embeddings)
        yield spans, partial(decode_span_by_span, *inputs), partial(decode_in_step, *inputs)


def with_image_size() -> Iterator[Point]:
    """Yield three questions of two choices about one image, and the masks of their true answers."""
    batch = draw_questions(3, choices=2)
    for side in (128, 256, 512):
        inputs = (build_small_model(side), batch, *draw_pixels(side))
        yield side, partial(score_and_segment_one_by_one, *inputs), partial(score_and_segment, *inputs)


def with_batch() -> Iterator[Point]:
    """Yield the gradients of a training step, four spans per row."""
    model, processor = build_plum_tiny()
    for rows in (1, 2, 4, 8):
        batch = build_batch(processor, rows)
        yield rows, partial(step_by_rows, model, batch), partial(step_at_once, model, batch)


AXES = {
    "choices": with_choices,
    "questions about one image": with_questions,
    "spans of each conversation": with_spans,
    "side of the image in pixels": with_image_size,
    "rows of a training step": with_batch,
}


def draw(seconds: dict[str, list[tuple[int, float, float]]]) -> None:
    """Draw docs/growth.png from (position, old seconds, new seconds) of each axis."""
    figure = Figure(figsize=(13, 2.8), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(seconds)), seconds.items(), strict=True):
        places, old, new = zip(*points, strict=True)
        axes.plot(places, old, "o-", label="research code's way")
        axes.plot(places, new, "o-", label="here")
        axes.set(xlabel=name, ylim=(0, None), xticks=places)
    figure.axes[0].set(ylabel="seconds")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(ROOT / "docs" / "growth.png", dpi=110)


@torch.no_grad()
def main() -> list[dict]:
    results, seconds = [], {}
    for name, points in AXES.items():
        seconds[name] = []
        for place, old, new in points():
            (expected, found), (old_seconds, new_seconds) = take_turns([old, new], rounds=2)
            detail = {
                "old_seconds": round(old_seconds, 4),
                "new_seconds": round(new_seconds, 4),
                "new_peak_mb": round(peak_memory(new) / 2**20, 1),
                "threads": torch.get_num_threads(),
            }
            equal = is_close(found, expected, tolerance=1e-3)
            results.append(
                result(f"growth, {name}: {place}", old_seconds / new_seconds, None, equal=equal, detail=detail)
            )
            seconds[name].append((place, old_seconds, new_seconds))
    draw(seconds)
    return results


if __name__ == "__main__":
    main()
