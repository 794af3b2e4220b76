"""Where generated answers end, how long they get, and what options of generate do to them."""

import json
import re
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import DynamicCache, GenerationConfig

from generation_plum import DEFAULT_MAX_NEW_TOKENS, GeneratedStates, settle_options
from modeling_plum import PlumForConditionalGeneration
from tests.tiny import conversation, graphs_in_place, random_image, tiny_model, tiny_processor
from tests.tiny_backbones import llava_clip, tiny_sam

OPTIONS = {"max_new_tokens": 10, "do_sample": False}
CHATS = [
    conversation(random_image(seed=1), None),
    conversation(random_image(90, 40, seed=2), None),
    conversation(None, None),
]


@pytest.fixture(scope="module", params=[True, False], ids=["shared_vision", "own_vision_tower"])
def plum(request):
    model, processor = tiny_model(request.param), tiny_processor(request.param)
    return model, processor, encode(processor, CHATS)


def encode(processor, chats):
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "padding_side": "left"}
    return processor.apply_chat_template(chats, **options)


@pytest.fixture(scope="module")
def plain(plum):
    model, _, batch = plum
    return model.segment(**batch, **OPTIONS)


def generated(outputs, batch) -> torch.Tensor:
    return outputs.sequences[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"generation_config": GenerationConfig(**OPTIONS), "max_new_tokens": None, "do_sample": None},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
        {"eos_token_id": None, "num_beams": None},
    ],
    ids=str,
)
def test_options_that_save_time_or_change_the_form_leave_answer_and_masks_as_they_are(plum, plain, options):
    model, _, batch = plum
    found = model.segment(**batch, **{**OPTIONS, **options})
    assert torch.equal(found.sequences, plain.sequences) and torch.equal(found.spans, plain.spans)
    assert len(plain.spans) and torch.equal(found.is_truncated, plain.is_truncated)
    assert_close(found.pred_masks, plain.pred_masks, rtol=1e-4, atol=1e-4)


def test_a_kept_cache_continues_a_chat_whose_image_it_has_read(plum):
    model, processor, _ = plum
    batch, cache = encode(processor, CHATS[:1]), DynamicCache()
    answered = model.generate(**batch, past_key_values=cache, **OPTIONS)
    follow_up = processor.tokenizer(" USER: Any other? ASSISTANT:", return_tensors="pt")["input_ids"]
    longer = {"input_ids": torch.cat([answered, follow_up], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    expected = model.generate(**{**batch, **longer}, **OPTIONS)
    assert torch.equal(model.generate(**longer, past_key_values=cache, **OPTIONS), expected)


@pytest.mark.parametrize("plum", [True], indirect=True, ids=["shared_vision"])
def test_compiled_decoding_steps_are_one_graph_for_prompts_of_any_length_and_change_nothing(plum):
    model, processor, batch = plum
    options = {**OPTIONS, "cache_implementation": "static", "compile_config": graphs_in_place()}
    shorter = encode(processor, [conversation(random_image(seed=1), None, "Wing?")] * len(CHATS))
    torch.compiler.reset()
    counters.clear()
    for prompts in (batch, shorter, batch):
        found, expected = model.segment(**prompts, **options), model.segment(**prompts, **OPTIONS)
        assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.spans, expected.spans)
        assert_close(found.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("new_tokens", [1, 5])
def test_hidden_states_observed_with_a_static_cache_are_those_of_another_pass(plum, new_tokens):
    model, _, batch = plum
    options = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": "static"}
    with GeneratedStates(model.vlm.get_decoder()) as observed:
        sequences = model.generate(**batch, **options)
    attention_mask = torch.nn.functional.pad(batch["attention_mask"], (0, new_tokens), value=1)
    found = observed.finish(sequences, attention_mask)
    expected = model.encode_conversations(**{**batch, "input_ids": sequences, "attention_mask": attention_mask})
    real = attention_mask.bool()
    assert_close(found[real], expected[real], rtol=1e-5, atol=3e-5)


def test_an_assistant_that_only_saves_time_changes_nothing(plum, plain):
    model, _, batch = plum
    found = model.segment(**batch, **OPTIONS, assistant_model=model.vlm)
    assert torch.equal(found.sequences, plain.sequences)
    assert_close(found.pred_masks, plain.pred_masks, rtol=0, atol=0)


@pytest.mark.parametrize("option", [{"custom_generate": lambda *_: None}, {"token_healing": True}])
def test_options_that_decode_otherwise_are_refused(plum, option):
    model, _, batch = plum
    with pytest.raises(ValueError, match=f"{next(iter(option))} is not supported"):
        model.segment(**batch, **OPTIONS, **option)


@pytest.mark.parametrize(
    "form", [int, lambda stop: [stop, 399], torch.tensor, lambda stop: GenerationConfig(eos_token_id=stop)]
)
def test_a_stop_token_given_to_a_call_ends_its_answers(plum, plain, form):
    model, processor, batch = plum
    stop = int(generated(plain, batch)[0, 4])
    given = form(stop)
    options = {"generation_config": given} if isinstance(given, GenerationConfig) else {"eos_token_id": given}
    outputs = model.segment(**batch, **OPTIONS, **options)
    rows = zip(generated(outputs, batch), generated(plain, batch).tolist(), outputs.answer_mask, strict=True)
    prompt_length = batch["input_ids"].shape[1]
    for row, (ids, whole, mask) in enumerate(rows):
        expected = whole[: whole.index(stop)] if stop in whole else whole
        assert ids[mask[prompt_length:]].tolist() == expected
        assert bool(outputs.is_truncated[row]) == (stop not in whole)
    answers = processor.post_process_segmentation(outputs)
    assert [answer.is_truncated for answer in answers] == outputs.is_truncated.tolist()
    assert model.generation_config.eos_token_id == 2


def test_a_text_that_the_caller_named_ends_an_answer_without_cutting_it_off(plum, plain):
    model, processor, batch = plum
    words = [processor.tokenizer.decode(token).strip() for token in generated(plain, batch)[0]]
    end = next(i for i, word in enumerate(words) if word.isalpha() and word.isascii())
    alone = {name: value[:1] for name, value in batch.items() if name != "pixel_values" or len(value)}
    outputs = model.segment(**alone, **OPTIONS, stop_strings=[words[end]], tokenizer=processor.tokenizer)
    assert generated(outputs, batch).shape[1] == end + 1 < 10 and not outputs.is_truncated.any()
    assert model.segment(**alone, **OPTIONS).is_truncated.all()


def test_a_length_given_to_a_call_overrides_the_saved_one_in_either_form():
    saved = GenerationConfig(max_new_tokens=256, eos_token_id=2)
    for options, expected in (
        ({}, 256),
        ({"max_new_tokens": 5}, 5),
        ({"max_length": 50}, 20),
        ({"max_length": 50, "max_new_tokens": 7}, 7),
        ({"generation_config": GenerationConfig(max_length=40)}, 10),
        ({"generation_config": GenerationConfig(max_length=40), "max_new_tokens": 9}, 9),
    ):
        settings, rest = settle_options(saved, options | {"pixel_values": 1}, prompt_length=30)
        assert (settings.max_new_tokens, settings.max_length, rest) == (expected, None, {"pixel_values": 1})
    assert settle_options(GenerationConfig(), {}, 30)[0].max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    assert saved.max_new_tokens == 256


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, found 0."),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer of at least 1, found 1.5."),
        ({"max_length": "40"}, "max_length must be an integer of at least 1, found '40'."),
        ({"num_beams": True}, "num_beams must be an integer of at least 1, found True."),
        ({"num_return_sequences": 0}, "num_return_sequences must be an integer of at least 1, found 0."),
        ({"min_new_tokens": -1}, "min_new_tokens must be an integer of at least 0, found -1."),
        ({"top_p": "0.9"}, "top_p must be a finite number, found '0.9'."),
        (
            {"generation_config": GenerationConfig(max_time=float("nan"))},
            "max_time must be a finite number, found nan",
        ),
    ],
)
def test_a_number_that_cannot_be_used_is_refused_before_an_answer_is_generated(plum, option, message):
    model, _, batch = plum
    with pytest.raises(ValueError, match=re.escape(message)):
        model.segment(**batch, **option)


def test_answers_have_room_without_any_option_and_every_checkpoint_says_how_much(plum, tmp_path):
    model, processor, batch = plum
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == DEFAULT_MAX_NEW_TOKENS
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path)
    assert generated(loaded.segment(**batch, do_sample=False), batch).shape[1] == DEFAULT_MAX_NEW_TOKENS
    composed = PlumForConditionalGeneration.from_backbones(
        vlm=str(llava_clip(tmp_path / "vlm")), sam=str(tiny_sam(tmp_path / "sam")), span_tagger_num_heads=4
    )
    composed.save_pretrained(tmp_path / "composed")
    saved = json.loads((tmp_path / "composed" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == DEFAULT_MAX_NEW_TOKENS


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{", b"[1]", b"null", b""])
def test_a_damaged_generation_config_is_an_error_and_an_absent_one_is_not(plum, tmp_path, content):
    model, _, _ = plum
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="generation_config.json (cannot be read as JSON|must hold a JSON object)"):
        PlumForConditionalGeneration.from_pretrained(tmp_path / "model")
    path.unlink()
    assert PlumForConditionalGeneration.from_pretrained(tmp_path / "model").generation_config.eos_token_id == 2
    shutil.rmtree(tmp_path / "model")


def test_more_tokens_than_before_are_saved_and_loaded(plum, plain, tmp_path):
    _, _, batch = plum
    model = tiny_model(shared_vision="pixel_values" not in batch)
    model.resize_token_embeddings(410)
    model.save_pretrained(tmp_path)
    loaded = PlumForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.get_text_config().vocab_size == 410
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_output_embeddings().weight.shape[0] == 410
    suppressed = {"suppress_tokens": list(range(400, 410))}
    assert torch.equal(loaded.segment(**batch, **OPTIONS, **suppressed).sequences, plain.sequences)
