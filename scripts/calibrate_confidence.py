"""
Calibrate the confidence of a checkpoint: the probability that an image is of a kind in the training data.

    python scripts/calibrate_confidence.py --model runs/plum_tiny --kinds "drawings of objects" \\
        --known '{"name": "mini"}' '{"name": "mini_instances"}' \\
        --other '{"name": "own_parts", "data_dir": "PHOTOGRAPHS"}'

Each `--known` data set is a separate kind: an image is known if it is similar to the images of one of them. Kinds and
logistic function are fitted on images of the validation splits and evaluated on those of the test splits. The result
is `image_statistics` in the checkpoint's config.json, used by `PlumAnswer.confidence`, `plum ask` and the demo.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from tqdm import tqdm

from inputs_plum import read_image
from plum_partonomy.files import write_whole
from plum_partonomy.images import undecoded
from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.training.mixture import load_records, parse_source

BATCH_SIZE = 8
KNOWN_RECALL = 0.98
"""Share of the known validation images above the threshold."""
PENALTY = 1e-3
"""Penalty of the squared slope; without it the slope of separable kinds is infinite."""


def read_images(entry: str, split: str, most: int) -> Iterator:
    """Yield at most this number of images of a source, evenly spaced."""
    source = parse_source(json.loads(entry), {"dataset": "partonomy", "name": None, "data_dir": None})
    records = undecoded(load_records(source, split))
    for index in np.unique(np.linspace(0, len(records) - 1, most).astype(int)).tolist():
        yield read_image(records[index]["image"], where=f"{source}, record {index}")


@torch.no_grad()
def pool_embeddings(model, processor, images: Iterator) -> np.ndarray:
    """Return the mean of SAM's embedding of each image, `(N, C)`."""
    pooled, batch = [], []
    for image in tqdm(images, desc="images", unit="image"):
        batch.append(image)
        if len(batch) == BATCH_SIZE:
            pooled.append(_pool(model, processor, batch))
            batch = []
    if batch:
        pooled.append(_pool(model, processor, batch))
    return np.concatenate(pooled)


def _pool(model, processor, images: list) -> np.ndarray:
    _, sam_inputs, _ = processor.prepare_images(images)
    return model.get_image_embeddings(sam_inputs["sam_pixel_values"]).float().mean(dim=(2, 3)).numpy()


def distances(pooled: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return the logarithm of the mean squared deviation of each row from the nearest kind, as in the model."""
    return np.log((((pooled[:, None] - mean) / std) ** 2).mean(axis=2).min(axis=1))


def fit_logistic(known: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return intercept and slope of P(known) = sigmoid(intercept - slope * distance), with equal class weights."""

    def loss(parameters: np.ndarray) -> float:
        intercept, slope = parameters
        of_known = np.logaddexp(0, -(intercept - slope * known)).mean()
        of_other = np.logaddexp(0, intercept - slope * other).mean()
        return of_known + of_other + PENALTY * slope**2

    return tuple(minimize(loss, np.array([0.0, 1.0])).x.tolist())


def auroc(known: np.ndarray, other: np.ndarray) -> float:
    """Return the probability that a known image has a higher confidence than another one; ties count half.

    >>> auroc(np.array([0.9, 0.6]), np.array([0.1, 0.6]))
    0.875
    """
    difference = known[:, None] - other[None]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def calibrate(model, processor, known: Sequence[str], other: Sequence[str], *, most: int) -> dict:
    """Return the `image_statistics` of a model, with `auroc` and the shares of correctly classified test images."""

    def pool(sources: Sequence[str], split: str) -> list[np.ndarray]:
        return [pool_embeddings(model, processor, read_images(source, split, most)) for source in sources]

    kinds = pool(known, "validation")
    fitted = [np.concatenate(kinds), np.concatenate(pool(other, "validation"))]
    tested = [np.concatenate(pool(sources, "test")) for sources in (known, other)]
    mean = np.stack([kind.mean(axis=0) for kind in kinds])
    std = np.stack([kind.std(axis=0) for kind in kinds]) + 1e-6
    intercept, slope = fit_logistic(*(distances(pooled, mean, std) for pooled in fitted))

    def confidences(pooled: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(intercept - slope * distances(pooled, mean, std))))

    threshold = min(0.5, float(np.quantile(confidences(fitted[0]), 1 - KNOWN_RECALL)))
    known_test, other_test = map(confidences, tested)
    return {
        "mean": mean.round(6).tolist(),
        "std": std.round(6).tolist(),
        "intercept": intercept,
        "slope": slope,
        "threshold": threshold,
        "auroc": auroc(known_test, other_test),
        "known_accepted": float((known_test >= threshold).mean()),
        "other_rejected": float((other_test < threshold).mean()),
        "images": {"known": len(known_test), "other": len(other_test)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Folder of the checkpoint; its config is changed.")
    parser.add_argument("--kinds", required=True, help="Description of the known images, for the warning.")
    parser.add_argument("--known", nargs="+", required=True, help="Data sets of known images, as in a mixture.")
    parser.add_argument("--other", nargs="+", required=True, help="Data sets of images of other kinds.")
    parser.add_argument("--most", type=int, default=150, help="Maximum number of images of each data set and split.")
    arguments = parser.parse_args()
    model, processor = load_checkpoint(arguments.model)
    statistics = calibrate(model.eval(), processor, arguments.known, arguments.other, most=arguments.most)
    statistics["kinds"] = arguments.kinds
    path = arguments.model / "config.json"
    config = json.loads(path.read_text()) | {"image_statistics": statistics}
    write_whole(path, [json.dumps(config, indent=2, sort_keys=True), "\n"])
    shares = {name: statistics[name] for name in ("auroc", "known_accepted", "other_rejected", "threshold")}
    print(", ".join(f"{name} {value:.3f}" for name, value in shares.items()), statistics["images"])


if __name__ == "__main__":
    main()
