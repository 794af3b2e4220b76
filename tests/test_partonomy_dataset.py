import dataclasses
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

import partonomy_dataset
from plum_partonomy.drawn import miniature
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES, QUESTION_FEATURES
from plum_partonomy.masks import DataError, decode
from plum_partonomy.records import GroundedConversation, PartMask, Question
from plum_partonomy.sources.official import QUESTIONS_FILE
from tests import forks
from tests.sources.test_coco import (
    paco_content,
    paco_folder,
    partimagenet_content,
    pascal_content,
    pascal_folder,
    write,
)

ROOT = Path(__file__).resolve().parent.parent
PARQUET = ROOT / "partonomy"
DRAWN = sorted(partonomy_dataset.DRAWING_SIZES)
FEATURES = {
    "mini": GROUNDED_CONVERSATION_FEATURES,
    "mini_instances": GROUNDED_CONVERSATION_FEATURES,
    "mini_questions": QUESTION_FEATURES,
    "mini_hard": GROUNDED_CONVERSATION_FEATURES,
    "mini_hard_questions": QUESTION_FEATURES,
}


def read_parquet(name: str, split: str, tmp_path: Path):
    return load_dataset(str(PARQUET), name, split=split, cache_dir=tmp_path / "parquet")


def as_record(row: dict, kind: type) -> GroundedConversation | Question:
    masks = [PartMask(mask["label"], mask["rle"]) for mask in row["masks"]]
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)} | {"masks": masks})


@pytest.mark.parametrize("name", DRAWN)
def test_the_builder_and_the_parquet_folder_serve_the_same_records(name, tmp_path):
    stored, drawn = read_parquet(name, "test", tmp_path), load_dataset("partonomy", name, split="test", streaming=True)
    assert stored.features == FEATURES[name]
    as_bytes, known = datasets.Image(decode=False), {}
    for row, other in zip(*(rows.cast_column("image", as_bytes) for rows in (stored, drawn)), strict=True):
        images = [found.pop("image")["bytes"] for found in (row, other)]
        assert row == other
        if row["image_id"] not in known:  # questions repeat it
            np.testing.assert_array_equal(*(np.asarray(Image.open(io.BytesIO(image))) for image in images))
        assert known.setdefault(row["image_id"], images) == images


@pytest.mark.parametrize("name", DRAWN)
def test_all_stored_records_are_valid_and_no_image_is_in_two_splits(name, tmp_path):
    kind = Question if name.endswith("_questions") else GroundedConversation
    owners = {}
    for split, size in partonomy_dataset.DRAWING_SIZES[name].items():
        stored = read_parquet(name, split, tmp_path)
        ids = stored["id"][:]
        assert len(set(ids)) == len(ids)
        assert len(set(stored["image_id"])) == size
        for row in stored.remove_columns("image"):
            as_record(row | {"image": None}, kind).validate(where=row["id"])
        for row in stored.select_columns(["image", "image_id"]).cast_column("image", datasets.Image(decode=False)):
            assert owners.setdefault(row["image"]["bytes"], row["image_id"]) == row["image_id"]


def test_questions_are_about_the_images_of_the_conversations(tmp_path):
    asked = read_parquet("mini_questions", "test", tmp_path)
    talked = read_parquet("mini", "test", tmp_path)
    assert set(asked["image_id"]) == set(talked["image_id"])
    first = asked[0]
    same = talked[talked["image_id"][:].index(first["image_id"])]
    np.testing.assert_array_equal(np.asarray(first["image"]), np.asarray(same["image"]))
    for mask in first["masks"]:
        assert decode(mask["rle"], expected_size=(first["image"].height, first["image"].width)).any()


def test_two_processes_make_the_data_set_that_is_stored(tmp_path):
    drawn = load_dataset("partonomy", "mini_questions", num_proc=2, cache_dir=tmp_path)
    for split, rows in drawn.items():
        stored = read_parquet("mini_questions", split, tmp_path)
        assert rows.remove_columns("image")[:] == stored.remove_columns("image")[:]


def run_python(code: str, *, cwd: Path, tmp_path: Path) -> str:
    environment = {
        "PYTHONPATH": str(ROOT) if cwd != ROOT else "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_is_served_from_the_repository_root_without_any_import_of_the_project(tmp_path):
    code = (
        "import sys; from datasets import load_dataset; d = load_dataset('partonomy', split='test');"
        "print(d[0]['id'], d[0]['image'].size, 'plum_partonomy' in sys.modules)"
    )
    assert run_python(code, cwd=ROOT, tmp_path=tmp_path) == "mini-test-00000-conversation (128, 128) False\n"


def test_the_import_serves_it_from_an_empty_folder_and_loads_neither_torch_nor_the_model(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import sys; from datasets import load_dataset; before = set(sys.modules); import partonomy_dataset;"
        "print(load_dataset('partonomy', 'mini_questions', split='test')[0]['image_id']);"
        "print(sorted({'torch', 'transformers', 'modeling_plum', 'processing_plum'} & (set(sys.modules) - before)))"
    )
    assert run_python(code, cwd=empty, tmp_path=tmp_path) == "mini-test-00000\n[]\n"


def test_other_packaged_modules_still_find_their_files(tmp_path):
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    assert load_dataset("csv", data_dir=str(tmp_path), split="train", cache_dir=tmp_path / "cache")[0] == {
        "a": 1,
        "b": 2,
    }


def test_the_parquet_files_stay_within_their_limit_and_graphs_match_the_drawings():
    assert sum(path.stat().st_size for path in PARQUET.rglob("*.parquet")) < 9_500_000
    graphs = json.loads((PARQUET / "graphs" / "mini.json").read_text())
    assert graphs == {
        "part_graph": miniature.part_graph(),
        "required_parts": miniature.required_parts(),
        "instance_graph": miniature.instance_graph(),
    }


def test_the_card_states_the_sizes_of_the_splits(tmp_path):
    card = (PARQUET / "README.md").read_text()
    for name in DRAWN:
        counts = [len(read_parquet(name, split, tmp_path)) for split in ("train", "validation", "test")]
        assert re.search(rf"^\| `{name}` .*\| {counts[0]} \| {counts[1]} \| {counts[2]} \|$", card, re.MULTILINE)


def test_every_import_stands_on_one_line():
    """datasets 3 runs the file as a script and reads its imports line by line."""
    lines = (ROOT / "partonomy_dataset.py").read_text().splitlines()
    assert not [line for line in lines if re.match(r"(from|import) .*\($", line)]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_official_sample_loads_by_name(fixtures_dir, tmp_path, streaming):
    folder = str(fixtures_dir / "official_layout")
    data = load_dataset("partonomy", "core", data_dir=folder, split="test", streaming=streaming, cache_dir=tmp_path)
    rows = list(data.select_columns(["id", "question_type", "image"]))
    assert len(rows) == 420
    assert len({row["question_type"] for row in rows}) == 10
    assert {row["image"].size for row in rows[:10]} == {(512, 512)}


def small_descriptor(fixtures_dir: Path, folder: Path, *, instances: int) -> Path:
    source = fixtures_dir / "data" / "real_parts"
    content = json.loads((source / "descriptor.json").read_text())
    content["instances"] = content["instances"][:: 1225 // instances][:instances]
    (folder / "images").mkdir(parents=True)
    for instance in content["instances"]:
        shutil.copy(source / instance["image_path"], folder / instance["image_path"])
    (folder / "descriptor.json").write_text(json.dumps(content))
    return folder


def test_a_descriptor_gives_images_to_validation_and_test_and_most_to_training(fixtures_dir, tmp_path):
    folder = small_descriptor(fixtures_dir, tmp_path / "data", instances=60)
    splits = load_dataset("partonomy", "descriptor", data_dir=str(folder), num_proc=2, cache_dir=tmp_path / "cache")
    images = {split: set(rows["image_id"]) for split, rows in splits.items()}
    assert set(images) == {"train", "validation", "test"} and len(set.union(*images.values())) == 60
    assert sum(map(len, images.values())) == 60 and len(images["train"]) >= 42
    assert min(len(images["validation"]), len(images["test"])) >= 2
    for row in splits["validation"]:
        assert all(mask["rle"]["size"] == [row["image"].height, row["image"].width] for mask in row["masks"])


def test_a_changed_file_is_read_again_and_not_served_from_the_cache(fixtures_dir, tmp_path):
    folder = small_descriptor(fixtures_dir, tmp_path / "data", instances=12)
    load = {"path": "partonomy", "name": "descriptor", "data_dir": str(folder), "cache_dir": tmp_path / "cache"}
    assert sum(len(rows) for rows in load_dataset(**load).values()) == 12
    content = json.loads((folder / "descriptor.json").read_text())
    content["instances"] = content["instances"][:5]
    (folder / "descriptor.json").write_text(json.dumps(content))
    assert len(load_dataset(**load, split="train")) == 5


def test_the_published_splits_of_part_annotations_become_splits_of_conversations(tmp_path):
    images = "train/n02071294_1.JPEG", "train/n01440764_2.JPEG", "val/n02071294_1.JPEG", "val/n01440764_2.JPEG"
    for split in ("train", "val"):
        write(tmp_path / "partimagenet", f"{split}.json", partimagenet_content(), *images)
    folders = {
        "pascal_part": (pascal_folder(tmp_path / "pascal", pascal_content()), {"train": ["bus", "potted plant"]}),
        "paco_lvis": (paco_folder(tmp_path / "paco", paco_content()), {"train": ["car", "trash can"]}),
        "partimagenet": (tmp_path / "partimagenet", dict.fromkeys(["train", "validation"], ["quadruped", "car"])),
    }
    for name, (folder, labels) in folders.items():
        splits = load_dataset("partonomy", name, data_dir=str(folder), cache_dir=tmp_path / "cache")
        assert {split: rows["image_label"][:] for split, rows in splits.items()} == labels
        assert splits["train"].features == GROUNDED_CONVERSATION_FEATURES
        for row in splits["train"].remove_columns("image"):
            as_record(row | {"image": None}, GroundedConversation).validate(where=row["id"])
        assert {row["image"].size for row in splits["train"]} == {(60, 40)}


def test_a_bad_record_is_named_in_the_chain_of_causes_and_leaves_no_data_set_behind(tmp_path):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "images" / "one.png")
    (folder / QUESTIONS_FILE).write_text(json.dumps([{"image_path": "images/two.png"}]))
    load = {"path": "partonomy", "name": "core", "data_dir": str(folder), "cache_dir": tmp_path / "cache"}
    for _ in range(2):
        with pytest.raises(Exception, match="generating the dataset") as caught:
            load_dataset(**load)
        assert isinstance(caught.value.__cause__, DataError)
        assert re.search(r"record 0, field 'image_path': there is no image", str(caught.value.__cause__))


INTERRUPTED = """
import os, resource, signal, sys
from datasets import load_dataset
from datasets.arrow_writer import ArrowWriter
import partonomy_dataset

finalize, begun = ArrowWriter.finalize, []

def stop_in_the_second_split(writer, *arguments):
    begun.append(writer)
    if len(begun) == 2 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(begun) == 2:  # the system refuses to write on, as on a disk without room
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return finalize(writer, *arguments)

how, data_dir, cache_dir = sys.argv[1:]
ArrowWriter.finalize = stop_in_the_second_split
load_dataset("partonomy", "partimagenet", data_dir=data_dir, cache_dir=cache_dir)
"""


@pytest.mark.parametrize("how", ["killed", "full disk"])
def test_what_an_interrupted_preparation_leaves_is_not_taken_for_a_data_set(tmp_path, how):
    for split in ("train", "val"):
        write(
            tmp_path / "data",
            f"{split}.json",
            partimagenet_content(),
            f"{split}/n02071294_1.JPEG",
            f"{split}/n01440764_2.JPEG",
        )
    stopped = forks.run("-c", INTERRUPTED, how, tmp_path / "data", tmp_path / "cache")
    if how == "killed":
        assert stopped.returncode == -signal.SIGKILL, stopped.stderr
        assert list(tmp_path.glob("cache/**/*train*.arrow"))
    else:
        assert stopped.returncode == 1 and "OSError: [Errno 27] File too large" in stopped.stderr
        assert not list(tmp_path.glob("cache/**/*.arrow"))
    load = {"path": "partonomy", "name": "partimagenet", "data_dir": str(tmp_path / "data")}
    found, unbroken = (load_dataset(**load, cache_dir=tmp_path / name) for name in ("cache", "other"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "validation": 2}
    for split, rows in found.items():
        assert rows.remove_columns("image")[:] == unbroken[split].remove_columns("image")[:]


@pytest.mark.parametrize("name", ["core", "descriptor", "pascal_part", "paco_lvis", "partimagenet"])
def test_a_config_that_reads_files_asks_for_their_folder(name, tmp_path):
    with pytest.raises(DataError, match="data_dir=FOLDER"):
        load_dataset("partonomy", name, cache_dir=tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}.*no "):
        load_dataset("partonomy", name, cache_dir=tmp_path, data_dir=str(tmp_path / "absent"))


def test_a_cache_is_built_anew_for_the_code_that_makes_records_and_for_no_other():
    own = "[m.__file__ for name, m in sys.modules.items() if name.startswith(('plum_', 'partonomy', 'inputs_'))]"
    code = f"import sys, partonomy_dataset; print(*{own})"
    used = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = set(partonomy_dataset.source_files())
    library = ROOT / "plum_partonomy"
    packages = {library / "__init__.py"}
    assert {Path(name) for name in used.split()} - packages <= files
    assert not [path for path in files if path.parent in (library / "scoring", library / "training")]
