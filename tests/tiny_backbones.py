"""Vision-language models of several families and a SAM, as folders of random weights with their own processors."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    Qwen2VLImageProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SiglipImageProcessor,
)

from tests.tiny import IMAGE_SIZE, tiny_config, tiny_tokenizer

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# As the families' own templates: no marks around the assistant's texts; LLaVA's does not end them either.
LLAVA_TEMPLATE = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
QWEN_TEMPLATE = """\
{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}\
<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
IDEFICS_TEMPLATE = """\
<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}\
{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}\
{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\
<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def tiny_sam(folder: Path) -> Path:
    torch.manual_seed(1)
    config = tiny_config().sam_config
    SamModel(SamConfig(**config.to_dict())).save_pretrained(folder)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SamImageProcessor(size={"longest_edge": IMAGE_SIZE}, pad_size=square).save_pretrained(folder)
    return folder


def _save(folder: Path, config: AutoConfig, *parts) -> Path:
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def _tokenizer(template: str, *special_tokens: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *special_tokens]})
    tokenizer.chat_template = template
    return tokenizer


def llava_clip(folder: Path) -> Path:
    tokenizer = _tokenizer(LLAVA_TEMPLATE)
    config = AutoConfig.for_model(
        "llava",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT},
    )
    square = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(folder, config, processor)


def llava_siglip(folder: Path) -> Path:
    tokenizer = _tokenizer(LLAVA_TEMPLATE)
    config = AutoConfig.for_model(
        "llava",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT},
    )
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(folder, config, processor)


def qwen2_5_vl(folder: Path) -> Path:
    names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = _tokenizer(QWEN_TEMPLATE, *names)
    tokenizer.eos_token = "<|im_end|>"
    _, _, start, end, image, video = tokenizer.convert_tokens_to_ids(list(names))
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    )
    image_processor = Qwen2VLImageProcessor(patch_size=4, min_pixels=16 * 16, max_pixels=48 * 48)
    return _save(folder, config, image_processor, tokenizer)


def idefics3(folder: Path) -> Path:
    """Skips the test where the installed transformers, an older one, wants torchvision for it."""
    try:
        image_processor = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    except ImportError as error:
        pytest.skip(f"needs a library that is not installed: {' '.join(str(error).split())}")
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = _tokenizer(IDEFICS_TEMPLATE, "<|im_start|>", "<fake_token_around_image>", "<global-img>", *tiles)
    tokenizer.add_special_tokens({"eos_token": "<end_of_utterance>"})
    config = AutoConfig.for_model(
        "idefics3",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT},
    )
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    return _save(folder, config, processor)


FAMILIES = [llava_clip, llava_siglip, qwen2_5_vl, idefics3]
