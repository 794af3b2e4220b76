"""ReasonSeg, LLaVA's chats and PARTONOMY's questions as conversations, each in miniature as published."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.masks import DataError, decode
from plum_partonomy.records import as_row, tagged_phrases
from plum_partonomy.sources.llava import LlavaInstruct, LlavaMixture
from plum_partonomy.sources.question_chats import CoreConversations, CoreStage2
from plum_partonomy.sources.reasonseg import ANSWERS, ASKING_WHY, EXPLANATIONS_FILE, WORDS_FOR_THE_ANSWER, ReasonSeg
from plum_partonomy.training.examples import Collator, ConversationDataset
from tests.sources.test_official_and_descriptor import official_folder, official_record
from tests.tiny import tiny_model, tiny_processor

HEIGHT, WIDTH = 20, 30


def shape(label: str, left: int, top: int, right: int, bottom: int) -> dict:
    points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"label": label, "labels": [label], "shape_type": "polygon", "image_name": "1.jpg", "points": points}


def reasonseg_folder(folder: Path, *, encoding: str = "utf-8") -> Path:
    target = [shape("target", 2, 2, 22, 18), shape("ignore", 4, 4, 10, 10), shape("target", 6, 6, 8, 8)]
    contents = {
        "train/1": (["What makes it fast?", "Which part lets it move?"], True, target),
        "train/2": (["the café's <p>door</p>"], False, [*target, shape("flag", 0, 0, 1, 1)]),
        "train/3": (["Where is it?"], True, [shape("ignore", 4, 4, 10, 10)]),
        "val/4": (["Where is it?"], True, target[:1]),
    }
    for name, values in contents.items():
        content = dict(zip(("text", "is_sentence", "shapes"), values, strict=True))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
        Image.new("RGB", (WIDTH, HEIGHT), "white").save(folder / f"{name}.jpg")
    (folder / EXPLANATIONS_FILE).parent.mkdir()
    explanation = {"image": "1.jpg", "query": "What makes it fast?", "outputs": "Wheels <p>roll</p>."}
    (folder / EXPLANATIONS_FILE).write_text(json.dumps([explanation]))
    return folder


def texts(conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
def test_small_regions_lie_over_large_ones_and_what_is_ignored_is_no_target(tmp_path, encoding):
    folder = reasonseg_folder(tmp_path, encoding=encoding)
    assert ReasonSeg.splits(folder) == ["train", "validation"]
    source = ReasonSeg(folder)
    assert source.counts == {"images": 3, "explanations": 1}
    target, ignored = (decode(rle) for rle in source.regions(0))
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[4:10, 4:10] = True
    expected[6:8, 6:8] = False
    np.testing.assert_array_equal(ignored, expected)
    expected = ~expected
    expected[:2], expected[18:], expected[:, :2], expected[:, 22:] = False, False, False, False
    np.testing.assert_array_equal(target, expected)


def test_each_question_is_asked_as_it_stands_and_explained_about_every_second_time(tmp_path):
    source = ReasonSeg(reasonseg_folder(tmp_path))
    explained = 0
    for seed in range(40):
        made = list(source.conversations(0, seed=seed))
        assert [texts(item)[0].split("?")[0] for item in made] == ["What makes it fast", "Which part lets it move"]
        for conversation in made:
            question, answer = texts(conversation)
            (phrase,) = tagged_phrases(answer)
            assert phrase in WORDS_FOR_THE_ANSWER
            assert conversation.masks[0].rle == source.regions(0)[0]
            asks_why = question.endswith(ASKING_WHY)
            assert answer.endswith(r"Wheels \<p>roll\</p>.") == asks_why
            explained += asks_why
    assert 20 < explained < 60
    assert list(source.conversations(0, seed=39)) == made
    (unexplained,) = ReasonSeg(tmp_path, split="validation").conversations(0, seed=0)
    assert texts(unexplained)[1] in {
        answer.format(tagged=f"<p>{w}</p>") for answer in ANSWERS for w in WORDS_FOR_THE_ANSWER
    }


def test_a_phrase_is_tagged_itself_and_an_image_without_a_target_gives_nothing(tmp_path):
    source = ReasonSeg(reasonseg_folder(tmp_path))
    (conversation,) = source.conversations(1, seed=0)
    assert tagged_phrases(texts(conversation)[1]) == ["the café's <p>door</p>"]
    assert list(source.conversations(2, seed=0)) == [] and source.blank == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("train/1.json", '"ignore"', '"other"', r"1.json, record shapes\[1\], field 'label': expected target, ignore"),
        ("train/1.json", '[2, 2]', '["2", 2]', r"1.json, record shapes\[0\], field 'points': expected a polygon"),
        ("train/1.json", '"is_sentence": true', '"is_sentence": 1', "1.json, field 'is_sentence': expected bool"),
        ("train/1.json", '"What makes it fast?"', '" "', "1.json, field 'text': expected questions"),
        ("train/1.json", '"shapes"', '"polygons"', "1.json: field 'shapes' is missing"),
        ("train/1.json", '{"text"', '["text"', "1.json: expected JSON"),
        (EXPLANATIONS_FILE, '"outputs"', '"output"', "train.json, record 0: field 'outputs' is missing"),
        (EXPLANATIONS_FILE, "[{", "{", "train.json: expected"),
    ],
)  # fmt: skip
def test_bad_files_of_reasonseg_are_refused_naming_file_and_field(tmp_path, file, old, new, message):
    folder = reasonseg_folder(tmp_path)
    content = (folder / file).read_text()
    assert old in content
    (folder / file).write_text(content.replace(old, new))
    with pytest.raises(DataError, match=message):
        list(ReasonSeg(folder).conversations(0, seed=0))


def test_an_incomplete_folder_of_reasonseg_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such files of reasonseg; expected the folders train and val"):
        ReasonSeg.splits(tmp_path)
    folder = reasonseg_folder(tmp_path)
    (folder / "train/1.jpg").unlink()
    with pytest.raises(DataError, match="1.json.*there is no image 'train/1.jpg'"):
        list(ReasonSeg(folder).conversations(0, seed=0))
    (folder / EXPLANATIONS_FILE).unlink()
    with pytest.raises(DataError, match="explanatory/train.json: no such file"):
        ReasonSeg(folder)


def chat(*values: str, first: str = "human", **fields) -> dict:
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    conversations = [{"from": speakers[number % 2], "value": value} for number, value in enumerate(values)]
    return {"id": "000000033471", **fields, "conversations": conversations}


INSTRUCT = [
    chat("<image>\nWhat colour is it?", "Red.", "Is it big?\n<image>", "Yes.", image="000000033471.jpg"),
    chat("What is <p>?\n<image>", "A tag of <p>HTML</p>.", image="000000033471.jpg"),
]
MIXTURE = [
    chat("<image>\nWhat colour is it?", "Red.", image="coco/train2017/000000033471.jpg"),
    chat("What does <image> mean in XML?", "It is a tag.", model=""),
    chat("Hello!", "What is 2 + 2?", "4.", "And 3 + 3?", first="gpt"),
    chat("Hello!", first="gpt"),
]


def llava_folder(folder: Path, records: list[dict], kind: type = LlavaMixture) -> Path:
    (folder / "coco/train2017").mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(folder / "coco/train2017/000000033471.jpg")
    (folder / kind.files[0]).write_text(json.dumps(records))
    return folder


def test_chats_keep_their_texts_but_for_the_placeholder_and_supervise_no_tags(tmp_path):
    source = LlavaInstruct(llava_folder(tmp_path, INSTRUCT, LlavaInstruct))
    (first,), (second,) = (list(source.conversations(index, seed=0)) for index in range(2))
    assert texts(first) == ["What colour is it?", "Red.", "Is it big?", "Yes."]
    assert [message["role"] for message in first.messages] == ["user", "assistant"] * 2
    assert texts(second) == [r"What is \<p>?", r"A tag of \<p>HTML\</p>."]
    assert first.image["path"].endswith("coco/train2017/000000033471.jpg")
    assert first.masks is None and first.id != second.id


def test_chats_without_an_image_hold_no_placeholder_and_unanswered_or_unasked_messages_go(tmp_path):
    source = LlavaMixture(llava_folder(tmp_path, MIXTURE))
    made = [list(source.conversations(index, seed=0)) for index in range(4)]
    assert made[0][0].image["path"].endswith("000000033471.jpg")
    assert made[1][0].image is None
    assert texts(made[1][0]) == ["What does <image > mean in XML?", "It is a tag."]
    assert texts(made[2][0]) == ["What is 2 + 2?", "4."]
    assert made[3] == [] and source.blank == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("Hello!", "Hi.", image="none.jpg"), "record 0, field 'image': there is no image"),
        (chat("Hello!", "Hi.", image="../outside.jpg"), "is outside"),
        (chat("Hello!", "Hi.", image="a\0b"), "is outside|there is no image"),
        (chat("Hello!", "Hi.", image=3), "record 0, field 'image': expected str"),
        (chat("Hello!", 3), r"record 0, record conversations\[1\], field 'value': expected str"),
        ({"conversations": [{"from": "system", "value": ""}]}, r"conversations\[0\], field 'from': expected human"),
        (
            {"conversations": chat("Hello!")["conversations"] * 2 + chat("a", "b")["conversations"]},
            "expected the role",
        ),
        ({"id": 3}, "record 0: field 'conversations' is missing"),
        (3, "record 0: field 'conversations' is missing"),
    ],
)
def test_bad_chats_are_refused_naming_file_record_and_field(tmp_path, record, message):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "outside.jpg")
    folder = llava_folder(tmp_path / "data", [record])
    with pytest.raises(DataError, match=message):
        list(LlavaMixture(folder).conversations(0, seed=0))


def test_an_incomplete_folder_of_chats_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file for the chats of .*; expected llava_v1_5_mix665k.json"):
        LlavaMixture.splits(tmp_path)
    with pytest.raises(DataError, match="expected a non-empty list of chats"):
        LlavaMixture(llava_folder(tmp_path, []))
    (tmp_path / LlavaMixture.files[0]).write_text(json.dumps(MIXTURE)[:-30])
    with pytest.raises(DataError, match="damaged or cut short"):
        LlavaMixture(tmp_path)


def test_questions_become_conversations_all_of_them_or_one_about_each_image(tmp_path):
    types = ("identification", "identification_with_label", "positive_with_label", "difference_with_label")
    records = [official_record() | {"question_type": name, "question": f"What parts? ({name})"} for name in types]
    folder = official_folder(tmp_path, *records)
    source = CoreConversations(folder)
    made = [conversation for index in range(len(source)) for conversation in source.conversations(index, seed=0)]
    assert [texts(conversation)[0] for conversation in made] == [record["question"] for record in records]
    assert {texts(conversation)[1] for conversation in made} == {"<p>door</p>, and <p>wheel</p>"}
    stage2 = CoreStage2(folder)
    assert len(stage2) == 1
    asked = {texts(conversation)[0] for seed in range(20) for conversation in stage2.conversations(0, seed=seed)}
    assert asked == {"What parts? (identification_with_label)", "What parts? (positive_with_label)"}


@pytest.mark.parametrize("with_tagged", [True, False])
def test_chats_train_the_language_and_no_tags(tmp_path, with_tagged):
    chats = LlavaMixture(llava_folder(tmp_path / "llava", MIXTURE))
    tagged = ReasonSeg(reasonseg_folder(tmp_path / "reasonseg"))
    made = [*chats.conversations(0, seed=0), *chats.conversations(1, seed=0)]
    made += tagged.conversations(1, seed=0) if with_tagged else []
    records = Dataset.from_list([as_row(item) for item in made], features=GROUNDED_CONVERSATION_FEATURES)
    examples = ConversationDataset(records)
    batch = Collator(tiny_processor())([examples[index] for index in range(len(records))])
    supervised = (batch["span_labels"] != -100).any(dim=1).tolist()
    assert supervised == [False, False] + [True] * with_tagged
    assert (batch["labels"] != -100).any(dim=1).all()
    inputs = {name: value for name, value in batch.items() if not name.startswith("record_")}
    loss = tiny_model()(**inputs).loss
    assert loss.isfinite() and loss > 0
