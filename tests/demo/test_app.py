"""The demonstration without a browser: its functions, and a round trip through its server."""

import base64
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import gc
import html
import io
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import gradio as gr
import gradio_client
import httpx
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from demo import pages
from demo.app import Demo, serve
from demo.checkpoints import describe, load_checkpoints, read_figures
from demo.events import MAX_CLICKS
from demo.replies import UNDO_STEPS, Replies, Shown, size_of
from demo.uploads import BoundedRequests, own_file, read_upload
from plum_partonomy.inference.one_image import Plum, Prompt, correct_with_prompts, finish, segment_words
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.benchmark import load_questions
from plum_partonomy.scoring.overlays import pick_colours
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
TEXT = "A wheel, another wheel and a left wing."
RANGES = [(2, 7), (17, 22), (29, 38)]
THRESHOLDS = (0.0, 0.5)
MODEL = "tiny"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = str(ROOT / "partonomy" / "mini_questions")
    rows, questions = load_questions("parquet", name="default", split="test", data_dir=folder, limit=3)
    checkpoints = [describe(name, Plum(tiny_model(), tiny_processor())) for name in (MODEL, "other")]
    return Demo(checkpoints, rows, questions, uploads=tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="module")
def plum(demo):
    return demo.plum(MODEL)


@pytest.fixture(scope="module")
def reply(plum):
    return segment_words(plum, random_image(), [{"role": "user", "content": "Which parts?"}], TEXT, RANGES)


@pytest.fixture
def ticket(demo, reply):
    return keep(demo, reply)


def event(**sent):
    """What the page sends with an event."""
    return gr.EventData(None, sent)


def keep(demo, reply):
    return demo.keep(MODEL, reply, len(reply.text))


def ranges_of(demo, outputs):
    return demo.ranges(demo.replies.get(outputs[1]), *THRESHOLDS)


def test_an_answer_is_escaped_and_its_pieces_are_the_text(plum, reply):
    answer = finish(plum, reply)
    page = pages.draw_answer(reply.image, answer)
    (paragraph,) = re.findall(r'<p class="plum-answer">(.*?)</p>', page, re.DOTALL)
    assert re.sub(r"<[^>]*>", "", paragraph) == TEXT
    assert re.findall(r'data-span="(\d)" data-score="[\d.]+"\s*style="--colour: (#\w+)', page) == list(
        zip("012", pick_colours(3), strict=True)
    )
    assert page.count('class="plum-mask"') == 3 and "http" not in page
    assert pages.draw_text("<script>") == '<p class="plum-answer" aria-busy="true">&lt;script&gt;</p>'


def test_an_image_unlike_the_known_ones_has_a_warning_above_its_answer(plum, reply):
    answer = finish(plum, reply)
    assert "plum-warning" not in pages.draw_answer(reply.image, answer)
    page = pages.draw_answer(reply.image, answer, warning="unlike <all> others")
    assert page.index("unlike &lt;all&gt; others") < page.index("plum-stage")


def test_an_answer_that_was_cut_off_says_so_whatever_is_segmented_in_it(demo, tmp_path):
    random_image().save(tmp_path / "image.png")
    *_, (page, ticket, *_) = demo.ask(MODEL, tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    reply = demo.replies.get(ticket).reply
    assert reply.is_truncated and page.index("plum-answer") < page.index("The answer is cut off")
    word = reply.text.split()[0]
    assert "The answer is cut off" in demo.segment(MODEL, None, ticket, word, None, *THRESHOLDS)[0]
    whole = keep(demo, dataclasses.replace(reply, is_truncated=False))
    assert "The answer is cut off" not in demo.segment(MODEL, None, whole, word, None, *THRESHOLDS)[0]


def test_a_drawn_mask_has_the_shape_and_the_colour_of_the_span():
    mask = random_mask(seed=3)
    drawn = np.asarray(pages.draw_mask(mask, "#0072b2", (70, 50)))
    assert np.array_equal(drawn[..., 3] > 0, mask)
    assert (drawn[..., :3] == (0x00, 0x72, 0xB2)).all()


@pytest.mark.parametrize(
    ("selected", "words"),
    [((3, 5), "wheel"), ((1, 8), "wheel"), ((30, 36), "left wing"), ((8, 9), ""), ((36, 900), "wing"), ((-4, 0), "")],
)
def test_a_selection_becomes_whole_words(demo, ticket, selected, words):
    picked, (start, end) = demo.pick_words(ticket, event(start=selected[0], end=selected[1]))
    assert picked == words == TEXT[start:end]


def test_selected_and_typed_words_join_the_spans_and_replace_what_they_overlap(demo, plum, reply):
    def after(words, picked):
        one = keep(demo, segment_words(plum, reply.image, reply.messages, TEXT, RANGES[:1]))
        return ranges_of(demo, demo.segment(MODEL, None, one, words, picked, *THRESHOLDS))

    assert after("wheel", RANGES[1]) == RANGES[:2]
    assert after("wheel, left wing", None) == RANGES
    assert after("A wheel", (0, 7)) == [(0, 7)]


def test_words_that_do_not_stand_in_the_answer_are_segmented_as_well_and_the_masks_before_them_stay(demo, reply):
    ticket = keep(demo, reply)
    before = demo.finish(demo.replies.get(ticket), *THRESHOLDS).spans
    page, ticket, *_ = demo.segment(MODEL, None, ticket, "sail, <b>", None, *THRESHOLDS)
    shown = demo.replies.get(ticket)
    spans = demo.finish(shown, *THRESHOLDS).spans
    assert shown.reply.text == f"{TEXT} Also: sail, <b>." and [span.text for span in spans[3:]] == ["sail", "<b>"]
    assert all(np.array_equal(old.mask, new.mask) for old, new in zip(before, spans, strict=False))
    assert '<span class="plum-own"> Also: </span>' in page and "&lt;b&gt;" in page and "Added:" in page


def test_words_are_segmented_on_an_image_that_nothing_was_asked_about(demo):
    path = demo.uploads / "words.png"
    random_image().save(path)
    page, ticket, *_ = demo.segment(MODEL, path, None, "left wing, tail", None, *THRESHOLDS)
    spans = demo.finish(demo.replies.get(ticket), *THRESHOLDS).spans
    assert [span.text for span in spans] == ["left wing", "tail"] and page.count('class="plum-mask"') == 2
    with pytest.raises(gr.Error, match="Choose an image"):
        demo.segment(MODEL, None, None, "tail", None, *THRESHOLDS)


def colours_on(page):
    """The colour of each span by its words with their score."""
    pieces = re.findall(r'style="--colour: (#\w+)">([^<]*)</span>', page[: page.index("plum-tools")])
    return {words: colour for colour, words in pieces}


def test_a_mask_keeps_its_colour_when_others_are_added_or_hidden(demo, plum, reply):
    ticket = keep(demo, segment_words(plum, reply.image, reply.messages, TEXT, RANGES[1:]))
    first = colours_on(demo.present(ticket, *THRESHOLDS)[0])
    page, ticket, *_ = demo.segment(MODEL, None, ticket, "A wheel", None, *THRESHOLDS)
    assert first.items() < colours_on(page).items() and len(set(colours_on(page).values())) == 3
    scores = sorted(span.score for span in demo.finish(demo.replies.get(ticket), *THRESHOLDS).spans)
    fewer = colours_on(demo.redraw(ticket, (scores[0] + scores[1]) / 2, 0.5)[0])
    assert len(fewer) < 3 and fewer.items() < colours_on(page).items()


def painted(start, mask):
    image = Image.fromarray(np.dstack([mask * 255] * 4).astype(np.uint8))
    return event(start=start, mask="data:image/png;base64," + base64.b64encode(as_png(image)).decode())


def shown_mask(mask, image):
    return np.asarray(pages.draw_mask(mask, "#000000", pages.shown_size(image)))[..., 3] > 0


def test_a_painted_mask_is_taken_and_where_nothing_was_painted_it_stays_as_it_was(demo, reply, ticket):
    mask = demo.finish(demo.replies.get(ticket), *THRESHOLDS).spans[0].mask
    same = shown_mask(mask, reply.image)
    kept = demo.correct(ticket, *THRESHOLDS, painted(2, same))[1]
    assert np.array_equal(demo.replies.get(kept).reply.given_masks[RANGES[0]], mask)
    drawn = same.copy()
    drawn[:, : same.shape[1] // 2] = True
    taken = demo.replies.get(demo.correct(ticket, *THRESHOLDS, painted(2, drawn))[1]).reply.given_masks[RANGES[0]]
    assert taken[:, :34].all() and np.array_equal(taken[:, 36:], mask[:, 36:])
    for start in (-1, 3, 10**9, "2", None, [2]):
        with pytest.raises(gr.Error, match="not there any more"):
            demo.correct(ticket, *THRESHOLDS, painted(start, same))
    with pytest.raises(gr.Error, match="paint it again"):
        demo.correct(ticket, *THRESHOLDS, painted(2, same[:50]))


def test_a_correction_marks_what_has_changed_and_can_be_undone(demo, reply, ticket):
    before, *_ = demo.present(ticket, *THRESHOLDS)
    page, corrected, *_ = demo.correct(ticket, *THRESHOLDS, painted(2, shown_mask(random_mask(seed=9), reply.image)))
    assert "Your mask of" in page and "Changed with it:" in page
    assert page.count('class="plum-was"') == page.count('class="plum-mask plum-changed"') > 1
    undone, ticket, *_ = demo.undo(corrected, *THRESHOLDS)
    assert undone == before
    with pytest.raises(gr.Error, match="nothing to undo"):
        demo.undo(ticket, *THRESHOLDS)


def test_clicks_and_boxes_reach_the_model_in_pixels_of_the_image_and_add_up(demo, plum, reply, ticket):
    place, start = RANGES[1], RANGES[1][0]
    sent = [{"point": [60, 12], "label": 1}, {"point": [3, 40], "label": 0}, {"box": [2, 3, 66, 44]}]
    names = ["your 1 click", "your 2 clicks", "your 2 clicks and box"]
    pages_before, tickets, expected = [demo.present(ticket, *THRESHOLDS)[0]], [ticket], reply
    for number, prompt in enumerate(sent):
        page, ticket, *_ = demo.click(tickets[-1], *THRESHOLDS, event(start=start, **prompt))
        prompt = {"points": [prompt["point"]], "labels": [prompt["label"]]} if "point" in prompt else prompt
        expected = correct_with_prompts(plum, expected, RANGES, place, **prompt)
        assert torch.equal(demo.replies.get(ticket).reply.outputs.pred_masks, expected.outputs.pred_masks)
        assert re.search(rf"The mask of .*wheel.* follows\s+{names[number]}\.", page)
        assert re.findall(r'plum-mark ([\w -]+)" data-span="1"', page) == [
            *["plum-box"] * ("box" in sent[number]),
            *["plum-point", "plum-point plum-less"][: number + 1],
        ]
        pages_before.append(page)
        tickets.append(ticket)
    prompt = demo.replies.get(ticket).reply.prompts[place]
    assert prompt.points == ((60, 12), (3, 40)) and prompt.labels == (1, 0) and prompt.box == (2, 3, 66, 44)
    assert re.search(r"2\. wheel</span>\s+your 2 clicks and box;\s+IoU", demo.steps(ticket, *THRESHOLDS))
    assert "left: 5.0%; top: 81.0%" in page and "left: 2.857%; top: 6.0%; width: 91.429%; height: 82.0%" in page
    for page in reversed(pages_before[:-1]):
        undone, ticket, *_ = demo.undo(ticket, *THRESHOLDS)
        assert undone == page


def test_a_click_refines_a_painted_mask_and_paint_replaces_clicks(demo, reply, ticket):
    start, drawn = RANGES[0][0], shown_mask(random_mask(seed=9), reply.image)
    ticket = demo.correct(ticket, *THRESHOLDS, painted(start, drawn))[1]
    assert re.search(r"1\. wheel</span>\s+your mask;\s+IoU", demo.steps(ticket, *THRESHOLDS))
    mask = demo.replies.get(ticket).reply.given_masks[RANGES[0]]
    ticket = demo.click(ticket, *THRESHOLDS, event(start=start, point=[5, 5], label=0))[1]
    clicked = demo.replies.get(ticket).reply
    assert clicked.given_masks == {} and clicked.prompts[RANGES[0]].mask is mask
    page, ticket, *_ = demo.correct(ticket, *THRESHOLDS, painted(start, drawn))
    assert demo.replies.get(ticket).reply.prompts == {} and "Your mask of" in page and "plum-mark" not in page


def test_an_image_is_encoded_once_for_all_that_is_done_with_its_answer(demo, plum, tmp_path):
    random_image().save(tmp_path / "image.png")
    encoded = []
    hook = plum.model.sam.vision_encoder.register_forward_hook(lambda *_: encoded.append(None))
    *_, (_, ticket, *_) = demo.ask(MODEL, tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    ticket = demo.segment(MODEL, None, ticket, "left wing, tail", None, *THRESHOLDS)[1]
    start = ranges_of(demo, (None, ticket))[-1][0]
    for point in ([60, 12], [3, 40]):
        ticket = demo.click(ticket, *THRESHOLDS, event(start=start, point=point, label=1))[1]
    demo.steps(ticket, *THRESHOLDS)
    assert len(encoded) == 1
    random_image(seed=1).save(tmp_path / "image.png")
    *_, (_, other, *_) = demo.ask(MODEL, tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    hook.remove()
    first, second = (demo.replies.get(each).reply.encoded for each in (ticket, other))
    assert len(encoded) == 2 and not torch.equal(first.sam_embedding, second.sam_embedding)
    (features,) = first.vlm_features.pooler_output
    reply = demo.replies.get(ticket).reply
    assert size_of(reply) > sum(kept.nbytes for kept in (first.sam_embedding, features, reply.hidden_states))


def test_a_mask_takes_a_limited_number_of_clicks_and_a_box_beside_them(demo, reply):
    place = RANGES[0]
    full = Prompt(points=((1, 1),) * MAX_CLICKS, labels=(1,) * MAX_CLICKS)
    ticket = keep(demo, dataclasses.replace(reply, prompts={place: full}))
    with pytest.raises(gr.Error, match=f"at most {MAX_CLICKS} clicks"):
        demo.click(ticket, *THRESHOLDS, event(start=place[0], point=[5, 5], label=0))
    demo.click(ticket, *THRESHOLDS, event(start=place[0], box=[0, 0, 70, 50]))
    demo.click(ticket, *THRESHOLDS, event(start=RANGES[1][0], point=[5, 5], label=0))


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"point": [5, 5]},
        {"point": [5, 5], "label": 2},
        {"point": [5, 5], "label": None},
        {"point": [5, 5], "label": [1]},
        {"point": [70, 5], "label": 1},
        {"point": [5, -1], "label": 1},
        {"point": [5, math.nan], "label": 1},
        {"point": [math.inf, 5], "label": 1},
        {"point": [10**400, 5], "label": 1},
        {"point": ["5", 5], "label": 1},
        {"point": [5], "label": 1},
        {"point": [[5, 5], [6, 6]], "label": [1, 1]},
        {"point": [[]] * 100_000, "label": 1},
        {"point": {"x": 5, "y": 5}, "label": 1},
        {"box": [5, 5, 5, 9]},
        {"box": [9, 5, 5, 9]},
        {"box": [0, 0, 71, 50]},
        {"box": [0, 0, math.nan, 50]},
        {"box": [5, 5]},
        {"box": "5 5 9 9"},
    ],
    ids=lambda sent: str(sent)[:40],
)
def test_clicks_and_boxes_that_are_not_in_the_image_are_refused_in_one_sentence(demo, ticket, sent):
    with pytest.raises(gr.Error, match="or a box, inside the image of 70 x 50 pixels, found .*: click on") as refused:
        demo.click(ticket, *THRESHOLDS, event(start=RANGES[0][0], **sent))
    assert len(str(refused.value)) < 300


def test_events_without_their_values_are_refused(demo, ticket):
    for nothing in (None, {}, [], "start", 3):
        with pytest.raises(gr.Error, match="not there any more"):
            demo.click(ticket, *THRESHOLDS, gr.EventData(None, nothing))
        with pytest.raises(gr.Error, match="select the words again"):
            demo.pick_words(ticket, gr.EventData(None, nothing))


def test_an_answer_without_masks_says_why(demo, plum, ticket):
    assert "No mask has a score of at least 1.00" in demo.redraw(ticket, 1.0, 0.5)[0]
    answer = dataclasses.replace(finish(plum, demo.replies.get(ticket).reply), spans=[])
    assert "names no part that has a mask" in pages.draw_answer(random_image(), answer)


def test_the_page_says_what_each_of_several_models_knows(tmp_path):
    for name in ("one", "two"):
        model = tiny_model()
        if name == "two":
            width = model.config.sam_config.vision_config.output_channels
            statistics = {"mean": [[0.0] * width], "std": [[1.0] * width], "intercept": 0.0, "slope": 1.0}
            model.config.image_statistics = {**statistics, "threshold": 0.5, "kinds": "photographs of <cars>"}
        model.save_pretrained(tmp_path / name)
        tiny_processor().save_pretrained(tmp_path / name)
    card = (ROOT / "checkpoints" / "plum-tiny" / "README.md").read_text()
    (tmp_path / "two" / "README.md").write_text(card)
    one, two = load_checkpoints([tmp_path / "one", tmp_path / "two"])
    assert "does not say which images it knows" in pages.draw_checkpoint(one)
    page = pages.draw_checkpoint(two)
    assert "two" in page and "photographs of &lt;cars&gt;" in page and "Measured on PARTONOMY mini_questions" in page
    assert read_figures(tmp_path / "two" / "README.md")["PARTONOMY mini_questions"]["choice accuracy"] > 0.5
    (tmp_path / "one" / "README.md").write_text("---\nmodel-index: 3\n---\n")
    assert read_figures(tmp_path / "one" / "README.md") == {}
    with pytest.raises(DataError, match="different names"):
        load_checkpoints([tmp_path / "one", tmp_path / "one"])


def test_each_answer_goes_on_with_the_model_that_gave_it(demo, reply):
    ticket = keep(demo, reply)
    _, ticket, *_ = demo.segment("other", None, ticket, "sail", None, *THRESHOLDS)
    assert demo.replies.get(ticket).model == MODEL
    with pytest.raises(gr.Error, match="one of the models tiny, other"):
        list(demo.ask("third", demo.uploads / "0.png", "Which parts?", *THRESHOLDS))


def test_steps_and_benchmark_questions_become_pages(demo, ticket):
    steps = demo.steps(ticket, *THRESHOLDS)
    assert steps.count("<figure>") == 9 and "1. wheel" in steps and "3. left wing" in steps
    page = demo.benchmark(MODEL, 2)
    assert demo.questions[1].question in page
    assert page.count("<li") == len(demo.questions[1].choices)
    assert page.count("<b>right</b>") == page.count("<b>the model's choice</b>") == 1
    assert demo.benchmark(MODEL, 99) == demo.benchmark(MODEL, 3)


def test_an_answer_is_shown_while_it_is_written(demo, tmp_path, monkeypatch):
    random_image().save(tmp_path / "image.png")
    monkeypatch.setattr("demo.app.SECONDS_BETWEEN_UPDATES", -1)
    (begun, *_), *growing, (_, ticket, *_) = demo.ask(MODEL, tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    shown = [
        re.fullmatch(r'<p class="plum-answer" aria-busy="true">(.*)</p>', page, re.DOTALL)[1] for page, *_ in growing
    ]
    assert (
        "plum-begun" in begun
        and len(shown) > 3
        and all(late.startswith(early) for early, late in itertools.pairwise(shown))
    )
    assert html.unescape(shown[-1]).strip() == demo.replies.get(ticket).reply.text.strip()


def test_nothing_can_be_done_before_a_question_is_asked(demo):
    actions = [
        lambda: demo.steps(None, *THRESHOLDS),
        lambda: next(demo.files(None, *THRESHOLDS)),
        lambda: demo.pick_words(None, event(start=0, end=3)),
        lambda: demo.correct(None, *THRESHOLDS, painted(2, random_mask())),
        lambda: demo.click(None, *THRESHOLDS, event(start=2, point=[5, 5], label=1)),
        lambda: demo.undo(None, *THRESHOLDS),
    ]
    for action in actions:
        with pytest.raises(gr.Error, match="Ask a question first"):
            action()
    with pytest.raises(gr.Error, match="Choose an image"):
        list(demo.ask(MODEL, None, "Which parts?", *THRESHOLDS))


def test_a_question_or_words_beyond_the_limit_of_the_app_are_refused(demo, ticket):
    path = demo.uploads / "question.png"
    random_image().save(path)
    for refused in (
        lambda: list(demo.ask(MODEL, path, "a" * 501, *THRESHOLDS)),
        lambda: demo.segment(MODEL, None, ticket, "a" * 501, None, *THRESHOLDS),
    ):
        with pytest.raises(gr.Error, match="of 1 to 500 characters, found 501"):
            refused()


@pytest.fixture(scope="module")
def server(demo):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(demo.uploads))
    app = serve(demo)
    yield app.local_url
    app.close()
    patch.undo()


def test_the_server_answers_and_hands_out_files_of_the_same_masks(demo, server, tmp_path):
    random_image().save(tmp_path / "image.png")
    client = gradio_client.Client(server, verbose=False, download_files=str(tmp_path / "files"))
    image = gradio_client.handle_file(tmp_path / "image.png")
    page, *_ = client.predict(MODEL, image, "Which parts?", 0, 0.5, api_name="/ask")
    *_, (expected, *_) = demo.ask(MODEL, tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    assert page == expected
    files = {Path(path).name: path for path in client.predict(0, 0.5, api_name="/files")}
    coco = json.loads(Path(files["masks.json"]).read_text())
    assert len(coco["annotations"]) == page.count('class="plum-mask"') == len(files) - 2
    assert max(Image.open(files["overlay.png"]).size) >= 512


def test_the_server_refuses_what_is_too_large_or_no_image(server, tmp_path):
    client = gradio_client.Client(server, verbose=False)
    Image.new("1", (8000, 5001)).save(tmp_path / "wide.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="more than 40 megapixels"):
        client.predict(MODEL, gradio_client.handle_file(tmp_path / "wide.png"), "Which?", 0, 0.5, api_name="/ask")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(gradio_client.exceptions.AppError, match="not a readable image"):
        client.predict(MODEL, gradio_client.handle_file(tmp_path / "text.png"), "Which?", 0, 0.5, api_name="/ask")
    (tmp_path / "large.png").write_bytes(bytes(10_000_001))
    with pytest.raises(Exception, match="413|size"):
        client.predict(MODEL, gradio_client.handle_file(tmp_path / "large.png"), "Which?", 0, 0.5, api_name="/ask")


# ---------------------------------------------------------------- raw requests


def upload(server: str, content: bytes, name: str = "image.png") -> str:
    """The path on the server under which it keeps an uploaded file."""
    (path,) = httpx.post(f"{server}gradio_api/upload", files={"files": (name, content)}, timeout=60).json()
    return path


@functools.cache
def functions_of(server: str) -> dict[str, int]:
    return {part["api_name"]: part["id"] for part in httpx.get(f"{server}config").json()["dependencies"]}


def call(server: str, function: str, data: list, session: str | None = None, event: dict | None = None) -> dict:
    """What a function of the page answers to data as they come over the wire."""
    session = session or uuid.uuid4().hex
    joined = {"data": data, "fn_index": functions_of(server)[function], "session_hash": session, "event_data": event}
    httpx.post(f"{server}gradio_api/queue/join", json=joined, timeout=60).raise_for_status()
    with httpx.stream("GET", f"{server}gradio_api/queue/data", params={"session_hash": session}, timeout=60) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the server ended without an answer")


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def with_and_without_meta(path: str) -> list[dict]:
    return [{"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}]


def test_a_raw_request_gets_an_answer_about_its_own_upload(server):
    path = upload(server, as_png(random_image()))
    for file in with_and_without_meta(path):
        message = call(server, "ask", [MODEL, file, "Which parts?", 0, 0.5])
        assert message["success"] and "plum-stage" in message["output"]["data"][0]


def test_no_request_sees_or_learns_of_a_file_outside_of_the_uploads(server, demo, tmp_path):
    secret = tmp_path / "secret.png"
    random_image().save(secret)
    os.mkfifo(tmp_path / "pipe.png")
    (demo.uploads / "inside").mkdir()
    (demo.uploads / "inside" / "link.png").symlink_to(secret)
    (demo.uploads / "inside" / "circle.png").symlink_to(demo.uploads / "inside" / "circle.png")
    os.mkfifo(demo.uploads / "inside" / "pipe.png")
    outside = [secret, tmp_path / "absent.png", tmp_path / "pipe.png", "/etc/passwd", "/dev/zero", "/dev/ptmx", "/"]
    outside += [demo.uploads / "inside" / name for name in ("link.png", "circle.png", "pipe.png", "absent.png")]
    outside += [demo.uploads, demo.uploads / ".." / secret.relative_to(tmp_path.parent), "", "a\0b", "x" * 5000]
    outside += ["http://127.0.0.1:9/image.png", "data:image/png;base64,AAAA", "file:///etc/passwd"]
    answers = set()
    for path in outside:
        message = call(server, "ask", [MODEL, {"path": str(path)}, "Which parts?", 0, 0.5])
        assert not message["success"]
        answers.add(message["output"]["error"])
    assert len(answers) == 1 and "upload it again" in answers.pop()
    for path in outside:  # gradio itself refuses these, in its own words
        assert not call(server, "ask", [with_and_without_meta(str(path))[1], "Which parts?", 0, 0.5])["success"]


def test_after_requests_that_would_block_it_the_server_answers_the_next(server):
    path = upload(server, as_png(random_image()))
    for device in ("/dev/zero", "/dev/ptmx", "/dev/stdin", "/proc/kmsg"):
        for function, data in (
            ("ask", [MODEL, {"path": device}, "Which parts?", 0, 0.5]),
            ("segment", [MODEL, {"path": device}, None, "wheel", None, 0, 0.5]),
        ):
            assert not call(server, function, data)["success"]
    assert call(server, "ask", [MODEL, {"path": path}, "Which parts?", 0, 0.5])["success"]


def test_a_painted_mask_has_the_size_of_the_page_and_clicks_are_in_the_image(server):
    session = uuid.uuid4().hex
    path = upload(server, as_png(random_image()))
    message = call(server, "segment", [MODEL, {"path": path}, None, "wheel, tail", None, 0, 0.5], session)
    start = int(re.search(r'data-start="(\d+)"', message["output"]["data"][0])[1])
    size = pages.shown_size(random_image())

    def correct(mask):
        return call(server, "correct", [None, 0, 0.5], session, event={"start": start, "mask": mask})

    def address(image):
        return "data:image/png;base64," + base64.b64encode(as_png(image)).decode()

    for mask, message in (
        (address(random_image()), f"Expected a mask of {size[0]} x {size[1]} pixels"),
        (address(Image.new("1", (5000, 5000))), "pixels, more than"),
        (address(random_image())[:82], "not a readable image"),
        ("data:image/png;base64,?", "cannot be read"),
        ("/etc/passwd", "Paint on a mask first"),
        (None, "Paint on a mask first"),
        ({"path": path}, "Paint on a mask first"),
    ):
        assert message in correct(mask)["output"]["error"]
    assert correct(address(Image.new("RGBA", size, (9, 9, 9, 255))))["success"]
    for event in (None, {}, {"start": start}, {"start": "x", "mask": address(Image.new("RGBA", size))}, ["start"]):
        assert not call(server, "correct", [None, 0, 0.5], session, event=event)["success"]

    def click(**event):
        return call(server, "click", [None, 0, 0.5], session, event={"start": start, **event})

    for event in ({}, {"point": [70, 5], "label": 1}, {"box": ["0", 0, 5, 5]}, {"point": {"path": path}, "label": 1}):
        assert "inside the image of 70 x 50 pixels" in click(**event)["output"]["error"]
    assert "your 1 click" in click(point=[5, 5], label=1)["output"]["data"][0]
    assert "your 1 click and box" in click(box=[0, 0, 70, 50])["output"]["data"][0]


def test_no_message_names_a_place_on_the_server(server, demo):
    path = upload(server, as_png(random_image())[:100])
    for file in ({"path": path}, *with_and_without_meta("/etc/passwd"), {"path": "x" * 5000}):
        message = call(server, "ask", [MODEL, file, "Which parts?", 0, 0.5])
        assert not message["success"]
        for secret in (str(demo.uploads), os.getcwd(), "/site-packages/", tempfile.gettempdir()):
            assert secret not in json.dumps(message)


@pytest.mark.parametrize(
    ("function", "data"),
    [
        ("ask", [MODEL, None, "Which parts?", 0, 0.5]),
        ("ask", [MODEL, [], "Which parts?", 0, 0.5]),
        ("ask", [MODEL, {"path": 3}, "Which parts?", 0, 0.5]),
        ("ask", [MODEL, "IMAGE", "x" * 10**6, 0, 0.5]),
        ("ask", [MODEL, "IMAGE", "Which parts?", -1e308, 0.5]),
        ("ask", [MODEL, "IMAGE", "Which parts?", "much", 0.5]),
        ("ask", [MODEL, "IMAGE", "Which parts?", 0, 0]),
        ("ask", [MODEL, "IMAGE", "Which parts?", 0, 1]),
        ("ask", [MODEL, "IMAGE", "Which parts?", 0]),
        ("ask", ["absent", "IMAGE", "Which parts?", 0, 0.5]),
        ("ask", []),
        ("segment", [MODEL, None, None, "a wheel", None, 0, 0.5]),
        ("segment", [MODEL, "IMAGE", {"reply": 1}, "x" * 10**6, [0, 10**9], 0, 0.5]),
        ("steps", [None, 0, 0.5]),
        ("files", [None, 0, 0.5]),
        ("undo", [None, 0, 0.5]),
        ("correct", [None, 0, 0.5]),
        ("click", [None, 0, 0.5]),
        ("benchmark", [MODEL, 1e308]),
        ("benchmark", [MODEL, "x"]),
        ("benchmark", ["absent", 1]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_request_that_makes_no_sense_fails_alone(server, function, data):
    path = upload(server, as_png(random_image()))
    sent = [{"path": path} if item == "IMAGE" else item for item in data]
    assert not call(server, function, sent)["success"]
    assert call(server, "ask", [MODEL, {"path": path}, "Which parts?", 0, 0.5])["success"]


def test_large_requests_are_refused_before_they_are_read(server):
    def endless():
        yield b"0"
        raise AssertionError("the server reads on")

    for headers in ({"Content-Length": str(10**12)}, {}):
        with contextlib.suppress(AssertionError, httpx.TransportError):
            response = httpx.post(f"{server}gradio_api/queue/join", content=endless(), headers=headers, timeout=60)
            assert response.status_code == 413


def test_an_image_that_takes_too_long_to_read_is_given_up(tmp_path):
    random_image().save(tmp_path / "image.png")
    with pytest.raises(DataError, match="takes more than 0 seconds to read"):
        read_upload(tmp_path / "image.png", seconds=0)
    assert np.array_equal(read_upload(tmp_path / "image.png"), random_image())


def test_only_a_regular_file_of_the_folder_is_an_own_file(tmp_path):
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "a").write_text("")
    assert own_file(str(tmp_path / "uploads" / "a"), tmp_path / "uploads") == tmp_path / "uploads" / "a"
    for path in (None, "a", str(tmp_path / "uploads"), str(tmp_path / "uploads" / "b")):
        with pytest.raises(DataError, match="upload it again"):
            own_file(path, tmp_path / "uploads")


# ---------------------------------------------------------------- what is kept


@pytest.fixture
def shown(reply):
    return Shown(MODEL, reply, len(reply.text))


def test_replies_are_bounded_in_number_and_bytes_and_the_least_recently_used_goes_first(shown):
    replies = Replies(limit=3, bytes_limit=10 * size_of(shown.reply))
    tickets = [replies.keep(shown) for _ in range(3)]
    assert replies.get(tickets[0]) is shown
    tickets.append(replies.keep(shown))
    with pytest.raises(DataError, match="many people"):
        replies.get(tickets[1])
    assert all(replies.get(tickets[i]) is shown for i in (0, 2, 3)) and len(replies) == 3

    few = Replies(limit=100, bytes_limit=2 * size_of(shown.reply))
    others = [copy.deepcopy(shown) for _ in range(5)]
    tickets = [few.keep(other) for other in others]
    assert len(few) == 2 and few.size() <= few.bytes_limit and few.get(tickets[4]) is others[4]
    none = Replies(limit=100, bytes_limit=0)
    assert none.get(none.keep(shown)) is shown


def test_what_answers_share_counts_once_and_a_limited_number_of_changes_can_be_undone(shown):
    replies, ticket = Replies(), None
    for _ in range(UNDO_STEPS + 5):
        ticket = replies.keep(dataclasses.replace(shown, before=ticket))
    gc.collect()
    assert len(replies) == UNDO_STEPS + 1 and replies.size() == size_of(shown.reply)
    drawn = dataclasses.replace(shown.reply, prompts={RANGES[0]: Prompt(mask=random_mask())})
    assert size_of(shown.reply, drawn) == size_of(shown.reply) + random_mask().nbytes
    steps = 0
    while (ticket := replies.get(ticket).before) is not None:
        steps += 1
    assert steps == UNDO_STEPS


def test_a_reply_goes_with_its_session(shown):
    replies = Replies()
    ticket = replies.keep(shown)
    assert copy.deepcopy(ticket) is ticket and len(replies) == 1
    del ticket
    gc.collect()
    assert len(replies) == 0 and replies.size() == 0


def test_the_oldest_uploads_make_room_for_new_ones_and_examples_stay(tmp_path):
    (tmp_path / "example.png").write_bytes(bytes(100))
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "image.png").write_bytes(bytes(100))
        os.utime(tmp_path / str(number) / "image.png", (number, number))
    BoundedRequests(None, tmp_path, limit=250).make_room()
    assert sorted(path.parent.name for path in tmp_path.glob("*/*")) == ["2", "3"]
    assert (tmp_path / "example.png").exists()


@pytest.mark.parametrize("people", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_people_at_once_each_get_the_answer_to_their_own_question(demo, server, tmp_path, people):
    def visit(number):
        path = tmp_path / f"{number}.png"
        random_image(40 + number, 60, seed=number).save(path)
        client = gradio_client.Client(server, verbose=False)
        page, *_ = client.predict(MODEL, gradio_client.handle_file(path), f"Part {number}?", 0, 0.5, api_name="/ask")
        return path, page

    with concurrent.futures.ThreadPoolExecutor(people) as pool:
        visits = list(pool.map(visit, range(people)))
    for number, (path, page) in enumerate(visits):
        *_, (expected, *_) = demo.ask(MODEL, path, f"Part {number}?", *THRESHOLDS)
        assert page == expected
    assert len({page for _, page in visits}) == people


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_the_released_model_and_leaves_no_file_when_it_is_stopped(tmp_path, stop):
    random_image().save(tmp_path / "image.png")
    (tmp_path / "temporary").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", str(ROOT / "demo" / "app.py"), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any("is at http://" in line for line in process.stdout)
            client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
            image = gradio_client.handle_file(tmp_path / "image.png")
            page, *_ = client.predict("plum-tiny", image, "Which?", 0, 0.5, api_name="/ask")
            assert "plum-stage" in page and list((tmp_path / "temporary").rglob("image.png"))
        finally:
            process.send_signal(stop)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert [path for path in (tmp_path / "temporary").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_answers(demo, tmp_path):
    random_image().save(tmp_path / "image.png")
    process, sizes = psutil.Process(), []
    for _ in range(20):
        for _ in range(50):  # two calls of the model's segment() each
            *_, (_, ticket, *_) = demo.ask(MODEL, tmp_path / "image.png", "Which parts?", *THRESHOLDS)
            demo.segment(MODEL, None, ticket, demo.replies.get(ticket).reply.text.split()[0], None, *THRESHOLDS)
        sizes.append(process.memory_info().rss)
    assert sizes[-1] < 1.05 * sizes[4]
