"""PLUM in the browser: ask about an image, isolate masks, name words, correct a mask, watch the steps.

    python demo/app.py --model checkpoints/plum-tiny

Needs no network, neither here nor in the browser. One request at a time uses the model, the others wait in line.
What a person asks and sees is kept in that person's session; uploads and files are deleted within an hour.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import datasets
import gradio as gr
import numpy as np
from gradio.component_meta import ComponentMeta
from gradio.components.base import server
from PIL import Image
from starlette.middleware import Middleware

from demo import pages
from demo.replies import Replies, Ticket
from demo.uploads import BoundedRequests, Drawings, own_file, read_upload
from images_plum import read_image
from partonomy_dataset import converse_about_drawing
from plum_partonomy.inference.inputs import MAX_IMAGE_BYTES, check_text
from plum_partonomy.inference.one_image import (
    MAX_NEW_TOKENS,
    Plum,
    Range,
    Reply,
    correct_mask,
    find_ranges,
    finish,
    load_model,
    overlaps,
    save,
    segment_again,
    segment_apart,
    stream,
    warn_of_unknown_image,
)
from plum_partonomy.inference.predictor import Predictor
from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.scoring.benchmark import load_image, load_questions
from processing_plum import PlumAnswer

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = HERE.parent / "checkpoints" / "plum-tiny"
QUESTION = "What visible parts does the object in the image have?"
EXAMPLES = (0, 8, 200, 400)
# A drawing of mini_instances, test split, about which one corrected mask mends the later ones.
CORRECTION_EXAMPLE = 32
"""Which questions of the benchmark give the example images."""
WAITING_REQUESTS = 64
SECONDS_BETWEEN_UPDATES = 0.1
# Longest question, and longest list of words to segment.
MAX_TEXT_CHARACTERS = 500
"""While an answer is written; sending every token would take longer than making it."""
KEPT_SECONDS = 3600
KEPT_SESSIONS = 256
"""Pages that are remembered; the oldest go first."""
CANVAS = (pages.LONGEST_SIDE, pages.LONGEST_SIDE)
BRUSH_COLOUR = "#b2182b"
USES_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    block_info_text_color="*neutral_600", body_text_color_subdued="*neutral_600", block_label_text_color="*neutral_700"
)


@contextmanager
def problems_shown():
    """Bad input becomes a message on the page instead of a traceback in the log."""
    try:
        yield
    except DataError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Demo:
    """
    What the page's events do. Every argument comes from one person's page or session, and all results go there.

    Args:
        uploads: Folder that gradio puts uploads into; no other file is read for anybody.
    """

    def __init__(self, plum: Plum, rows: datasets.Dataset, questions: Sequence[Question], *, uploads: Path):
        self.plum = plum
        self.rows = rows
        self.questions = questions
        self.uploads = uploads
        self.replies = Replies()
        self.drawings = Drawings(uploads, CANVAS)

    def find_upload(self, upload: gr.FileData | None) -> Path | None:
        """In the place of gradio's own reading of an image, which opens any file that a request names."""
        with problems_shown():
            return None if upload is None else own_file(upload.path, self.uploads)

    def read_drawing(self, data: Any) -> Image.Image | None:
        """In the place of gradio's own reading of a drawing."""
        with problems_shown():
            return self.drawings.read(data)

    def finish(self, reply: Reply, span_threshold: float, mask_threshold: float) -> PlumAnswer:
        return finish(self.plum, reply, span_threshold=span_threshold, mask_threshold=mask_threshold)

    def present(self, reply: Reply, *thresholds: float) -> tuple:
        """The reply for the page: picture and answer, session, list of masks to correct; the rest is emptied."""
        answer = self.finish(reply, *thresholds)
        choices = [(f"{n}. {span.text}", n - 1) for n, span in enumerate(answer.spans, start=1)]
        masks = gr.Dropdown(choices=choices, value=None)
        page = pages.draw_answer(reply.image, answer, warn_of_unknown_image(self.plum, answer))
        return page, self.replies.keep(reply), masks, "", None, None, "", None

    def ask(self, path: Path | None, question: str, *thresholds: float) -> Iterator[tuple]:
        with problems_shown():
            if path is None:
                raise DataError("Choose an image first.")
            image = read_upload(path)
            shown = time.monotonic()
            question = check_text(question or "", what="a question", max_characters=MAX_TEXT_CHARACTERS)
            for piece in stream(self.plum, image, question):
                if isinstance(piece, Reply):
                    yield self.present(piece, *thresholds)
                elif time.monotonic() - shown > SECONDS_BETWEEN_UPDATES:
                    shown = time.monotonic()
                    yield pages.draw_text(piece), *[gr.skip()] * 7

    def redraw(self, ticket: Ticket | None, *thresholds: float) -> tuple:
        if ticket is None:
            return (gr.skip(),) * 8
        with problems_shown():
            return self.present(self.replies.get(ticket), *thresholds)

    def pick_words(self, ticket: Ticket | None, event: gr.EventData) -> tuple[str, Range]:
        """Words selected in the answer, widened to whole words."""
        with problems_shown():
            text = self.replies.get(ticket).text
        start, end = sorted(min(max(int(place), 0), len(text)) for place in (event.start, event.end))
        while start < end and not text[start].isalnum():
            start += 1
        while start < end and not text[end - 1].isalnum():
            end -= 1
        while start > 0 and start < end and text[start - 1].isalnum():
            start -= 1
        while end < len(text) and start < end and text[end].isalnum():
            end += 1
        return text[start:end], (start, end)

    def segment(self, ticket: Ticket | None, words: str, picked: Range | None, *thresholds: float) -> tuple:
        """Adds words of the answer to its spans: the selected ones, or where typed words first stand free."""
        with problems_shown():
            reply, words = self.replies.get(ticket), words or ""
            words = check_text(words, what="words of the answer", max_characters=MAX_TEXT_CHARACTERS)
            text, known = reply.text, self.ranges(reply, *thresholds)
            if picked is not None and text[slice(*picked)] == words:
                new = [tuple(picked)]
            else:
                new = find_ranges(text, [phrase.strip() for phrase in words.split(",")], taken=known)
            ranges = [place for place in known if not overlaps(place, new)] + new
            reply = segment_again(self.plum, reply, ranges, given_masks=reply.given_masks)
            return self.present(reply, *thresholds)

    def ranges(self, reply: Reply, *thresholds: float) -> list[Range]:
        return [(span.start, span.end) for span in self.finish(reply, *thresholds).spans]

    def open_editor(self, ticket: Ticket | None, index: int | None, *thresholds: float) -> dict[str, Any] | None:
        """The image with one mask as a layer to paint on, both at the top left of a square canvas."""
        if index is None:
            return None
        with problems_shown():
            reply = self.replies.get(ticket)
            size = pages.shown_size(reply.image)
            mask = chosen(self.finish(reply, *thresholds).spans, index).mask
        layer, background = Image.new("RGBA", CANVAS), Image.new("RGBA", CANVAS)
        layer.paste(BRUSH_COLOUR, mask=Image.fromarray(mask).convert("L").resize(size, Image.Resampling.NEAREST))
        background.paste(reply.image.resize(size, Image.Resampling.BICUBIC))
        return {"background": background, "layers": [layer], "composite": None}

    def correct(
        self, ticket: Ticket | None, index: int | None, layer: Image.Image | None, *thresholds: float
    ) -> tuple:
        """Takes what was painted as the mask of a span, and decodes the spans after it from that."""
        with problems_shown():
            reply = self.replies.get(ticket)
            if index is None or layer is None:
                raise DataError("Choose a mask and paint on it first.")
            painted = layer.getchannel("A").crop((0, 0, *pages.shown_size(reply.image)))
            mask = np.asarray(painted.resize(reply.image.size, Image.Resampling.NEAREST)) > 127
            ranges = self.ranges(reply, *thresholds)
            return self.present(correct_mask(self.plum, reply, ranges, chosen(ranges, index), mask), *thresholds)

    def steps(self, ticket: Ticket | None, *thresholds: float) -> str:
        with problems_shown():
            reply = self.replies.get(ticket)
            spans = self.finish(reply, *thresholds).spans
            places = [(span.start, span.end) for span in spans]
            apart = [
                finish(self.plum, alone, mask_threshold=thresholds[1]).spans[0]
                for alone in segment_apart(self.plum, reply, places)
            ]
            return pages.draw_steps(reply.image, spans, apart)

    def files(self, ticket: Ticket | None, *thresholds: float) -> Iterator[list[str]]:
        with problems_shown(), tempfile.TemporaryDirectory() as folder:
            reply = self.replies.get(ticket)
            answer = self.finish(reply, *thresholds)
            # gradio copies the files to its cache before it comes back here and the folder goes
            yield [str(path) for path in save(answer, reply.image, Path(folder), file_name="image")]

    def benchmark(self, number: float) -> str:
        """The question of this number, from 1, with what the model says to it."""
        with problems_shown():
            index = min(max(int(number or 1), 1), len(self.questions)) - 1
            question = self.questions[index]
            image = load_image(self.rows, index, question)
            predictor = Predictor(
                self.plum.model,
                self.plum.processor,
                max_new_tokens=MAX_NEW_TOKENS,
                choice_reduction="answer_mean",
                mask_source="gt_answer",
            )
            (prediction,) = predictor.predict([question], [image], [question.image_id])
            return pages.draw_question(image, question, prediction)


def chosen(items: Sequence, index: int) -> Any:
    """The item that a request has chosen; DataError if there is none of that number."""
    if not 0 <= index < len(items):
        raise DataError("This mask is not there any more: choose another.")
    return items[index]


# ---------------------------------------------------------------- layout


def make_app(demo: Demo) -> gr.Blocks:
    """The page; the example images are put into the folder of uploads."""
    with gr.Blocks(title="PLUM", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 4, KEPT_SECONDS // 2)) as app:
        gr.Markdown("# PLUM\nAsk what an image shows. Words of the answer that name something visible have masks.")
        with gr.Tab("Ask"):
            add_ask_tab(demo, save_examples(demo))
        with gr.Tab("Benchmark") as tab:
            add_benchmark_tab(demo, tab)
    return app.queue(max_size=WAITING_REQUESTS)


def save_examples(demo: Demo) -> list[list[str]]:
    """Images of the benchmark, each with the question of the page, and one whose parts have the same name."""
    indices = sorted({min(index, len(demo.questions) - 1) for index in EXAMPLES})
    paths = [demo.uploads / f"{index}.png" for index in indices]
    for index, path in zip(indices, paths, strict=True):
        load_image(demo.rows, index, demo.questions[index]).save(path)
    repeated = converse_about_drawing("mini_instances", "test", CORRECTION_EXAMPLE)
    paths.append(demo.uploads / "repeated_parts.png")
    read_image(repeated.image).save(paths[-1])
    questions = [*[QUESTION] * len(indices), repeated.messages[0]["content"]]
    return [[str(path), question] for path, question in zip(paths, questions, strict=True)]


class OwnComponent(ComponentMeta):
    """Makes a component like one of gradio's, without the .pyi file that gradio writes beside its source."""

    def __new__(cls, name: str, bases: tuple, attributes: dict) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


def make_inputs(demo: Demo) -> tuple[type[gr.Image], type[gr.ImageEditor]]:
    """Gradio's components for an image and a drawing, with reading of their files of our own in every session."""

    class Upload(gr.Image, metaclass=OwnComponent):
        is_template = True  # to the page it is the component that it is derived from

        def preprocess(self, payload: Any) -> Path | None:
            return demo.find_upload(payload)

    class Drawing(gr.ImageEditor, metaclass=OwnComponent):
        is_template = True

        def preprocess(self, payload: Any) -> Image.Image | None:
            return demo.read_drawing(payload)

        @server
        def accept_blobs(self, data: Any) -> None:
            demo.drawings.accept(data)

    return Upload, Drawing


def add_ask_tab(demo: Demo, examples: list[list[str]]) -> None:
    upload_of, drawing_of = make_inputs(demo)
    reply = gr.State(time_to_live=KEPT_SECONDS)
    picked = gr.State(time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column():
            image = upload_of(
                label=f"Image, at most {MAX_IMAGE_BYTES // 10**6} MB",
                type="filepath",
                image_mode=None,
                sources=["upload", "webcam", "clipboard"],
                height=320,
            )
            question = gr.Textbox(QUESTION, label="Question", max_length=MAX_TEXT_CHARACTERS, lines=2, max_lines=4)
            ask = gr.Button("Ask", variant="primary")
            gr.Examples(
                examples,
                [image, question],
                label="Examples; the last one is for Correct a mask: mend one mask, and the later ones follow",
                cache_examples=False,
            )
            with gr.Accordion("Thresholds", open=False):
                span_threshold = gr.Slider(0, 1, 0, step=0.01, label="Span threshold", info="least score of a span")
                mask_threshold = gr.Slider(
                    0.05, 0.95, 0.5, step=0.05, label="Mask threshold", info="least probability of a pixel"
                )
        with gr.Column():
            view = gr.HTML(
                '<p class="plum-note">The answer and its masks appear here.</p>',
                js_on_load=(HERE / "view.js").read_text(),
                elem_id="answer",
                label="Answer",
            )
            with gr.Tab("Segment words"):
                words = gr.Textbox(
                    label="Words of the answer",
                    info="Select words in the answer, or type them, with commas between.",
                    max_length=MAX_TEXT_CHARACTERS,
                )
                segment = gr.Button("Segment")
            with gr.Tab("Correct a mask"):
                mask = gr.Dropdown([], label="Mask", info="Paint or erase; the masks after it follow.")
                editor = drawing_of(
                    label="Brush",
                    type="pil",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    canvas_size=CANVAS,
                    fixed_canvas=True,
                    brush=gr.Brush(colors=[BRUSH_COLOUR], color_mode="fixed"),
                )
                correct = gr.Button("Use this mask")
            with gr.Tab("Steps"):
                show_steps = gr.Button("Show how each mask follows from the earlier ones")
                steps = gr.HTML()
            with gr.Tab("Files"):
                make_files = gr.Button("Make files of these masks")
                files = gr.Files(label="Overlay, masks (PNG), COCO json", interactive=False)

    thresholds = [span_threshold, mask_threshold]
    shown = [view, reply, mask, words, picked, editor, steps, files]
    gr.on([ask.click, question.submit], demo.ask, [image, question, *thresholds], shown, api_name="ask", **USES_MODEL)
    gr.on([slider.change for slider in thresholds], demo.redraw, [reply, *thresholds], shown, show_progress="hidden")
    view.select(demo.pick_words, reply, [words, picked], show_progress="hidden")
    gr.on(
        [segment.click, words.submit],
        demo.segment,
        [reply, words, picked, *thresholds],
        shown,
        api_name="segment",
        **USES_MODEL,
    )
    mask.input(demo.open_editor, [reply, mask, *thresholds], editor)
    correct.click(demo.correct, [reply, mask, editor, *thresholds], shown, **USES_MODEL)
    show_steps.click(demo.steps, [reply, *thresholds], steps, **USES_MODEL)
    make_files.click(demo.files, [reply, *thresholds], files, api_name="files")


def add_benchmark_tab(demo: Demo, tab: gr.Tab) -> None:
    count = len(demo.questions)
    with gr.Row(equal_height=True):
        back = gr.Button("Previous", min_width=90)
        number = gr.Number(1, label=f"Question, of {count}", precision=0, minimum=1, maximum=count, min_width=90)
        on = gr.Button("Next", min_width=90)
    page = gr.HTML()
    back.click(lambda n: max(int(n or 1) - 1, 1), number, number, show_progress="hidden")
    on.click(lambda n: min(int(n or 1) + 1, count), number, number, show_progress="hidden")
    gr.on([tab.select, number.change], demo.benchmark, number, page, trigger_mode="always_last", **USES_MODEL)


def serve(demo: Demo, **options: Any) -> gr.Blocks:
    """Starts the server on the page; `options` are further ones of `launch`."""
    app = make_app(demo)
    app.launch(
        theme=THEME,
        css_paths=[HERE / "style.css"],
        max_file_size=MAX_IMAGE_BYTES,
        state_session_capacity=KEPT_SESSIONS,
        app_kwargs={"middleware": [Middleware(BoundedRequests, folder=demo.uploads)]},
        ssr_mode=False,
        footer_links=[],
        share=False,
        **options,
    )
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder of a PLUM checkpoint, or its name on the Hub")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    arguments = parser.parse_args()
    try:
        _, plum = load_model(arguments.model, device=arguments.device)
        rows, questions = load_questions("partonomy", name="mini_questions", split="test")
    except DataError as error:
        sys.exit(f"app.py: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes as well when a service is stopped
    with tempfile.TemporaryDirectory(prefix="plum-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and files; nothing of it stays
        serve(Demo(plum, rows, questions, uploads=Path(folder)), server_port=arguments.port)


if __name__ == "__main__":
    main()
