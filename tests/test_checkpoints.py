"""The checkpoints that travel with the repository: their code, their answers, and the metrics of their cards."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy", ...) work)
from plum_partonomy.masks import encode
from plum_partonomy.scoring.mask_metrics import matched_ious
from scripts.copy_code import CHECKPOINT_CODE, copies

ROOT = Path(__file__).parents[1]
FOLDER, PHOTOS = ROOT / "checkpoints" / "plum-tiny", ROOT / "checkpoints" / "plum-photos"


def test_the_copies_of_code_are_the_code_of_the_repository():
    for copy, source in copies().items():
        assert copy.read_text() == source.read_text(), f"{copy} differs from {source}; run python scripts/copy_code.py"
    assert {path.name for path in FOLDER.glob("*.py")} == set(CHECKPOINT_CODE)


@pytest.mark.parametrize(
    "folder, largest", [(FOLDER, 12e6), (PHOTOS, 16e6)], ids=lambda value: getattr(value, "name", "")
)
def test_it_is_small_and_its_card_names_no_place_of_the_machine_that_made_it(folder, largest):
    assert sum(path.stat().st_size for path in folder.iterdir()) < largest
    for name in ("README.md", "recipe.yaml"):
        assert not re.search(r"(^|[\s=\"'`])/(tmp|home|root|work)/", (folder / name).read_text())


def test_plum_tiny_masks_overlap_the_parts_of_drawings_it_has_not_seen():
    assert mean_iou(FOLDER, load_dataset(str(ROOT / "partonomy"), "mini", split="test").select(range(8))) > 0.5


@pytest.mark.slow
def test_plum_photos_masks_overlap_the_parts_of_photographs_it_has_not_seen(fixtures_dir):
    folder = fixtures_dir / "data" / "real_parts"
    photographs = load_dataset("partonomy", "own_parts", data_dir=str(folder), split="test")
    assert mean_iou(PHOTOS, photographs.select(range(12))) > 0.35


def mean_iou(folder: Path, records: Dataset) -> float:
    """Of the masks of the correct first answers with the true masks; that of an untrained model is below 0.2."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    ious = []
    for record in records:
        content = [
            {"type": "image", "image": record["image"]},
            {"type": "text", "text": record["messages"][0]["content"]},
        ]
        chat = [{"role": "user", "content": content}, record["messages"][1]]
        inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
        (answer,) = processor.post_process_segmentation(model.segment(**inputs))
        true = [mask["rle"] for mask in record["masks"][: len(answer.spans)]]
        if true:
            ious += matched_ious([encode(span.mask) for span in answer.spans], true)
    return sum(ious) / len(ious)


@pytest.mark.slow
def test_the_figures_of_its_card_are_those_that_its_evaluation_gives(tmp_path):
    command = [sys.executable, "evaluate_plum.py", "--model", str(FOLDER), "--name", "mini_questions"]
    command += ["--choice_reduction", "answer_mean", "--control", "none", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    overall = json.loads((tmp_path / "metrics.json").read_text())["overall"]
    results = ModelCard.load(FOLDER / "README.md").data.eval_results
    assert len(results) > 3
    for result in results:
        assert result.metric_value == pytest.approx(overall[result.metric_type], abs=2e-3)
