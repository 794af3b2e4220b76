"""plum-tiny as built by its recipe, with random weights, and the question of the benchmarks in this folder."""

import torch
import yaml
from measure import ROOT
from PIL import Image

from plum_partonomy.seeding import seeded_generator
from plum_partonomy.training.model import build_from_scratch

QUESTION = "What visible parts does the object in the image have?"
ANSWER = "The object in the image has the following visible parts: left wing, right wing, tail, wheel, and hull."


def build_plum_tiny():
    """Return the model, in evaluation mode and with tags that differ from token to token, and its processor."""
    recipe = yaml.safe_load((ROOT / "recipes" / "plum_tiny.yaml").read_text())
    torch.manual_seed(0)
    model, processor = build_from_scratch(recipe["model_config"], recipe["tokenizer_vocab_size"], [QUESTION, ANSWER])
    with torch.no_grad():
        model.span_tagger.classifier[-1].weight.mul_(20)
        model.span_tagger.classifier[-1].bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
    return model.eval(), processor


def draw_images(count: int) -> list[Image.Image]:
    """Return images of noise, of different sizes around 128 pixels."""
    generator = seeded_generator(0, "benchmark images")
    sizes = generator.integers(90, 160, (count, 2))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype="uint8")) for size in sizes]
