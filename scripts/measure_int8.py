"""
Print the effect of int8 weights on a CPU: gIoU of the masks of the correct answers, seconds per question, size.

    python scripts/measure_int8.py --model checkpoints/plum-tiny --limit 100

Linear layers of the language model, and optionally of SAM's image encoder, store int8 weights and quantise their
inputs on the fly (torch.ao.quantization.quantize_dynamic). The mask decoder and PLUM's heads stay in float32.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from itertools import chain

import torch
from PIL import Image
from torch.ao.quantization import quantize_dynamic

import partonomy_dataset
from plum_partonomy.inference.one_image import Plum, load_model
from plum_partonomy.inference.predictor import Predictor
from plum_partonomy.records import Question
from plum_partonomy.scoring.benchmark import Asked, load_image, load_questions, make_batches
from plum_partonomy.scoring.metrics import evaluate_predictions

BATCH_SIZE, NEW_TOKENS, ROUNDS = 8, 48, 2


def quantise(model, *, encoder: bool):
    """Return a copy of a float32 model with the linear layers of the language model (and SAM's encoder) in int8."""
    model = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that torchao will replace it
        quantize_dynamic(model.get_decoder(), {torch.nn.Linear}, inplace=True)
        if encoder:
            quantize_dynamic(model.sam.vision_encoder, {torch.nn.Linear}, inplace=True)
    return model


def measure(plum: Plum, questions: Sequence[Question], images: dict[str, Image.Image]) -> tuple[float, float]:
    """Return strict macro gIoU of the correct answers' masks, and seconds per question with its generated answer."""
    predictor = Predictor(
        plum.model,
        plum.processor,
        max_new_tokens=NEW_TOKENS,
        choice_reduction="answer_mean",
        mask_source="gt_answer",
    )
    started = time.perf_counter()
    predictions = []
    for batch in chain.from_iterable(make_batches(questions, BATCH_SIZE)):
        asked = [questions[index] for index in batch]
        predictions += predictor.predict([Asked(each, images[each.image_id], each.image_id) for each in asked])
    seconds = (time.perf_counter() - started) / len(questions)
    figures = evaluate_predictions(questions, predictions, mask_source="gt_answer")
    return figures["overall"]["strict_macro_giou"], seconds


def weigh(model) -> int:
    """Return the bytes of the model's weights; an int8 layer stores weight and bias as a pair."""
    values = (value if isinstance(value, tuple) else (value,) for value in model.state_dict().values())
    return sum(part.nbytes for pair in values for part in pair if isinstance(part, torch.Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a PLUM checkpoint")
    parser.add_argument(
        "--limit", type=int, default=100, help="questions, the first of the test split of mini_questions"
    )
    arguments = parser.parse_args()
    _, plum = load_model(arguments.model)
    name = partonomy_dataset.DATASET_NAME
    rows, questions = load_questions(name, name="mini_questions", split="test", limit=arguments.limit)
    images = {question.image_id: load_image(rows, index, question) for index, question in enumerate(questions)}
    variants = {
        "float32": plum.model,
        "int8: language model": quantise(plum.model, encoder=False),
        "int8: language model and SAM's encoder": quantise(plum.model, encoder=True),
    }
    measured = {name: [] for name in variants}
    for _ in range(ROUNDS):  # in turns, so that other load on the machine affects all of them equally
        for name, model in variants.items():
            measured[name].append(measure(Plum(model, plum.processor), questions, images))
    print("| weights | gIoU | seconds per question | MB |\n|---|---:|---:|---:|")
    for name, figures in measured.items():
        giou, seconds = figures[0][0], min(seconds for _, seconds in figures)
        print(f"| {name} | {giou:.4f} | {seconds:.3f} | {weigh(variants[name]) / 1e6:.1f} |")


if __name__ == "__main__":
    main()
