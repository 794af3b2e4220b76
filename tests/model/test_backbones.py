"""PLUM around pretrained backbones of several families: what is theirs stays theirs, and every path runs."""

import copy
import importlib.util
import inspect
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel, SamModel

from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.training.model import add_lora
from plum_partonomy.training.options import ModelArguments
from plum_partonomy.training.trainer import build_teacher, merge_lora
from processing_plum import PlumProcessor
from tests.tiny import conversation, mixed_conversations, random_image, tiny_config
from tests.tiny_backbones import FAMILIES, REFUSED, llava_clip, tiny_sam

# A folder is read by the code under test, so nobody is asked whether to trust the copy saved with it.
AutoConfig.register("plum", PlumConfig, exist_ok=True)
EXACT = {"rtol": 1e-4, "atol": 1e-5}
PLUM = {"span_tagger_num_heads": 4, "span_tagger_intermediate_size": 64}
WIDE, TALL = random_image(50, 70, seed=1), random_image(90, 40, seed=2)
CHATS, MASKS = mixed_conversations()
PROMPTS = [conversation(image, None) for image in (WIDE, TALL, None)]


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    return str(tiny_sam(tmp_path_factory.mktemp("sam")))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.build.__name__)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def vlm_folder(family, tmp_path_factory):
    return family.write(tmp_path_factory.mktemp(family.build.__name__))


@pytest.fixture(scope="module")
def plum(family, vlm_folder, sam_folder):
    torch.manual_seed(0)
    model = PlumForConditionalGeneration.from_backbones(vlm=vlm_folder, sam=sam_folder, **PLUM)
    replaced = pytest.warns(UserWarning, match=f"chat template of {vlm_folder} is replaced by PLUM's own")
    with nullcontext() if family.keeps_template else replaced:
        return model, PlumProcessor.from_backbones(vlm=vlm_folder, sam=sam_folder)


@pytest.fixture(scope="module")
def llava(sam_folder, tmp_path_factory):
    """For what does not depend on the family."""
    vlm = str(llava_clip(tmp_path_factory.mktemp("llava")))
    model = PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam_folder, **PLUM)
    return model, PlumProcessor.from_backbones(vlm=vlm, sam=sam_folder)


def encode(processor, chats, **options):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


def prompt(processor, chats):
    return encode(processor, chats, add_generation_prompt=True, padding_side="left")


def vlm_inputs_of(model, batch):
    """Inputs of a batch that the vision-language model takes by itself."""
    own = ("labels", "span_labels", "spans", "mask_labels", "original_sizes", "reshaped_input_sizes")
    return {name: value for name, value in batch.items() if not name.startswith("sam_") and name not in own}


def test_the_vision_language_model_inside_is_the_pretrained_one(plum, vlm_folder):
    model, processor = plum
    alone = AutoModelForImageTextToText.from_pretrained(vlm_folder).eval()
    assert alone.state_dict().keys() == model.vlm.state_dict().keys()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.vlm.state_dict()[name], tensor), name
    batch = encode(processor, CHATS, masks=MASKS)
    with torch.no_grad():
        expected = alone(**vlm_inputs_of(model, batch), use_cache=False).logits
        assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    prompts = prompt(processor, PROMPTS)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(**prompts, **options), alone.generate(**vlm_inputs_of(model, prompts), **options)
    )


def test_the_sam_inside_is_the_pretrained_one(llava, sam_folder):
    model, processor = llava
    alone = SamModel.from_pretrained(sam_folder).eval()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.sam.state_dict()[name], tensor), name
    pixels = encode(processor, CHATS)["sam_pixel_values"]
    points = torch.tensor([[[[20.0, 30.0]]], [[[40.0, 10.0]]]])
    with torch.no_grad():
        found, expected = (sam(pixel_values=pixels, input_points=points) for sam in (model.sam, alone))
        embeddings = model.get_image_embeddings(pixels)
        assert_close(embeddings, alone.get_image_embeddings(pixels), rtol=0, atol=0)
    assert_close(found.pred_masks, expected.pred_masks, rtol=0, atol=0)
    assert_close(found.iou_scores, expected.iou_scores, rtol=0, atol=0)


def test_only_plums_own_modules_are_fresh_and_as_a_model_from_scratch_has_them(llava):
    model, _ = llava
    scratch = PlumForConditionalGeneration(model.config)
    for name in ("span_tagger", "span_projector", "mask_feedback"):
        fresh, expected = (getattr(plum, name).state_dict() for plum in (model, scratch))
        assert fresh.keys() == expected.keys()
        for key, parameter in fresh.items():
            assert parameter.device.type == "cpu" and parameter.isfinite().all(), key
            if float(expected[key].std()) == 0:
                assert torch.equal(parameter, expected[key]), key  # biases and layer norms
            elif parameter.numel() > 500:
                assert float(parameter.std()) == pytest.approx(float(expected[key].std()), rel=0.15), key
    assert model.state_dict().keys() == scratch.state_dict().keys()


def test_image_tokens_are_those_of_the_familys_own_processor(plum):
    _, processor = plum
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in PROMPTS[:2]]
    expected = processor._vlm_processor(images=[[WIDE], [TALL]], text=texts, padding=True, return_tensors="pt")
    found = prompt(processor, PROMPTS[:2])
    for row in range(2):
        ids = expected["input_ids"][row][expected["attention_mask"][row] == 1].tolist()
        assert found["input_ids"][row][found["attention_mask"][row] == 1].tolist() == ids
    for name, value in expected.items():
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            assert_close(found[name], value, rtol=0, atol=0)


def test_labels_and_spans_are_words_of_the_answer_in_every_family(plum):
    _, processor = plum
    batch = encode(processor, CHATS, masks=MASKS)
    words = [processor.tokenizer.decode(batch["input_ids"][row, a:b]).strip() for row, a, b in batch["spans"]]
    assert words == ["wheel", "wheel", "left wing", "tail"]
    answers = [processor.tokenizer.decode(row[row >= 0]).strip() for row in batch["labels"]]
    stop = processor.tokenizer.eos_token
    assert answers[1:] == [f"The tail is red.{stop}", f"It is red.{stop}", f"Which object?{stop}"]


def test_one_step_of_training_lowers_the_loss_and_reaches_every_part(plum):
    model, processor = copy.deepcopy(plum[0]).train(), plum[1]
    batch = encode(processor, CHATS, masks=MASKS)
    loss = model(**batch).loss
    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    touched = {name for name in reached if model.get_parameter(name).grad.abs().sum() > 0}
    for part in ("span_tagger.classifier", "span_projector", "mask_feedback.film", "sam.mask_decoder"):
        assert any(part in name for name in touched), part
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0
    assert any("q_proj" in name for name in touched)
    assert any(part in name for name in touched for part in ("vision_tower", "visual", "vision_model"))
    with torch.no_grad():
        for name in reached:
            parameter = model.get_parameter(name)
            parameter -= 1e-4 * parameter.grad
        assert loss.isfinite() and float(model(**batch).loss) < float(loss)


def test_each_row_of_a_batch_equals_the_row_alone(plum):
    model, processor = plum
    with torch.no_grad():
        together = model(**encode(processor, CHATS, masks=MASKS))
        for row, members in ((0, slice(0, 3)), (1, slice(3, 4)), (3, slice(0, 0))):
            batch = encode(processor, CHATS[row : row + 1])
            alone, length = model(**batch), batch["input_ids"].shape[1]
            assert_close(together.logits[row, :length], alone.logits[0], **EXACT)
            assert_close(together.span_logits[row, :length], alone.span_logits[0], **EXACT)
            if alone.pred_masks is not None:
                assert_close(together.pred_masks[members], alone.pred_masks, **EXACT)


def test_answers_generated_and_segmented_in_a_batch_equal_those_alone(plum):
    model, processor = plum
    options = {"max_new_tokens": 12, "do_sample": False}
    batch = prompt(processor, PROMPTS)
    together = model.segment(**batch, **options)
    assert torch.equal(together.sequences, model.generate(**batch, **options))
    answers = processor.post_process_segmentation(together)
    for row, chat in enumerate(PROMPTS):
        alone = model.segment(**prompt(processor, [chat]), **options)
        (expected,) = processor.post_process_segmentation(alone)
        assert answers[row].text == expected.text
        assert [span.text for span in answers[row].spans] == [span.text for span in expected.spans]
        members = together.spans[:, 0] == row
        assert_close(together.pred_masks[members], alone.pred_masks, **EXACT)


def test_a_generated_answer_is_tagged_and_segmented_as_the_same_answer_given(plum):
    model, processor = plum
    prompts = prompt(processor, PROMPTS[:2])
    generated = model.segment(**prompts, max_new_tokens=12, do_sample=False)
    new = generated.sequences.shape[1] - prompts["input_ids"].shape[1]
    given = {**prompts, "input_ids": generated.sequences}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in given:
            fill = 1 if name == "attention_mask" else 0
            given[name] = nn.functional.pad(given[name], (0, new), value=fill)
    labels = torch.where(generated.answer_mask, generated.sequences, -100)
    tagged = model.segment_answers(**given, labels=labels)
    assert_close(tagged.span_logits[generated.answer_mask], generated.span_logits[generated.answer_mask], **EXACT)


def test_prepared_images_give_what_their_pixels_give(plum, family):
    model, processor = plum
    prepared, sam_inputs, vlm_inputs = processor.prepare_images([WIDE, TALL])
    with torch.no_grad():
        features = model.get_vlm_image_features([image.tokens for image in prepared], **vlm_inputs)
        accepted = "mm_encoder_outputs" in inspect.signature(model.vlm.model.forward).parameters
        assert (features is not None) == (family.shares_images and accepted)  # older releases of transformers: none
        if features is None:
            return
        embeddings = model.get_image_embeddings(sam_inputs["sam_pixel_values"])
    kept = {"vlm_image_features": features, "sam_image_embeddings": embeddings}
    answers, questions = ["A <p>wing</p>.", "No.", "A <p>tail</p>."], [WIDE, WIDE, TALL]
    chats = [conversation(image, answer) for image, answer in zip(questions, answers, strict=True)]
    of_prepared = [
        conversation(prepared[image is TALL], answer) for image, answer in zip(questions, answers, strict=True)
    ]
    batch, short = encode(processor, chats), encode(processor, of_prepared)
    assert not any("pixel" in name for name in short) and torch.equal(short["input_ids"], batch["input_ids"])
    assert_close(model.score_choices(**short, **kept, num_choices=3), model.score_choices(**batch, num_choices=3))
    assert_close(model.segment_spans(**short, **kept).pred_masks, model.segment_spans(**batch).pred_masks, **EXACT)
    prompts = [conversation(image, None) for image in (WIDE, TALL)]
    short_prompts = prompt(processor, [conversation(image, None) for image in prepared])
    options = {"max_new_tokens": 8, "do_sample": False}
    found = model.segment(**short_prompts, **kept, **options)
    expected = model.segment(**prompt(processor, prompts), **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(model.generate(**short_prompts, **kept, **options), expected.sequences)
    assert_close(found.pred_masks, expected.pred_masks, **EXACT)


def test_choices_score_as_in_a_forward_pass(plum):
    model, processor = plum
    batch = encode(processor, CHATS, masks=MASKS)
    with torch.no_grad():
        log_probabilities = model(**batch).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    picked = log_probabilities.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    scores = model.score_choices(**batch, num_choices=2, reduction="answer_sum")
    assert_close(scores, -picked.sum(1).view(2, 2), **EXACT)


def test_a_saved_model_and_processor_load_to_the_same_function(plum, tmp_path):
    model, processor = plum
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch, again = (encode(p, CHATS, masks=MASKS) for p in (processor, PlumProcessor.from_pretrained(tmp_path)))
    assert batch.keys() == again.keys()
    with torch.no_grad():
        assert_close(loaded(**again).logits, model(**batch).logits, rtol=0, atol=0)
    options = {"max_new_tokens": 8, "do_sample": False}
    found, expected = (m.segment(**prompt(processor, PROMPTS), **options) for m in (loaded, model))
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(found.pred_masks, expected.pred_masks, **EXACT)


def test_lora_adapts_the_language_model_and_its_merged_copy_computes_the_same(plum, tmp_path):
    model, processor = copy.deepcopy(plum[0]).eval(), plum[1]
    batch = encode(processor, CHATS, masks=MASKS)
    decoder = next(name for name, module in model.named_modules() if module is model.vlm.get_decoder())
    wrapped = add_lora(model, ModelArguments(model="unused", lora_r=2)).eval()
    adapters = [(name, parameter) for name, parameter in wrapped.named_parameters() if "lora_" in name]
    assert adapters and all(decoder in name and name.split(".")[-4] in ("q_proj", "v_proj") for name, _ in adapters)
    for name, parameter in adapters:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        expected = wrapped(**batch, teacher=build_teacher(wrapped))
        assert 0 < float(expected.losses["teacher_kl"]) < math.inf
        merged = merge_lora(wrapped)
        assert_close(merged(**batch).logits, expected.logits, **EXACT)
    merged.save_pretrained(tmp_path)
    with torch.no_grad():
        found = PlumForConditionalGeneration.from_pretrained(tmp_path).eval()(**batch)
    assert_close(found.logits, expected.logits, **EXACT)
    assert_close(found.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)


LOAD = """\
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    inputs = torch.load(f"{folder}/inputs.pt", weights_only=False)
    prompts = processor.apply_chat_template(inputs, tokenize=True, return_dict=True, add_generation_prompt=True,
                                            padding_side="left")
    outputs = model.segment(**prompts, max_new_tokens=8, do_sample=False)
    torch.save((outputs.sequences, outputs.pred_masks), f"{folder}/outputs.pt")
"""


@pytest.mark.slow
def test_every_family_loads_through_the_auto_classes_in_a_fresh_process(tmp_path, sam_folder):
    expected = {}
    for family in FAMILIES:
        if family.needs and not importlib.util.find_spec(family.needs):
            continue
        folder = tmp_path / family.build.__name__
        vlm = family.write(tmp_path / "vlm" / folder.name)
        torch.manual_seed(0)
        model = PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam_folder, **PLUM)
        processor = PlumProcessor.from_backbones(vlm=vlm, sam=sam_folder)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        torch.save(PROMPTS, folder / "inputs.pt")
        outputs = model.segment(**prompt(processor, PROMPTS), max_new_tokens=8, do_sample=False)
        expected[folder] = outputs.sequences, outputs.pred_masks
    script = [sys.executable, "-c", LOAD, *map(str, expected)]
    options = {"cwd": tmp_path, "env": os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}}
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stderr
    for folder, (sequences, masks) in expected.items():
        found = torch.load(folder / "outputs.pt")
        assert torch.equal(found[0], sequences), folder.name
        assert_close(found[1], masks, **EXACT)


def test_the_precision_asked_for_is_that_of_every_weight(tmp_path, sam_folder):
    model = PlumForConditionalGeneration.from_backbones(
        vlm=str(llava_clip(tmp_path)), sam=sam_folder, dtype=torch.bfloat16, **PLUM
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == model.config.dtype == torch.bfloat16


def test_an_image_is_padded_and_not_cropped_for_a_tower_that_crops(tmp_path, sam_folder):
    processor = PlumProcessor.from_backbones(vlm=str(llava_clip(tmp_path)), sam=sam_folder)
    image = random_image(32, 96).point(lambda value: 0)
    image.paste((255, 255, 255), (0, 0, 8, 32))  # far left, which a centre crop of the square would lose
    pixels = encode(processor, [conversation(image, None)])["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert float(pixels[0, :, 16, 0].min()) > 1.0 and float(pixels[0, :, 16, 16].max()) < 0.0


def test_a_chat_template_is_kept_where_answers_end_and_else_gives_way_to_plums_own(plum, family):
    _, processor = plum
    text = processor.apply_chat_template(conversation(WIDE, "A <p>wing</p>.", question="Which parts?"))
    assert (processor.chat_template == processor.tokenizer.chat_template) == family.keeps_template
    assert (text == "USER: <image>\nWhich parts? ASSISTANT: A <p>wing</p>." + processor.tokenizer.eos_token) != (
        family.keeps_template
    )
    assert text.rstrip().endswith("A <p>wing</p>." + processor.tokenizer.eos_token)


def test_a_template_that_rewrites_an_earlier_turn_is_refused(llava):
    _, processor = llava
    template = "{% for m in messages %}{{ m.role[0] if loop.last else m.role }}:{{ m.content[0].text }}{% endfor %}"
    chats = [conversation(None, "Yes.") + conversation(None, "No.")]
    with pytest.raises(ValueError, match="renders turn 1 differently"):
        encode(processor, chats, chat_template=template)


# ------------------------------------------------------------------------------------------------ what cannot work


@pytest.mark.parametrize("vlm_config, why", [(config, why) for _, config, why in REFUSED], ids=[f[0] for f in REFUSED])
def test_a_family_that_does_not_fit_is_refused_by_the_config_or_by_the_model(vlm_config, why):
    errors = (ValueError, StrictDataclassClassValidationError)
    with torch.device("meta"), pytest.raises(errors, match=f"'{vlm_config['model_type']}' model.*{why}"):
        PlumForConditionalGeneration(PlumConfig(vlm_config=vlm_config))


def test_a_vision_tower_that_cannot_look_through_sam_is_refused_by_the_config(family, vlm_folder, sam_folder):
    vlm, sam = (AutoConfig.from_pretrained(folder) for folder in (vlm_folder, sam_folder))
    words = r"\(num_channels, image_size\) = SAM's \(embedding width, grid size\) = \(32, 8\), found \("
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        PlumConfig(vlm_config=vlm, sam_config=sam, vlm_image_input="sam_image_embeddings", **PLUM)


def test_hidden_states_of_another_length_are_refused(llava):
    model, processor = copy.deepcopy(llava[0]), llava[1]
    batch = encode(processor, CHATS[3:])

    def drop_a_position(module, arguments, outputs):
        outputs.last_hidden_state = outputs.last_hidden_state[:, 1:]
        return outputs

    model.vlm.model.register_forward_hook(drop_a_position)
    length = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match=rf"\(1, {length - 1}\) hidden states for input_ids of shape \(1, {length}\)"):
        model(**batch)


def test_a_backbone_that_is_no_sam_is_refused(tmp_path, sam_folder):
    vlm = str(llava_clip(tmp_path / "vlm"))
    CLIPVisionModel(CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "clip"
    )
    with pytest.raises(ValueError, match="clip is a 'clip_vision_model' model, expected a segmenter"):
        PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=str(tmp_path / "clip"), **PLUM)


def test_a_sam_of_another_embedding_width_is_refused(tmp_path, sam_folder):
    vlm = str(llava_clip(tmp_path / "vlm"))
    words = "mask_feedback_num_heads is 5, which does not divide SAM's embedding width 32"
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam_folder, mask_feedback_num_heads=5, **PLUM)
    config = AutoConfig.from_pretrained(sam_folder)
    config.mask_decoder_config.hidden_size = 64
    SamModel(tiny_config().sam_config).save_pretrained(tmp_path / "sam")
    config.save_pretrained(tmp_path / "sam")
    words = "mask_decoder_config.hidden_size is 64 but .*prompt_encoder_config.hidden_size is 32"
    with pytest.raises(StrictDataclassClassValidationError, match=words):
        PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=str(tmp_path / "sam"), **PLUM)


def test_a_backbone_that_lacks_weights_is_refused_with_their_names(tmp_path, sam_folder):
    model = SamModel.from_pretrained(sam_folder)
    weights = {name: value for name, value in model.state_dict().items() if "prompt_encoder.no_mask" not in name}
    model.save_pretrained(tmp_path / "sam", state_dict=weights)
    vlm = str(llava_clip(tmp_path / "vlm"))
    with pytest.raises(ValueError, match="lacks 1 tensors of a 'sam' model.*prompt_encoder.no_mask_embed.weight"):
        PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=str(tmp_path / "sam"), **PLUM)


@pytest.mark.parametrize(
    "name, words",
    [
        ("Wav2Vec2Model", "'Wav2Vec2Model', which is not a processor class"),
        ("InstructBlipProcessor", "InstructBlipProcessor cannot be built from an image processor and a tokenizer"),
    ],
)
def test_a_processor_that_plum_cannot_use_is_refused(llava, name, words):
    _, own = llava
    with pytest.raises(ValueError, match=words):
        PlumProcessor(
            own.image_processor,
            own.sam_image_processor,
            own.tokenizer,
            image_token=own.image_token,
            vlm_processor_class=name,
        )
