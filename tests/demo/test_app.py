"""The demonstration without a browser: its functions, and a round trip through its server."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import gc
import html
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import gradio as gr
import gradio_client
import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from demo import pages
from demo.app import CANVAS, Demo, serve
from demo.replies import Replies, size_of
from demo.uploads import BoundedRequests, own_file, read_upload
from plum_partonomy.inference.one_image import Plum, finish, segment_words
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.benchmark import load_questions
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
TEXT = "A wheel, another wheel and a left wing."
RANGES = [(2, 7), (17, 22), (29, 38)]
THRESHOLDS = (0.0, 0.5)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = str(ROOT / "partonomy" / "mini_questions")
    rows, questions = load_questions("parquet", name="default", split="test", data_dir=folder, limit=3)
    return Demo(Plum(tiny_model(), tiny_processor()), rows, questions, uploads=tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="module")
def reply(demo):
    return segment_words(demo.plum, random_image(), [{"role": "user", "content": "Which parts?"}], TEXT, RANGES)


@pytest.fixture
def ticket(demo, reply):
    return demo.replies.keep(reply)


def ranges_of(demo, outputs):
    return demo.ranges(demo.replies.get(outputs[1]), *THRESHOLDS)


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


def test_an_image_unlike_the_known_ones_has_a_warning_above_its_answer(demo, reply):
    answer = finish(demo.plum, reply)
    assert "plum-warning" not in pages.draw_answer(reply.image, answer)
    page = pages.draw_answer(reply.image, answer, "unlike <all> others")
    assert page.index("unlike &lt;all&gt; others") < page.index("plum-stage")


def test_an_answer_that_was_cut_off_says_so_whatever_is_segmented_in_it(demo, tmp_path):
    random_image().save(tmp_path / "image.png")
    *_, (page, ticket, *_) = demo.ask(tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    reply = demo.replies.get(ticket)
    assert reply.is_truncated and page.index("plum-answer") < page.index("The answer is cut off")
    word = reply.text.split()[0]
    assert "The answer is cut off" in demo.segment(ticket, word, None, *THRESHOLDS)[0]
    whole = demo.replies.keep(dataclasses.replace(reply, is_truncated=False))
    assert "The answer is cut off" not in demo.segment(whole, word, None, *THRESHOLDS)[0]


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
def test_a_selection_becomes_whole_words(demo, ticket, selected, words):
    picked, (start, end) = demo.pick_words(ticket, Selection(*selected))
    assert picked == words == TEXT[start:end]


def test_selected_and_typed_words_join_the_spans_and_replace_what_they_overlap(demo, reply):
    one = demo.replies.keep(segment_words(demo.plum, reply.image, reply.messages, TEXT, RANGES[:1]))
    assert ranges_of(demo, demo.segment(one, "wheel", RANGES[1], *THRESHOLDS)) == RANGES[:2]
    assert ranges_of(demo, demo.segment(one, "wheel, left wing", None, *THRESHOLDS)) == RANGES
    assert ranges_of(demo, demo.segment(one, "A wheel", (0, 7), *THRESHOLDS)) == [(0, 7)]
    with pytest.raises(gr.Error, match="do not stand"):
        demo.segment(one, "sail", None, *THRESHOLDS)


def test_the_brush_gets_a_mask_at_the_size_of_the_page_and_gives_back_the_same(demo, reply, ticket):
    drawn = demo.open_editor(ticket, 0, *THRESHOLDS)
    assert drawn["background"].size == drawn["layers"][0].size == CANVAS
    corrected = demo.replies.get(demo.correct(ticket, 0, drawn["layers"][0], *THRESHOLDS)[1])
    assert np.array_equal(corrected.given_masks[RANGES[0]], finish(demo.plum, reply).spans[0].mask)
    with pytest.raises(gr.Error, match="paint on it"):
        demo.correct(ticket, 0, None, *THRESHOLDS)
    for number in (-1, 3):
        with pytest.raises(gr.Error, match="not there any more"):
            demo.open_editor(ticket, number, *THRESHOLDS)
        with pytest.raises(gr.Error, match="not there any more"):
            demo.correct(ticket, number, drawn["layers"][0], *THRESHOLDS)


def test_steps_and_benchmark_questions_become_pages(demo, ticket):
    steps = demo.steps(ticket, *THRESHOLDS)
    assert steps.count("<figure>") == 9 and "1. wheel" in steps and "3. left wing" in steps
    page = demo.benchmark(2)
    assert demo.questions[1].question in page
    assert page.count("<li") == len(demo.questions[1].choices)
    assert page.count("<b>right</b>") == page.count("<b>the model's choice</b>") == 1
    assert demo.benchmark(99) == demo.benchmark(3)


def test_an_answer_is_shown_while_it_is_written(demo, tmp_path, monkeypatch):
    random_image().save(tmp_path / "image.png")
    monkeypatch.setattr("demo.app.SECONDS_BETWEEN_UPDATES", -1)
    *growing, (_, ticket, *_) = demo.ask(tmp_path / "image.png", "Which parts?", *THRESHOLDS)
    shown = [
        re.fullmatch(r'<p class="plum-answer" aria-busy="true">(.*)</p>', page, re.DOTALL)[1] for page, *_ in growing
    ]
    assert len(shown) > 3 and all(late.startswith(early) for early, late in itertools.pairwise(shown))
    assert html.unescape(shown[-1]).strip() == demo.replies.get(ticket).text.strip()


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


def test_a_question_or_words_beyond_the_limit_of_the_app_are_refused(demo, ticket):
    path = demo.uploads / "question.png"
    random_image().save(path)
    for refused in (
        lambda: next(demo.ask(path, "a" * 501, *THRESHOLDS)),
        lambda: demo.segment(ticket, "a" * 501, None, *THRESHOLDS),
    ):
        with pytest.raises(gr.Error, match="of 1 to 500 characters, found 501"):
            refused()


@pytest.fixture(scope="module")
def server(demo):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(demo.uploads))
    app = serve(demo, prevent_thread_lock=True, quiet=True)
    yield app.local_url
    app.close()
    patch.undo()


def test_the_server_answers_and_hands_out_files_of_the_same_masks(demo, server, tmp_path):
    random_image().save(tmp_path / "image.png")
    client = gradio_client.Client(server, verbose=False, download_files=str(tmp_path / "files"))
    image = gradio_client.handle_file(tmp_path / "image.png")
    page, *_ = client.predict(image, "Which parts?", 0, 0.5, api_name="/ask")
    *_, (expected, *_) = demo.ask(tmp_path / "image.png", "Which parts?", *THRESHOLDS)
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
    with pytest.raises(gradio_client.exceptions.AppError, match="no readable image"):
        client.predict(gradio_client.handle_file(tmp_path / "text.png"), "Which?", 0, 0.5, api_name="/ask")
    (tmp_path / "large.png").write_bytes(bytes(10_000_001))
    with pytest.raises(Exception, match="413|size"):
        client.predict(gradio_client.handle_file(tmp_path / "large.png"), "Which?", 0, 0.5, api_name="/ask")


# ---------------------------------------------------------------- raw requests


def upload(server: str, content: bytes, name: str = "image.png") -> str:
    """The path on the server under which it keeps an uploaded file."""
    (path,) = httpx.post(f"{server}gradio_api/upload", files={"files": (name, content)}, timeout=60).json()
    return path


def call(server: str, function: str, data: list, session: str | None = None) -> dict:
    """What a function of the page answers to data as they come over the wire."""
    config = httpx.get(f"{server}config").json()
    (number,) = (part["id"] for part in config["dependencies"] if part["api_name"] == function)
    session = session or uuid.uuid4().hex
    joined = {"data": data, "fn_index": number, "session_hash": session}
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
        message = call(server, "ask", [file, "Which parts?", 0, 0.5])
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
        message = call(server, "ask", [{"path": str(path)}, "Which parts?", 0, 0.5])
        assert not message["success"]
        answers.add(message["output"]["error"])
    assert len(answers) == 1 and "upload it again" in answers.pop()
    for path in outside:  # gradio itself refuses these, in its own words
        assert not call(server, "ask", [with_and_without_meta(str(path))[1], "Which parts?", 0, 0.5])["success"]


def test_after_requests_that_would_block_it_the_server_answers_the_next(server):
    path = upload(server, as_png(random_image()))
    for device in ("/dev/zero", "/dev/ptmx", "/dev/stdin", "/proc/kmsg"):
        for function, data in (("ask", [{"path": device}, "Which parts?", 0, 0.5]), ("correct", drawing(device))):
            assert not call(server, function, data)["success"]
    assert call(server, "ask", [{"path": path}, "Which parts?", 0, 0.5])["success"]


def drawing(path: str) -> list:
    layer = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [None, 0, {"background": layer, "layers": [layer], "composite": layer, "id": None}, 0, 0.5]


def test_a_drawing_is_a_file_of_the_uploads_of_the_size_of_the_canvas(server, demo, tmp_path):
    session = uuid.uuid4().hex
    path = upload(server, as_png(random_image()))
    ask = call(server, "ask", [{"path": path}, "Which parts?", 0, 0.5], session)
    words = html.unescape(re.sub(r"<[^>]*>", "", ask["output"]["data"][0])).split()[0]
    call(server, "segment", [None, words, None, 0, 0.5], session)
    random_image().save(tmp_path / "secret.png")
    for content, message in (
        (upload(server, as_png(random_image())), "Expected a drawing of 640 x 640 pixels"),
        (upload(server, as_png(Image.new("1", (5000, 5000)))), "pixels, more than"),
        (upload(server, b"no image"), "no readable image"),
    ):
        assert message in call(server, "correct", drawing(str(content)), session)["output"]["error"]
    assert not call(server, "correct", drawing(str(tmp_path / "secret.png")), session)["success"]
    mask = upload(server, as_png(Image.new("RGBA", CANVAS, (9, 9, 9, 255))))
    assert call(server, "correct", drawing(mask), session)["success"]


def test_a_drawing_that_was_sent_ahead_is_used_once_and_after_the_page_has_changed(server, demo):
    session = uuid.uuid4().hex
    path = upload(server, as_png(random_image()))
    ask = call(server, "ask", [{"path": path}, "Which parts?", 0, 0.5], session)
    words = html.unescape(re.sub(r"<[^>]*>", "", ask["output"]["data"][0])).split()[0]
    call(server, "segment", [None, words, None, 0, 0.5], session)
    assert send_layer(server, type="layer", index="0", id="mine", session_hash=session).status_code == 200
    sent = [None, 0, {"background": None, "layers": [], "composite": None, "id": "mine"}, 0, 0.5]
    assert call(server, "correct", sent, session)["success"]
    assert "paint on it" in call(server, "correct", sent, session)["output"]["error"]


def send_layer(server: str, **data) -> httpx.Response:
    config = httpx.get(f"{server}config").json()
    (editor,) = (part["id"] for part in config["components"] if part["type"] == "imageeditor")
    fields = {"component_id": str(editor), "fn_name": "accept_blobs", "session_hash": "s", **data}
    files = {"file": ("blob", as_png(Image.new("RGBA", CANVAS)))}
    return httpx.post(f"{server}gradio_api/component_server", data=fields, files=files, timeout=60)


def test_drawings_that_are_sent_ahead_are_bounded(server, demo):
    for number in ("0", "1000000000", "-1", "null", "x"):
        assert send_layer(server, type="layer", index=number, id=f"drawing {number}").status_code == 200
    assert list(demo.drawings._layers) == ["drawing 0"]
    for number in range(demo.drawings.limit):
        send_layer(server, type="layer", index="1", id=str(number))
    assert list(demo.drawings._layers) == [str(number) for number in range(demo.drawings.limit)]


@pytest.mark.parametrize(
    ("function", "data"),
    [
        ("ask", [None, "Which parts?", 0, 0.5]),
        ("ask", [[], "Which parts?", 0, 0.5]),
        ("ask", [{"path": 3}, "Which parts?", 0, 0.5]),
        ("ask", ["IMAGE", "x" * 10**6, 0, 0.5]),
        ("ask", ["IMAGE", "Which parts?", -1e308, 0.5]),
        ("ask", ["IMAGE", "Which parts?", "much", 0.5]),
        ("ask", ["IMAGE", "Which parts?", 0, 0]),
        ("ask", ["IMAGE", "Which parts?", 0, 1]),
        ("ask", ["IMAGE", "Which parts?", 0]),
        ("ask", []),
        ("segment", [None, "a wheel", None, 0, 0.5]),
        ("segment", [{"reply": 1}, "x" * 10**6, [0, 10**9], 0, 0.5]),
        ("steps", [None, 0, 0.5]),
        ("files", [None, 0, 0.5]),
        ("open_editor", [None, 10**9, 0, 0.5]),
        ("correct", [None, 0, {"layers": "x"}, 0, 0.5]),
        ("benchmark", [1e308]),
        ("benchmark", ["x"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_request_that_makes_no_sense_fails_alone(server, function, data):
    path = upload(server, as_png(random_image()))
    sent = [{"path": path} if item == "IMAGE" else item for item in data]
    assert not call(server, function, sent)["success"]
    assert call(server, "ask", [{"path": path}, "Which parts?", 0, 0.5])["success"]


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


def test_replies_are_bounded_in_number_and_bytes_and_the_least_recently_used_goes_first(reply):
    replies = Replies(limit=3, bytes_limit=10 * size_of(reply))
    tickets = [replies.keep(reply) for _ in range(3)]
    assert replies.get(tickets[0]) is reply
    tickets.append(replies.keep(reply))
    with pytest.raises(DataError, match="no longer kept"):
        replies.get(tickets[1])
    assert all(replies.get(tickets[i]) is reply for i in (0, 2, 3)) and len(replies) == 3

    few = Replies(limit=100, bytes_limit=2 * size_of(reply))
    tickets = [few.keep(reply) for _ in range(5)]
    assert len(few) == 2 and few.size() <= few.bytes_limit and few.get(tickets[4]) is reply
    none = Replies(limit=100, bytes_limit=0)
    assert none.get(none.keep(reply)) is reply


def test_a_reply_goes_with_its_session(reply):
    replies = Replies()
    ticket = replies.keep(reply)
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
        page, *_ = client.predict(gradio_client.handle_file(path), f"Part {number}?", 0, 0.5, api_name="/ask")
        return path, page

    with concurrent.futures.ThreadPoolExecutor(people) as pool:
        visits = list(pool.map(visit, range(people)))
    for number, (path, page) in enumerate(visits):
        *_, (expected, *_) = demo.ask(path, f"Part {number}?", *THRESHOLDS)
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
            *_, (_, ticket, *_) = demo.ask(tmp_path / "image.png", "Which parts?", *THRESHOLDS)
            demo.segment(ticket, demo.replies.get(ticket).text.split()[0], None, *THRESHOLDS)
        sizes.append(process.memory_info().rss)
    assert sizes[-1] < 1.05 * sizes[4]
