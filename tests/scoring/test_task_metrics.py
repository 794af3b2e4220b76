"""Figures of other tasks against naive versions on dense arrays and against the words of their evaluation scripts."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plum_partonomy.masks import encode
from plum_partonomy.scoring import task_metrics
from plum_partonomy.scoring.bootstrap import Tally
from plum_partonomy.scoring.task_metrics import (
    TASKS,
    mask_ratios,
    says_yes,
    soft_accuracy,
    summarise_task,
    text_ratios,
    vqa_words,
)

SIZE = (3, 4)
masks = st.lists(arrays(bool, SIZE), max_size=3)


def union(dense):
    return np.any(dense, axis=0) if dense else np.zeros(SIZE, bool)


def figures(task, questions):
    tallies = [Tally(ratios) for ratios in questions]
    return summarise_task(task, tallies, [f"i{number // 2}" for number in range(len(tallies))])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(masks, st.lists(arrays(bool, SIZE).filter(np.any), max_size=2)), min_size=1, max_size=5))
def test_referring_figures_equal_a_naive_dense_version(pairs):
    ratios = [
        mask_ratios("generalized_referring", [encode(m) for m in found], [encode(m) for m in true], label=None)
        for found, true in pairs
    ]
    both = [(union(found) & union(true)).sum() for found, true in pairs]
    either = [(union(found) | union(true)).sum() for found, true in pairs]
    ious = [b / e if e else 1.0 for b, e in zip(both, either, strict=True)]
    found, intervals = figures("generalized_referring", ratios)
    assert found["giou"] == pytest.approx(np.mean(ious))
    assert found["ciou"] == pytest.approx(sum(both) / sum(either) if sum(either) else 0.0)
    nothing = [not union(found).any() for found, true in pairs if not true]
    something = [union(found).any() for found, true in pairs if true]
    assert found["n_acc"] == (pytest.approx(np.mean(nothing)) if nothing else None)
    assert found["t_acc"] == (pytest.approx(np.mean(something)) if something else None)
    assert all(low <= high for low, high in intervals.values())


def test_a_class_pools_its_pixels_over_images_before_the_mean_over_classes():
    left, first = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    left[:, :2], first[:, :1] = True, True
    asked = [("bird wing", first, left), ("wing of the bird", left, left), ("tail", first, left)]
    ratios = [
        mask_ratios("semantic_parts", [encode(found)], [encode(true)], label=label) for label, found, true in asked
    ]
    ratios.append(mask_ratios("semantic_parts", [encode(left)], [], label=None))
    found, intervals = figures("semantic_parts", ratios)
    assert found["miou"] == pytest.approx((9 / 12 + 3 / 6) / 2)
    assert intervals["miou"][0] <= found["miou"] <= intervals["miou"][1]
    assert figures("semantic_parts", [{}]) == ({"miou": None}, {})


def test_gqa_compares_the_whole_answer_but_for_case_blanks_and_a_full_stop():
    answers = [("Left.", "left"), (" dog", "dog"), ("a dog", "dog"), ("dogs", "dog")]
    found, _ = figures("gqa", [text_ratios("gqa", said, [true]) for said, true in answers])
    assert found == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("The  Stop-sign", "stop sign"),
        ("coca - cola!", "coca cola"),
        ("1,000 dollars", "1000 dollars"),
        ("ten o'clock.", "10 oclock"),
        ("3.5", "3.5"),
        ("None", "0"),
        ("a man's hat", "man s hat"),
    ],
)
def test_words_are_compared_as_the_vqa_evaluation_normalises_them(answer, words):
    assert vqa_words(answer) == words


@given(st.lists(st.sampled_from(["cat", "dog"]), min_size=1, max_size=10))
def test_soft_accuracy_is_the_mean_over_leaving_out_each_annotator(answers):
    scores = []
    for index in range(len(answers)):
        others = answers[:index] + answers[index + 1 :]
        scores.append(min(1, others.count("cat") / 3))
    assert soft_accuracy("A cat", answers) == pytest.approx(np.mean(scores))


def test_pope_counts_yes_as_positive_and_reads_the_first_sentence():
    answers = [("Yes, a dog.", "yes"), ("There is not. Yes.", "yes"), ("yes", "no"), ("No", "No")]
    found, _ = figures("pope", [text_ratios("pope", said, [true]) for said, true in answers])
    assert found == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_rate": 0.5}
    assert says_yes("Nothing is noted") and not says_yes("no")


def test_every_task_gives_every_figure_it_names_and_the_examples_run():
    mask = encode(np.ones(SIZE, bool))
    for task, names in TASKS.items():
        if task in task_metrics.MASK_TASKS:
            ratios = [mask_ratios(task, [mask], true, label=label) for true, label in (([mask], "wing"), ([], None))]
        else:
            ratios = [text_ratios(task, "yes", ["yes"] * 4)]
        found, intervals = figures(task, ratios)
        assert tuple(found) == names == tuple(intervals)
    assert doctest.testmod(task_metrics).failed == 0
