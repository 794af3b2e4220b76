"""How often the right choice can be told without the image: blind heuristics, to be held against chance.

Each heuristic scores the five part lists of a question; the best score is its choice, and a tie of n that holds the
right one counts 1 / n.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from partkit.schema import Question

PENALTY = 1.0


def measure_leak(train: Sequence[Question], test: Sequence[Question]) -> dict[str, float]:
    """Accuracy of each blind heuristic on the test questions; `chance` is what guessing gives.

    - longest, shortest: by number of parts.
    - most_frequent_parts: by the mean frequency of its parts among the right answers of the training questions.
    - middle: the fewest parts that differ from the other four lists, summed.
    - bag_of_parts: a linear classifier of the set of parts, fitted to the training questions.

    Raises ValueError if there are no training or no test questions.
    """
    if not train or not test:
        raise ValueError(f"expected questions to train and to test on, found {len(train)} and {len(test)}")
    frequency = Counter(part for question in train for part in question.choice_parts[question.correct])
    weights = fit_bag_of_parts(train)
    scores = {
        "longest": lambda lists: [len(parts) for parts in lists],
        "shortest": lambda lists: [-len(parts) for parts in lists],
        "most_frequent_parts": lambda lists: [np.mean([frequency[part] for part in parts]) for parts in lists],
        "middle": lambda lists: [-sum(len(set(parts) ^ set(other)) for other in lists) for parts in lists],
        "bag_of_parts": lambda lists: [sum(weights.get(part, 0.0) for part in parts) for parts in lists],
    }
    leak = {name: float(np.mean([_hit(question, score) for question in test])) for name, score in scores.items()}
    return leak | {"chance": float(np.mean([1 / len(question.choices) for question in test]))}


def fit_bag_of_parts(questions: Sequence[Question]) -> dict[str, float]:
    """A weight per part such that the sum over a list is the logit of its being right among the lists of a question.

    Conditional logistic regression with an L2 penalty of PENALTY / 2 times the squared weights.
    """
    parts = sorted({part for question in questions for listed in question.choice_parts for part in listed})
    column = {part: position for position, part in enumerate(parts)}
    choices = len(questions[0].choices)
    lists = [listed for question in questions for listed in question.choice_parts]
    rows = [row for row, listed in enumerate(lists) for _ in listed]
    columns = [column[part] for listed in lists for part in listed]
    features = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(lists), len(parts)))
    right = np.zeros((len(questions), choices))
    right[np.arange(len(questions)), [question.correct for question in questions]] = 1

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = (features @ weights).reshape(right.shape)
        loss = -(right * log_softmax(logits, axis=1)).sum() + PENALTY / 2 * weights @ weights
        return loss, features.T @ (softmax(logits, axis=1) - right).ravel() + PENALTY * weights

    fitted = minimize(loss_and_gradient, np.zeros(len(parts)), jac=True, method="L-BFGS-B")
    return dict(zip(parts, fitted.x.tolist(), strict=True))


def _hit(question: Question, score) -> float:
    scores = np.asarray(score(question.choice_parts), dtype=float)
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    return float(question.correct in best) / len(best)
