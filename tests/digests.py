"""
Digests of the records that are made of files:

    python -m tests.digests FOLDER NAME...

prints one for each config NAME, made of FOLDER/NAME by two processes.
"""

import hashlib
import json
import sys
from pathlib import Path

from datasets import load_dataset

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy") work)


def without_image(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "image"}


def digest(name: str, folder: Path, **options) -> str:
    """Changes with any text or mask of the split `train`, and with the order of its records."""
    rows = load_dataset("partonomy", name, data_dir=str(folder), split="train", **options)
    return hashlib.sha256(json.dumps([without_image(row) for row in rows]).encode()).hexdigest()


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    print(json.dumps({name: digest(name, Path(folder, name), num_proc=2) for name in names}))
