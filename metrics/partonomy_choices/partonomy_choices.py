"""Accuracy of PARTONOMY's multiple-choice answers as a metric of `evaluate`, in this one file."""

from numbers import Integral

import datasets
import evaluate

_DESCRIPTION = """Accuracy of multiple-choice answers, and the accuracy of a uniform choice, for the part questions and
the object questions of PARTONOMY."""

_CITATION = """@inproceedings{blume2025partonomy,
  title = {Partonomy: Large Multimodal Models with Part-Level Visual Understanding},
  author = {Blume, Ansel and others}, year = {2025}}"""

_KWARGS = """
Args:
    predictions: Index of the chosen answer of each question.
    references: Index of the correct answer of each question.
    num_choices: Number of choices of every question.

Examples:
    >>> metric = evaluate.load("metrics/partonomy_choices")
    >>> metric.compute(predictions=[0, 2, 1, 4], references=[0, 3, 1, 4])
    {'choice_accuracy': 0.75, 'choice_accuracy_random': 0.2}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS)
class PartonomyChoices(evaluate.Metric):
    def _info(self):
        index = datasets.Value("int32")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=datasets.Features({"predictions": index, "references": index}),
            reference_urls=["https://arxiv.org/abs/2505.20759"],
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add predictions and references. Raises ValueError that names the first one of another form."""
        columns = {"predictions": predictions, "references": references}
        for name, indices in columns.items():
            if not hasattr(indices, "__len__"):
                raise ValueError(f"Expected a list of indices as {name}, found {indices!r:.80}.")
            indices = columns[name] = [index.tolist() if hasattr(index, "tolist") else index for index in indices]
            for number, index in enumerate(indices):
                # a number would be cut to an integer
                if isinstance(index, bool) or not isinstance(index, Integral) or abs(index) >= 2**31:
                    raise ValueError(f"{name}[{number}]: expected the index of a choice, found {index!r:.80}.")
        super().add_batch(**columns, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one prediction and its reference, as `add_batch`."""
        one = {"predictions": prediction, "references": reference, **kwargs}  # `combine` passes these names
        self.add_batch(**{name: [value] for name, value in one.items()})

    def _compute(self, predictions, references, num_choices=5):
        if isinstance(num_choices, bool) or not isinstance(num_choices, Integral) or num_choices < 1:
            raise ValueError(f"num_choices must be a positive integer, found {num_choices!r}.")
        if not len(references):
            raise ValueError("Expected at least one question, found none.")
        wrong = [index for index in [*predictions, *references] if not 0 <= index < num_choices]
        if wrong:
            raise ValueError(f"Expected indices into {num_choices} choices, found {wrong[0]}; pass num_choices.")
        hits = sum(chosen == correct for chosen, correct in zip(predictions, references, strict=True))
        return {"choice_accuracy": hits / len(references), "choice_accuracy_random": 1 / num_choices}
