"""Real models, processors and tokenizers small enough for tests; random weights, fixed seeds."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.modules.module import register_module_forward_hook
from transformers import CLIPImageProcessor, CompileConfig, PreTrainedTokenizerFast, SamImageProcessor

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from processing_plum import PlumProcessor

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
CORPUS = [
    "USER: What visible parts does the object in the image have? ASSISTANT: The object in the image has the following "
    "visible parts: left wing, right wing, tail, and wheel. It is red.",
    "Which parts can you see? I can see a wheel, another wheel and a third wheel.",
    "(abcdefghijklmnopqrstuvwxyz)<p>/\\",
]
IMAGE_SIZE = 64
NUM_IMAGE_TOKENS = 16


def tiny_tokenizer(kind: str = "byte_level") -> PreTrainedTokenizerFast:
    """A fast tokenizer of kind `byte_level` (BPE), `metaspace` (as SentencePiece) or `wordpiece`."""
    options = {"vocab_size": 400, "special_tokens": SPECIAL_TOKENS, "show_progress": False}
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(**options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def tiny_config(shared_vision: bool = True, **options) -> PlumConfig:
    """A PLUM of 0.2 M parameters on 64 px images; with its own CLIP tower or looking through SAM's encoder."""
    sam_config = {
        "initializer_range": 0.15,  # so that masks differ visibly from each other without any training
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
            "initializer_range": 0.02,
        },
        "prompt_encoder_config": {"hidden_size": 32, "image_size": IMAGE_SIZE, "patch_size": 8},
        "mask_decoder_config": {
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        **(
            {"num_channels": 32, "image_size": IMAGE_SIZE // 8, "patch_size": 2}
            if shared_vision
            else {"image_size": IMAGE_SIZE, "patch_size": 16}
        ),
    }
    vlm_config = {
        "model_type": "llava",
        "image_token_index": SPECIAL_TOKENS.index("<image>"),
        "vision_feature_layer": -1,
        "vision_config": vision_config,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 400,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }
    return PlumConfig(
        vlm_config=vlm_config,
        sam_config=sam_config,
        vlm_image_input="sam_image_embeddings" if shared_vision else "pixel_values",
        span_tagger_num_heads=4,
        span_tagger_intermediate_size=64,
        mask_iou_loss_weight=0.1,
        **options,
    )


def tiny_model(shared_vision: bool = True, **options) -> PlumForConditionalGeneration:
    torch.manual_seed(0)
    return PlumForConditionalGeneration(tiny_config(shared_vision, **options)).eval()


def tiny_processor(shared_vision: bool = True, tokenizer_kind: str = "byte_level") -> PlumProcessor:
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    sam_image_processor = SamImageProcessor(size={"longest_edge": IMAGE_SIZE}, pad_size=square)
    return PlumProcessor(
        sam_image_processor if shared_vision else CLIPImageProcessor(size=square, do_center_crop=False),
        sam_image_processor,
        tiny_tokenizer(tokenizer_kind),
        num_image_tokens=NUM_IMAGE_TOKENS,
        vlm_image_input="sam_image_embeddings" if shared_vision else "pixel_values",
    )


def random_image(height: int = 50, width: int = 70, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_mask(height: int = 50, width: int = 70, seed: int = 0) -> np.ndarray:
    """A random rectangle as a boolean array."""
    generator = np.random.default_rng(seed)
    (top, bottom), (left, right) = (np.sort(generator.choice(side + 1, 2, replace=False)) for side in (height, width))
    mask = np.zeros((height, width), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def mixed_conversations() -> tuple[list[list[dict]], list[list[np.ndarray] | None]]:
    """Conversations and masks: two images of different sizes, three, one and no spans, and a row without an image."""
    wide, tall = random_image(50, 70, seed=1), random_image(90, 40, seed=2)
    conversations = [
        conversation(wide, "I can see a <p>wheel</p>, another <p>wheel</p> and a <p>left wing</p>."),
        conversation(tall, "The <p>tail</p> is red."),
        conversation(wide, "It is red."),
        conversation(None, "Which object?"),
    ]
    return conversations, [[random_mask(50, 70, seed) for seed in range(3)], [random_mask(90, 40, seed=3)], [], None]


def conversation(
    image: Image.Image | None, answer: str | None, question: str = "Which parts can you see?"
) -> list[dict]:
    """One user turn, with an image unless it is None, and one assistant turn unless `answer` is None."""
    content = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image", "image": image})
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return messages


def graphs_in_place() -> CompileConfig:
    """
    Options that compile the decoding steps of a static cache on a CPU too, each into one graph, which returns its
    results in the same memory every time, as replayed CUDA graphs do.
    """

    def compile_in_place(graph, _):
        memory = {}

        def run(*inputs):
            results = list(graph(*inputs))
            for i, result in enumerate(results):
                if isinstance(result, torch.Tensor):
                    kept = memory.setdefault((i, result.shape, result.dtype), torch.empty_like(result))
                    results[i] = kept.copy_(result)
            return tuple(results)

        return run

    config = CompileConfig(backend=compile_in_place, mode="default", fullgraph=True)
    config._compile_all_devices = True  # transformers' own switch for tests on a CPU
    return config


@contextmanager
def count_calls(kind: str) -> Iterator[list[str]]:
    """Collect the name of each module of class `kind` that is called meanwhile, whichever model it belongs to."""
    calls: list[str] = []

    def note(module, *_):
        calls.extend([kind] * (type(module).__name__ == kind))

    hook = register_module_forward_hook(note)
    try:
        yield calls
    finally:
        hook.remove()
