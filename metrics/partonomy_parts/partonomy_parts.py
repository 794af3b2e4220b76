"""Part names of PARTONOMY's answers as a metric of `evaluate`, in this one file."""

import datasets
import evaluate

_DESCRIPTION = """Precision, recall and F1 of the part names in answers, with counts pooled over all answers, and the
share of answers with exactly the true parts. Names are stripped and compared without case."""

_CITATION = """@inproceedings{blume2025partonomy,
  title = {Partonomy: Large Multimodal Models with Part-Level Visual Understanding},
  author = {Blume, Ansel and others}, year = {2025}}"""

_KWARGS = """
Args:
    predictions: List of part names in each answer, of the chosen choice or of the generated answer.
    references: List of part names in each correct answer.
    protocol: "strict" compares sets; "reference" counts a repeated name each time, as the authors' evaluator does.

Examples:
    >>> metric = evaluate.load("metrics/partonomy_parts")
    >>> metric.compute(predictions=[["hull", "flag"]], references=[["hull", "mast"]])
    {'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'exact': 0.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class PartonomyParts(evaluate.Metric):
    def _info(self):
        names = [datasets.Value("string")]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": names, "references": names}),
            reference_urls=["https://arxiv.org/abs/2505.20759"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add predictions and references. Raises ValueError that names the first one of another form."""
        for side, answers in (("predictions", predictions), ("references", references)):
            if not hasattr(answers, "__len__"):
                raise ValueError(f"Expected a list of the parts in each answer as {side}, found {answers!r:.80}.")
            for number, names in enumerate(answers):
                if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                    raise ValueError(f"{side}[{number}]: expected a list of part names, found {names!r:.80}.")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one prediction and its reference, as `add_batch`."""
        one = {"predictions": prediction, "references": reference, **kwargs}  # `combine` passes these names
        self.add_batch(**{name: [value] for name, value in one.items()})

    def _compute(self, predictions, references, protocol="strict"):
        if not len(predictions):
            raise ValueError("Expected at least one answer, found none.")
        if protocol not in ("strict", "reference"):
            raise ValueError(f"protocol must be strict or reference, found {protocol!r}.")
        hits = predicted_names = true_names = exact = 0
        for predicted, true in zip(predictions, references, strict=True):
            predicted, true = ([name.strip().lower() for name in names] for names in (predicted, true))
            exact += set(predicted) == set(true)
            if protocol == "strict":
                predicted, true = set(predicted), set(true)
            hits += sum(name in true for name in predicted)
            predicted_names += len(predicted)
            true_names += len(true)
        precision = hits / predicted_names if predicted_names else 0.0
        recall = hits / true_names if true_names else 0.0
        f1 = 2 * hits / (predicted_names + true_names) if hits else 0.0
        return {"precision": precision, "recall": recall, "f1": f1, "exact": exact / len(predictions)}
