"""
Trains and evaluates plum-tiny with and without what PLUM is made of, on equal terms, and prints a table:

    python scripts/run_ablations.py --output_dir runs/ablations

Span tags against a special token after each grounded phrase, and mask feedback on against off, on the drawn parts
(`mini`) and on parts that occur several times (`mini_instances`), with three seeds each. A run that is there is not
made again, so that an interrupted command goes on where it stopped. Further options are train.py's and go over the
recipe: `--max_steps 20`.

What is measured on the test split, turn by turn:

- gIoU: the mean IoU of a record's masks, the correct answer being given, averaged over records; with the model's own
  earlier masks, and with the true ones given in their place (for the second and later spans of a turn these differ).
- choice accuracy and gIoU of the generated answer, by evaluate_plum.py (for `mini`, which has questions).
- perplexity of the plain answers without an image, of new random weights and after the training: what it leaves of
  plain text, with span tags and with special tokens.
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

sys.path.insert(0, str(Path(__file__).parents[1]))

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)
from configuration_plum import PlumConfig
from modeling_plum import PlumForConditionalGeneration
from partkit.predictions import write_whole
from partkit.schema import escape_tags
from plumkit.checkpoint import load_checkpoint
from plumkit.data import Collator, ConversationDataset
from processing_plum import PlumProcessor, parse_span_tags

ROOT = Path(__file__).parents[1]
DATASETS = ("mini", "mini_instances")
VARIANTS = ("tags", "tags-no_feedback", "seg", "seg-no_feedback")  # recipes/ablations/*.yaml
SEEDS = (0, 1, 2)
FIGURES = {
    "giou": "gIoU",
    "giou_given": "gIoU, earlier masks given",
    "later_iou": "IoU, later spans",
    "later_iou_given": "IoU, later spans, earlier masks given",
    "choice_accuracy": "choice accuracy",
    "end_to_end_giou": "gIoU, generated answer",
    "perplexity_before": "perplexity, plain answers, before",
    "perplexity": "after",
}
BATCH_SIZE = 8


# ------------------------------------------------------------------------------------------------ figures


@torch.no_grad()
def measure_masks(model: PlumForConditionalGeneration, processor: PlumProcessor, records: Dataset) -> dict[str, float]:
    """gIoU over records and IoU over the second and later spans, with own and with given earlier masks."""
    examples, collate = ConversationDataset(records, turns_per_record=0), Collator(processor)
    rows = []
    for start in range(0, len(examples), BATCH_SIZE):
        some = [examples[i] for i in range(start, min(start + BATCH_SIZE, len(examples)))]
        batch = collate(some)
        record_of_row = (batch["record_index"] + start).tolist()
        batch = {name: value for name, value in batch.items() if not name.startswith("record_")}
        chats = [chat for example in some for chat in example["conversations"]]
        true = [torch.from_numpy(mask) for chat in chats for mask in chat["masks"]]
        for (row, position), *ious in _measure_batch(model, processor, batch, true):
            rows.append((record_of_row[row], position, *ious))
    record, position, own, given = np.array(rows).T
    later = position > 0
    figures = {}
    for suffix, iou in (("", own), ("_given", given)):
        figures[f"giou{suffix}"] = float(np.mean([iou[record == number].mean() for number in np.unique(record)]))
        figures[f"later_iou{suffix}"] = float(iou[later].mean())
    return figures


def _measure_batch(model, processor, batch: dict, true: list) -> list[tuple[tuple[int, int], float, float]]:
    """
    For each span its (row, position among the row's spans) and its IoU with own and with given earlier masks, `true`
    being the masks of all spans at the size of their images.
    """
    rows = batch["spans"][:, 0].contiguous()
    if not true:
        return []
    positions = (torch.arange(len(rows)) - torch.searchsorted(rows, rows)).tolist()
    batch["sam_image_embeddings"] = model.get_image_embeddings(batch.pop("sam_pixel_values").to(model.device))

    def segment(given_masks: dict[int, torch.Tensor]) -> list[float]:
        answers = processor.post_process_segmentation(model.segment(**batch, given_masks=given_masks))
        masks = [torch.from_numpy(span.mask) for answer in answers for span in answer.spans]
        return [float((mask & t).sum() / (mask | t).sum()) for mask, t in zip(masks, true, strict=True)]

    own = segment({})
    given = list(own)
    for position in range(1, max(positions) + 1):
        found = segment({i: mask for i, mask in enumerate(true) if positions[i] < position})
        given = [new if at == position else old for new, old, at in zip(found, given, positions, strict=True)]
    return list(zip(zip(rows.tolist(), positions, strict=True), own, given, strict=True))


@torch.no_grad()
def measure_perplexity(model: PlumForConditionalGeneration, processor: PlumProcessor, records: Dataset) -> float:
    """Perplexity per token of the answers as plain text, each after its question, without an image."""
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
    """A model of new random weights, the same whenever it is built with this seed."""
    set_seed(seed)
    return PlumForConditionalGeneration(config).eval()


# ------------------------------------------------------------------------------------------------ runs


def write_recipe(folder: Path, recipe: dict, *, dataset: str, variant: str, seed: int) -> Path:
    """
    The recipe of one run in its folder.

    Raises:
        SystemExit: The folder holds a run of another recipe.
    """
    ablation = yaml.safe_load((ROOT / "recipes" / "ablations" / f"{variant}.yaml").read_text())
    recipe = {
        **recipe,
        "output_dir": str(folder / "model"),
        "name": dataset,
        "seed": seed,
        "model_config": {**recipe["model_config"], **ablation["model_config"]},
    }
    path, text = folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False)
    if path.is_file() and path.read_text() != text:
        sys.exit(f"{path} was run with other options; name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, [text])
    return path


def run(folder: Path, recipe: Path, *, dataset: str) -> dict[str, float]:
    """Whatever of training, evaluation and measurement is not there yet; the figures of the run."""

    def command(*words: str):
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)

    model_dir, evaluation, figures_file = folder / "model", folder / "evaluation", folder / "figures.json"
    if not (model_dir / "trainer_state.json").is_file():  # the last that train.py writes
        command("train.py", str(recipe))
    metrics = {}
    if dataset == "mini":
        if not (evaluation / "metrics.json").is_file():
            options = ["--dataset", "partonomy", "--name", "mini_questions", "--control", "none"]
            options += ["--choice_reduction", "answer_mean"]
            command("evaluate_plum.py", "--model", str(model_dir), "--output_dir", str(evaluation), *options)
        overall = json.loads((evaluation / "metrics.json").read_text())["overall"]
        metrics = {name: overall[name] for name in ("choice_accuracy", "end_to_end_giou")}
    if not figures_file.is_file():
        model, processor = load_checkpoint(model_dir)
        records = load_dataset("partonomy", dataset, split="test")
        figures = measure_masks(model.eval(), processor, records)
        figures["perplexity"] = measure_perplexity(model, processor, records)
        untrained = build_untrained(model.config, seed=yaml.safe_load(recipe.read_text())["seed"])
        figures["perplexity_before"] = measure_perplexity(untrained, processor, records)
        write_whole(figures_file, [json.dumps(figures, indent=2), "\n"])
    return json.loads(figures_file.read_text()) | metrics


def format_table(results: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Mean over seeds, and the smallest and the largest, of every figure by (data set, variant)."""
    lines = [f"| data | spans, feedback | {' | '.join(FIGURES.values())} |", "|---|---|" + "---:|" * len(FIGURES)]
    for (dataset, variant), runs in results.items():
        cells = []
        for name in FIGURES:
            values = [figures[name] for figures in runs if figures.get(name) is not None]
            cell = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
            cells.append(cell)
        lines.append(f"| `{dataset}` | `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "plum_tiny.yaml")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the runs and of ablations.md.")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    arguments, options = parser.parse_known_args()
    names, values = options[::2], options[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        parser.error(f"options of train.py are pairs --name value, found {options}")
    recipe = yaml.safe_load(arguments.recipe.read_text())
    recipe |= {name[2:]: yaml.safe_load(value) for name, value in zip(names, values, strict=True)}

    results = {}
    for seed in arguments.seeds:  # outermost, so that what is there when a run is stopped compares all variants
        for dataset in arguments.datasets:
            for variant in arguments.variants:
                folder = arguments.output_dir.resolve() / f"{dataset}-{variant}-{seed}"
                path = write_recipe(folder, recipe, dataset=dataset, variant=variant, seed=seed)
                results.setdefault((dataset, variant), []).append(run(folder, path, dataset=dataset))
                write_whole(arguments.output_dir / "ablations.md", [format_table(results), "\n"])
    print(format_table(results))


if __name__ == "__main__":
    main()
