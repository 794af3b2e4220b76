"""Draws an answer of a model: the image, its masks, and the text with each span in the colour of its mask.

python scripts/draw_answer.py --model runs/demo/model --output docs/overlay.png --question 8
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from matplotlib.figure import Figure
from transformers import AutoModel, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy", ...) work)
from partkit.overlays import COLOURS, highlight, overlay

LINE_LENGTH = 58
"""Characters of the answer on one line of the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a PLUM checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--question", type=int, default=0, help="which question of mini_questions' test split to ask")
    arguments = parser.parse_args()
    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    record = load_dataset("partonomy", "mini_questions", split="test")[arguments.question]
    content = [{"type": "image", "image": record["image"]}, {"type": "text", "text": record["question"]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    answer = processor.post_process_segmentation(model.segment(**inputs, max_new_tokens=96, do_sample=False))[0]

    figure = Figure(figsize=(10, 3), layout="constrained")
    plain, masked, text = figure.subplots(1, 3, width_ratios=[1, 1, 2.1])
    plain.imshow(record["image"])
    masked.imshow(overlay(record["image"], [span.mask for span in answer.spans]))
    for axes in (plain, masked, text):
        axes.axis("off")
    write_text(text, record["question"], [(record["question"], None)], top=0.9)
    write_text(text, answer.text, highlight(answer.text, answer.spans, colours=COLOURS), top=0.62)
    figure.savefig(arguments.output, dpi=110)


def write_text(axes, whole: str, pieces: list[tuple[str, str | None]], *, top: float) -> None:
    """Writes the pieces of a text one after the other in a fixed-width font, broken between words."""
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
