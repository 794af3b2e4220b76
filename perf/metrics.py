"""Compare masks on their run lengths and as dense arrays, and measure the speed-up:

    python perf/metrics.py [--pairs 4968] [--side 1024] [--dense_pairs 50]

Draws pairs of overlapping shapes with a wavy outline, as many as Partonomy-Core has masks, and computes intersection
and union of each from the run lengths (scoring/mask_metrics.py) and, for some of the pairs, from decoded arrays. Both
are timed in one process on one core. Prints the time of all pairs and the ratio per pair.
"""

import argparse
import time

import numpy as np
from measure import result
from pycocotools import mask as coco

from plum_partonomy.masks import decode
from plum_partonomy.scoring.mask_metrics import RLE, overlap


def draw(generator: np.random.Generator, side: int) -> RLE:
    """Return an ellipse with a wavy outline, as compressed run lengths."""
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = side * generator.uniform(0.05, 0.3) * (1 + 0.15 * np.sin(angles * generator.integers(2, 9)))
    centre = side * generator.uniform(0.35, 0.65, size=2)
    points = centre + radius[:, None] * np.stack([np.cos(angles), generator.uniform(0.4, 1) * np.sin(angles)], axis=1)
    rle = coco.merge(coco.frPyObjects([points.clip(0, side).ravel().tolist()], side, side))
    return {"size": [side, side], "counts": rle["counts"].decode("ascii")}


def overlap_dense(predicted: RLE, true: RLE) -> tuple[int, int]:
    predicted, true = decode(predicted), decode(true)
    return int(np.logical_and(predicted, true).sum()), int(np.logical_or(predicted, true).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4968, help="mask pairs")
    parser.add_argument("--side", type=int, default=1024, help="height and width in pixels")
    parser.add_argument(
        "--dense_pairs", type=int, default=50, help="number of pairs that are also compared as dense arrays"
    )
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    pairs = [(draw(generator, options.side), draw(generator, options.side)) for _ in range(options.pairs)]

    started = time.perf_counter()
    counts = [overlap(*pair) for pair in pairs]
    of_runs = time.perf_counter() - started
    some = pairs[: options.dense_pairs]
    started = time.perf_counter()
    dense_counts = [overlap_dense(*pair) for pair in some]
    of_arrays = time.perf_counter() - started
    ratio = (of_arrays / len(some)) / (of_runs / len(pairs))
    detail = {
        "pairs": len(pairs),
        "side": options.side,
        "seconds_of_all_pairs": round(of_runs, 3),
        "dense_pairs": len(some),
        "seconds_of_dense_pairs": round(of_arrays, 3),
    }
    result(
        "masks compared on their runs, per pair", ratio, 10.0, equal=counts[: len(some)] == dense_counts, detail=detail
    )


if __name__ == "__main__":
    main()
