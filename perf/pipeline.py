"""
Training input prepared by one core: files decoded, resized for SAM and for CLIP, their conversations tokenized.

    python perf/pipeline.py

The files are smooth noise, which JPEG compresses about as well as photographs.
"""

import io
import time
from functools import partial

import numpy as np
import torch
from measure import peak_memory, result
from PIL import Image
from plum_tiny import ANSWER, QUESTION
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, SamImageProcessor

from plum_partonomy.records import as_chat
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.training.model import train_tokenizer
from processing_plum import PlumProcessor

IMAGES = 24
TARGETS = {256: 60.0, 1024: 12.0}  # images a second


def build_processor(side: int) -> PlumProcessor:
    square = {"height": side, "width": side}
    return PlumProcessor(
        CLIPImageProcessor(),
        SamImageProcessor(size={"longest_edge": side}, pad_size=square),
        train_tokenizer([QUESTION, ANSWER], 400),
        num_image_tokens=256,
    )


def draw_file(generator: np.random.Generator, side: int) -> bytes:
    """Return a JPEG of aspect ratio 4:3 whose longer side has `side` pixels."""
    noise = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype="uint8"))
    file = io.BytesIO()
    noise.resize((side, 3 * side // 4), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(files: list[bytes], processor: PlumProcessor) -> dict[str, torch.Tensor]:
    answered = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    chats = [as_chat(answered, Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return dict(processor.apply_chat_template(chats, tokenize=True, return_dict=True))


def main() -> list[dict]:
    torch.set_num_threads(1)
    generator, results = seeded_generator(0, "benchmark files"), []
    for side, target in TARGETS.items():
        processor = build_processor(side)
        files = [draw_file(generator, side) for _ in range(IMAGES)]
        prepare(files[:2], processor)
        seconds = []
        for _ in range(3):
            started = time.process_time()
            batch = prepare(files, processor)
            seconds.append(time.process_time() - started)
        loader = DataLoader(files, batch_size=IMAGES, collate_fn=partial(prepare, processor=processor), num_workers=2)
        equal = all(torch.equal(value, batch[name]) for name, value in next(iter(loader)).items())
        detail = {
            "unit": "images per second of one core",
            "images": IMAGES,
            "file_kb": round(sum(map(len, files)) / IMAGES / 1024, 1),
            "ms_per_image": round(1000 * min(seconds) / IMAGES, 2),
            "new_peak_mb": round(peak_memory(partial(prepare, files, processor)) / 2**20, 1),
        }
        results.append(
            result(f"input pipeline at {side} px", IMAGES / min(seconds), target, equal=equal, detail=detail)
        )
    return results


if __name__ == "__main__":
    main()
