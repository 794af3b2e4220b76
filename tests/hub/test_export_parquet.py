"""Exported repositories: what is in them, that it is the same every time, and that a failure leaves nothing behind."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from pyarrow import parquet

import partonomy_dataset
from plum_partonomy.hub.shards import write_shards
from plum_partonomy.records import as_row
from plum_partonomy.sources.official import read_questions
from plum_partonomy.sources.statistics import Statistics
from scripts import export_parquet
from tests.questions.test_question_builds import IMAGES, PARTS, bad_descriptor, small_descriptor
from tests.sources.test_mixture_configs import FOLDERS
from tests.sources.test_own_parts import coco_folder, varied_content

ROOT = Path(__file__).parents[2]
SMALL_SHARD = 30_000


def run(monkeypatch, *options) -> None:
    monkeypatch.setattr(sys, "argv", ["export_parquet.py", *map(str, options)])
    export_parquet.main()


def table_row(card: str, *cells: str | int) -> bool:
    return f"| {' | '.join(map(str, cells))} |" in card


def test_the_statistics_of_the_official_sample_are_those_of_the_annotations_it_was_made_from(fixtures_dir):
    folder = fixtures_dir / "official_layout"
    found = Statistics()
    for question in read_questions(folder):
        found.add(as_row(question))
    instances = json.loads((folder / "descriptor.json").read_text())["instances"]
    asked = json.loads((folder / "partonomy_qa_pairs.json").read_text())
    shown = {(item["image_label"], part) for item in instances for part in item["segmentations"]}
    assert found.as_row() == {
        "objects": len({item["image_label"] for item in instances}),
        "parts": len({part for _, part in shown}),
        "object-part pairs": len(shown),
        "images": len(list((folder / "images").iterdir())),
        "masks": sum(len(item["segmentations"]) for item in instances),
        "questions": len(asked),
    }
    assert found.questions == {kind: 42 for kind in {record["question_type"] for record in asked}}


def test_an_export_serves_the_rows_of_the_builder_from_small_shards_with_checksums(monkeypatch, tmp_path):
    folder, names = small_descriptor(tmp_path / "data"), ["descriptor_questions", "descriptor"]
    options = ["--name", *names, "--data_dir", folder, "--scheme", "balanced", "--max_shard_bytes", SMALL_SHARD]
    for output in ("one", "two"):
        run(monkeypatch, *options, "--output_dir", tmp_path / output / "exported")
    exported = tmp_path / "one" / "exported"
    for name in names:
        asked = {"scheme": "balanced"} if name == "descriptor_questions" else {}
        built = load_dataset("partonomy", name, data_dir=str(folder), cache_dir=tmp_path / "cache", **asked)
        stored = load_dataset(str(exported), name, cache_dir=tmp_path / "cache")
        assert {split: rows.features for split, rows in stored.items()} == {s: r.features for s, r in built.items()}
        for split, rows in built.items():
            assert rows.remove_columns("image")[:] == stored[split].remove_columns("image")[:]
            for row, other in zip(rows, stored[split], strict=True):
                np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(other["image"]))
    shards = sorted(exported.glob("*_questions/train-*.parquet"))
    assert len(shards) > 1
    assert [path.name for path in shards] == [
        f"train-{n:05d}-of-{len(shards):05d}.parquet" for n in range(len(shards))
    ]
    assert all(path.stat().st_size <= SMALL_SHARD for path in exported.rglob("*.parquet"))
    files = {path.relative_to(exported).as_posix(): path for path in exported.rglob("*") if path.is_file()}
    sums = dict(reversed(line.split("  ")) for line in (exported / "SHA256SUMS").read_text().splitlines())
    assert set(files) - set(sums) == {"README.md", "SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "two" / "exported" / name).read_bytes()


def test_an_image_that_rows_share_is_stored_once(tmp_path):
    image = {"bytes": np.random.default_rng(0).bytes(50_000), "path": None}
    rows = partonomy_dataset.datasets.Dataset.from_dict({"id": list(range(20)), "image": [image] * 20})
    rows = rows.cast_column("image", partonomy_dataset.datasets.Image(decode=False))
    write_shards(rows, tmp_path, split="test")
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 70_000
    assert parquet.read_table(path)["image"].to_pylist() == [image] * 20


def test_the_card_of_an_export_states_what_is_in_it(monkeypatch, tmp_path):
    folder = small_descriptor(tmp_path / "data")
    run(monkeypatch, "--name", "descriptor_questions", "--data_dir", folder, "--output_dir", tmp_path / "out")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert [config["config_name"] for config in card.data.configs] == ["descriptor_questions"]
    assert [files["split"] for files in card.data.configs[0]["data_files"]] == ["train", "validation", "test"]
    stored = load_dataset(str(tmp_path / "out"), "descriptor_questions", cache_dir=tmp_path / "cache")
    rows = [row for split in stored.values() for row in split.remove_columns("image")]
    parts = {part for row in rows for part in row["choice_parts"][row["correct"]]}
    pairs = {(row["image_label"], mask["label"]) for row in rows for mask in row["masks"]}
    masks = sum(len(row["masks"]) for row in rows if row["question_type"] == "identification")
    counts = [len(PARTS), len(parts), len(pairs), IMAGES, masks, len(rows)]
    assert table_row(card.text, "`descriptor_questions`", "all", *counts)
    assert table_row(card.text, "`identification`", IMAGES)
    assert table_row(card.text, "made up", "not stated", len(rows))
    assert re.search(r"^\| official \|( [01]\.\d{3} \|){6}$", card.text, re.MULTILINE)
    assert re.search(r"^\| balanced \|( ([01]\.\d{3}|-) \|){6}$", card.text, re.MULTILINE)
    graphs = json.loads((tmp_path / "out" / "graphs" / "descriptor.json").read_text())
    assert graphs["part_graph"] == PARTS
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("name", "make_folder", "rule"),
    [
        (
            "own_parts",
            lambda folder: coco_folder(folder, varied_content(10)),
            "About a tenth of the images, drawn by path",
        ),
        ("llava_instruct_150k", FOLDERS["llava_instruct_150k"], "The splits are those of the published files."),
    ],
)
def test_the_card_says_where_the_splits_of_any_source_come_from(monkeypatch, tmp_path, name, make_folder, rule):
    folder = make_folder(tmp_path / "data")
    run(monkeypatch, "--name", name, "--data_dir", folder, "--output_dir", tmp_path / "out")
    assert f"\n{rule}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "x | y |\n\n# Injected\n[free](https://example.org) <img src=x onerror=alert(1)> ![](http://x/y.png) `code`",
        "www.example.org",
        "",
        "<script>alert(1)</script>",
    ],
)
def test_a_name_in_a_descriptor_is_shown_on_the_card_and_does_nothing(monkeypatch, tmp_path, name):
    folder = small_descriptor(tmp_path / "data")
    content = json.loads((folder / "descriptor.json").read_text())
    (folder / "descriptor.json").write_text(json.dumps(content | {"dataset_name": name}))
    run(monkeypatch, "--name", "descriptor", "--data_dir", folder, "--output_dir", tmp_path / "out")
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    row = lines[lines.index("| source | licence | rows |") + 2]
    assert re.fullmatch(r"\| (-|`[^`]+`) \| not stated \| \d+ \|", row)
    outside = " ".join(line for line in lines if line != row)
    assert "Injected" not in outside and "example.org" not in outside and "alert" not in outside


def test_a_failed_export_leaves_what_was_there_and_reported_records_are_counted(monkeypatch, tmp_path):
    folder, problems = bad_descriptor(tmp_path)
    output = tmp_path / "here" / "exported"
    options = ["--name", "descriptor", "--data_dir", folder, "--output_dir", output]
    with pytest.raises(SystemExit, match="record 6: has the image and the label of record 5"):
        run(monkeypatch, *options)
    assert list(output.parent.iterdir()) == []
    run(monkeypatch, *options, "--on_error", "report")
    assert len((output / "errors.jsonl").read_text().splitlines()) == len(problems)
    card = (output / "README.md").read_text()
    assert f"{len(problems)} records of the source could not be used" in card
    with pytest.raises(SystemExit, match="already exists; name a new folder, or give --overwrite"):
        run(monkeypatch, *options)
    with pytest.raises(SystemExit, match="record 6"):
        run(monkeypatch, *options, "--overwrite")
    assert (output / "README.md").read_text() == card
    assert list(output.parent.iterdir()) == [output]


def test_the_stored_miniature_has_the_checksums_and_the_statistics_that_its_card_states():
    folder = ROOT / "partonomy"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    listed = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in (".parquet", ".json")
    }
    card = (folder / "README.md").read_text()
    counts: dict[str, list[int]] = {}
    for name, sizes in partonomy_dataset.DRAWING_SIZES.items():
        whole = Statistics()
        for split in sizes:
            found = Statistics()
            (path,) = (folder / name).glob(f"{split}-*.parquet")
            table = parquet.read_table(path)
            for row in table.drop_columns("image").to_pylist():
                found.add(row)
            assert table_row(card, f"`{name}`", split, *found.as_row().values())
            whole += found
        assert table_row(card, f"`{name}`", "all", *whole.as_row().values())
        for question_type, count in whole.questions.items():
            counts.setdefault(question_type, []).append(count)
    assert len(counts) == 10
    for question_type, of_configs in counts.items():
        assert table_row(card, f"`{question_type}`", *of_configs)
