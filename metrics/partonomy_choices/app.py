"""The Space of the metric beside this file: predictions and references as JSON in, figures out."""

import json
from pathlib import Path

import evaluate

FOLDER = Path(__file__).resolve().parent
(METRIC_FILE,) = FOLDER.glob("partonomy_*.py")


def compute(predictions: str, references: str) -> dict:
    metric = evaluate.load(str(METRIC_FILE))
    return metric.compute(predictions=json.loads(predictions), references=json.loads(references))


if __name__ == "__main__":
    import gradio

    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    example = json.loads((FOLDER / "example.json").read_text(encoding="utf-8"))
    inputs = [gradio.Textbox(json.dumps(example[name]), label=f"{name} (JSON)", lines=6) for name in example]
    gradio.Interface(compute, inputs, gradio.JSON(), title=METRIC_FILE.stem, article=card.split("---", 2)[2]).launch()
