"""
Write the card of a checkpoint from its config, the headers of its weights, the recipe and state of its training,
and its metrics.json. scripts/export_parquet.py writes the cards of data sets.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from plum_partonomy.inference.checkpoint import count_stored, weight_files
from plum_partonomy.scoring.corrections import METRICS as CORRECTION_METRICS

RECIPE_FILE, TRAINER_STATE_FILE, CURVES_FILE = "recipe.yaml", "trainer_state.json", "training_curves.png"
SEGMENTER_NAMES = {"sam": "SAM", "sam_hq": "SAM-HQ", "sam2": "SAM 2.1", "sam3_tracker": "SAM 3's tracker"}
PRIVATE_OPTIONS = (
    "output_dir",
    "overwrite_output_dir",
    "data_dir",
    "logging_dir",
    "resume_from_checkpoint",
    "hub_token",
)
PAPER = "https://arxiv.org/abs/2505.20759"
TASK = "grounded-image-text-to-text"  # of the pipeline in the checkpoint
LICENSE = "apache-2.0"  # of the code and the drawings, and so of models trained from them alone
FIGURES = {
    "strict_macro_giou": "gIoU, macro, strict (masks of the correct answer)",
    "strict_micro_giou": "gIoU, micro, strict",
    "span_f1": "span tags, F1",
    "choice_accuracy": "choice accuracy",
    "generated_part_precision": "parts of the generated answer, precision",
    "generated_part_recall": "parts of the generated answer, recall",
    "generated_exact": "generated part sets exactly correct",
    "end_to_end_giou": "gIoU of the generated answer",
}

MODEL_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A PLUM: a multimodal language model that answers in plain text, tags the words of its answer that name visible parts,
and returns a pixel mask for each tagged span. From *Partonomy: Large Multimodal Models with Part-Level Visual
Understanding* ([arXiv 2505.20759]({{ paper }})), in an independent, Hugging Face-native release.

{{ architecture }}
{%- if about %}

{{ about }}
{%- endif %}

## Use

```python
from transformers import AutoModel, AutoProcessor

pinned = {"trust_remote_code": True, "revision": "{{ revision }}"}  # runs the code of this revision only
model = AutoModel.from_pretrained("{{ repo_id }}", **pinned)
processor = AutoProcessor.from_pretrained("{{ repo_id }}", **pinned)
question = {"type": "text", "text": "What visible parts does the object in the image have?"}
chat = [{"role": "user", "content": [{"type": "image", "image": "image.png"}, question]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
answer = processor.post_process_segmentation(model.segment(**inputs, max_new_tokens=96))[0]
print(answer.text, *[(span.text, span.score, span.box, span.mask.shape) for span in answer.spans], sep="\\n")
```

## Measured

{% if figures -%}
`{{ run.name }}`, split `{{ run.split }}`, {{ overall.n }} questions
{%- if overall.photographs %} about {{ overall.photographs }} images{% endif %}
{%- if overall.objects %} of {{ overall.objects }} objects{% endif %}; each metric with its 95 % bootstrap
interval, its value with the image of another record, and its value for guessing.
{%- if run.protocol %} Protocol: {{ run.protocol.name }}.{% endif %}
{%- if selected %} This split also selected the checkpoint during training, so the results are optimistic.{% endif %}

| metric | model | 95 % interval | wrong image | random |
|---|---:|---:|---:|---:|
{%- for row in figures %}
| {{ row | join(" | ") }} |
{%- endfor %}

`{{ command }}`, {{ run.date }}
{%- else -%}
Not measured on a benchmark.
{%- endif %}
{%- for table in further %}

{{ table.title }}

| metric | {% for column in table.columns %}{{ column }} | {% endfor %}
|---|{% for column in table.columns %}---:|{% endfor %}
{%- for row in table.rows %}
| {{ row | join(" | ") }} |
{%- endfor %}

`{{ table.command }}`
{%- endfor %}
{%- if known %}

Confidence: `answer.confidence` is the probability that an image is of a kind in the training data
{%- if known.kinds %} ({{ known.kinds }}){% endif %}. On test images its AUROC against images of other kinds is
{{ "%.3f" | format(known.auroc) }}; the threshold accepts {{ "%.3f" | format(known.known_accepted) }} of
{{ known.images.known }} known images and rejects {{ "%.3f" | format(known.other_rejected) }} of
{{ known.images.other }} others.
{%- endif %}

## Training

{% if recipe -%}
{{ training }}

{% if curves -%}
![Losses and validation metrics by step](training_curves.png)

{% endif -%}
```yaml
{{ recipe }}
```
{%- else -%}
The folder of this card contains no information about its training.
{%- endif %}

## Intended use and limits

For research on grounded, part-level answers. Answers and masks can be plausible and wrong at the same time: a mask
shows where the model locates the words that it wrote, not that the part is there. Not for decisions about people or
for measurements.
{%- if drawn %}
Trained only on drawings made by code: its answers about photographs are meaningless.
{%- endif %}

## Cite

```bibtex
{{ citation }}
```
"""

CITATION = """@inproceedings{blume2025partonomy,
  title     = {Partonomy: Large Multimodal Models with Part-Level Visual Understanding},
  author    = {Blume, Ansel and Kim, Jeonghwan and Ha, Hyeonjeong and Chatikyan, Elen and Jin, Xiaomeng and
               Nguyen, Khanh Duy and Peng, Nanyun and Chang, Kai-Wei and Hoiem, Derek and Ji, Heng},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  note      = {arXiv:2505.20759}
}"""


def write_recipe(folder: Path, options: dict) -> None:
    """Write `recipe.yaml`: the options of a training run, without tokens and local paths."""
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(_without_private_options(options), sort_keys=False))


def make_model_card(
    folder: Path,
    *,
    repo_id: str | None = None,
    revision: str = "main",
    metrics: dict | None = None,
    further: Sequence[dict] = (),
    license: str | None = None,
    about: str | None = None,
) -> ModelCard:
    """
    Return the card of a checkpoint.

    Args:
        folder: The checkpoint, with `recipe.yaml`, `trainer_state.json` and `training_curves.png` if available.
        repo_id: Its name on the Hub; default: the name of the folder.
        revision: The commit, tag or branch that the example loads.
        metrics: Content of the metrics.json of its evaluation.
        further: Content of the metrics.json of other evaluations, of questions or by `--task correction`.
        license: Licence of the weights; known by default for a model trained from scratch on drawings only.
        about: Markdown about what the model recognises, its training data and terms of use.
    """
    recipe, name = _read_recipe(folder), (repo_id or folder.resolve().name).split("/")[-1]
    bases = [recipe[key] for key in ("model", "vlm", "sam") if _is_on_the_hub(recipe.get(key))]
    overall, run = (metrics or {}).get("overall", {}), (metrics or {}).get("run", {})
    drawn = bool(recipe) and not {"model", "vlm"} & recipe.keys() and _is_drawn(recipe)
    data = ModelCardData(
        language="en",
        license=license or (LICENSE if drawn else None),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["custom_code", "plum", TASK, "image-segmentation", "part-segmentation", "arxiv:2505.20759"],
        base_model=bases or None,
        datasets=[recipe["dataset"]] if _is_on_the_hub(recipe.get("dataset")) else None,
        model_name=name,
        eval_results=_as_eval_results(overall, run) or None,
    )
    return ModelCard.from_template(
        data,
        template_str=MODEL_TEMPLATE,
        name=name,
        repo_id=repo_id or name,
        revision=revision,
        paper=PAPER,
        architecture=_describe_architecture(folder),
        about=about,
        figures=_as_rows(overall, _intervals(metrics)),
        run=run,
        command=_without_places(run.get("command", "")),
        overall=overall,
        further=[_as_table(other) for other in further],
        known=json.loads((folder / "config.json").read_text()).get("image_statistics"),
        selected=bool(recipe) and run.get("split") == recipe.get("eval_split", "validation"),
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip() if recipe else None,
        training=_describe_training(folder, keeps_best=bool(recipe.get("load_best_model_at_end"))),
        curves=(folder / CURVES_FILE).is_file(),
        drawn=drawn,
        citation=CITATION,
    )


def _is_drawn(recipe: dict) -> bool:
    """Return whether all training data are drawings of this project."""
    sources = [recipe | entry for entry in recipe.get("mixture", [{}])]
    return all(
        source.get("dataset", "partonomy") == "partonomy" and source.get("name", "mini").startswith("mini")
        for source in sources
    )


def _is_on_the_hub(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def _without_private_options(options):
    if isinstance(options, dict):
        return {key: _without_private_options(value) for key, value in options.items() if key not in PRIVATE_OPTIONS}
    if isinstance(options, list):
        return [_without_private_options(value) for value in options]
    return os.path.basename(options) if isinstance(options, str) and os.path.exists(options) else options


def _read_recipe(folder: Path) -> dict:
    path = folder / RECIPE_FILE
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _describe_architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    _, parameters = count_stored(weight_files(folder))
    vlm, sam = config["vlm_config"], config["sam_config"]
    language = vlm["text_config"].get("model_type")
    spans = "a span tagger" if config.get("span_source", "tagger") == "tagger" else "a special token"
    return (
        f"{parameters / 1e6:,.1f} M parameters in {config.get('dtype')}.\n"
        f"Vision-language model: `{vlm['model_type']}` with language model `{language}`.\n"
        f"Masks: {SEGMENTER_NAMES[sam.get('model_type', 'sam')]} at {sam['prompt_encoder_config']['image_size']} px, "
        f"spans from {spans}, {'with' if config.get('mask_feedback', True) else 'without'} mask feedback."
    )


def _describe_training(folder: Path, *, keeps_best: bool) -> str:
    """Return the length of the training, and the metrics of the kept weights: the best or the last ones."""
    path = folder / TRAINER_STATE_FILE
    if not path.is_file():
        return f"By `train.py` with the options below (`{RECIPE_FILE}`)."
    state = json.loads(path.read_text())
    best = state.get("best_global_step") if keeps_best else None
    evaluations = [entry for entry in state["log_history"] if "eval_span_f1" in entry]
    kept = next((entry for entry in reversed(evaluations) if best is None or entry["step"] == best), {})
    seconds = next((entry["train_runtime"] for entry in state["log_history"] if "train_runtime" in entry), 0.0)
    parts = [f"{state['global_step']} steps ({state['epoch']:.2f} epochs)"]
    parts += [f"{seconds / 60:.0f} minutes"] if seconds >= 60 else []
    figures = [f"{key.removeprefix('eval_')} {kept[key]:.3f}" for key in kept if key.endswith(("giou", "f1"))]
    which = "at the last evaluation" if best is None else f"of step {best}, the best evaluation"
    measured = f" These weights are those {which}: {', '.join(figures)}." if figures else ""
    return f"{', '.join(parts)} of `train.py` with the options below (`{RECIPE_FILE}`).{measured}"


def _intervals(metrics: dict | None) -> dict[str, list[float]]:
    return (metrics or {}).get("intervals", {}).get("overall", {})


def _without_places(command: str) -> str:
    """Return a command line with each path reduced to its file or folder name."""
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in command.split())


def _as_rows(overall: dict, intervals: dict) -> list[list[str]]:
    rows = []
    for key, label in FIGURES.items():
        values = [overall.get(key + suffix) for suffix in ("", "_wrong_image", "_random")]
        if values[0] is not None:
            value, *others = ("-" if value is None else f"{value:.3f}" for value in values)
            limits = "{:.3f} to {:.3f}".format(*intervals[key]) if key in intervals else "-"
            rows.append([label, value, limits, *others])
    return rows


def _as_table(metrics: dict) -> dict:
    """Return title, columns, rows and command of one further evaluation."""
    overall, run = metrics["overall"], metrics["run"]
    place = f"`{run['name']}`, split `{run['split']}`"
    command = {"command": _without_places(run.get("command", ""))}
    if run.get("task") != "correction":
        title = f"{place}, {overall['n']} questions:"
        columns = ("model", "95 % interval", "wrong image", "random")
        return run | {"title": title, "columns": columns, "rows": _as_rows(overall, _intervals(metrics))} | command
    intervals, rows = _intervals(metrics), []
    for name, meaning in CORRECTION_METRICS.items():
        if overall[name] is not None:
            limits = "{:.3f} to {:.3f}".format(*intervals[name])
            rows.append([f"`{name}`: {meaning}", f"{overall[name]:.3f}", limits])
    title = f"{place}, masks of {overall['n']} answers, corrected one after the other:"
    return run | {"title": title, "columns": ("model", "95 % interval"), "rows": rows} | command


def _as_eval_results(overall: dict, run: dict) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-segmentation" if "giou" in key else "image-text-to-text",
            dataset_type=run["dataset"],
            dataset_name=f"PARTONOMY {run['name']}",
            dataset_config=run["name"],
            dataset_split=run["split"],
            metric_type=key,
            metric_name=label,
            metric_value=round(overall[key], 4),
        )
        for key, label in FIGURES.items()
        if overall.get(key) is not None
    ]
