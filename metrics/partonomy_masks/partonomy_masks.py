"""Mask metrics of PARTONOMY as a metric of `evaluate`.

It needs only `mask_metrics.py` and `inputs_plum.py` beside it, which are copies of the files in the project.
"""

from math import fsum, isfinite
from statistics import fmean

import datasets
import evaluate
import numpy as np

from .inputs_plum import DataError, validate_rle
from .mask_metrics import MATCHINGS, average_precision, matched_ious, normalise, strict_overlaps

_DESCRIPTION = """Compares the part masks of one image, given as COCO run lengths, with the true ones. Strict: by part
name, a missing or surplus part scores 0. Reference: the evaluator of the PARTONOMY authors, by position or by the
matchings greedy, hungarian and union; unmatched masks are ignored, images without predicted masks are skipped."""

_CITATION = """@inproceedings{blume2025partonomy,
  title = {Partonomy: Large Multimodal Models with Part-Level Visual Understanding},
  author = {Blume, Ansel and others}, year = {2025}}"""

_KWARGS = """
Args:
    predictions: List of {"label", "rle": {"size": [height, width], "counts": str}, "score"} for each image.
    references: List of {"label", "rle"} for each image.

Returns:
    strict_macro_giou, strict_micro_giou, strict_ciou, ap50, and macro and micro gIoU for each reference matching; None
    if a metric applies to no image.

Examples:
    Half of the hull is found, in an image of one row and four columns:

    >>> metric = evaluate.load("metrics/partonomy_masks")
    >>> hull = {"label": "hull", "rle": {"size": [1, 4], "counts": "022"}}
    >>> half = {"label": "hull", "rle": {"size": [1, 4], "counts": "013"}, "score": 0.9}
    >>> metric.compute(predictions=[[half]], references=[[hull]])["strict_macro_giou"]
    0.5
"""

_RLE = {"size": [datasets.Value("int32")], "counts": datasets.Value("string")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class PartonomyMasks(evaluate.Metric):
    def _info(self):
        true = {"label": datasets.Value("string"), "rle": _RLE}
        features = {"predictions": [true | {"score": datasets.Value("float64")}], "references": [true]}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features(features),
            reference_urls=["https://arxiv.org/abs/2505.20759"],
        )

    def _compute(self, predictions, references):
        strict, overlaps, detections, true_masks = [], [], [], 0
        reference = {matching: [] for matching in MATCHINGS}
        for image, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            predicted, true = _checked(predicted, true, image)
            found = strict_overlaps(_named(predicted), _named(true))
            ious = {name: both / united if united else 0.0 for name, (both, united) in found.items()}
            strict.append(list(ious.values()))
            overlaps += found.values()
            true_masks += len({normalise(mask["label"]) for mask in true} & ious.keys())
            scores = {}
            for mask in predicted:
                name = normalise(mask["label"])
                scores[name] = max(mask["score"], scores.get(name, mask["score"]))
            detections += [(scores[name], ious[name] >= 0.5) for name in scores if name in ious]
            if predicted and true:
                rles = [mask["rle"] for mask in predicted], [mask["rle"] for mask in true]
                for matching in MATCHINGS:
                    reference[matching].append(matched_ious(*rles, matching=matching))
        both, united = (sum(column) for column in zip((0, 0), *overlaps, strict=True))
        scores, hits = np.array(detections, dtype=float).reshape(-1, 2).T
        figures = _means("strict", strict)
        figures["strict_ciou"] = both / united if united else None
        figures["ap50"] = average_precision(scores, hits.astype(bool), true=true_masks)
        for matching, ious in reference.items():
            figures |= _means("reference" if matching == "paired" else f"reference_{matching}", ious)
        return figures


def _checked(predicted, true, image):
    """Return the masks of both sides with checked run lengths. Raises ValueError that names the mask unless all have
    one size, a label and, if predicted, a score.
    """
    size, sides = None, []
    for name, masks in (("reference", true), ("prediction", predicted)):
        checked = []
        for number, mask in enumerate(masks):
            where = f"image {image}, {name} {number}"
            rle = validate_rle(mask["rle"], expected_size=size, where=where)
            size = size or tuple(rle["size"])
            if mask["label"] is None:
                raise DataError(f"{where}: expected a label, found none")
            if name == "prediction" and (mask["score"] is None or not isfinite(mask["score"])):
                raise DataError(f"{where}: expected a finite score, found {mask['score']}")
            checked.append({**mask, "rle": rle})
        sides.append(checked)
    return sides[::-1]


def _named(masks):
    return [(mask["label"], mask["rle"]) for mask in masks]


def _means(prefix, per_image):
    """Return the mean over images of the mean in each, and the mean over all pairs."""
    scored = [ious for ious in per_image if ious]
    count = sum(map(len, scored))
    return {
        f"{prefix}_macro_giou": fmean(map(fmean, scored)) if scored else None,
        f"{prefix}_micro_giou": fsum(map(fsum, scored)) / count if count else None,
    }
