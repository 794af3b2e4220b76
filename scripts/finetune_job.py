# /// script
# requires-python = ">=3.11"
# dependencies = ["plum-partonomy[trackio]"]
# ///
"""Fine-tune a PLUM on your own parts on any machine; `uv run` installs the dependencies of this single file.

    uv run finetune_job.py --dataset user/my-parts --model user/plum --push_to user/plum-mine
    hf jobs uv run --flavor l4x1 --secrets HF_TOKEN finetune_job.py --dataset user/my-parts --model user/plum \\
        --push_to user/plum-mine --trackio_space_id user/trackio

`--dataset` is a data set repository on the Hub, or a folder, with images and masks in one of the formats of
docs/own_data.md. Losses go to trackio, on this machine or to a Space. The checkpoint that is best on the split
`validation` is evaluated on the split `test` and written to `--output_dir`. Until plum-partonomy is on PyPI, put its
address into the third line: "plum-partonomy[trackio] @ git+https://...".
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi, snapshot_download

from plum_partonomy.evaluation.run import main as evaluate
from plum_partonomy.hub.model_card import make_model_card
from plum_partonomy.masks import DataError
from plum_partonomy.training.run import main as train

# recipes/own_parts.yaml, which is missing when this file runs alone
RECIPE = {
    "dataset": "partonomy",
    "name": "own_parts",
    "color_jitter": 0.2,
    "random_crop": 0.2,
    "turns_per_record": 2,
    "follow_up_probability": 0.2,
    "max_spans": 6,
    "fresh_records": True,
    "mirror": True,
    "teacher_forcing_probability": 0.5,
    "order_free_targets": True,
    "seed": 0,
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 5.0e-4,
    "muon_learning_rate": 1.5e-3,
    "weight_decay": 0.05,
    "adam_beta2": 0.98,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 15,
    "logging_steps": 20,
    "eval_strategy": "steps",
    "eval_steps": 150,
    "save_strategy": "steps",
    "save_steps": 150,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
}


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this file, and the others, which train.py reads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder or data set repository with images and masks")
    parser.add_argument("--model", required=True, help="folder or Hub name of the PLUM to start from")
    parser.add_argument("--output_dir", type=Path, default=Path("plum-mine"), help="folder for model and evaluation")
    parser.add_argument("--push_to", help="repository for the model, created if it does not exist")
    parser.add_argument("--project", default="plum", help="project of trackio")
    return parser.parse_known_args()


def fetch(dataset: str, folder: Path) -> Path:
    """Return the folder of the data. A repository is copied, because its files may not be links out of it."""
    if Path(dataset).is_dir():
        return Path(dataset)
    return Path(snapshot_download(dataset, repo_type="dataset", local_dir=folder))


def main() -> None:
    options, further = parse_arguments()
    output_dir = options.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    data = fetch(options.dataset, output_dir / "data")

    # Train
    recipe = RECIPE | {"model": options.model, "data_dir": str(data), "output_dir": str(output_dir / "model")}
    recipe |= {"use_cpu": not torch.cuda.is_available(), "report_to": "trackio", "project": options.project}
    path = output_dir / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    train([str(path), *further])

    # Measure
    measured = output_dir / "evaluation" / "metrics.json"
    place = ["--name", "own_parts_questions", "--split", "test", "--data_dir", str(data)]
    place += ["--output_dir", str(measured.parent), "--choice_reduction", "answer_mean"]
    try:
        evaluate(["--model", str(output_dir / "model"), *place])
    except DataError as error:  # such as conversations, which have no questions
        print(f"Not measured: {error}")

    # Share
    if options.push_to is not None:
        metrics = json.loads(measured.read_text()) if measured.exists() else None
        make_model_card(output_dir / "model", repo_id=options.push_to, metrics=metrics).save(
            output_dir / "model" / "README.md"
        )
        api = HfApi()
        api.create_repo(options.push_to, exist_ok=True)
        ignored = ["checkpoint-*", "*.bin", "*.pt"]
        print(api.upload_folder(repo_id=options.push_to, folder_path=output_dir / "model", ignore_patterns=ignored))


if __name__ == "__main__":
    try:
        main()
    except (DataError, ValueError, OSError) as error:
        sys.exit(f"finetune_job.py: {error}")
