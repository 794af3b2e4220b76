"""
Print the perplexity of plain text before and after training, which measures the drift of a language model.

    python scripts/measure_drift.py --before runs/smollm2_base --after runs/plum_smollm2

The text is the documentation of Python in `pydoc`, which no recipe trains on, without images.
"""

import argparse
import math
import platform
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.checkpoint import load_checkpoint

TOPICS = ("assignment", "calls", "comparisons", "debugger", "execmodel", "import", "objects", "strings")
NUM_TOKENS = 512


@torch.no_grad()
def measure_perplexity(model: PlumForConditionalGeneration, tokenizer, texts: list[str]) -> float:
    """Return the perplexity per token over the first tokens of each text, each text separately."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=NUM_TOKENS)["input_ids"]
        logits = model.vlm(input_ids=ids.to(model.device)).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="Folder of the checkpoint that the training started from.")
    parser.add_argument("--after", required=True, help="Folder of the trained checkpoint.")
    arguments = parser.parse_args()
    figures = []
    for folder in (arguments.before, arguments.after):
        model, processor = load_checkpoint(folder)
        figures.append(measure_perplexity(model.eval(), processor.tokenizer, [topics[name] for name in TOPICS]))
    print(f"perplexity of {len(TOPICS)} texts of the documentation of Python {platform.python_version()}:")
    print(f"before {figures[0]:.3f}, after {figures[1]:.3f}, ratio {figures[1] / figures[0]:.4f}")


if __name__ == "__main__":
    main()
