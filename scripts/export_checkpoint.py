"""
Makes the checkpoint that travels with the repository from a training run: bf16 weights, code, processor, and a card
whose figures are measured on the very weights that it describes.

    python scripts/export_checkpoint.py runs/demo/model --output_dir checkpoints/plum-tiny

From the repository's root. The evaluation (its folder is printed) is the one of `make demo`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumkit.cards import CURVES_FILE, RECIPE_FILE, TRAINER_STATE_FILE, make_model_card
from plumkit.checkpoint import load_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of train.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    output_dir = arguments.output_dir
    if output_dir.exists():
        sys.exit(f"{output_dir} exists; remove it or name another --output_dir.")

    model, processor = load_checkpoint(arguments.folder)
    model.to(torch.bfloat16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    for name in (RECIPE_FILE, TRAINER_STATE_FILE, CURVES_FILE):
        if (arguments.folder / name).is_file():
            shutil.copyfile(arguments.folder / name, output_dir / name)

    evaluation = arguments.folder.parent / f"{output_dir.name}-evaluation"
    command = ["evaluate_plum.py", "--model", str(output_dir), "--dataset", "partonomy"]
    command += ["--name", "mini_questions", "--split", "test", "--choice_reduction", "answer_mean"]
    command += ["--output_dir", str(evaluation)]
    subprocess.run([sys.executable, *command], check=True)
    metrics = json.loads((evaluation / "metrics.json").read_text())
    make_model_card(output_dir, metrics=metrics).save(output_dir / "README.md")
    print(f"{output_dir} is written; its evaluation is in {evaluation}.")


if __name__ == "__main__":
    main()
