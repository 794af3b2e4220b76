"""Metrics of tasks other than PARTONOMY, question by question: masks against one true mask, text against answers.

referring, reasoning    gIoU, the mean IoU over questions, and cIoU, the sum of intersections over the sum of unions
                        (LISA, arXiv 2308.00692, section 5.1); an empty prediction for an empty target counts 1
instructed_parts        the same, and P@50, the share of questions with an IoU of at least 0.5 (InstructPart, arXiv
                        2505.18291)
generalized_referring   gIoU and cIoU, and N-acc and T-acc, the shares of questions without (with) a target for which
                        nothing (something) is found (GRES, arXiv 2306.00968, section 3)
semantic_parts          mIoU: intersections over unions of a class summed over questions, then the mean over classes
gqa                     exact match, ignoring case, surrounding blanks and a full stop
textvqa                 soft accuracy: an answer of three of the other annotators is correct (VQA, arXiv 1505.00468,
                        section 5), averaged over leaving out each annotator
pope                    accuracy, precision, recall, F1 of "yes", and the share of "yes" (POPE, arXiv 2305.10355)
"""

import re
from collections.abc import Iterable, Sequence
from math import fsum

import numpy as np

from plum_partonomy.scoring.bootstrap import Figures, Ratio, Tally, interval, ratio_draws, ratio_figures
from plum_partonomy.scoring.mask_metrics import RLE, area, overlap, unite

__all__ = ["TASKS", "class_name", "mask_ratios", "says_yes", "soft_accuracy", "summarise_task", "text_ratios"]

MASK_TASKS = {
    "referring": ("giou", "ciou"),
    "reasoning": ("giou", "ciou"),
    "instructed_parts": ("giou", "ciou", "p50"),
    "generalized_referring": ("giou", "ciou", "n_acc", "t_acc"),
    "semantic_parts": ("miou",),
}
TEXT_TASKS = {
    "gqa": ("exact_match",),
    "textvqa": ("soft_accuracy",),
    "pope": ("accuracy", "precision", "recall", "f1", "yes_rate"),
}
TASKS = MASK_TASKS | TEXT_TASKS
"""Task -> its metrics."""

NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


# ---------------------------------------------------------------- masks


def mask_ratios(task: str, predicted: Sequence[RLE], true: Sequence[RLE], *, label: str | None) -> dict[str, Ratio]:
    """Return the contribution of one question to the metrics of its task.

    Args:
        task: One of MASK_TASKS.
        predicted: Predicted masks, merged before the comparison; empty if nothing was found.
        true: True masks, merged; empty if the image does not show the target.
        label: Name of the target, the class in `semantic_parts`; None without a target.
    """
    both, united = _overlap(predicted, true)
    if task == "semantic_parts":
        return {} if label is None else {class_name(label): (both, united)}
    ratios: dict[str, Ratio] = {"giou": (both / united if united else 1.0, 1), "ciou": (both, united)}
    if task == "instructed_parts":
        ratios["p50"] = (ratios["giou"][0] >= 0.5, 1)
    if task == "generalized_referring":
        found = any(area(rle) for rle in predicted)
        ratios |= {"t_acc": (found, 1)} if true else {"n_acc": (not found, 1)}
    return ratios


def _overlap(predicted: Sequence[RLE], true: Sequence[RLE]) -> tuple[int, int]:
    if predicted and true:
        return overlap(unite(predicted), unite(true))
    return 0, area(unite([*predicted, *true])) if predicted or true else 0


def class_name(label: str) -> str:
    """Return one name for the two ways to name a class.

    >>> class_name("Wing of the bird"), class_name("bird wing")
    ('bird wing', 'bird wing')
    """
    part, _, whole = label.strip().lower().partition(" of the ")
    return f"{whole} {part}".strip()


# ---------------------------------------------------------------- words


def text_ratios(task: str, predicted: str, true: Sequence[str]) -> dict[str, Ratio]:
    """Return the contribution of one answer to the metrics of its task, one of TEXT_TASKS; `true` are the annotators'
    answers.
    """
    if task == "gqa":
        return {"exact_match": (_plain(predicted) == _plain(true[0]), 1)}
    if task == "textvqa":
        return {"soft_accuracy": (soft_accuracy(predicted, true), 1)}
    said, meant = says_yes(predicted), _plain(true[0]) == "yes"
    hit = said and meant
    return {
        "accuracy": (said == meant, 1),
        "precision": (hit, said),
        "recall": (hit, meant),
        "f1": (2 * hit, said + meant),
        "yes_rate": (said, 1),
    }


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def says_yes(answer: str) -> bool:
    """Return whether the first sentence has neither "no" nor "not", as in POPE's evaluation.

    >>> says_yes("Yes, there is a dog."), says_yes("There is no dog. Yes."), says_yes("No, there is not.")
    (True, False, False)
    """
    words = answer.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def soft_accuracy(predicted: str, true: Sequence[str]) -> float:
    """Return min(1, matches / 3), averaged over leaving out each annotator.

    >>> soft_accuracy("The Two dogs!", ["2 dogs", "two dogs", "dog", "2 dogs"]), soft_accuracy("cat", ["dog"] * 4)
    (0.75, 0.0)
    """
    matches = [vqa_words(answer) == vqa_words(predicted) for answer in true]
    scores = [min(1.0, (sum(matches) - left_out) / 3) for left_out in matches]
    return fsum(scores) / len(scores)


def vqa_words(answer: str) -> str:
    """Return an answer as the VQA evaluation compares it: lower case, without punctuation and articles, numbers as
    digits.

    The evaluation restores apostrophes of listed contractions ("dont"); here all apostrophes are removed.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ")
    original = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if beside_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text).replace("'", "")
    return " ".join(NUMBER_WORDS.get(word, word) for word in text.split() if word not in ARTICLES)


# ---------------------------------------------------------------- all questions


def summarise_task(
    task: str, tallies: Sequence[Tally], image_ids: Sequence[str]
) -> tuple[Figures, dict[str, tuple[float, float]]]:
    """Return the metrics of a task, None where no question applies, and their 95 % bootstrap intervals over images."""
    names = TASKS[task]
    if task != "semantic_parts":
        draws = ratio_draws(tallies, image_ids, names=names)
        return ratio_figures(tallies, names=names), {name: interval(values) for name, values in draws.items()}
    classes = sorted({name for tally in tallies for name in tally.ratios})
    if not classes:
        return {"miou": None}, {}
    draws = np.stack(list(ratio_draws(tallies, image_ids, names=classes).values()))  # (classes, draws)
    return {"miou": _mean(ratio_figures(tallies, names=classes).values())}, {
        "miou": interval(np.nanmean(draws, axis=0))
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return fsum(values) / len(values)
