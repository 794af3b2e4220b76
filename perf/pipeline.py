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
TARGETS = {256: 60.0, 1024: 40.0}  # images a second


class SlowProcessor(PlumProcessor):
    """Encodes images for SAM with transformers' image processor, which computes in float64."""

    def _encode_for_sam(self, images) -> dict[str, torch.Tensor]:
        encoded = self.sam_image_processor(images, return_tensors="pt")
        sizes = {name: torch.as_tensor(encoded[name]) for name in ("original_sizes", "reshaped_input_sizes")}
        return {"sam_pixel_values": encoded["pixel_values"], **sizes}


def build_processor(family: type[PlumProcessor], side: int) -> PlumProcessor:
    square = {"height": side, "width": side}
    return family(
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
        files = [draw_file(generator, side) for _ in range(IMAGES)]
        families = {"old": SlowProcessor, "new": PlumProcessor}
        paths = {name: partial(prepare, processor=build_processor(family, side)) for name, family in families.items()}
        seconds = {name: [] for name in paths}
        for _ in range(4):
            for name, path in paths.items():
                started = time.process_time()
                path(files)
                seconds[name].append(time.process_time() - started)
        best = {name: min(taken) for name, taken in seconds.items()}
        batches = [path(files) for path in paths.values()]
        batches += DataLoader(files, batch_size=IMAGES, collate_fn=paths["new"], num_workers=2)
        equal = all(torch.equal(batch[name], value) for batch in batches for name, value in batches[0].items())
        detail = {
            "unit": "images per second of one core",
            "images": IMAGES,
            "file_kb": round(sum(map(len, files)) / IMAGES / 1024, 1),
            **{f"{name}_ms_per_image": round(1000 * taken / IMAGES, 2) for name, taken in best.items()},
            "new_peak_mb": round(peak_memory(partial(paths["new"], files)) / 2**20, 1),
        }
        name = f"input pipeline at {side} px, SAM's pixels by table"
        results.append(result(name, IMAGES / best["new"], target, equal=equal, detail=detail))
    return results


if __name__ == "__main__":
    main()
