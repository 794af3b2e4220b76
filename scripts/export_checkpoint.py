"""
Write the checkpoint of the repository from a training run: bf16 weights, code, processor, and a card with results
measured on these weights.

    python scripts/export_checkpoint.py runs/plum_tiny --output_dir checkpoints/plum-tiny

The first of `--questions` is the evaluation in the card's metadata. A confidence calibrated by
`scripts/calibrate_confidence.py` is kept.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from plum_partonomy.hub.model_card import CURVES_FILE, RECIPE_FILE, TRAINER_STATE_FILE, make_model_card
from plum_partonomy.inference.checkpoint import load_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of train.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--questions", nargs="+", default=["mini_questions", "mini_hard_questions"])
    parser.add_argument("--corrections", nargs="*", default=["mini_instances"])
    parser.add_argument("--data_dir", help="folder of your files, if the configurations need one")
    parser.add_argument("--license", help="licence of the weights, if the recipe does not determine it")
    parser.add_argument(
        "--about", type=Path, help="Markdown file about what the model recognises and the terms of its data"
    )
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

    def evaluate(name: str, *options: str) -> dict:
        evaluation = arguments.folder.parent / f"{output_dir.name}-{name}"
        command = ["evaluate_plum.py", "--model", str(output_dir), "--name", name, "--output_dir", str(evaluation)]
        subprocess.run([sys.executable, *command, *data, *options], check=True)
        print(f"The evaluation on {name} is in {evaluation}.")
        return json.loads((evaluation / "metrics.json").read_text())

    data = [] if arguments.data_dir is None else ["--data_dir", arguments.data_dir]
    metrics, *further = [evaluate(name, "--choice_reduction", "answer_mean") for name in arguments.questions]
    further += [evaluate(name, "--task", "correction") for name in arguments.corrections]
    about = None if arguments.about is None else arguments.about.read_text(encoding="utf-8").strip()
    card = make_model_card(output_dir, metrics=metrics, further=further, license=arguments.license, about=about)
    card.save(output_dir / "README.md")
    print(f"{output_dir} is written.")


if __name__ == "__main__":
    main()
