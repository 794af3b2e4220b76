"""Rows computed with their common beginnings shared, against each row in a forward pass of its own."""

import threading

import pytest
import torch
from torch.testing import assert_close

from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.inference.packing import can_pack, encode_conversations, pack_rows
from plum_partonomy.inference.predictor import Predictor
from plum_partonomy.masks import encode as encode_mask
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring.benchmark import Asked
from processing_plum import PlumProcessor
from tests.tiny import (
    conversation,
    graphs_in_place,
    random_image,
    random_mask,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from tests.tiny_backbones import FAMILIES, tiny_sam

EXACT = {"rtol": 1e-5, "atol": 3e-5}
WIDE, TALL = random_image(50, 70, seed=1), random_image(90, 40, seed=2)
QUESTIONS = [(WIDE, "Which parts can you see?"), (WIDE, "Which object?"), (TALL, "Which parts can you see?")]
ANSWERS = ["I can see a <p>wheel</p>.", "I can see a <p>left wing</p> and a <p>tail</p>."]
CHATS = [conversation(image, answer, question) for image, question in QUESTIONS for answer in ANSWERS]
TEXT_ONLY = [conversation(None, answer) for answer in ("It is red.", "It is a wing.")]


@pytest.fixture(scope="module", params=[None, *FAMILIES], ids=lambda p: p.build.__name__ if p else "looks_through_sam")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def plum(family, tmp_path_factory):
    if family is None:
        return tiny_model(), tiny_processor()
    vlm = family.write(tmp_path_factory.mktemp("vlm"))
    sam = str(tiny_sam(tmp_path_factory.mktemp("sam")))
    options = {"span_tagger_num_heads": 4, "span_tagger_intermediate_size": 64}
    model = PlumForConditionalGeneration.from_backbones(vlm=vlm, sam=sam, **options)
    return model, PlumProcessor.from_backbones(vlm=vlm, sam=sam)


def encode(processor, chats, **options):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


def tokens_computed(model, function):
    """The function's result, and how many tokens the language model computed for it."""
    seen = []
    layer = model.vlm.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    try:
        return function(), sum(seen)
    finally:
        handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_and_scores_equal_those_of_each_row_in_a_pass_of_its_own(plum, family, side):
    model, processor = plum
    chats = CHATS + TEXT_ONLY
    batch = encode(processor, chats, padding_side=side)
    hidden_states, shared = tokens_computed(model, lambda: encode_conversations(model, **batch))
    total = 0
    for row, chat in enumerate(chats):
        alone = encode(processor, [chat])
        with torch.no_grad():
            outputs, tokens = tokens_computed(model, lambda alone=alone: model(**alone))
        total += tokens
        real = batch["attention_mask"][row].bool()
        assert_close(hidden_states[row, real], outputs.last_hidden_state[0], **EXACT)
    shares = family is None or family.shares_beginnings
    assert shared < 0.75 * total if shares else shared == batch["input_ids"].numel()
    for reduction in ("answer_mean", "answer_sum", "sequence_mean"):
        together = model.score_choices(**batch, num_choices=2, reduction=reduction)
        alone = [
            model.score_choices(**encode(processor, [chat]), num_choices=1, reduction=reduction) for chat in chats
        ]
        assert_close(together.flatten(), torch.cat(alone).flatten(), **EXACT)


def test_answers_are_segmented_from_the_pass_that_scored_them(plum):
    model, processor = plum
    batch = encode(processor, CHATS)
    hidden_states = encode_conversations(model, **batch)
    found, tokens = tokens_computed(model, lambda: model.segment_spans(**batch, hidden_states=hidden_states))
    expected = model.segment_spans(**batch)
    assert tokens == 0
    assert_close(found.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)
    assert_close(found.span_logits[found.answer_mask], expected.span_logits[found.answer_mask], **EXACT)
    del batch["labels"]
    with pytest.raises(ValueError, match="spans, hidden_states belong to answers that are given; pass their labels"):
        model.segment(**batch, hidden_states=hidden_states)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_generated_answer_is_segmented_without_reading_it_again(plum, family, cache):
    model, processor = plum
    prompts = encode_prompts(processor)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    sequences, generating = tokens_computed(model, lambda: model.generate(**prompts, **options))
    found, segmenting = tokens_computed(model, lambda: model.segment(**prompts, **options))
    once = family is None or {"dynamic": family.answers_once, "static": family.static_once}[cache]
    assert segmenting - generating == (len(sequences) if once else sequences.numel())
    assert torch.equal(found.sequences, sequences)
    read_again = model.segment(**prompts, max_new_tokens=5, do_sample=False, use_cache=False)
    assert_same_answers(found, read_again)
    beams = model.segment(**prompts, **options, num_beams=2)
    assert beams.span_logits.shape[:2] == beams.sequences.shape


@pytest.mark.slow
def test_compiled_decoding_steps_give_the_same_answers(plum):
    model, processor = plum
    prompts = encode_prompts(processor)
    options = {"max_new_tokens": 5, "do_sample": False}
    torch.compiler.reset()
    found = model.segment(**prompts, **options, cache_implementation="static", compile_config=graphs_in_place())
    assert_same_answers(found, model.segment(**prompts, **options))


def encode_prompts(processor):
    """Prompts of different lengths, padded on the left: single questions, and one after an answer."""
    chats = [conversation(image, None, question) for image, question in QUESTIONS]
    chats.append(conversation(TALL, "The tail is red.") + conversation(None, None))
    return encode(processor, chats, add_generation_prompt=True, padding_side="left")


def assert_same_answers(found, expected):
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.spans, expected.spans)
    assert_close(found.span_logits[found.answer_mask], expected.span_logits[found.answer_mask], **EXACT)
    assert_close(found.pred_masks, expected.pred_masks, rtol=1e-4, atol=1e-4)


def test_questions_of_the_benchmark_are_answered_together_as_alone(plum):
    model, processor = plum
    asked = []
    for name, image in (("0", WIDE), ("1", TALL)):
        parts = [PartMask("left wing", encode_mask(random_mask(image.height, image.width)))]
        choices = {"choices": ["left wing", "wheel"], "choice_parts": [["left wing"], ["wheel"]], "correct": 0}
        labels = {"image_label": "bird", "question_type": "identification", "question": "Which parts can you see?"}
        question = Question(id=name, image=None, image_id=name, masks=parts, **choices, **labels)
        asked.append(Asked(question, image, name))
    options = {"max_new_tokens": 4, "choice_reduction": "answer_mean", "mask_source": "generated"}
    together = Predictor(model, processor, **options).predict(asked)
    for found, question in zip(together, asked, strict=True):
        (alone,) = Predictor(model, processor, **options).predict([question])
        assert found.choice_scores == pytest.approx(alone.choice_scores, rel=1e-4)
        assert found.generated_text == alone.generated_text
        assert found.predicted_tags == alone.predicted_tags


def test_a_call_in_one_thread_sees_and_changes_nothing_of_another(plum):
    model, processor = plum
    shared = encode(processor, CHATS[:2])  # two rows that share their image and question
    other = encode(processor, [conversation(random_image(50, 70, seed=seed), ANSWERS[0]) for seed in (7, 8)])
    prompts = encode(processor, [conversation(WIDE, None)], add_generation_prompt=True)
    options = {"max_new_tokens": 4, "do_sample": False}
    calls = [
        lambda: encode_conversations(model, **shared),
        lambda: model.segment_spans(**other).pred_masks,
        lambda: model.segment(**prompts, **options).span_logits,
    ]
    expected = [call() for call in calls]
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    inside, results = threading.Barrier(len(calls)), {}

    def run(i: int):
        first = True

        def wait(*_):  # inside the language model, until all of the others are
            nonlocal first
            if first and threading.current_thread() is threads[i]:
                first = False
                inside.wait(timeout=60)

        handle = model.vlm.get_decoder().layers[0].register_forward_pre_hook(wait)
        handles.append(handle)
        ready.wait(timeout=60)
        results[i] = calls[i]()

    handles, ready = [], threading.Barrier(len(calls))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for i, value in enumerate(expected):
        assert_close(results[i], value, **EXACT)
    assert {name: len(module._forward_hooks) for name, module in model.named_modules()} == hooks


def test_rows_with_images_of_their_own_share_nothing():
    model, processor = tiny_model(), tiny_processor()
    batch = encode(processor, [conversation(random_image(seed=seed), "It is red.") for seed in range(3)])
    _, tokens = tokens_computed(model, lambda: encode_conversations(model, **batch))
    assert tokens == batch["attention_mask"].sum()
    del batch["sam_image_index"], batch["sam_pixel_values"]
    model = tiny_model(shared_vision=False)  # and neither do rows of which nobody says whose image they have
    batch = encode(tiny_processor(shared_vision=False), [conversation(WIDE, "It is red.")] * 2)
    del batch["sam_image_index"], batch["sam_pixel_values"]
    _, tokens = tokens_computed(model, lambda: encode_conversations(model, **batch))
    assert tokens == batch["attention_mask"].sum()


def test_a_language_model_that_looks_at_a_window_computes_each_row_whole():
    config = tiny_config(shared_vision=False)
    text = {**config.vlm_config.text_config.to_dict(), "model_type": "mistral", "sliding_window": 8}
    vlm_config = {**config.vlm_config.to_dict(), "text_config": text}
    torch.manual_seed(0)
    model = PlumForConditionalGeneration(type(config)(**{**config.to_dict(), "vlm_config": vlm_config})).eval()
    batch = encode(tiny_processor(shared_vision=False), CHATS)
    hidden_states, tokens = tokens_computed(model, lambda: encode_conversations(model, **batch))
    assert tokens == batch["input_ids"].numel()
    with torch.no_grad():
        assert_close(hidden_states, model(**batch).last_hidden_state, rtol=0, atol=0)


def test_inputs_beyond_embeddings_positions_and_padding_are_not_packed():
    config = tiny_model().vlm.get_decoder().config
    inputs = {"inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": torch.ones(2, 3), "use_cache": False}
    assert can_pack(inputs, config)
    for further in (
        {"visual_pos_masks": torch.ones(2, 3)},
        {"deepstack_visual_embeds": [torch.ones(2)]},
        {"attention_mask": {"full_attention": torch.ones(2, 1, 3, 3)}},
        {"attention_mask": torch.ones(2, 1, 3, 3)},
    ):
        assert not can_pack(inputs | further, config)


@pytest.mark.parametrize("max_tokens", [1, 6, 100])
def test_packed_rows_hold_every_token_once_and_each_sees_its_own_row_up_to_itself(max_tokens):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 3, (6, 5), generator=generator)
    lengths = torch.randint(1, 6, (6,), generator=generator)
    real = torch.arange(5) >= 5 - lengths[:, None]
    roots = [0, 0, 1, 0, 1, 1]
    packed = pack_rows(ids, real.long(), roots, max_tokens)
    for row in range(6):
        tree, places = packed.tree[row], packed.slot[row, real[row]]
        assert ids.flatten()[packed.source[tree, places]].tolist() == ids[row, real[row]].tolist()
        assert packed.depth[tree, places].tolist() == list(range(lengths[row]))
        for depth, place in enumerate(places):
            seen = packed.visible[tree, place].nonzero()[:, 0].tolist()
            assert seen == places[: depth + 1].tolist()
    beginnings = {
        (int(packed.tree[row]), tuple(ids[row, real[row]][: depth + 1].tolist()))
        for row in range(6)
        for depth in range(lengths[row])
    }
    used = {(int(packed.tree[row]), int(place)) for row in range(6) for place in packed.slot[row, real[row]]}
    assert len(used) == len(beginnings)
