"""Grounded conversations of random pixels, and training runs on them that take a second."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.masks import encode
from plum_partonomy.training.examples import Collator, ConversationDataset
from plum_partonomy.training.run import main as train
from tests.tiny import random_image, random_mask

ROOT = Path(__file__).parents[1]
# Sums of the same numbers in another order.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}
PARTS = ("wheel", "left wing", "tail")
EVALUATED = tuple(
    f"eval_{name}" for name in ("strict_macro_giou", "strict_micro_giou", "span_f1", "language_modeling_loss")
)


def record(number: int, spans: int, has_image: bool = True) -> dict:
    """A grounded conversation with as many tagged parts as asked for, the third of them in a turn of its own."""
    height, width = 40 + number % 3 * 10, 70 - number % 2 * 10
    answer = ", ".join(f"a <p>{part}</p>" for part in PARTS[: min(spans, 2)])
    messages = [
        {"role": "user", "content": "Which parts can you see?" if number % 2 else "What is there?"},
        {"role": "assistant", "content": f"I can see {answer}." if spans else "It is red."},
        {"role": "user", "content": "And what else?"},
        {"role": "assistant", "content": "It has a <p>tail</p>."},
    ]
    return {
        "id": f"record-{number}",
        "image": random_image(height, width, seed=number) if has_image else None,
        "image_id": str(number),
        "image_label": "bird",
        "messages": messages if spans == 3 else messages[:2],
        "masks": [
            {"label": part, "rle": encode(random_mask(height, width, seed=10 * number + i))}
            for i, part in enumerate(PARTS[:spans])
        ],
        "source": "random",
        "licence": "CC0-1.0",
    }


def approximately(value):
    """
    Return a value of JSON that equals another one with about the same fractions. Weights that were loaded again lie
    elsewhere in memory, where some processors sum in another order.
    """
    if isinstance(value, dict):
        return {name: approximately(item) for name, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return pytest.approx(value, abs=1e-5) if isinstance(value, float) else value


def read_lines(text: str | bytes) -> list:
    return [json.loads(line) for line in text.splitlines()]


def make_records(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=GROUNDED_CONVERSATION_FEATURES)


def uneven_records() -> Dataset:
    """
    Three batches of four; of each, two processes get two rows, here in brackets by their numbers of spans: [3 1][2 0],
    [1 2][no image], [none][1 3].
    """
    spans = [3, 1, 2, 0, 1, 2, 0, 0, 0, 0, 1, 3]
    return make_records([record(number, count, number not in (6, 7)) for number, count in enumerate(spans)])


def batch_of(rows: list[dict], processor) -> dict:
    examples = ConversationDataset(make_records(rows))
    return Collator(processor)([examples[i] for i in range(len(rows))])


def base_options(data_folder: Path, output_dir: Path) -> dict:
    return {
        "dataset": str(data_folder),
        "name": "default",
        "output_dir": str(output_dir),
        "use_cpu": True,
        "color_jitter": 0.2,
        "max_spans": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.003,
        "max_steps": 10,
        "logging_steps": 2,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
    }


def run_main(options: dict):
    train([word for name, value in options.items() for word in (f"--{name}", str(value))])


def losses_by_step(log_history: list[dict]) -> list[dict]:
    """The log without what depends on the clock."""
    ignored = ("runtime", "per_second", "total_flos", "train_loss")
    return [{k: v for k, v in entry.items() if not any(word in k for word in ignored)} for entry in log_history]
