import contextlib
import io
import json
import resource
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from plum_partonomy.inference.inputs import MAX_IMAGE_BYTES, check_text, read_image
from plum_partonomy.inference.one_image import (
    Plum,
    Prompt,
    as_coco,
    as_json,
    ask,
    correct_mask,
    correct_with_prompts,
    find_ranges,
    finish,
    remember,
    save,
    segment_again,
    segment_apart,
    segment_phrases,
    segment_words,
    stream,
)
from plum_partonomy.masks import DataError, decode
from tests.tiny import conversation, random_image, random_mask, tiny_model, tiny_processor

TEXT = "A wheel, another wheel and a left wing."
MESSAGES = [{"role": "user", "content": "Which parts can you see?"}]
RANGES = [(2, 7), (17, 22), (29, 38)]


@pytest.fixture(scope="module")
def plum():
    return Plum(tiny_model(), tiny_processor())


def masks_of(plum, reply):
    return [span.mask for span in finish(plum, reply).spans]


def test_a_streamed_answer_grows_to_the_reply_and_is_what_segment_says(plum):
    image = random_image()
    *growing, reply = stream(plum, image, "Which parts can you see?", max_new_tokens=12)
    assert all(later.startswith(earlier) for earlier, later in zip(growing, growing[1:], strict=False))
    assert growing[-1].strip() == reply.text
    inputs = plum.processor.apply_chat_template(
        conversation(image, None), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    outputs = plum.model.segment(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(reply.outputs.sequences, outputs.sequences)
    assert torch.equal(reply.outputs.pred_masks, outputs.pred_masks)


def test_generation_stops_when_nobody_reads_on(plum):
    forwarded = []
    handle = plum.model.vlm.register_forward_hook(lambda *_: forwarded.append(None))
    pieces = stream(plum, random_image(), "Which parts can you see?", max_new_tokens=400)
    next(pieces)
    pieces.close()
    handle.remove()
    assert len(forwarded) < 400


def test_the_next_question_sees_the_earlier_ones(plum):
    first = ask(plum, random_image(), "Which parts?", max_new_tokens=4)
    second = ask(plum, random_image(), "Is it red?", history=remember(first), max_new_tokens=4)
    prompt = plum.processor.tokenizer.decode(second.outputs.sequences[0])
    assert "Which parts?" in prompt and first.text in prompt and second.messages[-1]["content"] == "Is it red?"


def test_words_that_are_named_are_segmented_in_the_order_of_the_text(plum):
    reply = segment_words(plum, random_image(), MESSAGES, TEXT, RANGES[::-1])
    spans = finish(plum, reply).spans
    assert reply.text == TEXT
    assert [(span.start, span.end) for span in spans] == RANGES
    assert [span.text for span in spans] == ["wheel", "wheel", "left wing"]


def test_a_literal_tag_in_an_answer_stays_text(plum):
    text = "A <p> wheel"
    reply = segment_words(plum, random_image(), MESSAGES, text, find_ranges(text, ["wheel"]))
    assert reply.text == text and finish(plum, reply).spans[0].text == "wheel"


@pytest.mark.parametrize("ranges", [[], [(2, 7), (4, 9)], [(1, 2)]])
def test_words_that_cannot_be_spans_are_refused(plum, ranges):
    with pytest.raises(DataError):
        segment_words(plum, random_image(), MESSAGES, TEXT, ranges)


def test_phrases_become_the_parts_of_an_answer(plum):
    answer = finish(plum, segment_phrases(plum, random_image(), ["left wing", " tail"]))
    assert answer.text == "The object in the image has the following visible parts: left wing, and tail."
    assert [span.text for span in answer.spans] == ["left wing", "tail"]
    with pytest.raises(DataError, match="between the commas"):
        segment_phrases(plum, random_image(), ["left wing", " "])


def test_a_corrected_mask_changes_the_later_masks_only_and_stays_when_words_are_added(plum):
    image, drawn = random_image(), random_mask(seed=5)
    reply = segment_words(plum, image, MESSAGES, TEXT, RANGES)
    before = reply.outputs.pred_masks
    corrected = correct_mask(plum, reply, RANGES, RANGES[1], drawn)
    after = corrected.outputs.pred_masks
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[2], before[2])
    chat = conversation(image, "A <p>wheel</p>, another <p>wheel</p> and a <p>left wing</p>.")
    inputs = plum.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    expected = plum.model.segment_spans(**inputs, given_masks={1: torch.from_numpy(drawn)})
    assert torch.equal(after, expected.pred_masks)
    fewer = segment_words(plum, image, MESSAGES, TEXT, RANGES[1:], given_masks=corrected.given_masks)
    assert torch.equal(fewer.outputs.pred_masks[0], after[1])


def test_points_and_boxes_correct_the_present_mask_and_other_corrections_stay(plum):
    image, drawn = random_image(), random_mask(seed=5)
    reply = segment_words(plum, image, MESSAGES, TEXT, RANGES)
    reply = correct_mask(plum, reply, RANGES, RANGES[0], drawn)
    before = reply.outputs.pred_masks
    clicked = correct_with_prompts(plum, reply, RANGES, RANGES[1], points=[(60, 12)], labels=[1])
    chat = conversation(image, "A <p>wheel</p>, another <p>wheel</p> and a <p>left wing</p>.")
    inputs = plum.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    given = {"given_masks": {0: torch.from_numpy(drawn)}, "input_points": {1: [[60, 12]]}, "input_labels": {1: [1]}}
    expected = plum.model.segment_spans(**inputs, **given, input_masks={1: before[1]}).pred_masks
    assert torch.equal(clicked.outputs.pred_masks, expected)
    assert torch.equal(expected[0], before[0]) and not torch.equal(expected[1], before[1])
    # A second click adds to the first, from the mask after it.
    again = correct_with_prompts(plum, clicked, RANGES, RANGES[1], points=[(3, 40)], labels=[0], box=(2, 3, 66, 44))
    given |= {
        "input_points": {1: [[60, 12], [3, 40]]},
        "input_labels": {1: [1, 0]},
        "input_boxes": {1: [2, 3, 66, 44]},
    }
    expected = plum.model.segment_spans(**inputs, **given, input_masks={1: expected[1]}).pred_masks
    assert torch.equal(again.outputs.pred_masks, expected)
    # Later corrections keep it: of another span with a drawing, and of a drawn mask with a click.
    third = correct_mask(plum, again, RANGES, RANGES[2], drawn)
    assert torch.equal(third.outputs.pred_masks[:2], expected[:2])
    on_drawn = correct_with_prompts(plum, third, RANGES, RANGES[0], points=[(9, 9)], labels=[0])
    assert list(on_drawn.given_masks) == [RANGES[2]] and on_drawn.prompts[RANGES[0]].mask is drawn
    assert on_drawn.prompts[RANGES[1]] == again.prompts[RANGES[1]]
    # A drawn mask replaces the points of its span.
    assert list(correct_mask(plum, on_drawn, RANGES, RANGES[1], drawn).prompts) == [RANGES[0]]


def test_clicks_in_windows_start_from_the_mask_in_the_image():
    plum, image, drawn = Plum(tiny_model(correction_window=1.5), tiny_processor()), random_image(), random_mask()
    other = Plum(tiny_model(), tiny_processor())
    drawn[:] = False
    drawn[10:24, 30:44] = True
    reply, whole = (segment_words(each, image, MESSAGES, TEXT, RANGES) for each in (plum, other))
    assert torch.equal(reply.outputs.pred_masks, whole.outputs.pred_masks)
    reply = correct_mask(plum, reply, RANGES, RANGES[1], drawn)
    first = correct_with_prompts(plum, reply, RANGES, RANGES[1], points=[(40, 12)], labels=[1])
    second = correct_with_prompts(plum, first, RANGES, RANGES[1], points=[(33, 20)], labels=[0])
    assert first.outputs.mask_windows[1, 2] < first.outputs.mask_windows[0, 2] == 64
    chat = conversation(image, "A <p>wheel</p>, another <p>wheel</p> and a <p>left wing</p>.")
    inputs = plum.processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    clicks = {"input_points": {1: [(40, 12)]}, "input_labels": {1: [1]}, "input_masks": {1: drawn}}
    expected = plum.model.segment_spans(**inputs, **clicks)
    assert torch.equal(first.outputs.pred_masks, expected.pred_masks)
    (answer,) = plum.processor.post_process_segmentation(expected)
    assert all(map(np.array_equal, masks_of(plum, first), [span.mask for span in answer.spans]))
    clicks = {"input_points": {1: [(40, 12), (33, 20)]}, "input_labels": {1: [1, 0]}}
    expected = plum.model.segment_spans(**inputs, **clicks, input_masks={1: answer.spans[1].mask})
    assert torch.equal(second.outputs.pred_masks, expected.pred_masks)


@contextlib.contextmanager
def counted(plum):
    """Count how often the encoders and the language model run."""
    model, counts = plum.model, Counter()
    parts = {"sam": model.sam.vision_encoder, "vision": model.vlm.model.vision_tower, "words": model.vlm.get_decoder()}
    hooks = [part.register_forward_hook(lambda *_, name=name: counts.update([name])) for name, part in parts.items()]
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("shared_vision", [True, False])
def test_corrections_encode_nothing_again_and_equal_a_fresh_run(shared_vision):
    plum, image, drawn = Plum(tiny_model(shared_vision), tiny_processor(shared_vision)), random_image(), random_mask()
    inputs = plum.processor.apply_chat_template(
        conversation(image, "A <p>wheel</p>, another <p>wheel</p> and a <p>left wing</p>."),
        tokenize=True,
        return_dict=True,
    )
    with counted(plum) as counts:
        reply = ask(plum, image, MESSAGES[0]["content"], max_new_tokens=4)
        generated = counts["words"]
        reply = segment_again(plum, replace(reply, text=TEXT), RANGES)
        first = correct_with_prompts(plum, reply, RANGES, RANGES[1], points=[(60, 12)], labels=[1])
        second = correct_with_prompts(plum, first, RANGES, RANGES[1], points=[(3, 40)], labels=[0])
        third = correct_mask(plum, second, RANGES, RANGES[0], drawn)
        segment_apart(plum, third, RANGES)
        assert counts == {"sam": 1, "vision": 1, "words": generated + 1}
        other = segment_again(plum, replace(third, text=TEXT + " It is red."), RANGES)
        follow_up = ask(plum, image, "Is it red?", history=remember(reply), encoded=other.encoded, max_new_tokens=4)
        assert counts["sam"] == counts["vision"] == 1 and counts["words"] > generated + 2
    before = plum.model.segment_spans(**inputs).pred_masks
    assert torch.equal(reply.outputs.pred_masks, before)
    clicks = {"input_points": {1: [(60, 12)]}, "input_labels": {1: [1]}, "input_masks": {1: before[1]}}
    clicked = plum.model.segment_spans(**inputs, **clicks).pred_masks
    assert torch.equal(first.outputs.pred_masks, clicked)
    clicks = {"input_points": {1: [(60, 12), (3, 40)]}, "input_labels": {1: [1, 0]}, "input_masks": {1: clicked[1]}}
    expected = plum.model.segment_spans(**inputs, **clicks, given_masks={0: torch.from_numpy(drawn)}).pred_masks
    assert torch.equal(third.outputs.pred_masks, expected)
    fresh = segment_words(plum, image, MESSAGES, other.text, RANGES).outputs
    assert torch.equal(other.outputs.sequences, fresh.sequences)
    assert torch.equal(other.outputs.pred_masks, fresh.pred_masks)
    fresh = ask(plum, image, "Is it red?", history=remember(reply), max_new_tokens=4).outputs
    assert torch.equal(follow_up.outputs.sequences, fresh.sequences)
    assert torch.equal(follow_up.outputs.pred_masks, fresh.pred_masks)


def test_words_of_ones_own_take_prompts_before_there_is_a_mask(plum):
    image, box = random_image(), (2.0, 3.0, 66.0, 44.0)
    reply = segment_phrases(plum, image, ["left wing", "tail"])
    prompted = segment_phrases(plum, image, ["left wing", "tail"], prompts=[Prompt(box=box), None])
    (place,) = prompted.prompts
    assert prompted.text[slice(*place)] == "left wing" and prompted.prompts[place].mask is None
    assert not torch.equal(prompted.outputs.pred_masks[0], reply.outputs.pred_masks[0])
    with pytest.raises(DataError, match="Expected prompts for each of 2 phrases, found 1"):
        segment_phrases(plum, image, ["left wing", "tail"], prompts=[None])
    with pytest.raises(DataError, match=r"The point \(70, 0\) of span 0 is outside its image"):
        correct_with_prompts(plum, reply, [place], place, points=[(70, 0)], labels=[1])
    with pytest.raises(DataError, match="Expected one of the ranges"):
        correct_with_prompts(plum, reply, [place], (0, 3), box=box)


def test_a_span_apart_from_the_others_has_the_mask_of_a_first_span(plum):
    reply = segment_words(plum, random_image(), MESSAGES, TEXT, RANGES)
    apart = segment_apart(plum, reply, RANGES)
    assert torch.equal(apart[0].outputs.pred_masks[0], reply.outputs.pred_masks[0])
    assert not torch.equal(apart[2].outputs.pred_masks[0], reply.outputs.pred_masks[2])


def test_thresholds_leave_out_spans_and_pixels_without_asking_again(plum):
    reply = segment_words(plum, random_image(), MESSAGES, TEXT, RANGES)
    scores = sorted(span.score for span in finish(plum, reply).spans)
    kept = finish(plum, reply, span_threshold=scores[1]).spans
    assert len(kept) == 2 and all(span.score >= scores[1] for span in kept)
    for strict, loose in zip(
        finish(plum, reply, mask_threshold=0.9).spans, finish(plum, reply, mask_threshold=0.1).spans, strict=True
    ):
        assert (strict.mask <= loose.mask).all() and strict.mask.sum() < loose.mask.sum()
    for threshold in (0, 1, -0.5, float("nan"), "0.5"):
        with pytest.raises(DataError, match="mask_threshold must be a"):
            finish(plum, reply, mask_threshold=threshold)


def test_phrases_are_found_as_whole_words_each_in_a_place_of_its_own():
    assert find_ranges(TEXT, ["wheel", "wheel", "LEFT wing"]) == RANGES
    assert find_ranges(TEXT, ["wheel"], taken=RANGES[:1]) == RANGES[1:2]
    for phrases in (["wheel"] * 3, ["wing", "left wing"], ["whee"], [""]):
        with pytest.raises(DataError, match="do not occur"):
            find_ranges(TEXT, phrases)


def test_files_that_are_no_usable_image_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(MAX_IMAGE_BYTES + 1))
    Image.new("1", (8000, 5001)).save(tmp_path / "wide.png")
    random_image().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    problems = {
        "text.png": "not a readable image .expected JPEG, PNG",
        "large.png": "more than 10 MB",
        "wide.png": "more than 40 megapixels",
        "cut.png": "not a readable image",
        "absent.png": "there is no image file",
    }
    for name, problem in problems.items():
        with pytest.raises(DataError, match=problem):
            read_image(tmp_path / name)


def test_an_image_is_turned_upright():
    turned, file = Image.new("RGB", (30, 20)), io.BytesIO()
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    turned.save(file, format="JPEG", exif=exif)
    assert read_image(io.BytesIO(file.getvalue())).size == (20, 30)


@pytest.mark.parametrize(
    ("question", "message"),
    [("  ", "found an empty text"), ("What is <image>?", "the text contains '<image>'"), ("a \udcff", "UTF-8")],
)
def test_questions_without_words_with_special_tokens_or_of_broken_text_are_refused(plum, question, message):
    with pytest.raises(DataError, match=message):
        ask(plum, random_image(), question)


def test_a_long_question_is_answered_and_refused_only_where_a_limit_is_set(plum):
    question = "Which parts can you see? " * 40
    assert ask(plum, random_image(), question, max_new_tokens=2).messages[0]["content"] == question.strip()
    with pytest.raises(DataError, match="Expected a question of 1 to 500 characters, found 999"):
        check_text(question, what="a question", max_characters=500)
    with pytest.raises(DataError, match="The question is too long: .* this model reads at most 512; shorten it"):
        ask(plum, random_image(), question * 20)


def test_what_is_saved_can_be_read_by_others(plum, tmp_path):
    image = random_image()
    answer = finish(plum, segment_words(plum, image, MESSAGES, TEXT, RANGES))
    files = save(answer, image, tmp_path / "new", file_name="photo.jpg")
    assert [path.name for path in files] == [
        "overlay.png",
        "01_wheel.png",
        "02_wheel.png",
        "03_left_wing.png",
        "masks.json",
    ]
    coco = COCO(str(files[-1]))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["wheel", "left wing"]
    for span, path, annotation in zip(answer.spans, files[1:], coco.loadAnns(coco.getAnnIds()), strict=False):
        assert np.array_equal(np.asarray(Image.open(path)), span.mask)
        assert np.array_equal(coco.annToMask(annotation).astype(bool), span.mask)
        assert np.array_equal(decode(as_json(answer)["spans"][annotation["id"] - 1]["mask"]), span.mask)
    json.dumps([as_json(answer), as_coco(answer, image, file_name="photo.jpg")])


def test_saving_again_replaces_the_files_of_the_earlier_answer_and_no_others(plum, tmp_path):
    image = random_image()
    many, few = (finish(plum, segment_words(plum, image, MESSAGES, TEXT, ranges)) for ranges in (RANGES, RANGES[2:]))
    save(many, image, tmp_path, file_name="photo.jpg")
    (tmp_path / "02_notes.png").write_text("mine")
    save(few, image, tmp_path, file_name="photo.jpg")
    names = ["01_left_wing.png", "02_notes.png", "masks.json", "overlay.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("content", ["", "[]", '{"info": 3}', '{"info": {"files": ["../../02_x.png", 7, null]}}'])
def test_files_that_no_answer_wrote_are_neither_deleted_nor_replaced(plum, tmp_path, content):
    answer = finish(plum, segment_words(plum, random_image(), MESSAGES, TEXT, RANGES))
    (tmp_path / "02_x.png").write_text("mine")
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    (folder / "masks.json").write_text(content)
    (folder / "overlay.png").symlink_to(tmp_path / "02_x.png")
    for name in ("overlay.png", "masks.json"):
        with pytest.raises(DataError, match=f"{name} is not of an earlier answer: delete it, or give another"):
            save(answer, random_image(), folder, file_name="photo.jpg")
        (folder / name).unlink()
    assert (tmp_path / "02_x.png").read_text() == "mine" and not list(folder.iterdir())
    save(answer, random_image(), folder, file_name="photo.jpg")
    # The list of an answer names no file elsewhere.
    (folder / "masks.json").write_text('{"info": {"files": ["overlay.png", "../../02_x.png"]}}')
    with pytest.raises(DataError, match="01_wheel.png is not of an earlier answer"):
        save(answer, random_image(), folder, file_name="photo.jpg")
    assert (tmp_path / "02_x.png").read_text() == "mine" and len(list(folder.iterdir())) == 5


def test_a_full_disk_leaves_the_earlier_answer_whole(plum, tmp_path):
    image = random_image()
    many, few = (finish(plum, segment_words(plum, image, MESSAGES, TEXT, ranges)) for ranges in (RANGES, RANGES[2:]))
    files = save(few, image, tmp_path, file_name="photo.jpg")
    before = [path.read_bytes() for path in files]
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # less than the overlay
    try:
        with pytest.raises(DataError, match=r"cannot be written \(.+\): make room, or give another save=FOLDER"):
            save(many, image, tmp_path, file_name="photo.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(tmp_path.iterdir()) == sorted(files) and [path.read_bytes() for path in files] == before
