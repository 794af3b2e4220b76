"""Mask metrics of PARTONOMY as a metric of `evaluate`.

It needs only `mask_metrics.py` and `inputs_plum.py` beside it, which are copies of the files in the project.
"""

from math import fsum

import datasets
import evaluate
import numpy as np

from .inputs_plum import DataError, check_number, check_size, validate_rle
from .mask_metrics import average_precision, count_masks

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

_RATIOS = ("strict_macro_giou", "strict_micro_giou", "strict_ciou") + tuple(
    f"reference{matching}_{mean}_giou"
    for matching in ("", "_greedy", "_hungarian", "_union")
    for mean in ("macro", "micro")
)
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

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add predictions and references. Raises ValueError that names the first one of another form."""
        for name, images in (("reference", references), ("prediction", predictions)):
            if not isinstance(images, (list, tuple)):
                raise DataError(f"expected a list with the masks of each image as {name}s, found {images!r:.80}")
            for image, masks in enumerate(images):
                _check_form(masks, name, where=f"image {image}")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one prediction and its reference, as `add_batch`."""
        one = {"predictions": prediction, "references": reference, **kwargs}  # `combine` passes these names
        self.add_batch(**{name: [value] for name, value in one.items()})

    def _compute(self, predictions, references):
        if not len(references):
            raise ValueError("Expected at least one image, found none.")
        ratios, detections, true_masks = {name: [] for name in _RATIOS}, [], 0
        for image, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            predicted, true = _checked(predicted, true, image)
            found = [(mask["label"], mask["rle"], mask["score"]) for mask in predicted]
            counts = count_masks(found, [(mask["label"], mask["rle"]) for mask in true])
            for name, ratio in counts.ratios.items():
                ratios[name].append(ratio)
            detections += counts.detections
            true_masks += counts.true_masks
        figures = {}
        for name, pairs in ratios.items():
            total, count = (fsum(column) for column in zip((0, 0), *pairs, strict=True))
            figures[name] = total / count if count else None
        scores, hits = np.array(detections, dtype=float).reshape(-1, 2).T
        return figures | {"ap50": average_precision(scores, hits.astype(bool), true=true_masks)}


def _check_form(masks, name, *, where):
    """Raise ValueError unless the masks of an image are a list of dicts with the fields of `name`, a whole size, text
    counts and a finite score.
    """
    fields = ["label", "rle"] + ["score"] * (name == "prediction")
    if not isinstance(masks, (list, tuple)):
        raise DataError(f"{where}: expected a list with each {name}, found {masks!r:.80}")
    for number, mask in enumerate(masks):
        place = f"{where}, {name} {number}"
        if not isinstance(mask, dict) or sorted(mask) != fields:
            found = sorted(map(str, mask)) if isinstance(mask, dict) else f"{type(mask).__name__} {mask!r:.80}"
            raise DataError(f"{place}: expected a dict of {', '.join(fields)}, found {found}")
        if not isinstance(mask["label"], str) or not mask["label"].strip():
            raise DataError(f"{place}: expected the name of a part as label, found {mask['label']!r:.80}")
        if "score" in mask:
            check_number(mask["score"], name=f"{place}: a score")
        rle = mask["rle"]
        if not isinstance(rle, dict) or sorted(rle) != ["counts", "size"] or not isinstance(rle["counts"], str):
            raise DataError(
                f"{place}: expected an RLE of size [height, width] and counts as text, found {rle!r:.80}; encode the "
                "mask with pycocotools, and its bytes with .decode('ascii')"
            )
        check_size(rle["size"], where=place)  # a number with a fraction would be cut to an integer


def _checked(predicted, true, image):
    """Return the masks of both sides with checked run lengths. Raises ValueError that names the mask unless all have
    one size.
    """
    size, sides = None, []
    for name, masks in (("reference", true), ("prediction", predicted)):
        checked = []
        for number, mask in enumerate(masks):
            where = f"image {image}, {name} {number}"
            rle = validate_rle(mask["rle"], expected_size=size, where=where)
            size = size or tuple(rle["size"])
            checked.append({**mask, "rle": rle})
        sides.append(checked)
    return sides[::-1]
