"""The demonstration in a real browser: Debian's chromium, driven by Playwright.

PLUM_DEMO_MODEL=FOLDER names another checkpoint than the released one; PLUM_DEMO_PICTURES=docs makes the pictures of
docs/app.md.
"""

import base64
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from demo.app import BRUSH_COLOUR, DEFAULT_MODEL, LAUNCH, make_app
from partkit.benchmark import load_questions
from plumkit.inference import load_model

try:
    from playwright import sync_api
except ImportError:
    sync_api = None

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium")
EXAMPLE = 8


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if CHROMIUM is None or sync_api is None:
        pytest.skip("apt-get install chromium; pip install plum-partonomy[browser]")
    sync_api.expect.set_options(timeout=120_000)
    _, plum = load_model(os.environ.get("PLUM_DEMO_MODEL", DEFAULT_MODEL))
    data_dir = str(ROOT / "partonomy" / "mini_questions")
    rows, questions = load_questions("parquet", name="default", split="test", data_dir=data_dir)
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder))
    app = make_app(plum, rows, questions, examples=folder)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    rows[EXAMPLE]["image"].save(folder / "upload.png")
    yield address, folder / "upload.png"
    app.close()
    patch.undo()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def page(request, address):
    """A page that has been asked about an image; afterwards it must have asked nothing of any other machine."""
    address, upload = address
    requests = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": request.param, "height": 900})
        page.set_default_timeout(120_000)
        page.on("request", lambda sent: requests.append(sent.url))
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(upload)
        page.get_by_label("Remove Image").wait_for()
        page.get_by_role("button", name="Ask", exact=True).click()
        page.locator(".plum-stage").wait_for()
        yield page
        browser.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


def open_tab(page, name):
    """Tabs that do not fit on a phone are in a menu."""
    if not page.get_by_role("tab", name=name).is_visible():
        page.get_by_label("More tabs").locator("visible=true").last.click()
        page.get_by_role("button", name=name).or_(page.get_by_role("tab", name=name)).locator("visible=true").click()
    else:
        page.get_by_role("tab", name=name).click()


def keep(page, name):
    folder = os.environ.get("PLUM_DEMO_PICTURES")
    if folder:
        path = Path(folder) / f"app_{name}_{'desktop' if page.viewport_size['width'] > 600 else 'phone'}.png"
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
        picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1).save(path, optimize=True)


def select_first_word(page):
    page.evaluate(
        """() => {
            const text = document.querySelector(".plum-answer").firstChild, range = document.createRange();
            range.setStart(text, 0);
            range.setEnd(text, text.textContent.indexOf(" ", 1));
            getSelection().removeAllRanges();
            getSelection().addRange(range);
        }"""
    )


def wait_for_colour(element, colour):
    """The brush draws by WebGL, which a page cannot read: what is on the screen counts."""
    for _ in range(100):
        pixels = np.asarray(Image.open(io.BytesIO(element.screenshot())).convert("RGB"))
        if (pixels == ImageColor.getrgb(colour)).all(axis=-1).sum() > 100:
            return
    raise AssertionError(f"{colour} never appeared")


def first_mask(page):
    """The first mask on the page as a boolean array, and the address it is shown from."""
    source = page.locator(".plum-mask").first.get_attribute("src")
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return np.asarray(picture.getchannel("A")) > 0, source


def test_a_span_isolates_its_mask_by_mouse_and_by_keyboard(page):
    spans = page.locator(".plum-span")
    keep(page, "answer")
    assert page.locator(".plum-mask").count() == spans.count() > 1
    spans.nth(1).click()
    sync_api.expect(spans.nth(1)).to_have_attribute("aria-pressed", "true")
    sync_api.expect(page.locator(".plum-mask").nth(0)).to_have_css("opacity", "0")
    sync_api.expect(page.locator(".plum-mask").nth(1)).to_have_css("opacity", "1")
    keep(page, "span")
    page.keyboard.press("Escape")
    page.mouse.move(0, 0)
    sync_api.expect(page.locator(".plum-mask").nth(0)).to_have_css("opacity", "1")
    spans.nth(0).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sync_api.expect(spans.nth(1)).to_have_attribute("aria-pressed", "true")


def test_selected_words_become_a_span(page):
    before = page.locator(".plum-answer").inner_text()
    select_first_word(page)
    words = page.get_by_label("Words of the answer")
    sync_api.expect(words).not_to_have_value("")
    word = words.input_value()
    page.get_by_role("button", name="Segment", exact=True).click()
    sync_api.expect(page.locator(".plum-span").first).to_have_text(word)
    assert page.locator(".plum-answer").inner_text() == before


@pytest.mark.parametrize(("tool", "above_the_middle"), [("Brush", 110), ("Erase", 0)])
def test_a_painted_mask_replaces_that_of_the_span(page, tool, above_the_middle):
    """The first mask of this drawing covers the middle of it, and nothing near the upper edge."""
    before, source = first_mask(page)
    open_tab(page, "Correct a mask")
    page.get_by_label("Mask", exact=True).click()
    page.get_by_role("option").first.click()
    canvas = page.locator("canvas").last
    canvas.scroll_into_view_if_needed()
    wait_for_colour(canvas, BRUSH_COLOUR)
    page.get_by_label(tool, exact=True).click()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 - above_the_middle
    page.mouse.move(x - 40, y)
    page.mouse.down()
    page.mouse.move(x + 40, y, steps=8)
    page.mouse.up()
    keep(page, tool.lower())
    page.get_by_role("button", name="Use this mask").click()
    sync_api.expect(page.locator(".plum-mask").first).not_to_have_attribute("src", source)
    after, _ = first_mask(page)
    grown, shrunk = (after & ~before).sum(), (before & ~after).sum()
    assert grown > 2 * shrunk if tool == "Brush" else shrunk > 2 * grown


def test_steps_files_and_benchmark_questions_are_shown(page):
    spans = page.locator(".plum-span").count()
    open_tab(page, "Steps")
    page.get_by_role("button", name="Show how each mask").click()
    sync_api.expect(page.locator(".plum-step")).to_have_count(spans)
    keep(page, "steps")
    open_tab(page, "Files")
    page.get_by_role("button", name="Make files").click()
    with page.expect_download() as download:
        page.get_by_role("link").filter(has_text="KB").or_(page.locator("a[download='masks.json']")).last.click()
    assert len(json.loads(Path(download.value.path()).read_text())["annotations"]) == spans
    open_tab(page, "Benchmark")
    page.locator(".plum-choices").wait_for()
    name = page.locator(".plum-note").locator("visible=true").first
    first = name.inner_text()
    page.get_by_role("button", name="Next").click()
    sync_api.expect(name).not_to_have_text(first)
    keep(page, "benchmark")
