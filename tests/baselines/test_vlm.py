import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F
from transformers import BlipConfig, BlipForConditionalGeneration

from plum_partonomy.baselines import served
from plum_partonomy.baselines.sam3 import Sam3
from plum_partonomy.baselines.served import ServedVlm
from plum_partonomy.baselines.vlm import LIST_PROMPT, Vlm
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.letters import LETTERS, letter_question
from tests.baselines.tiny_models import tiny_gemma3, tiny_qwen3vl
from tests.tiny import random_image

CHOICES = ["wheel", "left wing, and tail", "left wing, tail, and a wheel that is another one"]
ASKED = [{"role": "user", "content": "What visible parts does the object in the image have?"}]
TOLD = [*ASKED, {"role": "assistant", "content": "tail"}, {"role": "user", "content": "What is the object?"}]


@pytest.fixture(scope="module", params=[tiny_gemma3, tiny_qwen3vl], ids=["gemma3", "qwen3vl"])
def pretrained(request):
    return request.param()


def naive_inputs(processor, messages, image, *, prompt: bool) -> dict:
    chat = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    chat[0]["content"].insert(0, {"type": "image", "image": image})
    return processor.apply_chat_template(
        chat, add_generation_prompt=prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def naive_score(model, processor, image, messages, choice: str, reduction: str) -> float:
    """One whole forward pass of one choice, token by token."""
    prompt = naive_inputs(processor, messages, image, prompt=True)["input_ids"][0]
    inputs = naive_inputs(processor, [*messages, {"role": "assistant", "content": choice}], image, prompt=False)
    ids = inputs["input_ids"][0]
    assert ids[: len(prompt)].equal(prompt)
    log_probabilities = F.log_softmax(model(**inputs).logits[0], dim=-1)
    each = {n: float(log_probabilities[n - 1, ids[n]]) for n in range(1, len(ids))}
    if reduction == "sequence_mean":
        counted = [value for n, value in each.items() if ids[n] != model.config.image_token_id]
    else:
        counted = [value for n, value in each.items() if n >= len(prompt)]
    return sum(counted) / (1 if reduction == "answer_sum" else len(counted))


@pytest.mark.parametrize("reduction", ["sequence_mean", "answer_mean", "answer_sum"])
@pytest.mark.parametrize("messages", [ASKED, TOLD], ids=["one_turn", "two_turns"])
def test_choices_score_as_whole_forward_passes_of_each(pretrained, reduction, messages):
    vlm = Vlm(*pretrained, reduction=reduction)
    images = [random_image(60, 84, seed=1), random_image(90, 40, seed=2)]
    seen = [vlm.encode(image) for image in images]  # the second is read before the first is asked about
    assert all(item.prefix is not None for item in seen)
    for item, image in zip(seen, images, strict=True):
        expected = [naive_score(*pretrained, image, messages, choice, reduction) for choice in CHOICES]
        torch.testing.assert_close(vlm.choose(item, messages, CHOICES), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_share_a_prefix_scores_and_answers_alike(pretrained):
    sharing, whole = Vlm(*pretrained, max_new_tokens=8), Vlm(*pretrained, max_new_tokens=8)
    whole.shares_prefix = False
    image = random_image(60, 84)
    one, other = sharing.encode(image), whole.encode(image)
    assert one.prefix is not None and other.prefix is None
    expected = whole.choose(other, ASKED, CHOICES)
    torch.testing.assert_close(sharing.choose(one, ASKED, CHOICES), expected, rtol=1e-4, atol=1e-5)
    assert sharing.answer(one, ASKED) == whole.answer(other, ASKED)


@torch.no_grad()
def test_an_answer_is_what_generate_gives_for_the_whole_prompt_and_can_be_asked_for_again(pretrained):
    model, processor = pretrained
    vlm = Vlm(model, processor, max_new_tokens=8)
    image = random_image(60, 84)
    asked = [{"role": "user", "content": f"{ASKED[0]['content']}\n{LIST_PROMPT}"}]
    inputs = naive_inputs(processor, asked, image, prompt=True)
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    seen = vlm.encode(image)
    assert [vlm.answer(seen, ASKED), vlm.answer(seen, ASKED)] == [expected, expected]


def test_letters_are_scored_as_the_choices_of_a_question_that_lists_them(pretrained):
    by_letter, plain = Vlm(*pretrained, choices_by="letter"), Vlm(*pretrained)
    seen = plain.encode(random_image())
    expected = plain.choose(seen, letter_question(ASKED, CHOICES), list(LETTERS[:3]))
    assert by_letter.choose(seen, ASKED, CHOICES) == expected


def test_a_template_that_refuses_a_conversation_is_named(pretrained):
    model, processor = pretrained
    processor = copy.copy(processor)
    processor.chat_template = "{{ raise_exception('system messages only') }}"
    with pytest.raises(DataError, match="chat template of .* cannot write a conversation of 1 messages.*system"):
        Vlm(model, processor).encode(random_image())


def test_what_is_no_vision_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match=r"--vlm .*: expected a checkpoint of AutoModelForImageTextToText"):
        Vlm.from_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"--vlm .*absent: expected a checkpoint of AutoModelForImageTextToText"):
        Vlm.from_pretrained(tmp_path / "absent")


def test_code_beside_the_weights_does_not_run_whatever_is_answered(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unknown", "auto_map": auto_map}))
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    for open_model in (Vlm.from_pretrained, Sam3.from_pretrained):
        with pytest.raises(DataError, match="expected a"):
            open_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_model_whose_images_are_no_tokens_of_its_prompt_is_refused(pretrained, tmp_path):
    model, processor = pretrained
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = BlipConfig(text_config={**sizes, "vocab_size": 420}, vision_config=vision, projection_dim=32)
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"expected a decoder-only model whose images are tokens .* found 'blip'"):
        Vlm.from_pretrained(tmp_path)


# ---------------------------------------------------------------- behind an endpoint


@pytest.fixture
def endpoint():
    """A server that answers with the texts of `replies`, and keeps what it was asked."""
    replies, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": "served-vlm"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"authorization": self.headers["Authorization"]})
            text = replies.pop(0)
            self.reply({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})

        def reply(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", replies, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_served_model_chooses_by_letter_and_answers(endpoint):
    url, replies, asked = endpoint
    vlm = ServedVlm(url)
    replies += ["**B**", "I cannot tell.", "I cannot tell.", "- wheel\n- tail"]
    seen = vlm.encode(random_image())
    assert vlm.choose(seen, ASKED, CHOICES) == [0, 1, 0]
    guess = vlm.choose(seen, ASKED, CHOICES)
    assert sum(guess) == 1 and vlm.choose(seen, ASKED, CHOICES) == guess
    assert vlm.answer(seen, ASKED) == "- wheel\n- tail"
    image, text = asked[0]["messages"][0]["content"]
    assert asked[0]["model"] == "served-vlm" and image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == letter_question(ASKED, CHOICES)[0]["content"]
    with pytest.raises(DataError, match="gave no answer"):
        vlm.answer(seen, ASKED)  # the server has no reply left


def test_a_server_that_is_not_the_hub_gets_no_token_of_the_hub(endpoint, monkeypatch):
    url, replies, asked = endpoint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for key, sent in ((None, None), ("own", "Bearer own")):
        if key is not None:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        replies.append("B")
        vlm = ServedVlm(url)
        vlm.choose(vlm.encode(random_image()), ASKED, CHOICES)
        assert asked.pop()["authorization"] == sent
    hosts = ("https://x.us-east-1.aws.endpoints.huggingface.cloud/v1", "https://router.huggingface.co/v1")
    others = (
        "http://router.huggingface.co/v1",
        "https://huggingface.co.example.org/v1",
        "https://nothuggingface.co/v1",
    )
    assert [bool(served.HUB.match(address)) for address in (*hosts, *others)] == [True] * 2 + [False] * 3


def test_an_answer_that_is_no_text_is_one_sentence(endpoint):
    url, replies, _ = endpoint
    vlm = ServedVlm(url)
    replies += [None, [{"type": "text", "text": "B"}]]
    seen = vlm.encode(random_image())
    assert vlm.answer(seen, ASKED) == ""
    with pytest.raises(DataError, match="gave no text as answer, but \\[{'type'"):
        vlm.answer(seen, ASKED)


def test_an_address_where_nothing_answers_is_refused():
    with pytest.raises(DataError, match="expected an API that lists its models"):
        ServedVlm("http://127.0.0.1:1/v1")
