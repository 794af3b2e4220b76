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
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt

from demo.app import Demo, serve, shipped_checkpoints
from demo.checkpoints import describe, load_checkpoints
from plum_partonomy.inference.one_image import Plum
from plum_partonomy.scoring.benchmark import load_image, load_questions
from tests.tiny import tiny_model, tiny_processor

try:
    from playwright import sync_api
except ImportError:
    sync_api = None

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
EXAMPLE = 8
BEYOND_THE_EDGE = """() => [...document.querySelectorAll("body :not(.visually-hidden *)")].filter((part) => {
    const box = part.getBoundingClientRect();
    return part.checkVisibility({ visibilityProperty: true }) && box.width > 1 && box.right > innerWidth + 1;
}).map((part) => part.outerHTML.slice(0, 200))"""


CHANGED = "before => [...document.querySelectorAll('.plum-mask')].some((mask, n) => mask.src !== before[n])"
COLOUR_BY_WORD = "spans => spans.map(span => `${span.textContent} ${span.style.getPropertyValue('--colour')}`)"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if CHROMIUM is None or sync_api is None:
        pytest.skip("apt-get install chromium; pip install plum-partonomy[browser]")
    sync_api.expect.set_options(timeout=30_000)
    names = [os.environ["PLUM_DEMO_MODEL"]] if "PLUM_DEMO_MODEL" in os.environ else shipped_checkpoints()[:1]
    checkpoints = [*load_checkpoints(names), describe("untrained", Plum(tiny_model(), tiny_processor()))]
    data_dir = str(ROOT / "partonomy" / "mini_questions")
    rows, questions = load_questions("parquet", name="default", split="test", data_dir=data_dir)
    folder = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder))
    app = serve(Demo(checkpoints, rows, questions, uploads=folder))
    load_image(rows, EXAMPLE, questions[EXAMPLE]).save(folder / "upload.png")
    yield app.local_url, folder / "upload.png"
    app.close()
    patch.undo()


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def new_page(request, address):
    """The page as it first comes up; afterwards it must have asked nothing of any other machine."""
    address, _ = address
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    requests = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": request.param, "height": 900}, has_touch=request.param == 390)
        page.set_default_timeout(30_000)
        page.on("request", lambda sent: requests.append(sent.url))
        page.goto(address)
        yield page
        browser.close()
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def page(new_page, address):
    """A page that has been asked about an image."""
    upload(new_page, address[1])
    ask(new_page)
    return new_page


def upload(page, path):
    page.locator("input[type=file]").first.set_input_files(path)
    page.get_by_label("Remove Image").wait_for()


def ask(page):
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".plum-stage").wait_for()


def keep(page, name):
    """Nothing of the page is beyond the edge of the screen; and, where pictures are wanted, a picture of it."""
    assert page.evaluate(BEYOND_THE_EDGE) == []
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


def addresses_of(page):
    """Where the masks on the page are shown from, in the order of their spans."""
    return page.locator(".plum-mask").evaluate_all("masks => masks.map(mask => mask.getAttribute('src'))")


def masks_of(page):
    """The masks on the page: bool (spans, height, width)."""
    files = [io.BytesIO(base64.b64decode(address.partition(",")[2])) for address in addresses_of(page)]
    return np.array([np.asarray(Image.open(file).getchannel("A")) > 0 for file in files])


def press_tab_until_at(page, element):
    for _ in range(80):
        page.keyboard.press("Tab")
        if element.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"{element} is not to be reached from the keyboard")


def test_a_span_isolates_its_mask_and_escape_lets_go(page):
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


def test_the_picture_isolates_the_mask_under_the_pointer(page):
    masks, stage = masks_of(page), page.locator(".plum-stage")
    box = stage.bounding_box()

    def middle_of(area):
        """The point of the stage that is farthest from the edge of an area."""
        distance = distance_transform_edt(np.pad(area, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        return {"x": (x + 0.5) * box["width"] / area.shape[1], "y": (y + 0.5) * box["height"] / area.shape[0]}

    on_top = [mask & ~masks[index + 1 :].any(axis=0) for index, mask in enumerate(masks)]
    for index, area in enumerate(on_top):
        stage.hover(position=middle_of(area))
        sync_api.expect(page.locator(".plum-mask.plum-on")).to_have_count(1)
        sync_api.expect(page.locator(".plum-mask").nth(index)).to_have_class("plum-mask plum-on")
    first = page.locator(".plum-span").first
    for let_go in (lambda: page.keyboard.press("Escape"), lambda: stage.click(position=middle_of(~masks.any(axis=0)))):
        stage.click(position=middle_of(on_top[0]))
        page.mouse.move(0, 0)
        sync_api.expect(first).to_have_attribute("aria-pressed", "true")
        sync_api.expect(page.locator(".plum-mask.plum-on")).to_have_count(1)
        let_go()
        sync_api.expect(first).to_have_attribute("aria-pressed", "false")


def test_all_but_the_upload_is_done_from_the_keyboard(new_page, address):
    page, spans = new_page, new_page.locator(".plum-span")
    upload(page, address[1])
    press_tab_until_at(page, page.get_by_label("Question"))
    page.keyboard.press("End")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Name them.")
    assert page.get_by_label("Question").input_value().endswith("have?\nName them.")
    page.keyboard.press("Enter")
    spans.first.wait_for()
    press_tab_until_at(page, spans.nth(1))
    page.keyboard.press("Enter")
    sync_api.expect(spans.nth(1)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Space")
    sync_api.expect(spans.nth(1)).to_have_attribute("aria-pressed", "false")
    count = spans.count()
    press_tab_until_at(page, page.get_by_label("Segment your own words"))
    page.keyboard.type("flag, water")
    page.keyboard.press("Enter")
    sync_api.expect(spans).to_have_count(count + 2)
    press_tab_until_at(page, page.get_by_role("button", name="Undo", exact=True))
    page.keyboard.press("Enter")
    sync_api.expect(spans).to_have_count(count)


def test_sliders_change_spans_and_masks_and_their_last_position_counts(page):
    text, masks, spans = page.locator(".plum-answer").inner_text(), masks_of(page), page.locator(".plum-span")
    scores = [float(score) for score in spans.evaluate_all("spans => spans.map(s => s.dataset.score)")]
    colours = spans.evaluate_all(COLOUR_BY_WORD)
    page.get_by_role("button", name="Thresholds").click()

    def move(name, key):
        """Moves a slider by one key, and says where the masks are shown from once they have changed."""
        before = addresses_of(page)
        page.get_by_label(f"range slider for {name}").press(key)
        page.wait_for_function(CHANGED, arg=before)
        return addresses_of(page)

    strictest = move("Minimum probability", "End")
    strict = masks_of(page)
    move("Minimum probability", "Home")
    assert (strict <= masks).all() and (masks <= masks_of(page)).all() and strict.sum() < masks_of(page).sum()
    for _ in range(18):
        page.keyboard.press("ArrowRight")
    for index, source in enumerate(strictest):
        sync_api.expect(page.locator(".plum-mask").nth(index)).to_have_attribute("src", source)

    span_threshold = page.get_by_label("range slider for Minimum score")
    span_threshold.press("End")
    sync_api.expect(spans).to_have_count(0)
    page.get_by_text("No mask has a score of at least 1.00").wait_for()
    span_threshold.press("Home")
    sync_api.expect(spans).to_have_count(len(scores))
    for _ in range(round(100 * min(scores)) + 1):
        page.keyboard.press("ArrowRight")
    sync_api.expect(page.locator(f".plum-span[data-score='{min(scores):.2f}']")).to_have_count(0)
    assert set(spans.evaluate_all(COLOUR_BY_WORD)) < set(colours)
    assert 0 < spans.count() < len(scores) and page.locator(".plum-answer").inner_text() == text


@pytest.mark.parametrize("origin", ["example", "camera"])
def test_an_example_and_a_picture_of_the_camera_are_asked_about(new_page, origin):
    if origin == "example":
        new_page.locator(".gallery-item").first.click()
    else:
        new_page.get_by_label("Capture from camera").click()
        new_page.get_by_title("grant webcam access").click()
        new_page.wait_for_function("document.querySelector('video')?.videoWidth > 0")
        new_page.get_by_label("capture photo").click()
    new_page.get_by_label("Remove Image").wait_for()
    ask(new_page)


def test_selected_words_become_a_span(page):
    before = page.locator(".plum-answer").inner_text()
    select_first_word(page)
    words = page.get_by_label("Segment your own words")
    sync_api.expect(words).not_to_have_value("")
    word = words.input_value()
    page.get_by_role("button", name="Segment", exact=True).click()
    sync_api.expect(page.locator(".plum-span").first).to_have_text(word)
    assert page.locator(".plum-answer").inner_text() == before


def start_correcting(page, tool):
    """Open the correction of the first mask; return its pad, in view, and the box of it on the screen."""
    page.locator(".plum-span").first.click()
    page.get_by_role("button", name="Correct this mask").click()
    page.get_by_role("button", name=tool).click()
    pad = page.locator(".plum-pad")
    pad.scroll_into_view_if_needed()
    return pad, pad.bounding_box()


@pytest.mark.parametrize("effect", ["Add", "Take away"])
def test_a_painted_mask_replaces_that_of_the_span_and_those_after_it_follow(page, effect):
    """Strokes across the middle of the drawing are added to the mask of the first span, or its middle taken away."""
    before, sources = masks_of(page), addresses_of(page)
    middle = before[0].any(axis=1).nonzero()[0].mean() / len(before[0])
    heights = (0.15, 0.25, 0.35) if effect == "Add" else (middle,)
    pad, box = start_correcting(page, "Brush")
    assert box["width"] == pytest.approx(page.locator(".plum-stage").bounding_box()["width"], abs=1)
    page.get_by_role("button", name=effect).click()
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    for height in heights:
        y = box["y"] + height * box["height"]
        page.mouse.move(box["x"] + 0.3 * box["width"], y)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.7 * box["width"], y, steps=8)
        page.mouse.up()
    inside = ink_of(page)
    assert 0.1 < inside[(inside > 0) & (inside < 1)].mean() < 0.9  # translucent
    assert (inside[edge_of(before[0])] == 1).all()  # the edge that the mask had
    keep(page, "paint" if effect == "Add" else "erase")
    page.get_by_role("button", name="Use this mask").click()
    page.get_by_text("Your mask of").wait_for()
    after = masks_of(page)
    grown, shrunk = (after[0] & ~before[0]).sum(), (before[0] & ~after[0]).sum()
    assert len(addresses_of(page)) == len(sources)
    if effect == "Add":
        assert grown > 2 * shrunk and addresses_of(page)[1:] != sources[1:]
    else:
        assert shrunk > 2 * grown
    page.mouse.move(0, 0)
    page.get_by_role("button", name="Show before").click()
    sync_api.expect(page.locator(".plum-was").first).to_have_css("opacity", "1")
    sync_api.expect(page.locator(".plum-changed.plum-mask").first).to_have_css("opacity", "0")
    keep(page, f"after_{'paint' if effect == 'Add' else 'erase'}")
    page.get_by_role("button", name="Undo", exact=True).click()
    sync_api.expect(page.locator(".plum-mask").first).to_have_attribute("src", sources[0])
    assert addresses_of(page) == sources


def ink_of(page):
    """Opacity 0..1 of what is painted over the picture: (height, width)."""
    address = page.locator(".plum-pad").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).getchannel("A")) / 255


def edge_of(mask):
    return mask & ~binary_erosion(mask, np.ones((3, 3)), border_value=1)


def test_a_stroke_can_be_taken_back(page):
    pad, _ = start_correcting(page, "Brush")
    before = ink_of(page)
    pad.click(position={"x": 20, "y": 20})
    assert not np.array_equal(ink_of(page), before)
    page.get_by_role("button", name="Undo stroke").click()
    assert np.array_equal(ink_of(page), before)
    page.get_by_role("button", name="Cancel").click()
    sync_api.expect(pad).to_be_hidden()


def test_clicks_and_a_box_change_the_mask_at_once_and_are_undone_one_by_one(page):
    sources, marks = [addresses_of(page)], page.locator(".plum-mark:not(.plum-pending)")
    pad, box = start_correcting(page, "Click or box")
    undo = page.get_by_role("button", name="Undo click")
    sync_api.expect(undo).to_be_disabled()

    def at(x, y):
        return {"x": x * box["width"], "y": y * box["height"]}

    def draw_box():
        pad.scroll_into_view_if_needed()
        corner = pad.bounding_box()
        page.mouse.move(corner["x"] + 0.2 * box["width"], corner["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(corner["x"] + 0.7 * box["width"], corner["y"] + 0.8 * box["height"], steps=4)
        page.mouse.up()

    def take_away():
        page.get_by_role("button", name="Take away").click()
        touch_or_click = pad.tap if page.evaluate("navigator.maxTouchPoints") else pad.click
        touch_or_click(position=at(0.8, 0.1))

    def use_keys():
        pad.focus()
        for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "Shift+Enter"):
            page.keyboard.press(key)

    steps = (
        (lambda: pad.click(position=at(0.5, 0.3)), "your 1 click"),
        (lambda: pad.click(position=at(0.1, 0.1), modifiers=["Shift"]), "your 2 clicks"),
        (take_away, "your 3 clicks"),
        (draw_box, "your 3 clicks and box"),
        (use_keys, "your 4 clicks and box"),
    )
    for act, words in steps:
        act()
        sync_api.expect(page.locator(".plum-clicked")).to_contain_text(f"follows {words}.")
        sync_api.expect(pad).to_be_visible()
        sources.append(addresses_of(page))
        keep(page, "click")
    sync_api.expect(pad).to_be_focused()
    assert marks.all_inner_texts() == ["", "+", "\u2212", "\u2212", "\u2212"]
    assert sources[-1] != sources[0]
    places = marks.evaluate_all("marks => marks.map(mark => [mark.style.left, mark.style.top].map(parseFloat))")
    expected = [(20, 20), (50, 30), (10, 10), (80, 10), (46, 48)]
    assert np.abs(np.array(places) - expected).max() < 1  # 1 % of the image is more than one of its pixels
    for count, earlier in reversed(list(enumerate(sources[:-1]))):
        undo.click()
        sync_api.expect(marks).to_have_count(count)
        for mask, source in zip(page.locator(".plum-mask").all(), earlier, strict=True):
            sync_api.expect(mask).to_have_attribute("src", source)
    sync_api.expect(undo).to_be_disabled()
    page.get_by_role("button", name="Done").click()
    sync_api.expect(pad).to_be_hidden()


def test_clicks_in_quick_succession_all_count(page):
    pad, box = start_correcting(page, "Click or box")
    for part in (0.3, 0.5, 0.7):
        page.mouse.click(box["x"] + part * box["width"], box["y"] + part * box["height"])
    sync_api.expect(page.locator(".plum-clicked")).to_contain_text("your 3 clicks")
    page.keyboard.press("Escape")
    sync_api.expect(pad).to_be_hidden()


def test_a_refused_click_leaves_a_message_and_no_mark(page):
    pad, box = start_correcting(page, "Click or box")
    page.evaluate("() => (document.querySelector('.plum-stage').dataset.width = 10 ** 6)")
    pad.click(position={"x": 0.5 * box["width"], "y": 0.5 * box["height"]})
    page.get_by_text("click on the image again").first.wait_for()
    sync_api.expect(page.locator(".plum-mark")).to_have_count(0)
    sync_api.expect(pad).to_be_visible()


def test_the_answer_is_in_view_when_it_comes(page):
    sync_api.expect(page.locator(".plum-stage")).to_be_in_viewport(ratio=0.5)


def test_words_that_no_answer_has_are_segmented_and_colours_stay(page):
    spans = page.locator(".plum-span")
    before = spans.evaluate_all(COLOUR_BY_WORD)
    page.get_by_label("Segment your own words").fill("flag")
    page.get_by_role("button", name="Segment", exact=True).click()
    sync_api.expect(spans).to_have_count(len(before) + 1)
    assert spans.evaluate_all(COLOUR_BY_WORD)[:-1] == before
    keep(page, "words")


def test_an_error_is_a_message_and_what_is_on_the_page_stays_readable(new_page):
    new_page.get_by_role("button", name="Ask", exact=True).click()
    sync_api.expect(new_page.locator("#answer .plum-note")).to_have_text("Choose an image first.")
    covers = "all => all.filter(part => part.checkVisibility({ opacityProperty: true })).length"
    assert new_page.get_by_test_id("status-tracker").evaluate_all(covers) == 0


def test_one_of_several_models_is_chosen_and_says_what_it_knows(page):
    about = page.locator(".plum-model")
    sync_api.expect(about).to_contain_text("It knows drawings")
    text = page.locator(".plum-answer").inner_text()
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name="untrained").click()
    sync_api.expect(about).to_contain_text("does not say which images it knows")
    page.get_by_role("button", name="Ask", exact=True).click()
    sync_api.expect(page.locator(".plum-answer:not([aria-busy])")).not_to_have_text(text)


def test_steps_files_and_benchmark_questions_are_shown(page):
    spans = page.locator(".plum-span").count()
    page.get_by_role("button", name="How each mask follows").click()
    page.get_by_role("button", name="Show the steps").click()
    sync_api.expect(page.locator(".plum-step")).to_have_count(spans)
    keep(page, "steps")
    page.get_by_role("button", name="Files of these masks").click()
    page.get_by_role("button", name="Make files").click()
    with page.expect_download() as download:
        page.get_by_role("link").filter(has_text="KB").or_(page.locator("a[download='masks.json']")).last.click()
    assert len(json.loads(Path(download.value.path()).read_text())["annotations"]) == spans
    page.get_by_role("tab", name="Benchmark").click()
    page.locator(".plum-choices").wait_for()
    name = page.locator(".plum-note").locator("visible=true").first
    first = name.inner_text()
    page.get_by_role("button", name="Next").click()
    sync_api.expect(name).not_to_have_text(first)
    keep(page, "benchmark")
