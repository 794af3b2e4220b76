"""Tags to tokens and back, masks in every form, typed results; on three kinds of tokenizer."""

import base64
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from transformers.utils.chat_template_utils import render_jinja_template

from chats_plum import DEFAULT_CHAT_TEMPLATE, find_answers, parse_span_tags
from inputs_plum import to_binary_mask
from processing_plum import PlumProcessor
from tests.tiny import conversation, random_image, random_mask, tiny_model, tiny_processor

TOKENIZERS = ["byte_level", "metaspace", "wordpiece"]
ANSWER = "The object has a <p>left wing</p>, (<p>tail</p>), and one <p>wheel</p>."


@pytest.fixture(scope="module", params=TOKENIZERS)
def processor(request):
    return tiny_processor(tokenizer_kind=request.param)


@pytest.fixture(scope="module")
def byte_level_processor():
    return tiny_processor()


def encode(processor, conversations, **options):
    return processor.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)


def words_of(processor, ids) -> str:
    return processor.tokenizer.decode(ids).strip()


@given(
    st.lists(st.tuples(st.text("ab <>p/", max_size=8), st.text("xyz", min_size=1, max_size=5)), max_size=6),
    st.text("ab <>p/", max_size=8),
)
def test_tags_put_around_words_come_out_as_the_ranges_of_those_words(pieces, rest):
    def escape(text):
        return text.replace("<p>", "\\<p>").replace("</p>", "\\</p>")

    tagged = "".join(f"{escape(before)}<p>{words}</p>" for before, words in pieces) + escape(rest)
    plain, spans = parse_span_tags(tagged)
    assert plain == "".join(before + words for before, words in pieces) + rest
    assert [plain[start:end] for start, end in spans] == [words for _, words in pieces]


@pytest.mark.parametrize(
    "text, words",
    [
        ("A <p>wing.", "Unbalanced span tag in a text with 1 opening and 0 closing span tags: 'A <p>wing.'"),
        ("A wing</p>.", "Unbalanced span tag in a text with 0 opening and 1 closing"),
        ("<p>a <p>b</p></p>", "Nested span tag in a text with 2 opening and 2 closing"),
        ("A <p> </p>.", "Empty span tag in a text with 1 opening and 1 closing"),
    ],
)
def test_a_broken_tag_is_refused_with_the_counts_and_the_text(text, words):
    with pytest.raises(ValueError, match=words):
        parse_span_tags(text)


def test_bio_labels_cover_exactly_the_tagged_words(processor):
    masks = [[random_mask(seed=seed) for seed in range(3)]]
    batch = encode(processor, [conversation(random_image(), ANSWER)], masks=masks)
    spans = batch["spans"].tolist()
    assert [words_of(processor, batch["input_ids"][row, start:end]) for row, start, end in spans] == [
        "left wing",
        "tail",
        "wheel",
    ]
    expected = torch.where(batch["labels"] == -100, -100, 0)
    for row, start, end in spans:
        expected[row, start:end] = 2
        expected[row, start] = 1
    assert torch.equal(batch["span_labels"], expected)


def test_labels_are_the_answers_of_every_assistant_turn(processor):
    chat = conversation(random_image(), "A <p>wheel</p>.") + conversation(None, "It is red.", question="Colour?")
    batch = encode(processor, [chat], masks=[[random_mask()]])
    answers = words_of(processor, batch["labels"][batch["labels"] != -100])
    assert answers.replace("</s>", "|").replace(" ", "").lower() == "awheel.|itisred.|"
    assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens


def test_padding_side_moves_spans_with_their_tokens(processor):
    chats = [conversation(random_image(), ANSWER), conversation(None, "It is red.")]
    long = [conversation(random_image(), "I can see a wheel. " * 5)]
    for side in ("left", "right"):
        batch = encode(processor, chats + long, padding_side=side)
        found = [
            words_of(processor, batch["input_ids"][row, start:end]) for row, start, end in batch["spans"].tolist()
        ]
        assert found == ["left wing", "tail", "wheel"]
        assert (batch["attention_mask"][1] == 0).sum() > 0


def test_tags_in_a_users_text_are_plain_text(byte_level_processor):
    chat = conversation(random_image(), "\\<p> is a tag, a <p>wheel</p> is a part.", question="What is <p>this</p>?")
    batch = encode(byte_level_processor, [chat], masks=[[random_mask()]])
    text = byte_level_processor.tokenizer.decode(batch["input_ids"][0])
    assert "What is <p>this</p>?" in text and "<p> is a tag" in text
    assert len(batch["spans"]) == 1


def test_only_conversations_with_masks_supervise_their_tags(byte_level_processor):
    chats = [conversation(random_image(), "A <p>wheel</p>."), conversation(None, "No."), conversation(None, "Yes.")]
    batch = encode(byte_level_processor, chats, masks=[[random_mask()], [], None])
    supervised = (batch["span_labels"] >= 0).any(dim=1)
    assert supervised.tolist() == [True, True, False]
    assert batch["sam_image_index"].tolist() == [0, -1, -1]


@pytest.mark.parametrize("masks", [[[]], [[random_mask(seed=i) for i in range(2)]]])
def test_a_count_of_masks_that_differs_from_the_tags_names_both_and_the_text(byte_level_processor, masks):
    chat = conversation(random_image(), "A <p>wheel</p>.")
    with pytest.raises(ValueError, match=f"1 span tags but {len(masks[0])} masks for the text 'A wheel.</s>'"):
        encode(byte_level_processor, [chat], masks=masks)


def test_the_masks_of_a_conversation_may_be_one_array(byte_level_processor):
    chat = conversation(random_image(), "A <p>wheel</p> and a <p>tail</p>.")
    masks = np.stack([random_mask(seed=1), random_mask(seed=2)])
    expected = torch.stack(encode(byte_level_processor, [chat], masks=[list(masks)])["mask_labels"])
    for array in (masks, torch.from_numpy(masks)):
        for batch in (encode(byte_level_processor, [chat], masks=[array]),
                      encode(byte_level_processor, chat, masks=array)):  # fmt: skip
            assert torch.equal(torch.stack(batch["mask_labels"]), expected)


def test_masks_in_every_form_are_the_same_mask():
    mask = np.zeros((50, 70), dtype=bool)
    mask[10:30, 20:60] = True
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = [20 * 50 + 10] + [20, 30] * 39 + [20, 10 * 50 + 20]
    forms = [
        mask,
        torch.from_numpy(mask),
        Image.fromarray(mask),
        compressed,
        {"size": [50, 70], "counts": compressed["counts"].decode()},
        {"size": [50, 70], "counts": runs},
        {"size": torch.tensor([50, 70]), "counts": runs},  # as `datasets` returns it `with_format("torch")`
        {"size": np.array([50, 70], dtype=np.int32), "counts": runs},
        [[20, 10, 60, 10, 60, 30, 20, 30]],
        [np.array([20, 10, 60, 10, 60, 30, 20, 30], dtype=np.float32)],
        ((20, 10, 60, 10, 60, 30, 20, 30),),
        mask[None],
        mask[..., None],
        torch.from_numpy(mask)[None].to(torch.bfloat16),
        Image.fromarray(mask).convert("L"),
        mask.tolist(),
        (255 * mask.astype(int)).tolist(),
        [mask.tolist()],
        [mask],
    ]
    for form in forms:
        assert np.array_equal(to_binary_mask(form, (50, 70)), mask), form


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.zeros((9, 9)), r"A mask is \(9, 9\).*image is \(50, 70\)"),
        ({"size": [9, 9], "counts": "0"}, r"size \[9, 9\].*image has \[height, width\] \[50, 70\]"),
        ({"size": np.array([50.5, 70.0]), "counts": "0"}, r"two positive integers, found \[50.5, 70.0\]"),
        ({"size": [50, 70], "counts": "0PPPPPPPPP7"}, "'P', which no RLE has at this place"),
        ({"size": [50, 70], "counts": ""}, r"decode to 0 pixels, but size \[50, 70\]"),
        ({"size": [50, 70], "counts": b"\xff"}, "which no RLE has"),
        ({"size": [50, 70], "counts": [7]}, r"decode to 7 pixels, but size \[50, 70\]"),
        ({"size": [50, 70]}, "expected counts"),
        ([[1, 2, 3, 4]], "at least three x, y pairs"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], "near the image"),
        ([[[0, 0], [9, 0], [9, 9]]], "at least three x, y pairs"),
        (np.zeros((50, 70, 3)), r"A mask is \(50, 70, 3\)"),
        (Image.new("RGB", (70, 50)), "one channel.*found mode 'RGB'"),
        (Image.new("L", (50, 70)), r"\(50, 70\) \(height, width\), found mode 'L' of \(70, 50\)"),
        (np.full((50, 70), np.nan), "finite numbers"),
        (np.full((50, 70), "a"), "booleans or numbers"),
        (None, r"A mask is \(\)"),
    ],
)
def test_a_damaged_mask_is_refused(mask, words):
    with pytest.raises(ValueError, match=words):
        to_binary_mask(mask, (50, 70))


def image_parts(image: Image.Image, path) -> list[dict]:
    """Parts of a message that show the same image in every form that transformers or this processor takes."""
    image.save(path)
    content = path.read_bytes()
    text = base64.b64encode(content).decode()
    forms = [image, path, str(path), content, text, np.asarray(image), np.asarray(image) / 255]
    forms += [torch.from_numpy(np.array(image)).permute(2, 0, 1), Image.open(path), {"bytes": content, "path": None}]
    data_url = f"data:image/png;base64,{text}"
    return [
        *({"type": "image", "image": form} for form in forms),
        {"type": "image", "url": str(path)},
        {"type": "image", "url": data_url},
        {"type": "image", "path": str(path)},
        {"type": "image", "base64": text},
        {"type": "image_url", "image_url": {"url": data_url}},
        {"type": "image_url", "image_url": str(path)},
    ]


def test_an_image_in_every_form_gives_the_same_batch_with_its_masks(byte_level_processor, tmp_path):
    image, batches = random_image(), []
    for part in image_parts(image, tmp_path / "image.png"):
        chat = conversation(image, "A <p>wheel</p>.")
        chat[0]["content"][0] = part
        batches.append(encode(byte_level_processor, [chat], masks=[[random_mask()]]))
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        assert torch.equal(batch["sam_pixel_values"], batches[0]["sam_pixel_values"])
        assert torch.equal(batch["mask_labels"][0], batches[0]["mask_labels"][0])
        assert torch.equal(batch["input_ids"], batches[0]["input_ids"])


def test_an_opened_image_is_turned_by_its_exif_orientation_as_its_file_is(byte_level_processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image().save(tmp_path / "turned.png", exif=exif)
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        batch = encode(byte_level_processor, [conversation(image, "Yes.")])
        assert batch["original_sizes"].tolist() == [[70, 50]]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image"}, r"one of the keys image, url, path, base64, found \['type'\]"),
        ({"type": "image", "url": "a.png", "path": "b.png"}, "one of the keys image, url, path, base64"),
        ({"type": "image_url"}, "one of the keys"),
        ({"type": "image", "url": "none.png"}, "Image 0: there is no image file 'none.png'"),
        ({"type": "image", "image": Image.new("RGB", (2000, 4))}, "Image 0: .*2000 x 4 pixels, and one side may be"),
    ],
)
def test_an_image_part_without_one_readable_image_is_refused(byte_level_processor, part, words):
    chat = conversation(random_image(), None)
    chat[0]["content"][0] = part
    with pytest.raises(ValueError, match=words):
        encode(byte_level_processor, [chat], add_generation_prompt=True)


def test_one_path_in_several_conversations_is_read_once(byte_level_processor, tmp_path):
    random_image().save(tmp_path / "image.png")
    chats = [conversation(str(tmp_path / "image.png"), "Yes.") for _ in range(3)]
    assert encode(byte_level_processor, chats)["sam_image_index"].tolist() == [0, 0, 0]


def test_one_image_in_several_conversations_is_encoded_once(byte_level_processor):
    first, second = random_image(seed=1), random_image(90, 40, seed=2)
    chats = [conversation(image, "Yes.") for image in (first, second, None, first)]
    batch = encode(byte_level_processor, chats)
    assert batch["sam_image_index"].tolist() == [0, 1, -1, 0]
    assert batch["original_sizes"].tolist() == [[50, 70], [90, 40]]
    own_tower = encode(tiny_processor(shared_vision=False), chats)
    assert len(own_tower["sam_pixel_values"]) == 2 and len(own_tower["pixel_values"]) == 3


@pytest.mark.parametrize("size", [(24, 18), (18, 24), (64, 21), (64, 64), (3, 64), (100, 41)])
def test_sam_pixels_are_bit_by_bit_those_of_transformers_image_processor(byte_level_processor, size):
    images = [random_image(seed).resize(size) for seed in (0, 1)]
    _, found, _ = byte_level_processor.prepare_images(images)
    expected = byte_level_processor.sam_image_processor(images, return_tensors="pt")
    torch.testing.assert_close(found.pop("sam_pixel_values"), expected["pixel_values"], rtol=0, atol=0)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: torch.as_tensor(expected[name]).tolist() for name in ("original_sizes", "reshaped_input_sizes")
    }


def test_two_spans_without_a_token_between_them_are_refused_if_they_share_one(byte_level_processor):
    chats = [conversation(random_image(), "A <p>whe</p><p>el</p>.")]
    with pytest.raises(ValueError, match="The span 'el' of conversation 0 has no tokens of its own"):
        encode(byte_level_processor, chats)


@pytest.mark.parametrize("text", ["What is {}?", "{}", "</<p>s></p>{}"])
@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>", "<pad>", "<unk>"])
def test_a_special_token_in_a_text_is_refused_and_the_place_named(processor, text, token):
    text = text.format(token)
    as_question = [conversation(random_image(), "Yes."), conversation(None, "Yes.", question=text)]
    with pytest.raises(ValueError, match="Conversation 1, message 0: the text contains '<"):
        encode(processor, as_question, add_generation_prompt=True)
    with pytest.raises(ValueError, match="Conversation 1, message 1: the text contains '<"):
        encode(processor, [conversation(random_image(), "Yes."), conversation(None, text)])


def test_a_special_token_that_tags_or_parts_hide_is_refused(byte_level_processor):
    for answer in ("</<p>s></p>", "<p></</p>s>", [{"type": "text", "text": part} for part in ("</", "s>")]):
        with pytest.raises(ValueError, match="Conversation 0, message 1: the text contains '</s>'"):
            encode(byte_level_processor, [conversation(None, answer)])


def test_a_prompt_without_tokens_is_refused(byte_level_processor):
    for text in ("", ["USER: Hello ASSISTANT:", ""]):
        with pytest.raises(ValueError, match=f"Text {len(text) and 1} has no tokens; give a prompt with words."):
            byte_level_processor(text=text)


def test_a_prompt_with_another_number_of_placeholders_than_images_is_refused(byte_level_processor):
    with pytest.raises(ValueError, match="Found 0 images for 1 texts with '<image>'"):
        byte_level_processor(text="USER: <image>\nHello ASSISTANT:")
    with pytest.raises(ValueError, match="Conversation 0 has 2 image placeholders '<image>' for 1 images"):
        byte_level_processor(images=[random_image()], text="USER: <image>\n<image>\nHello ASSISTANT:")


HISTORY = conversation(random_image(), "A <p>wheel</p>.")
NEXT = conversation(None, None, question="And its colour?")


def test_a_conversation_to_be_continued_has_neither_labels_nor_spans(byte_level_processor):
    processor = byte_level_processor
    for chat, options in (
        (HISTORY + NEXT, {"add_generation_prompt": True}),
        (HISTORY + NEXT, {}),
        (HISTORY, {"add_generation_prompt": True}),
        (HISTORY, {"continue_final_message": True}),
    ):
        batch = encode(processor, [chat], **options)
        assert not {"labels", "spans", "span_labels"} & set(batch), options
        assert "A wheel." in processor.tokenizer.decode(batch["input_ids"][0])
        with pytest.raises(ValueError, match="all conversations are to be continued"):
            encode(processor, [chat], masks=[[random_mask()]], **options)


def test_labels_are_those_of_the_rows_that_are_given_in_full(byte_level_processor):
    given = conversation(random_image(seed=1), "A <p>tail</p>.")
    batch = encode(byte_level_processor, [HISTORY + NEXT, given])
    assert (batch["labels"][0] == -100).all() and batch["spans"][:, 0].tolist() == [1]
    alone = encode(byte_level_processor, [given])
    assert torch.equal(batch["labels"][1][batch["labels"][1] != -100], alone["labels"][alone["labels"] != -100])
    model = tiny_model()
    for call in (model.segment_answers, lambda **inputs: model.score_choices(**inputs, num_choices=1)):
        with pytest.raises(ValueError, match=r"Rows \[0\] have no answer in labels"):
            call(**batch)


def test_the_answer_that_is_segmented_is_the_last_and_earlier_spans_guide_its_masks(byte_level_processor):
    model, processor = tiny_model(), byte_level_processor
    torch.nn.init.normal_(model.mask_feedback.out_proj.weight, std=1.0)
    later = conversation(None, "A <p>tail</p>.", question="What else?")
    batch = encode(processor, [HISTORY + later])
    outputs = model.segment_spans(**batch)
    (answer,) = processor.post_process_segmentation(outputs)
    assert answer.text == "A tail." and [span.text for span in answer.spans] == ["tail"]
    assert len(outputs.spans) == 2
    drawn = random_mask(seed=4)
    guided = model.segment_spans(**batch, given_masks={0: drawn})
    assert not torch.allclose(guided.pred_masks[1], outputs.pred_masks[1], atol=1e-4)


def test_an_answer_that_is_written_on_is_the_prompt_up_to_its_last_word(byte_level_processor):
    processor, begun = byte_level_processor, conversation(random_image(), "I can see a <p>left wing</p> and")
    text = processor.apply_chat_template(begun, continue_final_message=True)
    assert text == "USER: <image>\nWhich parts can you see? ASSISTANT: I can see a <p>left wing</p> and"
    batch = encode(processor, [begun], continue_final_message=True)
    expected = processor(images=begun[0]["content"][0]["image"], text=text.replace("<p>", "").replace("</p>", ""))
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    for chat, options in ((begun, {"add_generation_prompt": True}), (NEXT, {})):
        with pytest.raises(ValueError, match="continue_final_message"):
            encode(processor, [chat], continue_final_message=True, **options)


def test_a_system_message_is_rendered_as_such_and_other_roles_are_refused(byte_level_processor):
    processor = byte_level_processor
    system = [{"role": "system", "content": "Be brief."}]
    text = processor.apply_chat_template(system + NEXT, add_generation_prompt=True)
    assert text == "Be brief. USER: And its colour? ASSISTANT:"
    labels = encode(processor, [system + conversation(random_image(), "A <p>wheel</p>.")])["labels"]
    assert words_of(processor, labels[labels != -100]) == "A wheel.</s>"
    for role in ("human", "tool", "ASSISTANT", None):
        with pytest.raises(ValueError, match=f"Conversation 0, message 0: expected a role.*found {role!r}"):
            processor.apply_chat_template([{"role": role, "content": "Be brief."}, *NEXT])
    with pytest.raises(ValueError, match="system in the first message, found system"):
        processor.apply_chat_template(NEXT + system)


def test_all_texts_of_a_message_are_rendered_and_other_parts_refused(byte_level_processor):
    processor = byte_level_processor
    parts = [{"type": "text", "text": part} for part in ("A <p>wheel</p>", " and", " a <p>tail</p>.")]
    chat = conversation(random_image(), parts)
    batch = encode(processor, [chat], masks=[[random_mask(), random_mask(seed=1)]])
    assert words_of(processor, batch["labels"][batch["labels"] != -100]) == "A wheel and a tail.</s>"
    for part in ({"type": "video", "video": "film.mp4"}, {"type": "text"}, "a word", {"text": "Hello"}):
        with pytest.raises(ValueError, match="message 0: expected parts of type 'text' or 'image'"):
            encode(processor, [[{"role": "user", "content": [part]}]])
    with pytest.raises(ValueError, match="has no messages"):
        encode(processor, [NEXT, []])
    for found in ([], {"role": "user", "content": "Hello"}, "Hello"):
        with pytest.raises(ValueError, match="Expected a conversation, a list of messages"):
            processor.apply_chat_template(found)


@pytest.mark.parametrize(
    "options",
    [
        {"truncation": True, "max_length": 8},
        {"max_length": 8},
        {"padding": "max_length"},
        {"padding": False},
        {"return_tensors": "np"},
        {"return_assistant_tokens_mask": True},
        {"tools": [{"type": "function"}]},
        {"documents": [{"title": "a", "text": "b"}]},
        {"enable_thinking": False},
        {"processor_kwargs": {"truncation": True}},
    ],
    ids=str,
)
def test_an_option_of_transformers_that_would_be_ignored_is_refused(byte_level_processor, options):
    name = next(iter(options.get("processor_kwargs", options)))
    with pytest.raises(ValueError, match=f"{name}.*(is not supported|nor a variable)"):
        encode(byte_level_processor, [HISTORY, HISTORY], **options)
    with pytest.raises(ValueError, match=f"{name}.*(is not supported|nor a variable)"):
        byte_level_processor(text=["USER: Hello ASSISTANT:"] * 2, **options.get("processor_kwargs", options))


def test_options_of_transformers_that_ask_for_what_is_done_and_variables_of_the_template_pass(byte_level_processor):
    processor, template = byte_level_processor, "{{ greeting }}" + byte_level_processor.chat_template
    expected = encode(processor, [HISTORY])
    same = {"padding": True, "truncation": False, "return_tensors": "pt", "tools": None}
    for options in (same, {"padding": False}, {"processor_kwargs": {"padding": True}}):
        assert torch.equal(encode(processor, [HISTORY], **options)["input_ids"], expected["input_ids"])
    text = processor.apply_chat_template(NEXT, chat_template=template, greeting="Hello. ")
    assert text == "Hello. USER: And its colour? "


def test_an_image_that_the_template_leaves_out_is_refused(byte_level_processor):
    answer = {"role": "assistant", "content": [{"type": "image", "image": random_image()}]}
    with pytest.raises(ValueError, match="0 image placeholders .* the chat template leaves the image out"):
        encode(byte_level_processor, [[*NEXT, answer]])


def test_two_images_in_one_conversation_are_refused(byte_level_processor):
    chat = conversation(random_image(), "Yes.") + conversation(random_image(seed=1), "No.")
    with pytest.raises(ValueError, match="one image per conversation, found 2"):
        encode(byte_level_processor, [chat])


def test_a_rendered_prompt_is_encoded_as_the_chat_it_came_from(byte_level_processor):
    chat, image = conversation(random_image(), None), random_image()
    prompt = byte_level_processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhich parts can you see? ASSISTANT:"
    expected = encode(byte_level_processor, [chat], add_generation_prompt=True)
    for images, text in (
        (image, prompt),
        ([image], [prompt]),
        ([[image]], [prompt]),
        ([[None, image]], np.array([prompt])),
    ):
        called = byte_level_processor(images, text, padding=True, return_tensors="pt", videos=None)
        assert called.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(called[name], value), name
    for text in (None, image, [None]):
        with pytest.raises(ValueError, match="Expected a prompt, .* or a list of prompts"):
            byte_level_processor(image, text)


def test_results_are_the_words_and_masks_of_the_answer_at_the_size_of_the_image(processor):
    model = tiny_model()
    images = [random_image(50, 70, seed=1), random_image(90, 40, seed=2), None]
    chats = [
        conversation(images[0], ANSWER),
        conversation(images[1], "The <p>tail</p>."),
        conversation(images[2], "It is red."),
    ]
    outputs = model.segment_spans(**encode(processor, chats))
    answers = processor.post_process_segmentation(outputs)
    plain = ["The object has a left wing, (tail), and one wheel.", "The tail.", "It is red."]
    squeezed = [answer.text.replace(" ", "").lower() for answer in answers]
    assert squeezed == [text.replace(" ", "").lower() for text in plain]
    assert [[span.text.lower() for span in answer.spans] for answer in answers] == [
        ["left wing", "tail", "wheel"],
        ["tail"],
        [],
    ]
    for answer, size in zip(answers, [(50, 70), (90, 40), None], strict=True):
        for span in answer.spans:
            assert answer.text[span.start : span.end] == span.text
            assert span.mask.shape == size and span.mask.dtype == bool
            assert 0.0 <= span.score <= 1.0
            x0, y0, x1, y1 = span.box
            assert span.mask[y0:y1, x0:x1].sum() == span.mask.sum()
            assert (
                span.mask[y0:y1, [x0, x1 - 1]].any(axis=0).all() and span.mask[[y0, y1 - 1], x0:x1].any(axis=1).all()
            )


def test_an_empty_mask_has_no_box(byte_level_processor):
    model = tiny_model()
    outputs = model.segment_spans(**encode(byte_level_processor, [conversation(random_image(), "A <p>wheel</p>.")]))
    span = byte_level_processor.post_process_segmentation(outputs, mask_threshold=1e9)[0].spans[0]
    assert span.box is None and not span.mask.any()


def test_masks_without_the_sizes_of_their_images_are_refused(byte_level_processor):
    batch = encode(byte_level_processor, [conversation(random_image(), "A <p>wheel</p>.")])
    outputs = tiny_model().segment_spans(**{name: value for name, value in batch.items() if "sizes" not in name})
    with pytest.raises(ValueError, match="Masks need original_sizes and reshaped_input_sizes"):
        byte_level_processor.post_process_segmentation(outputs)


@pytest.mark.parametrize("shared_vision", [True, False])
def test_a_saved_processor_loads_to_the_same_function(tmp_path, shared_vision):
    processor = tiny_processor(shared_vision)
    processor.save_pretrained(tmp_path)
    loaded = PlumProcessor.from_pretrained(tmp_path)
    chats, masks = [conversation(random_image(), "A <p>wheel</p>.")], [[random_mask()]]
    found, expected = encode(loaded, chats, masks=masks), encode(processor, chats, masks=masks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        for left, right in zip(found[name], value, strict=True):
            assert torch.equal(left, right), name


def test_a_tokenizer_without_the_image_token_is_refused():
    processor = tiny_processor()
    tokenizer = copy.deepcopy(processor.tokenizer)
    with pytest.raises(ValueError, match="no token '<picture>'"):
        PlumProcessor(processor.sam_image_processor, processor.sam_image_processor, tokenizer, image_token="<picture>")


def test_an_unknown_setting_is_an_error_of_a_call_and_ignored_in_the_file_of_another_version(tmp_path):
    processor = tiny_processor()
    with pytest.raises(TypeError, match="num_image_token"):
        PlumProcessor(processor.image_processor, processor.sam_image_processor, processor.tokenizer, num_image_token=3)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"setting_of_another_version": 3}))
    assert PlumProcessor.from_pretrained(tmp_path).num_image_tokens == processor.num_image_tokens


def test_generation_blocks_of_the_template_are_where_answers_are_located():
    template, variables = DEFAULT_CHAT_TEMPLATE, {"image_token": "<image>", "eos_token": "</s>"}
    texts = ["What?", "A <p>wing</p>.", "And that?", "A tail.\n"]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(["user", "assistant"] * 2, texts, strict=True)
    ]
    (rendered,), (marked,) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    assert list(map(tuple, marked)) == find_answers(messages, rendered, template, variables)
    assert [rendered[start:end] for start, end in marked] == [" A <p>wing</p>.</s>", " A tail.\n</s>"]
