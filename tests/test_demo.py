"""The demonstration without a browser: its functions, and a round trip through its server."""

import concurrent.futures
import html
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import gradio as gr
import gradio_client
import numpy as np
import psutil
import pytest
from PIL import Image

from demo import pages
from demo.app import CANVAS, LAUNCH, Demo, make_app
from partkit.benchmark import load_questions
from plumkit.inference import Plum, finish, segment_words
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor

ROOT = Path(__file__).parents[1]
TEXT = "A wheel, another wheel and a left wing."
RANGES = [(2, 7), (17, 22), (29, 38)]
THRESHOLDS = (0.0, 0.5)


@pytest.fixture(scope="module")
def demo():
    folder = str(ROOT / "partonomy" / "mini_questions")
    rows, questions = load_questions("parquet", name="default", split="test", data_dir=folder, limit=3)
    return Demo(Plum(tiny_model(), tiny_processor()), rows, questions)


@pytest.fixture(scope="module")
def reply(demo):
    return segment_words(demo.plum, random_image(), [{"role": "user", "content": "Which parts?"}], TEXT, RANGES)


def ranges_of(demo, outputs):
    return demo.ranges(outputs[1], *THRESHOLDS)


def test_an_answer_is_escaped_and_its_pieces_are_the_text(demo, reply):
    answer = finish(demo.plum, reply)
    page = pages.draw_answer(reply.image, answer)
    (paragraph,) = re.findall(r'<p class="plum-answer">(.*?)</p>', page, re.DOTALL)
    assert re.sub(r"<[^>]*>", "", paragraph) == TEXT
    assert re.findall(r'data-span="(\d)"\s*style="--colour: (#\w+)', page) == list(
        zip("012", pages.COLOURS, strict=False)
    )
    assert page.count('class="plum-mask"') == 3 and "http" not in page
    assert pages.draw_text("<script>") == '<p class="plum-answer" aria-busy="true">&lt;script&gt;</p>'


def test_a_drawn_mask_has_the_shape_and_the_colour_of_the_span():
    mask = random_mask(seed=3)
    drawn = np.asarray(pages.draw_mask(mask, "#0072b2", (70, 50)))
    assert np.array_equal(drawn[..., 3] > 0, mask)
    assert (drawn[..., :3] == (0x00, 0x72, 0xB2)).all()


class Selection:
    def __init__(self, start, end):
        self.start, self.end = start, end


@pytest.mark.parametrize(
    ("selected", "words"),
    [((3, 5), "wheel"), ((1, 8), "wheel"), ((30, 36), "left wing"), ((8, 9), ""), ((36, 900), "wing"), ((-4, 0), "")],
)
def test_a_selection_becomes_whole_words(demo, reply, selected, words):
    picked, (start, end) = demo.pick_words(reply, Selection(*selected))
    assert picked == words == TEXT[start:end]


def test_selected_and_typed_words_join_the_spans_and_replace_what_they_overlap(demo, reply):
    one = segment_words(demo.plum, reply.image, reply.messages, TEXT, RANGES[:1])
    assert ranges_of(demo, demo.segment(one, "wheel", RANGES[1], *THRESHOLDS)) == RANGES[:2]
    assert ranges_of(demo, demo.segment(one, "wheel, left wing", None, *THRESHOLDS)) == RANGES
    assert ranges_of(demo, demo.segment(one, "A wheel", (0, 7), *THRESHOLDS)) == [(0, 7)]
    with pytest.raises(gr.Error, match="do not stand"):
        demo.segment(one, "sail", None, *THRESHOLDS)


def test_the_brush_gets_a_mask_at_the_size_of_the_page_and_gives_back_the_same(demo, reply):
    drawn = demo.open_editor(reply, 0, *THRESHOLDS)
    assert drawn["background"].size == drawn["layers"][0].size == CANVAS
    corrected = demo.correct(reply, 0, drawn, *THRESHOLDS)[1]
    assert np.array_equal(corrected.given_masks[RANGES[0]], finish(demo.plum, reply).spans[0].mask)
    for missing in (None, {"background": None, "layers": [], "composite": None}):
        with pytest.raises(gr.Error, match="paint on it"):
            demo.correct(reply, 0, missing, *THRESHOLDS)


def test_steps_and_benchmark_questions_become_pages(demo, reply):
    steps = demo.steps(reply, *THRESHOLDS)
    assert steps.count("<figure>") == 9 and "1. wheel" in steps and "3. left wing" in steps
    page = demo.benchmark(2)
    assert demo.questions[1].question in page
    assert page.count("<li") == len(demo.questions[1].choices)
    assert page.count("<b>right</b>") == page.count("<b>the model's choice</b>") == 1
    assert demo.benchmark(99) == demo.benchmark(3)


def test_an_answer_is_shown_while_it_is_written(demo, tmp_path, monkeypatch):
    random_image().save(tmp_path / "image.png")
    monkeypatch.setattr("demo.app.SECONDS_BETWEEN_UPDATES", -1)
    *growing, (_, reply, *_) = demo.ask(str(tmp_path / "image.png"), "Which parts?", *THRESHOLDS)
    shown = [
        re.fullmatch(r'<p class="plum-answer" aria-busy="true">(.*)</p>', page, re.DOTALL)[1] for page, *_ in growing
    ]
    assert len(shown) > 3 and all(late.startswith(early) for early, late in itertools.pairwise(shown))
    assert html.unescape(shown[-1]).strip() == reply.text.strip()


def test_nothing_can_be_done_before_a_question_is_asked(demo):
    actions = [
        lambda: demo.steps(None, *THRESHOLDS),
        lambda: next(demo.files(None, *THRESHOLDS)),
        lambda: demo.segment(None, "wheel", None, *THRESHOLDS),
        lambda: demo.pick_words(None, Selection(0, 3)),
        lambda: demo.open_editor(None, 0, *THRESHOLDS),
    ]
    for action in actions:
        with pytest.raises(gr.Error, match="Ask a question first"):
            action()
    assert demo.open_editor(None, None, *THRESHOLDS) is None
    with pytest.raises(gr.Error, match="Choose an image"):
        next(demo.ask(None, "Which parts?", *THRESHOLDS))


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder))
    app = make_app(demo.plum, demo.rows, demo.questions, examples=folder)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield address
    app.close()
    patch.undo()


def test_the_server_answers_and_hands_out_files_of_the_same_masks(demo, server, tmp_path):
    random_image().save(tmp_path / "image.png")
    client = gradio_client.Client(server, verbose=False, download_files=str(tmp_path / "files"))
    image = gradio_client.handle_file(tmp_path / "image.png")
    page, *_ = client.predict(image, "Which parts?", 0, 0.5, api_name="/ask")
    *_, (expected, *_) = demo.ask(str(tmp_path / "image.png"), "Which parts?", *THRESHOLDS)
    assert page == expected
    files = {Path(path).name: path for path in client.predict(0, 0.5, api_name="/files")}
    coco = json.loads(Path(files["masks.json"]).read_text())
    assert len(coco["annotations"]) == page.count('class="plum-mask"') == len(files) - 2
    assert Image.open(files["overlay.png"]).size == (70, 50)


def test_the_server_refuses_what_is_too_large_or_no_image(server, tmp_path):
    client = gradio_client.Client(server, verbose=False)
    Image.new("1", (8000, 5001)).save(tmp_path / "wide.png")
    with pytest.raises(gradio_client.exceptions.AppError, match="more than 40 megapixels"):
        client.predict(gradio_client.handle_file(tmp_path / "wide.png"), "Which?", 0, 0.5, api_name="/ask")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(gradio_client.exceptions.AppError, match="cannot be read as an image"):
        client.predict(gradio_client.handle_file(tmp_path / "text.png"), "Which?", 0, 0.5, api_name="/ask")
    (tmp_path / "large.png").write_bytes(bytes(10_000_001))
    with pytest.raises(Exception, match="413|size"):
        client.predict(gradio_client.handle_file(tmp_path / "large.png"), "Which?", 0, 0.5, api_name="/ask")


@pytest.mark.parametrize("people", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_people_at_once_each_get_the_answer_to_their_own_question(demo, server, tmp_path, people):
    def visit(number):
        path = tmp_path / f"{number}.png"
        random_image(40 + number, 60, seed=number).save(path)
        client = gradio_client.Client(server, verbose=False)
        page, *_ = client.predict(gradio_client.handle_file(path), f"Part {number}?", 0, 0.5, api_name="/ask")
        return path, page

    with concurrent.futures.ThreadPoolExecutor(people) as pool:
        visits = list(pool.map(visit, range(people)))
    for number, (path, page) in enumerate(visits):
        *_, (expected, *_) = demo.ask(str(path), f"Part {number}?", *THRESHOLDS)
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
            assert any("Running on local URL" in line for line in process.stdout)
            client = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
            page, *_ = client.predict(
                gradio_client.handle_file(tmp_path / "image.png"), "Which?", 0, 0.5, api_name="/ask"
            )
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
            *_, (_, reply, *_) = demo.ask(str(tmp_path / "image.png"), "Which parts?", *THRESHOLDS)
            demo.segment(reply, reply.text.split()[0], None, *THRESHOLDS)
        sizes.append(process.memory_info().rss)
    assert sizes[-1] < 1.05 * sizes[4]
