"""Draw an answer of a model, and below it the effect of one given mask on the others.

    python scripts/draw_answer.py --model checkpoints/plum-tiny --question 8 \\
        --corrections runs/correction/predictions.jsonl --output docs/overlay.png

The correction is the answer of a `--task correction` run with the largest gain from the first given mask, among those
with three masks or more.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import load_dataset
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoProcessor

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)
from plum_partonomy.masks import decode
from plum_partonomy.scoring.corrections import gain, read_corrections
from plum_partonomy.scoring.overlays import COLOURS, highlight, overlay

LINE_LENGTH = 58
"""Characters per line of the answer."""
SIDE = 384
"""Side of the drawn images in pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a PLUM checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--question", type=int, default=0, help="which question of mini_questions' test split to ask")
    parser.add_argument("--corrections", type=Path, required=True, help="predictions.jsonl of mini_instances")
    arguments = parser.parse_args()
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    answered, corrected = figure.subfigures(2, 1, height_ratios=[1, 1.06])
    draw_answer(answered, arguments.model, arguments.question)
    draw_correction(corrected, arguments.corrections)
    figure.savefig(arguments.output, dpi=110)


def draw_answer(figure, model_name: str, number: int) -> None:
    """Draw the image, its masks, and question and answer with each span in the colour of its mask."""
    model = AutoModel.from_pretrained(model_name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(model_name, trust_remote_code=True)
    record = load_dataset("partonomy", "mini_questions", split="test")[number]
    content = [{"type": "image", "image": record["image"]}, {"type": "text", "text": record["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    answer = processor.post_process_segmentation(model.segment(**inputs, do_sample=False))[0]
    plain, masked, text = figure.subplots(1, 3, width_ratios=[1, 1, 2.1])
    plain.imshow(enlarge(record["image"], []))
    masked.imshow(enlarge(record["image"], [span.mask for span in answer.spans]))
    for axes in (plain, masked, text):
        axes.axis("off")
    write_text(text, record["question"], [(record["question"], None)], top=0.9)
    write_text(text, answer.text, highlight(answer.text, answer.spans, colours=COLOURS), top=0.62)


def draw_correction(figure, path: Path) -> None:
    """Draw an answer about equal parts: the predicted masks, the given mask, and the masks after it."""
    answer = max((answer for answer in read_corrections(path) if len(answer.phrases) > 2), key=gain)
    record = load_dataset("partonomy", "mini_instances", split="test")[answer.row]
    given = [answer.true[answer.corrected]]
    shown = (
        (f"{answer.question}\nits own masks", answer.before, COLOURS),
        ("one mask given by a person", given, COLOURS[answer.corrected :]),
        ("the masks decoded after it", answer.after, COLOURS),
    )
    for axes, (title, rles, colours) in zip(figure.subplots(1, 3), shown, strict=True):
        axes.imshow(enlarge(record["image"], [decode(rle) for rle in rles], colours))
        axes.set_title(title, fontsize=9.5)
        axes.axis("off")


def enlarge(image: Image.Image, masks: Sequence[np.ndarray], colours: Sequence[str] = COLOURS) -> Image.Image:
    """Return the image with its masks, smoothly enlarged to SIDE."""
    large = [
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) > 127
        for mask in masks
    ]
    return overlay(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), large, colours=colours)


def write_text(axes, whole: str, pieces: list[tuple[str, str | None]], *, top: float) -> None:
    """Write the pieces of a text one after the other in a fixed-width font, with line breaks between words."""
    colours = np.concatenate([[colour] * len(piece) for piece, colour in pieces])
    row, column = 0, 0
    for position, character in enumerate(whole):
        word_end = whole.find(" ", position + 1) if character == " " else position
        word_end = len(whole) if word_end < 0 else word_end
        if character == " " and column + word_end - position > LINE_LENGTH:
            row, column = row + 1, 0
            continue
        colour = colours[position]
        style = {"color": colour or "#333333", "weight": "bold" if colour else "normal"}
        axes.text(column / LINE_LENGTH, top - 0.11 * row, character, family="monospace", fontsize=9.5, **style)
        column += 1


if __name__ == "__main__":
    main()
