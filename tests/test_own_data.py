"""The commands of docs/own_data.md, as they stand on the page, on a few photographs and for a few steps."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

from plum_partonomy.cli import main as plum
from plum_partonomy.evaluation.run import main as evaluate_plum
from plum_partonomy.training.run import main as train
from tests.tiny import tiny_model, tiny_processor

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = 24
QUICKLY = ["--max_steps", "2", "--save_steps", "2", "--eval_steps", "2", "--per_device_train_batch_size", "2"]


def coco_of_photographs(source: Path, folder: Path) -> None:
    """Some of the photographs with their masks, as a COCO file in the layout of a CVAT export."""
    instances = json.loads((source / "descriptor.json").read_text())["instances"][:: 1225 // PHOTOGRAPHS][:PHOTOGRAPHS]
    parts = sorted({part for instance in instances for part in instance["segmentations"]})
    content = {"categories": [{"id": id, "name": part, "supercategory": ""} for id, part in enumerate(parts)]}
    content |= {"images": [], "annotations": []}
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for image_id, instance in enumerate(instances):
        shutil.copy(source / instance["image_path"], folder / "images")
        masks = [(part, rle) for part, rles in instance["segmentations"].items() for rle in rles]
        height, width = masks[0][1]["size"]
        name = Path(instance["image_path"]).name
        image = {"id": image_id, "file_name": name, "height": height, "width": width}
        content["images"].append(image | {"image_label": instance["image_label"]})
        for part, rle in masks:
            record = {"id": len(content["annotations"]), "image_id": image_id, "category_id": parts.index(part)}
            content["annotations"].append(record | {"segmentation": rle, "iscrowd": 1})
    (folder / "annotations" / "instances_default.json").write_text(json.dumps(content))


def run_command(words: list[str], monkeypatch) -> None:
    match words:
        case ["plum", *arguments]:
            assert plum(arguments) == 0
        case ["python", "train.py", *arguments]:
            train([*arguments, *QUICKLY])
        case ["python", "evaluate_plum.py", *arguments]:
            monkeypatch.setattr(sys, "argv", ["evaluate_plum.py", *arguments, "--max_new_tokens", "4"])
            evaluate_plum()
        case _:
            raise AssertionError(f"the test does not know how to run {shlex.join(words)}")


def test_the_commands_of_the_page_lead_from_photographs_to_an_evaluated_model(
    fixtures_dir, tmp_path, monkeypatch, capsys
):
    page = (ROOT / "docs" / "own_data.md").read_text()
    commands = [shlex.split(block) for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    assert [command[1] for command in commands] == ["data", "train.py", "evaluate_plum.py"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    coco_of_photographs(fixtures_dir / "data" / "real_parts", tmp_path / "photos")
    tiny_model().save_pretrained("checkpoints/plum-tiny")
    tiny_processor().save_pretrained("checkpoints/plum-tiny")
    for command in commands:
        run_command(command, monkeypatch)
    printed = capsys.readouterr().out
    assert all(f"{split}: " in printed for split in ("train", "validation", "test"))
    metrics = json.loads((tmp_path / "runs/mine/evaluation/metrics.json").read_text())
    assert metrics["run"]["questions"] > 0
    assert (tmp_path / "runs/mine/evaluation/report.html").is_file()
