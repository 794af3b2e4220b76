"""Measure how often heuristics that do not see the image find the correct choice, compared with chance.

Each heuristic scores the part lists of a question and chooses the best. A tie of n choices that includes the correct
one counts 1 / n.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from plum_partonomy.drawn import miniature
from plum_partonomy.masks import encode
from plum_partonomy.questions.maker import SCHEMES, QuestionMaker
from plum_partonomy.questions.part_statistics import PartKnowledge, collect_knowledge
from plum_partonomy.records import QUESTION_TYPES, PartExample, PartMask, Question
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.sources.splits import Survey

PENALTY = 1.0
MAX_IMAGES = 2000
"""Maximum number of images, drawn by seed, of each half of a data set."""

Leak = dict[str, float]
"""Heuristic, or "chance" -> accuracy."""


def compare_schemes(
    train: Sequence[PartExample],
    test: Sequence[PartExample],
    *,
    knowledge: Mapping[str, PartKnowledge],
    seed: int,
    question_types: Sequence[str] = QUESTION_TYPES,
) -> dict[str, Leak | None]:
    """Return scheme -> leak of its questions about the test images, or None if one half has no question.

    Args:
        train, test: The examples; their images are not read.
        knowledge: Scheme -> the statistics for its questions.
    """
    leaks = {}
    for scheme, known in knowledge.items():
        maker = QuestionMaker(known, scheme=scheme, seed=seed)
        asked = [[q for example in half for q in maker.questions(example, question_types)] for half in (train, test)]
        leaks[scheme] = measure_leak(*asked) if all(asked) else None
    return leaks


def leak_of_drawings(
    sizes: Mapping[str, int], *, scene: miniature.Scene = miniature.MINI, seed: int
) -> dict[str, Leak | None]:
    """Return scheme -> leak of questions about drawings.

    Args:
        sizes: Number of drawings of the splits "train" and "test".
    """
    train, test = (
        [miniature.draw_example(split, number, scene=scene, seed=seed) for number in range(sizes[split])]
        for split in ("train", "test")
    )
    graphs = {"part_graph": miniature.part_graph(scene), "instance_graph": miniature.instance_graph(scene)}
    annotated = [(example.image_label, [mask.label for mask in example.masks]) for example in (*train, *test)]
    knowledge = {
        "official": collect_knowledge(annotated, **graphs),
        "balanced": PartKnowledge(**graphs, presence=miniature.presence(scene)),
    }
    return compare_schemes(train, test, knowledge=knowledge, seed=seed, question_types=QUESTION_TYPES)


def leak_of_copy(found: Survey, *, seed: int) -> dict[str, Leak | None]:
    """Scheme -> the leak of questions about a copy of a data set: the last split tests, the others train.

    Where there is but one split, half of its images test.
    """
    *earlier, last = ([*images] for images in found.annotated.values())
    train, test = [image for split in earlier for image in split], last
    drawn = seeded_generator(seed, "leak")
    if not train:
        test = [test[position] for position in drawn.permutation(len(test))]
        train, test = test[: len(test) // 2], test[len(test) // 2 :]
    rle = encode(np.ones((1, 1), dtype=bool))  # which parts are visible is all that the making of questions looks at
    halves = [
        [
            PartExample(None, image.image_id, image.label, [PartMask(part, rle) for part in image.parts], "", "")
            for image in (half[position] for position in drawn.permutation(len(half))[:MAX_IMAGES])
        ]
        for half in (train, test)
    ]
    return compare_schemes(*halves, knowledge=dict.fromkeys(SCHEMES, found.knowledge()), seed=seed)


def leak_of_published(questions: Sequence[Question], *, seed: int) -> Leak | None:
    """Return the leak of questions without a training split; half of the images, drawn by seed, serve as training."""
    photographs = seeded_generator(seed, "leak").permutation(sorted({question.photograph for question in questions}))
    train = set(photographs[: len(photographs) // 2].tolist())
    halves = [[q for q in questions if (q.photograph in train) == wanted] for wanted in (True, False)]
    return measure_leak(*halves) if all(halves) else None


def measure_leak(train: Sequence[Question], test: Sequence[Question]) -> Leak:
    """Return the accuracy of each heuristic on the test questions; `chance` is the accuracy of guessing.

    - longest, shortest: by number of parts.
    - most_frequent_parts: by the mean frequency of the parts in the correct answers of the training questions.
    - middle: the smallest number of parts that differ from the other four lists, summed.
    - bag_of_parts: a linear classifier of the set of parts, fitted to the training questions.

    Raises ValueError without training or test questions.
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
    """Return a weight per part, such that the sum over a list is its logit among the lists of a question.

    Conditional logistic regression with an L2 penalty of PENALTY / 2 times the squared weights.
    """
    parts = sorted({part for question in questions for listed in question.choice_parts for part in listed})
    column = {part: position for position, part in enumerate(parts)}
    lists = [listed for question in questions for listed in question.choice_parts]
    rows = [row for row, listed in enumerate(lists) for _ in listed]
    columns = [column[part] for listed in lists for part in listed]
    features = sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(lists), len(parts)))
    counts = np.array([len(question.choice_parts) for question in questions])
    is_choice = np.arange(counts.max()) < counts[:, None]  # (questions, most choices of any)
    right = np.zeros(is_choice.shape, dtype=bool)
    right[np.arange(len(questions)), [question.correct for question in questions]] = True

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = np.full(is_choice.shape, -np.inf)
        logits[is_choice] = features @ weights
        loss = -log_softmax(logits, axis=1)[right].sum() + PENALTY / 2 * weights @ weights
        return loss, features.T @ (softmax(logits, axis=1) - right)[is_choice] + PENALTY * weights

    fitted = minimize(loss_and_gradient, np.zeros(len(parts)), jac=True, method="L-BFGS-B")
    return dict(zip(parts, fitted.x.tolist(), strict=True))


def _hit(question: Question, score: Callable[[list[list[str]]], Sequence[float]]) -> float:
    scores = np.asarray(score(question.choice_parts), dtype=float)
    best = np.flatnonzero(scores >= scores.max() - 1e-9)
    return float(question.correct in best) / len(best)
