"""
Train plum-tiny with and without the components of PLUM under equal conditions, evaluate each model, print a table:

    python scripts/run_ablations.py --output_dir runs/ablations

`recipes/ablations/` contains the variants: span tags or a special token after each grounded phrase; mask feedback off,
with predicted masks, or with true masks half of the time (teacher forcing); targets of equal words in any order or as
listed. One model of each variant and seed trains on both drawn configurations of the recipe. Existing runs are kept,
so an interrupted command continues. Further options are those of train.py and override the recipe: `--max_steps 20`.

Measured on the test splits, by evaluate_plum.py unless stated otherwise:

- `mini`: gIoU (masks of the correct answer), choice accuracy, gIoU of the generated answer.
- `mini_instances`: the metrics of `--task correction`.
- perplexity of the plain answers of `mini` without an image, of new random weights and after the training, with span
  tags and with special tokens.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Dataset, load_dataset
from transformers import set_seed

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)
from chats_plum import parse_span_tags
from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.files import write_whole
from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.records import escape_tags
from processing_plum import PlumProcessor

ROOT = Path(__file__).parents[1]
VARIANTS = tuple(sorted(path.stem for path in (ROOT / "recipes" / "ablations").glob("*.yaml")))
SEEDS = (0, 1, 2)
QUESTION_FIGURES = {
    "strict_macro_giou": "gIoU",
    "choice_accuracy": "choice accuracy",
    "end_to_end_giou": "gIoU, generated answer",
}
CORRECTION_FIGURES = {
    "later_iou_own": "IoU, later spans, own earlier masks",
    "later_iou_given": "IoU, later spans, true earlier masks",
    "matched_iou": "IoU, equal words matched",
    "repeat_overlap": "overlap of equal words",
}
PERPLEXITIES = {"perplexity_before": "perplexity, plain answers, before", "perplexity": "after"}
FIGURES = {**QUESTION_FIGURES, **CORRECTION_FIGURES, **PERPLEXITIES}
BATCH_SIZE = 8


# ------------------------------------------------------------------------------------------------ figures


@torch.no_grad()
def measure_perplexity(model: PlumForConditionalGeneration, processor: PlumProcessor, records: Dataset) -> float:
    """Return the perplexity per token of the answers as plain text, each after its question, without an image."""
    chats = []
    for messages in records["messages"]:
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            plain = escape_tags(parse_span_tags(answer["content"])[0])
            chats.append([question, {"role": "assistant", "content": plain}])
    total, count = 0.0, 0
    for start in range(0, len(chats), BATCH_SIZE):
        batch = processor.apply_chat_template(chats[start : start + BATCH_SIZE], tokenize=True, return_dict=True)
        batch = batch.to(model.device)
        total += float(model.score_choices(**batch, num_choices=1, reduction="answer_sum").double().sum())
        count += int((batch["labels"] != -100).sum())
    return math.exp(total / count)


def build_untrained(config: PlumConfig, *, seed: int) -> PlumForConditionalGeneration:
    """Return a model with new random weights, which depend only on the seed."""
    set_seed(seed)
    return PlumForConditionalGeneration(config).eval()


# ------------------------------------------------------------------------------------------------ runs


def write_recipe(folder: Path, recipe: dict, *, variant: str, seed: int) -> Path:
    """
    Write the recipe of one run into its folder and return its path.

    Raises:
        SystemExit: The folder contains a run of another recipe.
    """
    ablation = yaml.safe_load((ROOT / "recipes" / "ablations" / f"{variant}.yaml").read_text())
    model_config = {**recipe["model_config"], **ablation.pop("model_config")}
    recipe = {**recipe, **ablation, "output_dir": str(folder / "model"), "seed": seed, "model_config": model_config}
    path, text = folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False)
    if path.is_file() and path.read_text() != text:
        sys.exit(f"{path} was run with other options; name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, [text])
    return path


def run(folder: Path, recipe: Path) -> dict[str, float]:
    """Run the training, evaluation and measurement steps whose outputs are missing; return the metrics of the run."""
    model_dir, perplexities = folder / "model", folder / "perplexity.json"
    if not (model_dir / "trainer_state.json").is_file():  # the last file that train.py writes
        subprocess.run([sys.executable, "train.py", str(recipe)], cwd=ROOT, check=True)
    questions = _evaluate(folder / "questions", model_dir, "--control", "none", "--choice_reduction", "answer_mean")
    corrections = _evaluate(folder / "corrections", model_dir, "--task", "correction", "--name", "mini_instances")
    if not perplexities.is_file():
        model, processor = load_checkpoint(model_dir)
        records = load_dataset("partonomy", "mini", split="test")
        untrained = build_untrained(model.config, seed=yaml.safe_load(recipe.read_text())["seed"])
        found = {
            "perplexity": measure_perplexity(model.eval(), processor, records),
            "perplexity_before": measure_perplexity(untrained, processor, records),
        }
        write_whole(perplexities, [json.dumps(found, indent=2), "\n"])
    return {
        **{name: questions[name] for name in QUESTION_FIGURES},
        **{name: corrections[name] for name in CORRECTION_FIGURES},
        **json.loads(perplexities.read_text()),
    }


def _evaluate(folder: Path, model_dir: Path, *options: str) -> dict[str, float]:
    """Return the overall metrics of an evaluation, which runs if its output is missing."""
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        words = ["evaluate_plum.py", "--model", str(model_dir), "--output_dir", str(folder), *options]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    return json.loads(metrics.read_text())["overall"]


def format_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return a table of the mean, smallest and largest value over seeds of each metric, by variant."""
    lines = [f"| variant | {' | '.join(FIGURES.values())} |", "|---|" + "---:|" * len(FIGURES)]
    for variant, runs in results.items():
        cells = []
        for name in FIGURES:
            values = [figures[name] for figures in runs if figures.get(name) is not None]
            cell = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
            cells.append(cell)
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "plum_tiny.yaml")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the runs and of ablations.md.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments, options = parser.parse_known_args()
    names, values = options[::2], options[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        parser.error(f"options of train.py are pairs --name value, found {options}")
    recipe = yaml.safe_load(arguments.recipe.read_text())
    recipe |= {name[2:]: yaml.safe_load(value) for name, value in zip(names, values, strict=True)}

    results = {}
    for seed in arguments.seeds:  # outermost, so that an interrupted command has results of all variants
        for variant in arguments.variants:
            folder = arguments.output_dir.resolve() / f"{variant}-{seed}"
            path = write_recipe(folder, recipe, variant=variant, seed=seed)
            results.setdefault(variant, []).append(run(folder, path))
            write_whole(arguments.output_dir / "ablations.md", [format_table(results), "\n"])
    print(format_table(results))


if __name__ == "__main__":
    main()
