"""Read questions from Parquet shards and write a predictions file, for models that need a separate environment.

Needs pyarrow, Pillow, numpy and pycocotools, but nothing of this repository. `python scripts/export_parquet.py --name
core --data_dir FOLDER --output_dir OUT` writes the shards of any configuration; `partonomy/mini_questions` has some.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from pycocotools import mask as coco


def write_answers(shards: list[Path], output: Path, segment) -> None:
    """Ask for a mask of each part of each correct answer and write one line for each question.

    Lines of an interrupted run are kept.

    Args:
        shards: Parquet files of questions.
        output: The predictions file.
        segment: (RGB image, name of a part) -> boolean mask (height, width), or None if the model finds nothing.
    """
    lines = output.read_text().splitlines(keepends=True) if output.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    done = {json.loads(line)["id"] for line in lines}
    output.write_text("".join(lines))
    with output.open("a") as file:
        for shard in shards:
            for batch in pq.ParquetFile(shard).iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    if row["id"] not in done:
                        file.write(json.dumps({"id": row["id"], "masks": answer(row, segment)}) + "\n")
                        file.flush()


def answer(row: dict, segment) -> list[dict]:
    """Return the masks of one question as described in docs/predictions.schema.json."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(row["image"]["bytes"]))).convert("RGB")
    masks = []
    for part in row["choice_parts"][row["correct"]]:
        mask = segment(image, part)
        if mask is not None:
            rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
            masks.append({"part": part, "rle": {"size": list(rle["size"]), "counts": rle["counts"].decode()}})
    return masks
