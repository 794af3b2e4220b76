import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from plum_partonomy.features import QUESTION_FEATURES
from plum_partonomy.masks import DataError, encode
from plum_partonomy.records import PartMask, Question, as_row
from plum_partonomy.scoring.baselines import answer_without_model
from plum_partonomy.scoring.benchmark import (
    fingerprint,
    load_image,
    load_questions,
    make_batches,
    pick_wrong_images,
    read_masks,
)
from plum_partonomy.scoring.results import score


def make_question(number, *, image_number=0, size=(6, 8), **changes):
    fields = {
        "id": f"q{number}",
        "image": Image.new("RGB", (8, 6)),
        "image_id": f"i{image_number}",
        "image_label": "boat",
        "question_type": "identification",
        "question": "What visible parts does the object in the image have?",
        "choices": ["hull", "mast"],
        "correct": 0,
        "choice_parts": [["hull"], ["mast"]],
        "masks": [PartMask("hull", encode(np.ones(size, bool)))],
    }
    return Question(**(fields | changes))


HULL = PartMask("hull", encode(np.ones((6, 8), bool)))


def save(questions, folder, split="test"):
    rows = datasets.Dataset.from_list([as_row(question) for question in questions], features=QUESTION_FEATURES)
    rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_questions_come_back_in_order_without_their_images_and_the_images_by_index(tmp_path):
    questions = [make_question(0), make_question(1, image_number=1, image=Image.new("RGB", (8, 6), "red"))]
    rows, loaded = load_questions(save(questions, tmp_path), name="default", split="test")
    assert [question.id for question in loaded] == ["q0", "q1"]
    assert loaded[1].image is None
    assert loaded[1].masks == questions[1].masks
    assert load_image(rows, 1, loaded[1]).getpixel((0, 0)) == (255, 0, 0)
    assert [q.id for q in load_questions(str(tmp_path), name="default", split="test", limit=1)[1]] == ["q0"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"split": "dev"}, "Cannot load data set .*split 'dev'.*dev"),
        ({"name": "mini_qestions"}, "there is no name 'mini_qestions'; there are default"),
    ],
)
def test_an_unknown_split_or_name_is_one_sentence(tmp_path, asked, message):
    folder = save([make_question(0)], tmp_path)
    with pytest.raises(DataError, match=message):
        load_questions(folder, **{"name": "default", "split": "test", **asked})


def test_a_split_without_records_is_an_error(tmp_path):
    save([make_question(0)], tmp_path, split="test")
    with pytest.raises(DataError, match=r"split 'test\[:0\]': .*no "):
        load_questions(str(tmp_path), name="default", split="test[:0]")


def test_records_that_are_no_questions_are_an_error_that_lists_what_they_lack(tmp_path):
    datasets.Dataset.from_dict({"image": [None], "id": ["a"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"has no questions, its records lack \['choice_parts', 'choices'"):
        load_questions(str(tmp_path), name="default", split="test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct": 2}, "record 1, field 'correct'"),
        ({"choice_parts": [["keel"], ["mast"]]}, "record 1, field 'masks'.*keel"),
        ({"id": "q0"}, "record 1, field 'id': 'q0' occurs more than once"),
        ({"choices": None}, "record 1, field 'choices': expected a value, found null"),
    ],
)
def test_an_invalid_record_is_named_by_its_index_and_field(tmp_path, changes, message):
    folder = save([make_question(0), make_question(1, **changes)], tmp_path)
    with pytest.raises(DataError, match=message):
        load_questions(folder, name="default", split="test")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"label": "mast", "rle": {"size": [8, 6], "counts": "`1"}},
            r"has size \[8, 6\], but the first mask \[6, 8\]",
        ),
        ({"label": "mast", "rle": {"size": [6, 8], "counts": "Pm2"}}, "the counts decode to more than 48 pixels"),
        ({"label": "mast", "rle": None}, "field 'rle': expected dict, found None"),
        ({"label": None, "rle": HULL.rle}, "field 'label': expected str, found None"),
        (None, "field 'label' is missing"),
    ],
)
def test_a_damaged_mask_of_a_record_is_named_before_it_is_compared(second, message):
    hull = {"label": "hull", "rle": HULL.rle}
    assert (
        read_masks([hull], where="record 1", valid=set()) == [HULL] and read_masks(None, where="", valid=set()) == []
    )
    with pytest.raises(DataError, match=rf"record 1, field 'masks\[1\]'.* {message}"):
        read_masks([hull, second], where="record 1", valid=set())


def test_two_masks_of_one_part_are_an_error():
    with pytest.raises(DataError, match="record 1, field 'masks': two masks are named 'hull'; merge them into one"):
        make_question(1, masks=[HULL, HULL]).validate(where="record 1")


def test_fields_of_other_types_are_converted_or_named(tmp_path):
    folder = save([make_question(0)], tmp_path)
    rows = datasets.load_dataset(folder, split="test")
    rows.cast_column("correct", datasets.Value("int64")).to_parquet(tmp_path / "test.parquet")
    assert load_questions(folder, name="default", split="test")[1][0].correct == 0
    rows.remove_columns("choices").add_column("choices", ["hull, mast"]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(
        DataError, match=r"other types than its task needs: 'choices' is Value\('string'\), expected L"
    ):
        load_questions(folder, name="default", split="test")


def test_an_image_that_is_damaged_or_not_of_its_masks_size_is_named(tmp_path):
    questions = [make_question(0, size=(8, 6)), make_question(1, image={"bytes": b"no image", "path": None})]
    rows, loaded = load_questions(save(questions, tmp_path), name="default", split="test")
    with pytest.raises(DataError, match=r"'q0': its image has \[height, width\] \[6, 8\], its masks \[8, 6\]"):
        load_image(rows, 0, loaded[0])
    with pytest.raises(DataError, match="'q1', image 'i0': not a readable image"):
        load_image(rows, 1, loaded[1])
    options = {"output_dir": tmp_path, "run": {}, "mask_source": "gt_answer"}
    with pytest.raises(DataError, match="'q0': its image has"):
        score(rows, loaded[:1], answer_without_model("ground_truth", loaded[:1]), **options)
    assert not (tmp_path / "metrics.json").exists()


def test_the_fingerprint_changes_with_content_and_order_and_not_with_how_an_image_is_held():
    questions = [make_question(0), make_question(1)]
    assert fingerprint([make_question(0, image=None), make_question(1, image=b"")]) == fingerprint(questions)
    changed = [questions[::-1], questions[:1], [questions[0], make_question(1, masks=[])]]
    assert len({fingerprint(questions), *map(fingerprint, changed)}) == 4


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 7))
def test_batches_hold_every_question_once_and_all_questions_about_an_image_are_in_one_group(numbers, batch_size):
    questions = [make_question(i, image_number=number) for i, number in enumerate(numbers)]
    groups = make_batches(questions, batch_size)
    images = []
    for group in groups:
        order = [index for batch in group for index in batch]
        images.append({numbers[index] for index in order})
        changes = sum(numbers[a] != numbers[b] for a, b in zip(order, order[1:], strict=False))
        assert changes == len(images[-1]) - 1  # questions about an image are next to each other
        assert all(len(batch) == batch_size for batch in group[:-1]) and 1 <= len(group[-1]) <= batch_size
        assert len(group) == 1 or changes == 0
    assert sorted(index for group in groups for batch in group for index in batch) == list(range(len(questions)))
    assert sum(map(len, images)) == len(set(numbers))


def test_images_fill_a_batch_as_far_as_they_fit():
    questions = [make_question(i, image_number=number) for i, number in enumerate([0, 0, 1, 2, 1, 3, 3, 3, 3, 3, 4])]
    assert make_batches(questions, 4) == [[[0, 1, 2, 4]], [[3]], [[5, 6, 7, 8], [9]], [[10]]]


def about(photographs_and_labels):
    return [
        make_question(number, image_id=f"{photograph}.jpg#{label}", image_label=label)
        for number, (photograph, label) in enumerate(photographs_and_labels)
    ]


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=20))
def test_every_image_gets_another_one_each_once_and_of_another_label_where_that_is_possible(labels):
    questions = about(enumerate(labels))
    labels = {question.image_id: question.image_label for question in questions}
    wrong = pick_wrong_images(questions)
    assert wrong.keys() == set(wrong.values()) == labels.keys()
    assert all(image != other for image, other in wrong.items())
    largest = max(list(labels.values()).count(label) for label in labels.values())
    if 2 * largest <= len(labels):
        assert all(labels[image] != labels[other] for image, other in wrong.items())
    assert pick_wrong_images(questions[::-1]) == wrong


@given(st.sets(st.tuples(st.integers(0, 6), st.sampled_from("abcd")), min_size=2, max_size=20))
def test_the_wrong_image_is_never_another_object_of_the_same_photograph(objects):
    objects = sorted(objects)
    photographs = [photograph for photograph, _ in objects]
    if len(set(photographs)) == 1:
        with pytest.raises(DataError, match="at least two images"):
            pick_wrong_images(about(objects))
        return
    wrong = pick_wrong_images(about(objects))
    assert len(wrong) == len(objects)
    assert all(image.split("#")[0] != other.split("#")[0] for image, other in wrong.items())
    if 2 * max(map(photographs.count, photographs)) <= len(objects):
        assert set(wrong.values()) == wrong.keys()


@pytest.mark.parametrize(
    ("image_id", "label", "photograph"),
    [
        ("images/0.png#car", "car", "images/0.png"),
        ("train-7-car (sedan)", "car (sedan)", "train-7"),
        ("images/0.png", "car", "images/0.png"),
        ("mini-test-3", "boat", "mini-test-3"),
        ("#car", "car", "#car"),
    ],
)
def test_the_photograph_of_a_question_is_its_image_without_the_object(image_id, label, photograph):
    assert make_question(0, image_id=image_id, image_label=label).photograph == photograph


def test_one_image_alone_has_no_wrong_image():
    with pytest.raises(DataError, match="needs at least two images"):
        pick_wrong_images([make_question(0)])
