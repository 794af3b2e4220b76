"""The checkpoint that travels with the repository: its code, its answers, and the figures of its card."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy", ...) work)
from plum_partonomy.masks import encode
from plum_partonomy.scoring.mask_metrics import matched_ious
from scripts.copy_code import CHECKPOINT_CODE, copies

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "checkpoints" / "plum-tiny"


def test_the_copies_of_code_are_the_code_of_the_repository():
    for copy, source in copies().items():
        assert copy.read_text() == source.read_text(), f"{copy} differs from {source}; run python scripts/copy_code.py"
    assert {path.name for path in FOLDER.glob("*.py")} == set(CHECKPOINT_CODE)


def test_it_is_small_and_its_card_names_no_place_of_the_machine_that_made_it():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12e6
    card = (FOLDER / "README.md").read_text()
    assert not re.search(r"(^|[\s=\"'`])/(tmp|home|root|work)/", card)


def test_it_answers_with_masks_that_overlap_the_parts_of_drawings_it_has_not_seen():
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
    ious = []
    for record in load_dataset("partonomy", "mini", split="test").select(range(8)):
        content = [
            {"type": "image", "image": record["image"]},
            {"type": "text", "text": record["messages"][0]["content"]},
        ]
        chat = [{"role": "user", "content": content}, record["messages"][1]]
        inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True)
        (answer,) = processor.post_process_segmentation(model.segment_spans(**inputs))
        true = [mask["rle"] for mask in record["masks"][: len(answer.spans)]]
        if true:
            ious += matched_ious([encode(span.mask) for span in answer.spans], true)
    assert sum(ious) / len(ious) > 0.5  # an untrained model stays below 0.2


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
