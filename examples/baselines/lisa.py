"""LISA (arXiv 2308.00692) on PARTONOMY's questions, through a predictions file.

NOT RUN HERE: written after `chat.py` of github.com/dvlab-research/LISA, without the weights. Start it in a clone of
that repository and in its environment, with pyarrow and pycocotools added:

    PYTHONPATH=. python THIS_FILE QUESTIONS.parquet --output lisa.jsonl
    python evaluate_plum.py --predictions lisa.jsonl --name mini_questions --output_dir runs/lisa
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from predictions_file import write_answers
from transformers import AutoTokenizer, CLIPImageProcessor

SIDE = 1024
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)


def load(name: str):
    """Return LISA, its tokenizer and the preprocessing of its CLIP tower, in bfloat16 as in chat.py."""
    from model.LISA import LISAForCausalLM  # of the clone

    tokenizer = AutoTokenizer.from_pretrained(name, model_max_length=512, padding_side="right", use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    seg = tokenizer("[SEG]", add_special_tokens=False).input_ids[0]
    tower = "openai/clip-vit-large-patch14"
    model = LISAForCausalLM.from_pretrained(
        name, low_cpu_mem_usage=True, vision_tower=tower, seg_token_idx=seg, torch_dtype=torch.bfloat16
    )
    model.config.eos_token_id, model.config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.get_model().initialize_vision_modules(model.get_model().config)
    model.get_model().get_vision_tower().to(dtype=torch.bfloat16)
    model = model.bfloat16().cuda().eval()
    model.get_model().get_vision_tower().to(device="cuda")
    return model, tokenizer, CLIPImageProcessor.from_pretrained(model.config.vision_tower)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--model", default="xinlai/LISA-13B-llama2-v1")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    model, tokenizer, clip = load(options.model)

    from model.llava import conversation as conversations  # of the clone
    from model.llava.mm_utils import tokenizer_image_token
    from model.segment_anything.utils.transforms import ResizeLongestSide
    from utils.utils import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

    transform = ResizeLongestSide(SIDE)

    def segment(image, part):
        chat = conversations.conv_templates["llava_v1"].copy()
        shown = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        question = f"Can you segment the {part} in this image? Please output segmentation mask."
        chat.append_message(chat.roles[0], f"{shown}\n{question}")
        chat.append_message(chat.roles[1], "")
        input_ids = tokenizer_image_token(chat.get_prompt(), tokenizer, return_tensors="pt")[None].cuda()
        pixels = np.asarray(image)
        seen = clip.preprocess(pixels, return_tensors="pt")["pixel_values"].cuda().bfloat16()
        resized = torch.from_numpy(transform.apply_image(pixels)).permute(2, 0, 1)
        height, width = resized.shape[-2:]
        padded = torch.nn.functional.pad((resized - MEAN) / STD, (0, SIDE - width, 0, SIDE - height))
        _, masks = model.evaluate(
            seen,
            padded[None].cuda().bfloat16(),
            input_ids,
            [(height, width)],
            [pixels.shape[:2]],
            max_new_tokens=512,
            tokenizer=tokenizer,
        )
        found = [mask for mask in masks if mask.shape[0] > 0]  # logits (instances, height, width)
        return (torch.cat(found) > 0).any(dim=0).cpu().numpy() if found else None

    write_answers(options.shards, options.output, segment)


if __name__ == "__main__":
    main()
