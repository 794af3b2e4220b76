"""Vision-language models of several families and a SAM, as folders of random weights with their own processors."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4ImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
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
# As the families' own templates: no marks around the assistant's texts; LLaVA's does not end them, and the one of
# LLaVA-OneVision asks for an answer in another way than it renders one.
LLAVA_TEMPLATE = """\
{% for message in messages %}{{ message['role'].upper() + ': ' }}\
{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
ONEVISION_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}\
{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else '\n' + part['text'] }}{% endfor %}\
<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
CHATML_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}\
{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
QWEN3_TEMPLATE = CHATML_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
QWEN2_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
INTERNVL_TEMPLATE = CHATML_TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>\n")
IDEFICS_TEMPLATE = """\
<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}\
{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}\
{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\
<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
GEMMA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{{ 'START' + message['role'].replace('assistant', 'model') + '\n' }}\
{% for part in message['content'] %}{{ 'IMAGE' if part['type'] == 'image' else part['text'] | trim }}{% endfor %}\
END\n{% endfor %}{% if add_generation_prompt %}{{ 'STARTmodel\n' }}{% endif %}"""


def gemma_template(start: str, end: str, image: str) -> str:
    return GEMMA_TEMPLATE.replace("START", start).replace("END", end).replace("IMAGE", image)


def tiny_sam(folder: Path) -> Path:
    torch.manual_seed(1)
    config = tiny_config().sam_config
    SamModel(SamConfig(**config.to_dict())).save_pretrained(folder)
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SamImageProcessor(size={"longest_edge": IMAGE_SIZE}, pad_size=square).save_pretrained(folder)
    return folder


def _save(folder: Path, config: AutoConfig, *parts, **processor_config) -> Path:
    """Save a random model with its processor, or with the parts of one that needs a video processor as well."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():  # some projections start at zero, which hides the image
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    if processor_config:
        (folder / "processor_config.json").write_text(json.dumps(processor_config))
    return folder


def _tokenizer(template: str, *special_tokens: str, stop: str = "</s>", **named_tokens: str):
    """Return a tokenizer with special tokens; those with a name are attributes of it, such as `boi_token`."""
    plain = tiny_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        **{**plain.special_tokens_map, "eos_token": stop},
        **({"extra_special_tokens": named_tokens} if named_tokens else {}),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *special_tokens, *named_tokens.values()]})
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


QWEN_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(folder: Path, model_type: str, template: str, text: dict, vision: dict, processor: str) -> Path:
    tokenizer = _tokenizer(template, *QWEN_TOKENS, stop="<|im_end|>")
    _, start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    config = AutoConfig.for_model(
        model_type,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            **text,
        },
        vision_config={
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "depth": 2,
            "num_heads": 2,
            "patch_size": 4,
            **vision,
        },
    )
    image_processor = Qwen2VLImageProcessor(patch_size=4, min_pixels=16 * 16, max_pixels=48 * 48)
    return _save(folder, config, image_processor, tokenizer, processor_class=processor)


def qwen2_5_vl(folder: Path) -> Path:
    vision = {"window_size": 16, "fullatt_block_indexes": [1]}
    return _qwen(folder, "qwen2_5_vl", QWEN2_SYSTEM + QWEN3_TEMPLATE, {}, vision, "Qwen2_5_VLProcessor")


def qwen3_vl(folder: Path) -> Path:
    text = {"head_dim": 16, "tie_word_embeddings": True}
    vision = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    return _qwen(folder, "qwen3_vl", QWEN3_TEMPLATE, text, vision, "Qwen3VLProcessor")


def _idefics_like(model_type: str) -> tuple:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    special = ("<|im_start|>", "<fake_token_around_image>", "<global-img>", *tiles)
    tokenizer = _tokenizer(IDEFICS_TEMPLATE, *special, stop="<end_of_utterance>")
    config = AutoConfig.for_model(
        model_type,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT},
    )
    return config, tokenizer


def idefics3(folder: Path) -> Path:
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config, tokenizer = _idefics_like("idefics3")
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)
    return _save(folder, config, processor)


def smolvlm(folder: Path) -> Path:
    image_processor = SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config, tokenizer = _idefics_like("smolvlm")
    return _save(folder, config, image_processor, tokenizer, processor_class="SmolVLMProcessor", image_seq_len=4)


def internvl(folder: Path) -> Path:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(INTERNVL_TEMPLATE, "<|im_start|>", stop="<|im_end|>", **names, video_token="<video>")
    config = AutoConfig.for_model(
        "internvl",
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "qwen2", **TEXT},
    )
    tiles = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    return _save(folder, config, tiles, tokenizer, processor_class="InternVLProcessor", image_seq_length=4)


def llava_onevision(folder: Path) -> Path:
    tokenizer = _tokenizer(ONEVISION_TEMPLATE, "<|im_start|>", "<video>", stop="<|im_end|>")
    sizes = [[32, 32], [32, 64], [64, 32]]
    config = AutoConfig.for_model(
        "llava_onevision",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=sizes,
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **TEXT},
    )
    tiles = LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=sizes)
    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
    return _save(folder, config, tiles, tokenizer, processor_class="LlavaOnevisionProcessor", **options)


def gemma3(folder: Path) -> Path:
    """The placeholder of a text, which begins the image, is another token than those of the image's patches."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    template = gemma_template("<start_of_turn>", "<end_of_turn>", "<start_of_image>")
    tokenizer = _tokenizer(template, "<start_of_turn>", stop="<end_of_turn>", **names)
    config = AutoConfig.for_model(
        "gemma3",
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        mm_tokens_per_image=4,
        vision_config={"model_type": "siglip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        text_config={**TEXT, "head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16, "layer_types": LAYERS},
    )
    image_processor = Gemma3ImageProcessor(size={"height": 32, "width": 32}, image_seq_length=4)
    processor = Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=template)
    return _save(folder, config, processor)


LAYERS = ["sliding_attention", "full_attention"]


def gemma4(folder: Path) -> Path:
    """With what sets the family apart: embeddings of every layer, shared keys and values, a cap on the logits."""
    from transformers import Gemma4Processor  # needs torchvision in older releases of transformers

    names = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    audio = {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    template = gemma_template("<|turn>", "<turn|>", "<|image|>")
    tokenizer = _tokenizer(template, "<|turn>", "<|video|>", stop="<turn|>", **names, **audio)
    config = AutoConfig.for_model(
        "gemma4",
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        audio_token_id=tokenizer.audio_token_id,
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "position_embedding_size": 256,
        },
        text_config={
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 32,
            "layer_types": 2 * LAYERS,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 500,
            "hidden_size_per_layer_input": 8,
            "final_logit_softcapping": 2.0,
            "use_bidirectional_attention": "vision",
        },
    )
    image_processor = Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)
    return _save(folder, config, image_processor, tokenizer, processor_class=Gemma4Processor.__name__)


@dataclass(frozen=True)
class Family:
    """
    A family of vision-language models with which every test of a family runs, and what it lacks.

    Args:
        build: Writes a tiny model of the family with its own processor into a folder.
        name: Title in the documentation.
        example: A pretrained checkpoint on the Hub, if there is a well-known one.
        needs: Library that its processor imports; without it, tests of the family are skipped.
        keeps_template: Whether PLUM is trained with the family's own chat template.
        shares_images: Whether an image is encoded once for all its questions.
        shares_beginnings: Whether the common beginning of several answers is computed once.
        answers_once: Whether masks use the hidden states of `generate`, without another pass over the answer.
        static_once: The same with a static cache.
        why: Reason for what the family lacks.
    """

    build: Callable[[Path], Path]
    name: str
    example: str
    needs: str = ""
    keeps_template: bool = True
    shares_images: bool = True
    shares_beginnings: bool = True
    answers_once: bool = True
    static_once: bool = True
    why: str = ""

    def write(self, folder: Path) -> str:
        """Write the tiny model, or skip the test where the family's classes or libraries are not installed."""
        if self.needs:
            pytest.importorskip(self.needs)
        try:
            return str(self.build(folder))
        except ImportError as error:  # image processors of some families, in older releases of transformers
            pytest.skip(f"needs a library that is not installed: {' '.join(str(error).split())}")


NO_END = "its chat template does not end answers with a special token"
FAMILIES = [
    Family(llava_clip, "LLaVA", "llava-hf/llava-1.5-7b-hf", keeps_template=False, why=NO_END),
    Family(llava_siglip, "LLaVA with a SigLIP", "", keeps_template=False, why=NO_END),
    Family(
        llava_onevision,
        "LLaVA-OneVision",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        keeps_template=False,
        why="its chat template asks for an answer in another way than it renders one",
    ),
    Family(qwen2_5_vl, "Qwen2.5-VL", "Qwen/Qwen2.5-VL-3B-Instruct"),
    Family(
        qwen3_vl,
        "Qwen3-VL",
        "Qwen/Qwen3-VL-4B-Instruct",
        shares_beginnings=False,
        why="image features enter several layers",
    ),
    Family(internvl, "InternVL 3", "OpenGVLab/InternVL3-2B-hf"),
    Family(idefics3, "Idefics3, SmolVLM", "HuggingFaceTB/SmolVLM-Instruct"),
    Family(smolvlm, "SmolVLM2", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", needs="num2words"),
    Family(
        gemma3,
        "Gemma 3",
        "google/gemma-3-4b-it",
        shares_beginnings=False,
        static_once=False,
        why="attention differs by layer (sliding windows)",
    ),
    Family(
        gemma4,
        "Gemma 4",
        "google/gemma-4-e2b-it",
        shares_beginnings=False,
        answers_once=False,
        static_once=False,
        why="attention differs by layer, and every layer has embeddings of its own",
    ),
]
# Configurations that PLUM refuses: what they are called, and why in the words of the error.
ENCODER_DECODER = "encoder-decoder: its decoder sees the answer only"
NO_IMAGE_TOKENS = "images are not placeholder tokens in input_ids"
NO_MODEL = "has no model without language-modeling head"
REFUSED = [
    ("Florence-2", {"model_type": "florence2"}, ENCODER_DECODER),
    ("Pix2Struct", {"model_type": "pix2struct"}, ENCODER_DECODER),
    ("BLIP-2 with T5", {"model_type": "blip-2", "text_config": {"model_type": "t5"}}, ENCODER_DECODER),
    ("GIT", {"model_type": "git"}, NO_IMAGE_TOKENS),
    ("Kosmos-2", {"model_type": "kosmos-2"}, NO_IMAGE_TOKENS),
    ("BLIP-2 with OPT", {"model_type": "blip-2", "image_token_index": 9}, NO_MODEL),
    ("Llama 4", {"model_type": "llama4"}, NO_MODEL),
]
