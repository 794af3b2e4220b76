"""Sa2VA (arXiv 2501.04001) on PARTONOMY's questions, through a predictions file.

NOT RUN HERE: written after the call that the model's card documents (`predict_forward`), without the weights.

    pip install "transformers==4.42.3" torch torchvision pyarrow pillow pycocotools einops timm
    python examples/baselines/sa2va.py partonomy/mini_questions/test-*.parquet --output sa2va.jsonl
    python evaluate_plum.py --predictions sa2va.jsonl --name mini_questions --output_dir runs/sa2va
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from predictions_file import write_answers
from transformers import AutoModel, AutoTokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--model", default="ByteDance/Sa2VA-4B")
    parser.add_argument("--revision", help="commit of the model whose code you have read: it is run")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    pinned = {"revision": options.revision, "trust_remote_code": True}
    model = AutoModel.from_pretrained(options.model, torch_dtype=torch.bfloat16, **pinned).eval().cuda()
    tokenizer = AutoTokenizer.from_pretrained(options.model, use_fast=False, **pinned)

    def segment(image, part):
        text = f"<image>Please segment the {part}."
        result = model.predict_forward(image=image, text=text, past_text="", mask_prompts=None, tokenizer=tokenizer)
        masks = result.get("prediction_masks") or []  # arrays (1, height, width)
        return (
            np.any([np.asarray(mask).reshape(image.height, image.width) > 0 for mask in masks], axis=0)
            if masks
            else None
        )

    write_answers(options.shards, options.output, segment)


if __name__ == "__main__":
    main()
