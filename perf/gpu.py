"""
A model of the size of PLUM-7B (LLaVA-1.5-7B and SAM ViT-H, random bfloat16 weights) on a GPU: scoring choices,
answering with masks, encoding images, training steps, a step of plum-tiny, and plum-7b's recipe through train.py.

    python perf/gpu.py                    # all of it, on an H100 or H200
    python perf/gpu.py --tiny             # the same steps, small, on a CPU

Every row is a line of JSON that is printed as soon as it is measured; a row that fails prints its error, and the
others follow. Two methods of a row are compared: their times, their results and their peak memory. The *floor* of a
step is the time that its arithmetic alone would take at `--peak_tflops`, plus, for each decoded token, one reading of
the language model's weights at `--peak_tbytes`. A breakdown says which components take the time above the floor. In
bfloat16 the two methods differ by some hundredths; the detail contains the relative error.

The recipe runs on drawings of 1024 pixels, with a checkpoint of random weights that takes 14 GB in a temporary folder.
"""

import argparse
import tempfile
from pathlib import Path

from gpu_inference import measure_inference
from gpu_measure import Card, attempt
from gpu_model import build_config, build_model, save_checkpoint
from gpu_training import measure_few_bits, measure_lora, measure_plum_tiny, measure_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small layers on the CPU")
    parser.add_argument("--peak_tflops", type=float, default=790.0, help="bfloat16 TFLOP/s that the device reaches")
    parser.add_argument("--peak_tbytes", type=float, default=4.3, help="TB/s that it reads from its memory")
    parser.add_argument("--steps", type=int, default=30, help="steps of plum-7b's recipe, 0 to leave it out")
    options = parser.parse_args()
    card = Card("cpu" if options.tiny else "cuda", options.peak_tflops, options.peak_tbytes)
    config = build_config(options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with attempt("training step of plum-tiny"):
            measure_plum_tiny(card, 2 if options.tiny else 32)
        with attempt("model of random weights"):
            measure_model(folder, config, card)
        with attempt("training step with LoRA, batch 1, language model in 4 bits"):
            measure_few_bits(folder / "model", card)
        if options.steps:
            name = "plum-7b's recipe through train.py"
            with attempt(name):
                measure_recipe(name, folder, config, card, max_steps=options.steps)
            name += ", batch 1, frozen weights in bfloat16"
            with attempt(name):
                few = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
                few |= {"gradient_checkpointing": True, "frozen_dtype": "bfloat16", "max_steps": options.steps}
                measure_recipe(name, folder, config, card, **few)


def measure_model(folder: Path, config, card: Card) -> None:
    """Measure inference and training steps of a model, and save it as `folder / "model"`."""
    model = build_model(config, card.device)
    measure_inference(model, config, card)
    with attempt("checkpoint of random weights"):
        save_checkpoint(model, config, folder / "model")
    measure_lora(model, config, card)


if __name__ == "__main__":
    main()
