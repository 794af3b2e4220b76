"""The fine-tuning script that runs alone: its header, its recipe, and a whole run with the real trackio, offline."""

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from plum_partonomy.drawn import miniature
from tests.tiny import tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "finetune_job.py"
DRAWINGS = 24


def own_folder(folder: Path) -> Path:
    """Drawings with their masks as a COCO file, as an annotation tool would export them."""
    (folder / "images").mkdir(parents=True)
    categories: dict[str, int] = {}
    content = {"images": [], "annotations": []}
    for number in range(DRAWINGS):
        example = miniature.draw_example("train", number, scene=miniature.MINI, seed=0)
        name = f"drawing{number}.png"
        example.image.save(folder / "images" / name)
        size = {"height": example.image.height, "width": example.image.width}
        content["images"].append({"id": number, "file_name": name, "image_label": example.image_label, **size})
        for mask in example.masks:
            record = {"id": len(content["annotations"]), "image_id": number, "segmentation": mask.rle, "iscrowd": 0}
            content["annotations"].append(record | {"category_id": categories.setdefault(mask.label, len(categories))})
    content["categories"] = [{"id": id, "name": name, "supercategory": ""} for name, id in categories.items()]
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


def test_the_header_is_a_script_block_and_asks_for_an_extra_that_there_is():
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", SCRIPT.read_text())
    header = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block[1].splitlines(True)))
    assert header == {"requires-python": ">=3.11", "dependencies": ["plum-partonomy[trackio]"]}
    assert "\ntrackio =\n" in (ROOT / "setup.cfg").read_text()


def test_its_recipe_is_that_for_ones_own_parts():
    spec = importlib.util.spec_from_file_location("finetune_job", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    recipe = yaml.safe_load((ROOT / "recipes" / "own_parts.yaml").read_text())
    for name in ("output_dir", "model", "use_cpu", "report_to"):  # which the script decides
        del recipe[name]
    assert recipe == script.RECIPE


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="pip install .[trackio]")
def test_it_trains_tracks_and_measures_from_one_folder(tmp_path):
    model = tmp_path / "tiny"
    tiny_model().save_pretrained(model)
    tiny_processor().save_pretrained(model)
    command = [sys.executable, str(SCRIPT), "--dataset", str(own_folder(tmp_path / "data")), "--model", str(model)]
    command += ["--output_dir", str(tmp_path / "out"), "--project", "tests", "--max_steps", "2", "--eval_steps", "2"]
    command += ["--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "trackio" / "tests.db") as database:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by step")]
    names = {name for entry in logged for name in entry}
    assert "train/loss" in names and any("giou" in name for name in names)
    metrics = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    assert metrics["run"]["split"] == "test" and metrics["overall"]["n"] > 0
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
