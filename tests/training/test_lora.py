"""LoRA on tiny models: what is trained beside it, its teacher, the merged model."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.masks import DataError
from plum_partonomy.training.model import add_lora, store_frozen
from plum_partonomy.training.options import LORA_TRAINED_WHOLE, ModelArguments
from plum_partonomy.training.trainer import build_teacher
from tests.runs import CLOSE, base_options, batch_of, record, run_main
from tests.tiny import tiny_config, tiny_model, tiny_processor
from tests.tiny_backbones import idefics3, tiny_sam


def lora_arguments(**changes) -> ModelArguments:
    return ModelArguments(model="unused", lora_r=2, **changes)


def test_with_lora_only_its_matrices_and_the_modules_trained_whole_have_gradients():
    model = add_lora(tiny_model(), lora_arguments())
    model(**batch_of([record(0, 3), record(1, 2)], tiny_processor())).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in with_gradient:
        attention = ".language_model.layers." in name and name.split(".")[-4] in ("q_proj", "v_proj")
        assert attention or any(f"{whole}.modules_to_save" in name for whole in LORA_TRAINED_WHOLE), name
    for whole in LORA_TRAINED_WHOLE:
        assert any(f"{whole}.modules_to_save" in name for name in with_gradient), whole
    assert any("lora_A" in name for name in with_gradient) and any("lora_B" in name for name in with_gradient)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lora_trained_whole": ["span_tager"]}, "'span_tager', which is not a module of the model; did you mean"),
        ({"frozen_modules": ["span_tagger"]}, "freezes 'span_tagger', but lora_trained_whole trains 'span_tagger'"),
        ({"frozen_modules": ["sam"]}, "frozen_modules freezes 'sam', but lora_trained_whole trains 'mask_decoder'"),
        ({"frozen_modules": ["span_tagger.layers"]}, "freezes 'span_tagger.layers', but .* trains 'span_tagger'"),
    ],
)  # fmt: skip
def test_a_module_trained_whole_exists_and_is_not_frozen(arguments, message):
    with pytest.raises(DataError, match=message):
        add_lora(tiny_model(), lora_arguments(**arguments))


def test_a_language_model_without_the_adapted_projections_is_named():
    model = tiny_model()
    for layer in model.vlm.get_decoder().layers:
        del layer.self_attn.q_proj, layer.self_attn.v_proj
    with pytest.raises(DataError, match="lora_r adapts q_proj and v_proj, which this language model does not have"):
        add_lora(model, lora_arguments())


def test_lora_alone_is_trained_where_no_module_is_trained_whole():
    model = add_lora(tiny_model(mask_feedback=False), lora_arguments(lora_trained_whole=[], frozen_modules=["sam"]))
    assert all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_the_teacher_under_lora_gives_the_loss_and_gradients_of_an_explicit_frozen_copy():
    plain = tiny_model(teacher_kl_loss_weight=1.0)
    copied_teacher = build_teacher(plain)
    batch = batch_of([record(0, 3), record(1, 2)], tiny_processor())
    wrapped = add_lora(copy.deepcopy(plain), lora_arguments(lora_dropout=0.0))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or name.endswith("embed_tokens.modules_to_save.default.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    found = {}
    for name, teacher in (("adapter off", build_teacher(wrapped)), ("copy", copied_teacher)):
        wrapped.zero_grad()
        outputs = wrapped(**batch, teacher=teacher)
        outputs.loss.backward()
        found[name] = {key: p.grad.clone() for key, p in wrapped.named_parameters() if p.grad is not None}
        found[name]["teacher_kl"] = outputs.losses["teacher_kl"].detach()
    assert float(found["copy"]["teacher_kl"]) > 0.01
    assert found["adapter off"].keys() == found["copy"].keys()
    assert_close(found["adapter off"], found["copy"])


def test_without_its_loss_there_is_no_teacher():
    assert build_teacher(tiny_model(teacher_kl_loss_weight=0.0)) is None


def test_a_model_wrapped_for_lora_computes_and_segments_as_the_model_itself():
    plain, wrapped = tiny_model(), add_lora(tiny_model(), lora_arguments()).eval()
    batch = batch_of([record(0, 3), record(1, 2)], tiny_processor())
    with torch.no_grad():
        found, expected = wrapped(**batch), plain(**batch)
    assert_close(found.losses, expected.losses, rtol=0, atol=0)
    assert_close(wrapped.segment_spans(**batch).pred_masks, plain.segment_spans(**batch).pred_masks, rtol=0, atol=0)


def test_lora_finds_the_language_model_under_any_name_and_leaves_vision_towers_alone(tmp_path):
    backbones = {"vlm": idefics3(tmp_path / "vlm"), "sam": tiny_sam(tmp_path / "sam")}
    model = PlumForConditionalGeneration.from_backbones(**backbones, span_tagger_num_heads=4)
    names = {name for name, p in add_lora(model, lora_arguments()).named_parameters() if "lora_A" in name}
    assert len(names) == 2 * model.config.get_text_config().num_hidden_layers
    assert all(".text_model.layers." in name for name in names)


def test_frozen_encoders_leave_nothing_for_the_backward_pass_also_with_gradient_checkpointing():
    gradients = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(shared_vision=False), lora_arguments(lora_dropout=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        plum, outputs = model.get_base_model(), {}
        for encoder in (plum.sam.vision_encoder, plum.vlm.model.vision_tower):
            encoder.register_forward_hook(lambda module, _, output, kept=outputs: kept.update({module: output}))
        batch = batch_of([record(0, 3), record(1, 2)], tiny_processor(shared_vision=False))
        model(**batch).loss.backward()
        assert [output.last_hidden_state.requires_grad for output in outputs.values()] == [False, False]
        gradients[checkpointing] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(gradients[True], gradients[False])


def adapted(frozen_dtype: torch.dtype, shared_vision: bool):
    """A model with LoRA and its gradients in a step under bfloat16 autocast."""
    torch.manual_seed(0)
    model = add_lora(tiny_model(shared_vision), lora_arguments(lora_dropout=0.0)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    store_frozen(model, frozen_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch_of([record(0, 3), record(1, 2)], tiny_processor(shared_vision))).loss
    loss.backward()
    return model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared_vision", [True, False], ids=["shared_vision", "own_vision_tower"])
def test_frozen_layers_in_bfloat16_take_half_and_leave_gradients_bit_for_bit_the_same(shared_vision):
    (model, found), (whole, expected) = (adapted(dtype, shared_vision) for dtype in (torch.bfloat16, torch.float32))
    assert_close(found, expected, rtol=0, atol=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    stored = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    layers = (".vlm.model.language_model.layers.0.mlp.", ".sam.vision_encoder.layers.1.attn.", ".vision_tower.")
    assert all(any(layer in name for name in stored) for layer in layers)
    assert not any(".sam." in name and ".vision_encoder." not in name for name in stored)
    assert all(
        torch.equal(p.bfloat16(), q.bfloat16()) for p, q in zip(model.parameters(), whole.parameters(), strict=True)
    )


def test_a_run_with_frozen_layers_in_bfloat16_adapts_and_resumes_as_one_without(data_folder, tmp_path):
    tiny_model(shared_vision=False).save_pretrained(tmp_path / "base")
    tiny_processor(shared_vision=False).save_pretrained(tmp_path / "base")
    options = base_options(data_folder, tmp_path / "out")
    options |= {"model": tmp_path / "base", "lora_r": 4, "bf16": True, "learning_rate": 0.01, "max_steps": 4}
    few = options | {"frozen_dtype": "bfloat16", "output_dir": tmp_path / "few", "save_steps": 2}
    run_main(options)
    run_main(few)
    adapters = [load_file(tmp_path / run / "checkpoint-4" / "adapter_model.safetensors") for run in ("out", "few")]
    assert_close(*adapters, rtol=0, atol=0)
    resumed = few | {"output_dir": tmp_path / "resumed", "resume_from_checkpoint": tmp_path / "few" / "checkpoint-2"}
    run_main(resumed)
    whole, few, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("out", "few", "resumed"))
    assert_close(resumed, few, rtol=0, atol=0)
    assert {tensor.dtype for tensor in few.values()} == {torch.float32}
    for name, tensor in whole.items():  # frozen weights are rounded to 8 bits, adapters are not
        assert_close(few[name], tensor, rtol=0, atol=2**-8 * float(tensor.abs().max()))


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_the_merged_model_is_the_adapted_one_and_the_frozen_weights_are_as_before(data_folder, tmp_path, tied):
    config = tiny_config()
    config.vlm_config.tie_word_embeddings = config.vlm_config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    PlumForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    options = base_options(data_folder, tmp_path / "out") | {"model": tmp_path / "base", "lora_r": 4, "max_steps": 4}
    run_main(options | {"learning_rate": 0.01})

    merged = PlumForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert not (merged.config.vlm_config.tie_word_embeddings or merged.config.get_text_config().tie_word_embeddings)
    base = PlumForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    before = copy.deepcopy(base.state_dict())
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-4").eval()
    batch = batch_of([record(0, 3), record(1, 2)], tiny_processor())
    with torch.no_grad():
        found, expected = merged(**batch), adapted(**batch)
    assert_close(found.logits, expected.logits, **CLOSE)
    assert_close(found.span_logits, expected.span_logits, **CLOSE)
    assert_close(found.pred_masks, expected.pred_masks, **CLOSE)

    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    trained_whole = {name for name in before if any(f".{whole}." in f".{name}" for whole in LORA_TRAINED_WHOLE)}
    attention = {name for name in before if "language_model" in name and name.split(".")[-2] in ("q_proj", "v_proj")}
    assert changed <= trained_whole | attention
    assert attention <= changed
    for whole in LORA_TRAINED_WHOLE:
        assert any(f".{whole}." in f".{name}" for name in changed), whole
