import json

import pytest

from plum_partonomy.cli import main
from plum_partonomy.commands import LISTED_PROBLEMS
from plum_partonomy.sources.validate import CHECKS, validate
from tests.sources.test_coco import (
    VOC,
    annotation,
    changed,
    image,
    paco_content,
    paco_folder,
    pascal_content,
    pascal_folder,
)
from tests.sources.test_official_and_descriptor import (
    descriptor_content,
    descriptor_folder,
    official_folder,
    official_record,
)


def whole_pascal_content() -> dict:
    content = pascal_content()
    for id in range(100, 190):
        content["categories"].append({"id": id, "name": f"bus:piece {id}"})
    return content


def test_whole_copies_are_fit_and_say_what_they_hold(tmp_path):
    pascal = validate("pascal_part", pascal_folder(tmp_path / "pascal", whole_pascal_content()))
    assert pascal.problems == []
    assert pascal.notes == [
        "train: 2 images, 0 objects, 4 parts, of which 0 give nothing to talk about; 2 conversations, 10 questions, "
        "11 spans of 3 masks"
    ]
    descriptor = validate("descriptor", descriptor_folder(tmp_path / "descriptor", descriptor_content()))
    assert descriptor.problems == []
    assert descriptor.notes[0].startswith("train: 1 images, 1 conversations, ")
    assert descriptor.notes[1] == "validation: 0 images, 0 conversations, 0 questions, 0 spans of 0 masks"
    core = validate("core", official_folder(tmp_path / "core", official_record()))
    assert core.problems == []
    assert core.notes == [
        "1 questions: 1 identification",
        "1 objects (Partonomy-Core: 534), 2 parts (Partonomy-Core: 862), 2 object-part pairs (Partonomy-Core: 1976), "
        "1 images (Partonomy-Core: 1068), 2 masks (Partonomy-Core: 4968)",
    ]


@pytest.mark.parametrize("source", CHECKS)
def test_an_empty_folder_is_one_problem(tmp_path, source):
    (problem,) = validate(source, tmp_path).problems
    assert "no such file" in problem or "no annotations of" in problem


def test_every_missing_and_damaged_image_is_a_problem_of_its_own(tmp_path):
    content = whole_pascal_content()
    content["images"].append(image(3, "2008_000019.jpg"))
    for id in (2, 3):
        content["annotations"].append(annotation(10 + id, 24, [[2, 20, 8, 20, 8, 30]]) | {"image_id": id})
    folder = pascal_folder(tmp_path, content)
    (folder / VOC / "2008_000009.jpg").write_bytes((folder / VOC / "2008_000009.jpg").read_bytes()[:200])
    damaged, missing = validate("pascal_part", folder).problems
    assert "record images[1]" in damaged and "not a readable image" in damaged
    assert "record images[2]" in missing and "there is no image" in missing


def test_another_version_or_a_part_of_the_published_one_is_a_problem(tmp_path):
    problems = validate("paco_lvis", paco_folder(tmp_path, paco_content())).problems
    assert [problem.split("paco_lvis_v1_train.json: ")[1].split(";")[0] for problem in problems] == [
        "5 categories, but the published version of paco_lvis has 531",
        "2 images, but the publishers count 45790",
        "4 objects, but the publishers count 217117",
        "4 parts, but the publishers count 395071",
    ]


def test_a_split_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    folder = pascal_folder(tmp_path, whole_pascal_content())
    (folder / "val.json").write_text(json.dumps(whole_pascal_content())[:-50])
    report = validate("pascal_part", folder)
    (problem,) = report.problems
    assert "val.json: expected JSON; the file is damaged or cut short" in problem
    assert len(report.notes) == 1 and report.notes[0].startswith("train: 2 images, 0 objects, 4 parts, ")


def test_the_command_prints_the_first_problems_and_exits_with_one(tmp_path, capsys):
    bad = changed(official_record(), "image_path", value="images/none.png")
    folder = official_folder(tmp_path / "data", official_record(), *[bad] * (LISTED_PROBLEMS + 5))
    errors = tmp_path / "errors.jsonl"
    assert main(["data", "validate", "core", str(folder), "--errors", str(errors)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(errors.read_text().splitlines()) == LISTED_PROBLEMS + 5
    assert "record 1, field 'image_path'" in json.loads(errors.read_text().splitlines()[0])["problem"]
    assert sum(line.startswith("problem: ") for line in lines) == LISTED_PROBLEMS
    assert lines[-2:] == ["and 5 more problems", f"{folder} cannot be built: {LISTED_PROBLEMS + 5} problems"]
