"""The app: ask about an image, isolate masks, segment words, correct a mask with clicks or a brush, see the steps.

    python demo/app.py                          # every checkpoint in checkpoints/; others: --model FOLDER [FOLDER ...]

Needs no network, on the server or in the browser. One request at a time uses the model; others wait in a queue.
Questions and answers are kept in the session of their user; uploads and files are deleted within an hour.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import datasets
import gradio as gr
import numpy as np
from gradio.component_meta import ComponentMeta
from PIL import Image
from starlette.middleware import Middleware
from transformers.utils.logging import disable_progress_bar

from demo import pages
from demo.checkpoints import Checkpoint, load_checkpoints
from demo.events import read_prompt, read_selection, read_span, sent
from demo.replies import Replies, Shown, Ticket, add_colours
from demo.uploads import BoundedRequests, own_file, read_painted, read_upload
from inputs_plum import read_image
from partonomy_dataset import converse_about_drawing
from plum_partonomy.inference.inputs import MAX_IMAGE_BYTES, check_phrases, check_text
from plum_partonomy.inference.one_image import (
    MAX_NEW_TOKENS,
    Plum,
    Prompt,
    Range,
    Reply,
    add_words,
    correct_mask,
    correct_with_prompts,
    finish,
    overlaps,
    save,
    segment_again,
    segment_apart,
    segment_phrases,
    stream,
    warn_of_unknown_image,
)
from plum_partonomy.inference.predictor import Predictor
from plum_partonomy.masks import DataError
from plum_partonomy.records import Question
from plum_partonomy.scoring.benchmark import Asked, load_image, load_questions
from plum_partonomy.scoring.overlays import pick_colours
from processing_plum import PlumAnswer

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE.parent / "checkpoints"
NOTHING_YET = "The answer and its masks appear here."
QUESTION = "What visible parts does the object in the image have?"
EXAMPLES = (0, 200, 400, 600)
"""Indices of the benchmark questions whose images are the examples."""
CORRECTION_EXAMPLE = 32
"""Index of a drawing of mini_instances, test split, on which one corrected mask improves the later ones."""
WAITING_REQUESTS = 64
SECONDS_BETWEEN_UPDATES = 0.1
"""Interval of updates during generation; sending every token takes longer than generating it."""
MAX_TEXT_CHARACTERS = 500
"""Maximum length of a question, and of a list of words to segment."""
MAX_ANSWER_CHARACTERS = 1500
"""Maximum length of an answer with added words."""
KEPT_SECONDS = 3600
KEPT_SESSIONS = 256
"""Maximum number of sessions; the oldest are dropped first."""
USES_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
FORGET_CLICKS = "() => document.querySelectorAll('.plum-pending').forEach((mark) => mark.remove())"
"""Removes the marks of clicks that the server has refused."""
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    block_info_text_color="*neutral_600", body_text_color_subdued="*neutral_600", block_label_text_color="*neutral_700"
)


@contextmanager
def problems_shown():
    """Context that shows expected errors on the page instead of a traceback in the log."""
    try:
        yield
    except DataError as error:
        raise gr.Error(str(error), print_exception=False) from error


class Demo:
    """
    The handlers of the page's events. All arguments and results belong to the session of one user.

    Args:
        uploads: gradio's folder of uploads; no other file is read.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        rows: datasets.Dataset,
        questions: Sequence[Question],
        *,
        uploads: Path,
    ):
        self.checkpoints = {checkpoint.name: checkpoint for checkpoint in checkpoints}
        self.rows = rows
        self.questions = questions
        self.uploads = uploads
        self.replies = Replies()

    def plum(self, model: str) -> Plum:
        if model not in self.checkpoints:
            raise DataError(f"Choose one of the models {', '.join(self.checkpoints)}.")
        return self.checkpoints[model].plum

    def describe(self, model: str) -> str:
        return pages.draw_checkpoint(self.checkpoints[model])

    def find_upload(self, upload: gr.FileData | None) -> Path | None:
        """Return an uploaded file; replaces gradio's own reading of images, which opens any file of a request."""
        with problems_shown():
            return None if upload is None else own_file(upload.path, self.uploads)

    def finish(self, shown: Shown, span_threshold: float, mask_threshold: float) -> PlumAnswer:
        thresholds = {"span_threshold": span_threshold, "mask_threshold": mask_threshold}
        return finish(self.plum(shown.model), shown.reply, **thresholds)

    def keep(self, model: str, reply: Reply, written: int, last: Ticket | None = None, **change: Any) -> Ticket:
        """Return a ticket for an answer, with the span colours of the last one."""
        ranges = [(span.start, span.end) for span in finish(self.plum(model), reply).spans]
        before = {} if last is None else self.replies.get(last).colours
        colours = add_colours(before, ranges)
        return self.replies.keep(Shown(model, reply, written, colours, before=last, **change))

    def present(self, ticket: Ticket, *thresholds: float) -> tuple:
        """Return the answer for the page: image, answer and ticket; words, selection, steps and files are cleared."""
        shown = self.replies.get(ticket)
        answer = self.finish(shown, *thresholds)
        last = self.replies.find(shown.before)
        change = None
        if last is not None:
            masks = {(span.start, span.end): span.mask for span in self.finish(last, *thresholds).spans}
            change = pages.Change(masks, shown.corrected)
        page = pages.draw_answer(
            shown.reply.image,
            answer,
            colours=colours_of(shown, answer),
            written=shown.written,
            warning=warn_of_unknown_image(self.plum(shown.model), answer),
            least_score=thresholds[0],
            change=change,
            prompts=shown.reply.prompts,
        )
        return page, ticket, "", None, "", None

    def clear(self) -> tuple:
        """Return the page without an answer."""
        return pages.draw_note(NOTHING_YET), None, "", None, "", None

    def ask(self, model: str, path: Path | None, question: str, *thresholds: float) -> Iterator[tuple]:
        try:
            with problems_shown():
                plum = self.plum(model)
                if path is None:
                    raise DataError("Choose an image first.")
                yield pages.draw_text("…", begun=True), *self.clear()[1:]
                image = read_upload(path)
                shown = time.monotonic()
                question = check_text(question or "", what="a question", max_characters=MAX_TEXT_CHARACTERS)
                for piece in stream(plum, image, question):
                    if isinstance(piece, Reply):
                        yield self.present(self.keep(model, piece, len(piece.text)), *thresholds)
                    elif time.monotonic() - shown > SECONDS_BETWEEN_UPDATES:
                        shown = time.monotonic()
                        yield pages.draw_text(piece), *[gr.skip()] * 5
        except gr.Error as error:
            yield pages.draw_note(str(error.message)), *self.clear()[1:]
            raise

    def redraw(self, ticket: Ticket | None, *thresholds: float) -> tuple:
        if ticket is None:
            return (gr.skip(),) * 6
        with problems_shown():
            page, *_ = self.present(ticket, *thresholds)
            return page, ticket, gr.skip(), gr.skip(), "", None

    def pick_words(self, ticket: Ticket | None, event: gr.EventData) -> tuple[str, Range]:
        """Return the words selected in the answer, extended to whole words."""
        with problems_shown():
            text = self.replies.get(ticket).reply.text
            start, end = read_selection(event, len(text))
        while start < end and not text[start].isalnum():
            start += 1
        while start < end and not text[end - 1].isalnum():
            end -= 1
        while start > 0 and start < end and text[start - 1].isalnum():
            start -= 1
        while end < len(text) and start < end and text[end].isalnum():
            end += 1
        return text[start:end], (start, end)

    def segment(
        self,
        model: str,
        path: Path | None,
        ticket: Ticket | None,
        words: str,
        picked: Range | None,
        *thresholds: float,
    ) -> tuple:
        """
        Segment words of the user: selected words of the answer, or typed ones, which are added to the answer if it
        does not contain them. Without an answer they are segmented on the image only.
        """
        with problems_shown():
            words = check_text(words or "", what="words to segment", max_characters=MAX_TEXT_CHARACTERS)
            phrases = check_phrases(words.split(","))
            if ticket is None:
                if path is None:
                    raise DataError("Choose an image first.")
                reply = segment_phrases(self.plum(model), read_upload(path), phrases)
                return self.present(self.keep(model, reply, 0), *thresholds)
            shown = self.replies.get(ticket)
            text, known = shown.reply.text, self.ranges(shown, *thresholds)
            if picked is not None and text[slice(*picked)] == words:
                new = [tuple(picked)]
            else:
                text, new = add_words(text, phrases, taken=known)
            if len(text) > MAX_ANSWER_CHARACTERS:
                raise DataError("The answer is too long for more words: ask again, then segment these.")
            ranges = [place for place in known if not overlaps(place, new)] + new
            reply = replace(shown.reply, text=text)
            corrections = {"given_masks": reply.given_masks, "prompts": reply.prompts}
            reply = segment_again(self.plum(shown.model), reply, ranges, **corrections)
            return self.present(self.keep(shown.model, reply, shown.written, ticket), *thresholds)

    def ranges(self, shown: Shown, *thresholds: float) -> list[Range]:
        return [(span.start, span.end) for span in self.finish(shown, *thresholds).spans]

    def correct(
        self, ticket: Ticket | None, span_threshold: float, mask_threshold: float, event: gr.EventData
    ) -> tuple:
        """
        Use the painted mask for a span, and decode the later spans from it. Unpainted areas of the mask keep their
        full resolution, which the page does not show.
        """
        thresholds = span_threshold, mask_threshold
        with problems_shown():
            shown = self.replies.get(ticket)
            span, size = read_span(event, self.finish(shown, *thresholds).spans), pages.shown_size(shown.reply.image)
            painted = read_painted(sent(event, "mask"), size)
            before = np.asarray(pages.draw_mask(span.mask, "#000000", size))[..., 3] > 0
            changed, painted = (
                np.asarray(Image.fromarray(area).resize(shown.reply.image.size, Image.Resampling.NEAREST))
                for area in (painted != before, painted)
            )
            place, ranges = (span.start, span.end), self.ranges(shown, *thresholds)
            mask = np.where(changed, painted, span.mask)
            reply = correct_mask(self.plum(shown.model), shown.reply, ranges, place, mask)
            kept = self.keep(shown.model, reply, shown.written, ticket, corrected=place)
            return self.present(kept, *thresholds)

    def click(self, ticket: Ticket | None, span_threshold: float, mask_threshold: float, event: gr.EventData) -> tuple:
        """Add a point or a box to those of a span, decode its mask again and the later ones from it."""
        thresholds = span_threshold, mask_threshold
        with problems_shown():
            shown = self.replies.get(ticket)
            span = read_span(event, self.finish(shown, *thresholds).spans)
            place, ranges = (span.start, span.end), self.ranges(shown, *thresholds)
            new = read_prompt(event, shown.reply.image.size, shown.reply.prompts.get(place, Prompt()))
            added = {"points": new.points, "labels": new.labels, "box": new.box}
            reply = correct_with_prompts(self.plum(shown.model), shown.reply, ranges, place, **added)
            kept = self.keep(shown.model, reply, shown.written, ticket, corrected=place)
            return self.present(kept, *thresholds)

    def undo(self, ticket: Ticket | None, *thresholds: float) -> tuple:
        """Return the answer before the last correction or the last added words."""
        with problems_shown():
            last = self.replies.get(ticket).before
            if last is None:
                raise DataError("There is nothing to undo.")
            return self.present(last, *thresholds)

    def steps(self, ticket: Ticket | None, *thresholds: float) -> str:
        with problems_shown():
            shown = self.replies.get(ticket)
            answer, plum = self.finish(shown, *thresholds), self.plum(shown.model)
            places = [(span.start, span.end) for span in answer.spans]
            apart = [
                finish(plum, alone, mask_threshold=thresholds[1]).spans[0]
                for alone in segment_apart(plum, shown.reply, places)
            ]
            given, prompts = shown.reply.given_masks, shown.reply.prompts
            by_user = ["your mask" if place in given else pages.name_prompts(prompts.get(place)) for place in places]
            return pages.draw_steps(shown.reply.image, answer.spans, apart, colours_of(shown, answer), by_user)

    def files(self, ticket: Ticket | None, *thresholds: float) -> Iterator[list[str]]:
        with problems_shown(), tempfile.TemporaryDirectory() as folder:
            shown = self.replies.get(ticket)
            answer, image = self.finish(shown, *thresholds), shown.reply.image
            paths = save(answer, image, Path(folder), file_name="image", colours=colours_of(shown, answer))
            # gradio copies the files to its cache before this generator resumes and the folder is deleted
            yield [str(path) for path in paths]

    def benchmark(self, model: str, number: float) -> str:
        """Return the question of this number, from 1, with the model's prediction."""
        with problems_shown():
            index = min(max(int(number or 1), 1), len(self.questions)) - 1
            question, plum = self.questions[index], self.plum(model)
            image = load_image(self.rows, index, question)
            predictor = Predictor(
                plum.model,
                plum.processor,
                max_new_tokens=MAX_NEW_TOKENS,
                choice_reduction="answer_mean",
                mask_source="gt_answer",
            )
            (prediction,) = predictor.predict([Asked(question, image, question.image_id)])
            return pages.draw_question(image, question, prediction)


def colours_of(shown: Shown, answer: PlumAnswer) -> list[str]:
    """Return the colour of each span of an answer at the given thresholds."""
    colours = pick_colours(1 + max(shown.colours.values(), default=0))
    return [colours[shown.colours[span.start, span.end]] for span in answer.spans]


# ---------------------------------------------------------------- layout


def make_app(demo: Demo) -> gr.Blocks:
    """Return the page; the example images are copied to the folder of uploads."""
    with gr.Blocks(title="PLUM", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 4, KEPT_SECONDS // 2)) as app:
        gr.Markdown("# PLUM\nAsk what an image shows. Words of the answer that name something visible have masks.")
        model = add_model(demo)
        with gr.Tab("Ask"):
            add_ask_tab(demo, model, save_examples(demo))
        with gr.Tab("Benchmark") as tab:
            add_benchmark_tab(demo, model, tab)
    return app.queue(max_size=WAITING_REQUESTS)


def save_examples(demo: Demo) -> list[list[str]]:
    """Return benchmark images with the question of the page, and one image whose parts have the same name."""
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
    """Creates a subclass of a gradio component without the .pyi file that gradio writes beside its source."""

    def __new__(cls, name: str, bases: tuple, attributes: dict) -> type:
        return ABCMeta.__new__(cls, name, bases, attributes)


def make_upload(demo: Demo) -> type[gr.Image]:
    """Return gradio's image component with our own reading of its file."""

    class Upload(gr.Image, metaclass=OwnComponent):
        is_template = True  # the page uses the component that it is derived from

        def preprocess(self, payload: Any) -> Path | None:
            return demo.find_upload(payload)

    return Upload


def add_model(demo: Demo) -> gr.Dropdown:
    """Add the description of the model, with a choice if there are several."""
    names = list(demo.checkpoints)
    model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1)
    about = gr.HTML(demo.describe(names[0]))
    model.change(demo.describe, model, about, show_progress="hidden")
    return model


def add_question(demo: Demo, examples: list[list[str]]) -> tuple[gr.Component, ...]:
    """Add the image, the question, the button and the gallery of examples."""
    image = make_upload(demo)(
        label=f"Image, at most {MAX_IMAGE_BYTES // 10**6} MB",
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        height=320,
    )
    question = gr.Textbox(
        QUESTION,
        label="Question",
        info="Enter asks, Shift+Enter begins a new line.",
        max_length=MAX_TEXT_CHARACTERS,
        lines=2,
        max_lines=4,
        elem_id="question",
    )
    ask = gr.Button("Ask", variant="primary", elem_id="ask")
    gallery = gr.Dataset(
        components=[image],
        samples=[[path] for path, _ in examples],
        label="Examples; in the last one, correct a mask: the later ones follow",
        type="index",
        layout="gallery",
    )
    return image, question, ask, gallery


def add_ask_tab(demo: Demo, model: gr.Dropdown, examples: list[list[str]]) -> None:
    reply = gr.State(time_to_live=KEPT_SECONDS)
    picked = gr.State(time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column():
            image, question, ask, gallery = add_question(demo, examples)
        with gr.Column():
            view = gr.HTML(
                pages.draw_note(NOTHING_YET),
                js_on_load=(HERE / "view.js").read_text(),
                elem_id="answer",
                label="Answer",
            )
            words = gr.Textbox(
                label="Segment your own words",
                info="Any words, separated by commas; or select words in the answer.",
                max_length=MAX_TEXT_CHARACTERS,
            )
            segment = gr.Button("Segment")
            with gr.Accordion("Thresholds", open=False):
                span_threshold = gr.Slider(0, 1, 0, step=0.01, label="Minimum score", info="of a shown mask")
                mask_threshold = gr.Slider(
                    0.05, 0.95, 0.5, step=0.05, label="Minimum probability", info="of a pixel of a mask"
                )
            with gr.Accordion("How each mask follows from the earlier ones", open=False):
                show_steps = gr.Button("Show the steps")
                steps = gr.HTML()
            with gr.Accordion("Files of these masks", open=False):
                make_files = gr.Button("Make files")
                files = gr.Files(label="Image with names, masks (PNG), COCO json", interactive=False)

    thresholds = [span_threshold, mask_threshold]
    shown = [view, reply, words, picked, steps, files]
    # Messages have their own place: gradio's display of progress and errors would cover the outputs.
    options = {"show_progress": "hidden", **USES_MODEL}
    gallery.click(lambda index: examples[index], gallery, [image, question], show_progress="hidden")
    ask.click(demo.ask, [model, image, question, *thresholds], shown, api_name="ask", **options)
    image.change(demo.clear, None, shown, show_progress="hidden", queue=False)
    gr.on([slider.change for slider in thresholds], demo.redraw, [reply, *thresholds], shown, show_progress="hidden")
    view.select(demo.pick_words, reply, [words, picked], show_progress="hidden")
    view.apply(demo.correct, [reply, *thresholds], shown, api_name="correct", **options)
    # Quick clicks wait in the queue, in their order; by default gradio drops them.
    in_order = {"trigger_mode": "multiple", **options}
    clicked = view.edit(demo.click, [reply, *thresholds], shown, api_name="click", **in_order)
    clicked.failure(None, js=FORGET_CLICKS)
    view.undo(demo.undo, [reply, *thresholds], shown, **in_order)
    given = [model, image, reply, words, picked, *thresholds]
    gr.on([segment.click, words.submit], demo.segment, given, shown, api_name="segment", **options)
    show_steps.click(demo.steps, [reply, *thresholds], steps, **options)
    make_files.click(demo.files, [reply, *thresholds], files, api_name="files", show_progress="hidden")


def add_benchmark_tab(demo: Demo, model: gr.Dropdown, tab: gr.Tab) -> None:
    count = len(demo.questions)
    with gr.Row(equal_height=True):
        back = gr.Button("Previous", min_width=90)
        number = gr.Number(1, label=f"Question, of {count}", precision=0, minimum=1, maximum=count, min_width=90)
        on = gr.Button("Next", min_width=90)
    page = gr.HTML()
    back.click(lambda n: max(int(n or 1) - 1, 1), number, number, show_progress="hidden")
    on.click(lambda n: min(int(n or 1) + 1, count), number, number, show_progress="hidden")
    triggers = [tab.select, number.change, model.change]
    options = {"trigger_mode": "always_last", "show_progress": "hidden", **USES_MODEL}
    gr.on(triggers, demo.benchmark, [model, number], page, **options)


def serve(demo: Demo, **options: Any) -> gr.Blocks:
    """Start the server of the page; `options` are further ones of `launch`."""
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
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    return app


def shipped_checkpoints() -> list[Path]:
    """Return the folders of checkpoints/, plum-tiny first."""
    folders = [path.parent for path in CHECKPOINTS.glob("*/config.json")]
    return sorted(folders, key=lambda folder: (folder.name != "plum-tiny", folder.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "folders of PLUM checkpoints, or their names on the Hub; default: all in checkpoints/"
    parser.add_argument("--model", nargs="+", default=shipped_checkpoints(), help=help)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    arguments = parser.parse_args()
    datasets.utils.logging.disable_progress_bar()
    disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the folder also when a service is stopped
    with tempfile.TemporaryDirectory(prefix="plum-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and files, deleted at the end
        try:
            checkpoints = load_checkpoints(arguments.model, device=arguments.device)
            rows, questions = load_questions("partonomy", name="mini_questions", split="test")
            demo = Demo(checkpoints, rows, questions, uploads=Path(folder))
            app = serve(demo, server_port=arguments.port)
        except DataError as error:
            sys.exit(f"app.py: {error}")
        except OSError as error:
            if "port" not in str(error):
                raise
            sys.exit(f"app.py: port {arguments.port} is in use: choose another with --port.")
        print(f"PLUM ({', '.join(demo.checkpoints)}) is at {app.local_url} ; Ctrl+C ends it.", flush=True)
        app.block_thread()


if __name__ == "__main__":
    main()
