"""Real models of others, small enough for tests: SAM 3, Gemma 3, Qwen3-VL; random weights, fixed seeds."""

import numpy as np
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Sam3Config,
    Sam3Model,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from plum_partonomy.masks import encode
from plum_partonomy.records import PartMask, Question
from tests.tiny import tiny_tokenizer

SIDE = 56
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]\n{% for item in message.content %}"
    "{% if item.type == 'image' %}IMAGE{% else %}{{ item.text }}{% endif %}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


def with_tokens(**tokens: str) -> PreTrainedTokenizerFast:
    """The tokenizer of the other tests with some special tokens, each by the name that a processor knows it by."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens.values())})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=tokens,
    )


def text_config(**options) -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 420,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        **options,
    }


def tiny_gemma3() -> tuple[Gemma3ForConditionalGeneration, Gemma3Processor]:
    """A Gemma 3 whose first layer sees 24 tokens back, so that prompts are longer than its window."""
    tokenizer = with_tokens(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
    image_processor = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    template = TEMPLATE.replace("IMAGE", "<boi>")
    processor = Gemma3Processor(image_processor, tokenizer, chat_template=template, image_seq_length=4)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text_config(sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
        vision_config={**vision, "image_size": SIDE, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<soft>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<boi>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<eoi>"),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval(), processor


class StillQwen3VLProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor for images alone: its videos need torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]


def tiny_qwen3vl() -> tuple[Qwen3VLForConditionalGeneration, StillQwen3VLProcessor]:
    """A Qwen3-VL, whose positions after an image depend on its size."""
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = with_tokens(**names)
    sizes = {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}
    image_processor = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2, size=sizes)
    template = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = StillQwen3VLProcessor(image_processor, tokenizer, chat_template=template)
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}
    config = Qwen3VLConfig(
        text_config=text_config(rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
        },
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration(config).eval(), processor


def tiny_sam3() -> tuple[Sam3Model, PreTrainedTokenizerFast]:
    """A SAM 3 of 56 pixels and 6 queries."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    vision = {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 14, "window_size": 2}
    vision |= {"global_attn_indexes": [1], "pretrain_image_size": SIDE}
    config = Sam3Config(
        vision_config={
            "backbone_config": {"model_type": "sam3_vit_model", **sizes, **vision},
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={
            **sizes,
            "vocab_size": 420,
            "num_hidden_layers": 1,
            "max_position_embeddings": 16,
            "projection_dim": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        geometry_encoder_config={**sizes, "num_layers": 1},
        detr_encoder_config={**sizes, "num_layers": 1},
        detr_decoder_config={**sizes, "num_layers": 1, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
        initializer_range=0.3,  # so that words and masks differ without any training
    )
    torch.manual_seed(0)
    return Sam3Model(config).eval(), tiny_tokenizer()


def make_question(number: int = 0, *, image_label: str = "plane", question_type: str = "identification") -> Question:
    """A question about an image of 60 x 84 pixels; the third of its choices is right."""
    parts = [["tail"], ["wheel"], ["left wing", "tail"]]
    left, right = np.zeros((60, 84), dtype=bool), np.zeros((60, 84), dtype=bool)
    left[:, :40], right[:, 50:] = True, True
    object_fields = {}
    if question_type in ("whole_to_part", "part_to_whole"):
        object_fields = {"object_question": "What is the object in the image?", "object_correct": 1}
        object_fields |= {"object_choices": ["It is a boat.", "It is a plane."], "object_classes": ["boat", "plane"]}
    return Question(
        id=f"q{number}",
        image=None,
        image_id=f"i{number}",
        image_label=image_label,
        question_type=question_type,
        question="What visible parts does the object in the image have?",
        choices=["It has a tail.", "It has a wheel.", "It has a left wing, and tail."],
        correct=2,
        choice_parts=parts,
        masks=[PartMask("left wing", encode(left)), PartMask("tail", encode(right)), PartMask("wheel", encode(right))],
        **object_fields,
    )
