import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from plum_partonomy.masks import encode
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring.metrics import evaluate_predictions, iou_per_part
from plum_partonomy.scoring.overlays import COLOURS, draw_named_masks, highlight, overlay, pick_colours
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from plum_partonomy.scoring.report import FIGURES, MEANINGS, write_report

HEIGHT, WIDTH = 24, 32
LEFT = np.zeros((HEIGHT, WIDTH), bool)
LEFT[:, :16] = True


def make_span(text="wing", start=0, mask=LEFT):
    return SpanMask(text=text, start=start, end=start + len(text), rle=encode(mask), score=0.5)


def make_pair(number, *, name="wing", generated=True):
    answer = f"The object in the image has the following visible parts: {name}."
    spans = [make_span(name, start=answer.index(name))]
    question = Question(
        id=f"q{number}",
        image=None,
        image_id=f"image{number}",
        image_label="plane",
        question_type="identification",
        question="What visible parts does the object in the image have?",
        choices=[answer, "none of them"],
        correct=0,
        choice_parts=[[name], ["tail"]],
        masks=[PartMask(name, encode(LEFT))],
    )
    prediction = Prediction(
        question_id=question.id,
        image_id=question.image_id,
        choice_scores=[0.25, 0.75],
        given_spans=spans,
        true_tags=[(11, 12)],
        predicted_tags=[(11, 12)],
        generated_text=answer if generated else "",
        generated_spans=spans if generated else [],
    )
    return question, prediction


def write(path, pairs, **options):
    questions, predictions = map(list, zip(*pairs, strict=True))
    metrics = evaluate_predictions(questions, predictions, intervals=True)
    metrics["by_part"] = iou_per_part(questions, predictions)
    metrics["run"] = {"model": "folder", "versions": {"torch": "2.13.0"}}
    grey = Image.new("RGB", (WIDTH, HEIGHT), "#808080")
    options = {"load_image": lambda question: grey, **options}
    write_report(path, metrics=metrics, questions=questions, predictions=predictions, **options)
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Open tags with their attributes, and a check that every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# ---------------------------------------------------------------- drawing


def test_an_overlay_tints_the_mask_outlines_it_and_leaves_everything_else_alone():
    image = Image.new("L", (WIDTH, HEIGHT), 128)
    drawn = np.asarray(overlay(image, [LEFT]))
    assert drawn.shape == (HEIGHT, WIDTH, 3)
    assert (drawn[~LEFT] == 128).all()
    red, green, blue = (int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    assert drawn[12, 15].tolist() == [red, green, blue]
    inside = drawn[12, 8].astype(int)
    assert all(min(128, c) < v < max(128, c) for c, v in zip((red, green, blue), inside, strict=True))
    assert image.getpixel((0, 0)) == 128


def test_an_overlay_without_masks_or_with_an_empty_one_is_the_image():
    image = Image.new("RGB", (WIDTH, HEIGHT), "#102030")
    assert overlay(image, []).tobytes() == image.tobytes()
    assert overlay(image, [np.zeros((HEIGHT, WIDTH), bool)]).tobytes() == image.tobytes()


def test_a_mask_of_another_size_than_its_image_is_an_error_with_both_sizes():
    with pytest.raises(ValueError, match=r"\(24, 32\), found \(32, 24\) for mask 1"):
        overlay(Image.new("RGB", (WIDTH, HEIGHT)), [LEFT, LEFT.T])


@given(st.text(alphabet="ab <&", max_size=12), st.lists(st.integers(0, 12), unique=True, max_size=6).map(sorted))
def test_the_pieces_of_a_highlighted_text_joined_are_the_text_and_the_coloured_ones_its_spans(text, cuts):
    cuts = [cut for cut in cuts if cut <= len(text)]
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    spans = [make_span(text[start:end], start=start) for start, end in ranges]
    pieces = highlight(text, spans)
    assert "".join(piece for piece, _ in pieces) == text
    assert [(piece, colour) for piece, colour in pieces if colour] == [
        (text[start:end], COLOURS[index]) for index, (start, end) in enumerate(ranges)
    ]


# ---------------------------------------------------------------- page


def test_the_page_is_well_formed_stands_alone_and_shows_every_figure(tmp_path):
    pairs = [make_pair(0), make_pair(1, generated=False)]
    text = write(tmp_path / "report.html", pairs)
    tags = Tags(text)
    assert tags.open == []
    addresses = [attributes.get("src") or attributes.get("href") for _, attributes in tags.seen]
    assert all(address.startswith(("data:image/", "#")) for address in addresses if address)
    assert not {"link", "iframe"} & {tag for tag, _ in tags.seen}
    assert all("src" not in attributes for tag, attributes in tags.seen if tag == "script")
    assert sum(tag == "img" for tag, _ in tags.seen) == 3 * len(pairs)
    assert re.search(
        r"generated part set exactly correct<small>[^<]*</small></td><td><b>0\.500</b>"
        r"<small>0\.000 to 1\.000</small></td>",
        text,
    )
    assert re.search(
        r"choice accuracy<small>[^<]*</small></td><td><b>1\.000</b><small>1\.000 to 1\.000</small></td>\s*"
        r"<td>0\.500</td></tr>",
        text,
    )
    assert "torch 2.13.0" in text
    assert f'<mark style="background: {COLOURS[0]}">wing</mark>' in text
    assert "object choice accuracy" not in text


def test_the_wrong_image_control_stands_beside_each_figure(tmp_path):
    question, prediction = make_pair(0)
    control = replace(prediction, choice_scores=[0.75, 0.25])
    text = write(tmp_path / "report.html", [(question, replace(prediction, wrong_image=control))])
    assert re.search(
        r"choice accuracy<small>[^<]*</small></td><td><b>1\.000</b><small>1\.000 to 1\.000</small></td>\s*"
        r"<td>0\.000</td><td>0\.500</td>",
        text,
    )


def test_text_of_data_and_model_is_escaped_everywhere(tmp_path):
    evil = "<script>alert(1)</script>"
    question, prediction = make_pair(0, name=evil)
    question.question, question.image_label = evil, evil
    text = write(tmp_path / "report.html", [(question, prediction)])
    assert evil not in text
    assert text.count("&lt;script&gt;") >= 6
    assert Tags(text).open == []


def test_examples_run_from_the_worst_to_the_best_answer_and_are_limited_for_each_type(tmp_path):
    pairs = [make_pair(number, generated=number % 2 == 0) for number in range(60)]
    for question, _ in pairs[:20]:
        question.question_type = "negative"
    text = write(tmp_path / "report.html", pairs)
    ious = re.findall(r"mean IoU (\d\.\d\d)", text)
    assert ious == ["0.00"] * 12 + ["1.00"] * 12
    assert text.count('data-type="negative"') == text.count('data-type="identification"') == 12


def test_the_head_says_what_was_run_and_links_lead_to_every_part(tmp_path):
    text = write(tmp_path / "report.html", [make_pair(0)])
    assert "<dt>model</dt><dd>folder</dd>" in text
    assert set(re.findall(r'href="#(\w+)"', text)) <= set(re.findall(r'id="(\w+)"', text))
    assert FIGURES.keys() == MEANINGS.keys()


def test_curves_are_drawn_where_the_model_has_them_with_empty_cells_left_out(tmp_path):
    curves = tmp_path / "training_curves.csv"
    curves.write_text("step,loss,eval_span_f1\n10,2.5,\n20,1.5,0.5\n")
    assert 'alt="training curves"' in write(tmp_path / "report.html", [make_pair(0)], training_curves=curves)


@pytest.mark.parametrize("content", ["step,loss\n10,high\n", "loss\n1\n", "step,loss\n1,2,3\n"])
def test_a_damaged_curves_file_is_named_with_its_line_and_no_page_is_left(tmp_path, content):
    curves = tmp_path / "training_curves.csv"
    curves.write_text(content)
    with pytest.raises(ValueError, match="training_curves.csv, line 2: expected a step and numbers"):
        write(tmp_path / "report.html", [make_pair(0)], training_curves=curves)
    assert [path.name for path in tmp_path.iterdir()] == ["training_curves.csv"]


def test_a_failing_image_leaves_the_page_that_was_there(tmp_path):
    def fail(question):
        raise OSError("gone")

    (tmp_path / "report.html").write_text("old")
    with pytest.raises(OSError, match="gone"):
        write(tmp_path / "report.html", [make_pair(0)], load_image=fail)
    assert (tmp_path / "report.html").read_text() == "old"


# ---------------------------------------------------------------- colours and names


def contrast_with_white(colour: str) -> float:
    """As WCAG 2 defines it, 1 to 21."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 1.05 / (0.05 + float(np.dot(linear, [0.2126, 0.7152, 0.0722])))


def test_colours_are_all_different_the_first_ones_stay_and_white_text_is_read_on_each():
    colours = pick_colours(60)
    assert len(set(colours)) == 60 and pick_colours(7) == colours[:7] and pick_colours(0) == []
    assert min(map(contrast_with_white, colours)) > 4.5


@pytest.mark.parametrize("count", [0, 1, 40])
def test_names_stand_beside_the_masks_on_a_large_enough_image_and_none_hides_another(count):
    image, masks = Image.new("RGB", (WIDTH, HEIGHT)), [LEFT] * count
    drawn = draw_named_masks(image, masks, [f"part {number}" for number in range(count)])
    assert drawn.width > 512 and drawn.height >= HEIGHT * 512 // WIDTH
    pixels = np.asarray(drawn)[:, 512:].reshape(-1, 3)
    shown = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels, axis=0)}
    assert set(pick_colours(count)) <= shown
    assert draw_named_masks(image, [np.zeros_like(LEFT)], ["nothing"]).width > 512
