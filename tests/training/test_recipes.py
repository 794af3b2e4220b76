"""The recipes that need pretrained weights: their options, and their models on the meta device."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import Qwen2VLImageProcessor

from configuration_plum import PlumConfig
from partonomy_dataset import Partonomy
from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.training.model import compose_backbones, freeze, load_processor_alone
from plum_partonomy.training.options import parse_arguments
from plum_partonomy.training.run import main as train
from scripts.count_parameters import count_parameters, format_table
from supervision_plum import PROMPT_DRAWS
from tests.tiny import mixed_conversations, tiny_model, tiny_processor
from tests.tiny_backbones import llava_clip, qwen3_vl, tiny_sam

ROOT = Path(__file__).parents[2]
BACKBONES = ROOT / "tests" / "fixtures" / "backbones"


PUBLISHED = ["7b", "13b"]
# The configurations of the two backbones of each pair of recipes.
SIZES = {
    "7b": ("llava-1.5-7b-hf", "sam-vit-huge"),
    "13b": ("llava-1.5-13b-hf", "sam-vit-huge"),
    "qwen3vl_4b_sam2": ("qwen3-vl-4b-instruct", "sam2.1-hiera-large"),
}


def options_of(size: str) -> list[str]:
    vlm, sam = (str(BACKBONES / name) for name in SIZES[size])
    return [str(ROOT / "recipes" / f"stage1_plum_{size}.yaml"), "--vlm", vlm, "--sam", sam]


def parse_recipe(name: str):
    return parse_arguments([str(ROOT / "recipes" / f"{name}.yaml"), "--use_cpu", "true", "--data_dir", "data"])


@pytest.mark.parametrize("size", SIZES)
def test_stage_1_mixes_semantic_referring_question_and_reasoning_data_as_9_5_5_1(size):
    sources = parse_recipe(f"stage1_plum_{size}")[1].sources
    known = {config.name for config in Partonomy.BUILDER_CONFIGS}
    assert {source.name for source in sources} <= known and {source.dataset for source in sources} == {"partonomy"}
    kinds = {"ref": "referring", "lla": "questions", "rea": "reasoning"}
    rates = Counter()
    for source in sources:
        rates[kinds.get(source.name[:3], "semantic")] += source.rate
    assert rates == pytest.approx({"semantic": 9, "referring": 5, "questions": 5, "reasoning": 1})
    assert [source.name for source in sources if source.eval_split] == ["reasonseg"]
    assert all(source.data_dir.startswith("data/") for source in sources)


@pytest.mark.parametrize("size", SIZES)
def test_stage_2_goes_on_from_stage_1_with_one_question_for_each_image(size):
    (model, data, args), (model_before, data_before, before) = (
        parse_recipe(f"{name}_{size}") for name in ("stage2_partonomy", "stage1_plum")
    )
    assert model.model == before.output_dir and data.max_length == data_before.max_length
    for name in ("lora_r", "lora_alpha", "lora_trained_whole"):
        assert getattr(model, name) == getattr(model_before, name)
    assert [(source.name, source.data_dir, source.eval_split) for source in data.sources] == [
        ("core_stage2", "data", None)
    ]
    assert (args.learning_rate, args.max_steps) == (before.learning_rate, before.max_steps)


@pytest.mark.parametrize("name", ["plum_tiny", "plum_photos"])
def test_recipes_of_clicks_change_no_answer_and_store_nothing_of_encoder_and_language_model(name):
    arguments, data, _ = parse_recipe(f"clicks_{name}")
    assert data.prompt_probability == 1
    model = tiny_model().train()
    freeze(model, arguments.frozen_modules)
    conversations, masks = mixed_conversations()
    batch = tiny_processor().apply_chat_template(conversations, masks=masks, tokenize=True, return_dict=True)
    draws = torch.tensor([[kind, *[0.5] * (PROMPT_DRAWS - 1)] for kind in (0.1, 0.6, 0.9, 0.1)])
    outputs = model(**batch, prompt_rounds=torch.tensor([3, 2, 1, 3]), prompt_draws=draws)
    assert not outputs.last_hidden_state.requires_grad and not outputs.span_logits.requires_grad
    outputs.loss.backward()
    learning = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    decoding = ("sam.mask_decoder.", "sam.prompt_encoder.", "mask_feedback.", "span_projector.")
    assert all(name.startswith(decoding) for name in learning)
    for part in ("mask_decoder.iou_token", "prompt_encoder.point_embed.3", "prompt_encoder.mask_embed.conv1"):
        assert any(part in name for name in learning), part


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_hyper_parameters_are_those_of_the_recipe(size):
    model, data, args = parse_recipe(f"stage1_plum_{size}")
    assert (model.vlm, model.sam) == (f"llava-hf/llava-1.5-{size}-hf", "facebook/sam-vit-huge")
    assert data.max_length == 512 - 256 + 576
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, 16, 0.05)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (3e-4, 0.9, 0.95, 0.0)
    assert (args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm, args.bf16) == ("linear", 100, 1.0, True)
    assert (args.max_steps, args.gradient_accumulation_steps) == (25 * 500, 10)
    config = PlumConfig(**model.model_config)
    assert (
        config.mask_feedback and config.span_loss_scope == "sequence" and config.mask_overlap_loss == "focal_tversky"
    )
    assert (config.language_modeling_loss_weight, config.span_loss_weight) == (1.0, 8.0)
    assert tuple(config.span_class_weights) == (0.1, 1.0, 1.0)
    assert (config.mask_overlap_loss_weight, config.mask_bce_loss_weight, config.teacher_kl_loss_weight) == (8, 2, 0.1)
    assert (config.tversky_false_negative_weight, config.tversky_false_positive_weight) == (0.7, 0.3)
    assert (config.tversky_focal_exponent, config.mask_iou_loss_weight) == (0.75, 0.0)


@pytest.mark.parametrize("size", SIZES)
def test_the_documented_parameter_counts_are_those_of_the_recipes_model(size):
    table = format_table(count_parameters(options_of(size)))
    assert table in (ROOT / "docs" / "model.md").read_text()


def test_the_7b_model_has_the_sizes_of_its_published_backbones():
    counts = {name: (total, trained) for name, total, trained in count_parameters(options_of("7b"))}
    language = counts["vlm.language_model"][0] + counts["vlm.lm_head"][0]
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert language == 32 * layer + 2 * 32064 * 4096 + 4096
    adapters = 32 * 2 * 8 * (4096 + 4096)  # q_proj and v_proj of each layer, rank 8
    assert counts["vlm.language_model"][1] == adapters + 32064 * 4096
    assert round(sum(total for name, (total, _) in counts.items() if name.startswith("sam.")) / 1e6) == 641
    assert counts["vlm.vision_tower"][1] == counts["sam.vision_encoder"][1] == counts["sam.prompt_encoder"][1] == 0
    for name in ("sam.mask_decoder", "span_tagger", "span_projector", "mask_feedback"):
        assert counts[name][0] == counts[name][1]


def test_the_model_with_qwen3_vl_and_sam_2_has_the_sizes_of_its_published_backbones():
    counts = {name: (total, trained) for name, total, trained in count_parameters(options_of("qwen3vl_4b_sam2"))}
    assert sum(total for name, (total, _) in counts.items() if name.startswith("vlm.")) == 4_437_815_808
    assert round(counts["sam.vision_encoder"][0] / 1e6) == 213
    query, value = 2560 + 32 * 128, 2560 + 8 * 128  # inputs and outputs of both projections, rank 16
    assert counts["vlm.language_model"][1] == 36 * 16 * (query + value)
    assert counts["vlm.visual"][1] == counts["sam.vision_encoder"][1] == counts["sam.prompt_encoder"][1] == 0


def test_the_largest_image_and_a_text_as_in_the_published_run_fit_into_the_rows_for_qwen3_vl():
    model, data, args = parse_recipe("stage1_plum_qwen3vl_4b_sam2")
    size = model.vlm_image_options["size"]
    processor = Qwen2VLImageProcessor(patch_size=16, merge_size=2, size=size)
    tokens = [
        int(processor(Image.new("RGB", sides), return_tensors="pt")["image_grid_thw"].prod()) // 4
        for sides in ((640, 480), (4032, 3024))
    ]
    assert tokens[0] == 300 and 900 < tokens[1] <= 1024 == data.max_length - (512 - 256)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 20


def test_image_options_change_the_image_processor_of_the_backbone(tmp_path, capsys):
    vlm, sam = qwen3_vl(tmp_path / "vlm"), tiny_sam(tmp_path / "sam")
    folders = ["--vlm", str(vlm), "--sam", str(sam), "--output_dir", "unused", "--use_cpu", "true"]
    changed = '{"size": {"shortest_edge": 64, "longest_edge": 256}}'
    arguments, _, _ = parse_arguments([*folders, "--vlm_image_options", changed])
    processor = load_processor_alone(arguments)
    assert len(processor.prepare_images([Image.new("RGB", (50, 50))])[0][0].tokens["input_ids"]) == 4
    arguments, _, _ = parse_arguments([*folders, "--vlm_image_options", '{"width": 3}'])
    with pytest.raises(
        ValueError, match=r"vlm_image_options has \['width'\], which the image processor of .* not have"
    ):
        load_processor_alone(arguments)
    with pytest.raises(SystemExit):
        parse_arguments(["--model", "a", "--vlm_image_options", changed, "--output_dir", "unused"])
    assert "vlm_image_options change the image processor that comes with vlm" in capsys.readouterr().err


def test_training_starts_from_pretrained_backbones_and_leaves_the_frozen_ones_alone(data_folder, tmp_path):
    vlm, sam, output = llava_clip(tmp_path / "vlm"), tiny_sam(tmp_path / "sam"), tmp_path / "run"
    options = {
        "--vlm": vlm,
        "--sam": sam,
        "--model_config": '{"span_tagger_num_heads": 4, "span_tagger_intermediate_size": 64}',
        "--output_dir": output,
        "--dataset": data_folder,
        "--name": "default",
        "--turns_per_record": 1,
        "--lora_r": 2,
        "--max_steps": 2,
        "--learning_rate": 0.01,
        "--per_device_train_batch_size": 2,
        "--use_cpu": "true",
        "--report_to": "none",
    }
    train([str(word) for option in options.items() for word in option])
    model, processor = load_checkpoint(output)
    assert processor.vlm_processor_class == "LlavaProcessor"
    before = transformers.AutoModelForImageTextToText.from_pretrained(vlm)
    for part in ("vision_tower", "multi_modal_projector"):
        found, expected = (getattr(plum.model, part).state_dict() for plum in (model.vlm, before))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(
        model.vlm.model.language_model.layers[0].self_attn.q_proj.weight,
        before.model.language_model.layers[0].self_attn.q_proj.weight,
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--vlm", "a"], "Give vlm and sam together, found --vlm 'a' and --sam None"),
        (["--vlm", "a", "--sam", "b", "--model", "c"], "Give either model .* or vlm and sam"),
        ([], "Give model .*, vlm and sam .* or --model_config"),
    ],
)
def test_a_recipe_that_names_too_few_or_too_many_starts_is_refused(options, words, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([*options, "--output_dir", "unused", "--use_cpu", "true"])
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(words, message)


def test_sizes_of_backbones_in_model_config_are_refused():
    with pytest.raises(ValueError, match=r"model_config gives \['sam_config'\], which come with vlm and sam"):
        compose_backbones("unread", "unread", {"sam_config": {}})
