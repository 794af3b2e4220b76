import doctest
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from plum_partonomy.masks import decode, encode
from plum_partonomy.records import PartMask, Question
from plum_partonomy.scoring import bootstrap, mask_metrics, metrics
from plum_partonomy.scoring import results as scoring_results
from plum_partonomy.scoring.bootstrap import Tally, confidence_intervals, resample, summarise
from plum_partonomy.scoring.mask_metrics import MATCHINGS, average_precision, matched_ious, overlap, strict_ious
from plum_partonomy.scoring.metrics import (
    Counts,
    accuracy,
    evaluate_predictions,
    iou_per_part,
    part_counts,
    pool,
)
from plum_partonomy.scoring.predictions import Prediction, SpanMask

PARTS = ("flag", "hull", "mast", "sail")
SIZE = (4, 5)  # (height, width)

masks = arrays(bool, SIZE)
named_masks = st.dictionaries(st.sampled_from(PARTS), masks, max_size=4)


# ---------------------------------------------------------------- naive versions on dense arrays


def naive_iou(predicted, true):
    union = np.logical_or(predicted, true).sum()
    return np.logical_and(predicted, true).sum() / union if union else None


def naive_strict(predicted, true):
    empty = np.zeros(SIZE, bool)
    ious = [
        naive_iou(predicted.get(name, empty), true.get(name, empty)) for name in PARTS if name in {*predicted, *true}
    ]
    both = [name for name in PARTS if name in {*predicted, *true}]
    # one side only scores 0 even where that mask is empty
    ious = [iou if name in predicted and name in true else 0.0 for name, iou in zip(both, ious, strict=True)]
    return [iou for iou in ious if iou is not None]


def naive_best_sum(ious):
    """Largest sum of a one-to-one matching, by trying all."""
    ious = ious if ious.shape[0] <= ious.shape[1] else ious.T
    rows = range(ious.shape[0])
    return max(sum(ious[rows, columns]) for columns in itertools.permutations(range(ious.shape[1]), len(rows)))


def as_rles(dense):
    return [(name, encode(mask)) for name, mask in dense.items()]


@given(named_masks, named_masks)
def test_strict_ious_equal_a_naive_dense_version(predicted, true):
    found = strict_ious(as_rles(predicted), as_rles(true))
    assert list(found.values()) == pytest.approx(naive_strict(predicted, true))


@given(masks, masks, masks)
def test_masks_of_one_name_are_united_whatever_its_case_and_blanks(first, second, true):
    found = strict_ious([("Hull ", encode(first)), ("hull", encode(second))], [("hull", encode(true))])
    expected = naive_iou(first | second, true)
    assert found == ({} if expected is None else {"hull": pytest.approx(expected)})


@given(st.lists(masks, min_size=1, max_size=4), st.lists(masks, min_size=1, max_size=4))
def test_reference_matching_equals_a_naive_dense_version(predicted, true):
    def iou(left, right):
        value = naive_iou(left, right)
        return 1.0 if value is None else value

    rles = [encode(mask) for mask in predicted], [encode(mask) for mask in true]
    matrix = np.array([[iou(left, right) for right in true] for left in predicted])
    assert matched_ious(*rles, matching="paired") == pytest.approx(np.diagonal(matrix).tolist())
    assert matched_ious(*rles, matching="union") == pytest.approx([iou(np.any(predicted, 0), np.any(true, 0))])
    assert sum(matched_ious(*rles, matching="hungarian")) == pytest.approx(naive_best_sum(matrix))
    greedy = matched_ious(*rles, matching="greedy")
    assert greedy[0] == pytest.approx(matrix.max())
    assert len(greedy) == min(matrix.shape)
    assert greedy == sorted(greedy, reverse=True)


def test_matching_without_masks_on_one_side_is_an_error_with_both_counts():
    with pytest.raises(ValueError, match="found 0 predicted, 1 true"):
        matched_ious([], [encode(np.ones(SIZE, bool))])


# ---------------------------------------------------------------- the recorded original


@pytest.fixture(scope="module")
def recorded(fixtures_dir):
    (path,) = fixtures_dir.glob("parity/metrics_*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("matching", MATCHINGS)
def test_reference_ious_equal_the_recorded_original_case_by_case(recorded, matching):
    for case in recorded["iou"]["cases"]:
        ious = matched_ious(case["predictions"], case["targets"], matching=matching)
        expected = case["expected"][matching]
        assert np.mean(ious) == pytest.approx(expected["mean"], abs=1e-12), case["note"]
        assert len(ious) == len(expected["pairs"]), case["note"]


@pytest.mark.parametrize("matching", MATCHINGS)
def test_reference_macro_and_micro_means_equal_the_recorded_original(recorded, matching):
    cases = recorded["iou"]["cases"]
    figures = summarise([Tally(mask_metrics.reference_ratios(case["predictions"], case["targets"])) for case in cases])
    name = "reference" if matching == "paired" else f"reference_{matching}"
    macro, micro = figures[f"{name}_macro_giou"], figures[f"{name}_micro_giou"]
    summaries = recorded["iou"]["summaries"]
    assert macro == pytest.approx(summaries[f"macro/{matching}"]["summarize"][f"gmIoU-{matching}"], abs=1e-12)
    assert micro == pytest.approx(summaries[f"micro/{matching}"]["summarize"][f"gmIoU-{matching}"], abs=1e-12)


def test_part_text_counts_equal_the_recorded_original(recorded):
    cases = recorded["part_text_exact"]["cases"]
    counts = [part_counts(case["predictions"], case["references"], protocol="reference") for case in cases]
    recorded_values = [case["expected"] for case in cases] + [recorded["part_text_exact"]["summarize"]]
    for expected, found in zip(recorded_values, [*counts, pool(counts)], strict=True):
        assert (found.precision, found.recall, found.f1) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1"])
        )


def test_choice_accuracy_equals_the_recorded_original(recorded):
    cases = recorded["mc_text"]["cases"]
    found = accuracy([case["predicted_index"] for case in cases], [case["target_index"] for case in cases])
    assert found == pytest.approx(recorded["mc_text"]["summarize"]["accuracy"])


def test_a_repeated_prediction_counts_each_time_in_reference_and_once_in_strict():
    assert part_counts(["wing"] * 3, ["wing"], protocol="reference").recall == 3.0
    assert part_counts(["wing", "Wing ", "wing"], ["wing"]) == Counts(1, 1, 1)


# ---------------------------------------------------------------- whole evaluations


def make_question(number, true, *, question_type="identification", distractors=(("anchor",), ("keel", "oar"))):
    parts = sorted(true)
    return Question(
        id=f"q{number}",
        image=None,
        image_id=f"i{number}",
        image_label="boat",
        question_type=question_type,
        question="What visible parts does the object in the image have?",
        choices=[", ".join(choice) for choice in [parts, *distractors]],
        correct=0,
        choice_parts=[parts, *map(list, distractors)],
        masks=[PartMask(label=part, rle=encode(true[part])) for part in parts],
    )


def as_spans(dense):
    return [SpanMask(text=name, start=0, end=4, rle=encode(mask), score=1.0) for name, mask in dense.items()]


def make_prediction(number, given, generated, *, scores=(0.0, 1.0, 2.0), tags=((1, 2),), wrong_image=None):
    return Prediction(
        question_id=f"q{number}",
        image_id=f"i{number}",
        choice_scores=list(scores),
        given_spans=as_spans(given),
        true_tags=[(1, 2)],
        predicted_tags=list(tags),
        generated_text="",
        generated_spans=as_spans(generated),
        wrong_image=wrong_image,
    )


visible = st.dictionaries(st.sampled_from(PARTS), masks.filter(np.any), min_size=1, max_size=4)
types = st.sampled_from(["identification", "positive", "negative"])
runs = st.lists(
    st.tuples(visible, named_masks, named_masks, types, st.permutations([0.1, 0.2, 0.3])), min_size=1, max_size=6
)


def build(run):
    questions = [make_question(i, true, question_type=kind) for i, (true, _, _, kind, _) in enumerate(run)]
    predictions = [
        make_prediction(i, given_answer, generated, scores=scores, tags=[(i % 2, 2)])
        for i, (_, given_answer, generated, _, scores) in enumerate(run)
    ]
    return questions, predictions


@settings(max_examples=40, deadline=None)
@given(runs)
def test_figures_equal_a_naive_dense_version(run):
    figures = evaluate_predictions(*build(run))["overall"]
    given_ious = [naive_strict(given_answer, true) for true, given_answer, *_ in run]
    own_ious = [naive_strict(generated, true) for true, _, generated, *_ in run]
    assert figures["n"] == len(run)
    assert figures["strict_macro_giou"] == pytest.approx(np.mean([np.mean(ious) for ious in given_ious if ious]))
    assert figures["strict_micro_giou"] == pytest.approx(np.mean(np.concatenate(given_ious)))
    assert figures["end_to_end_giou"] == pytest.approx(np.mean([np.mean(ious) for ious in own_ious if ious]))
    hits = sum(len(set(true) & set(generated)) for true, _, generated, *_ in run)
    predicted = sum(len(generated) for _, _, generated, *_ in run)
    true_count = sum(len(true) for true, *_ in run)
    assert figures["generated_part_precision"] == pytest.approx(hits / max(1, predicted))
    assert figures["generated_part_recall"] == pytest.approx(hits / true_count)
    assert figures["generated_part_f1"] == pytest.approx(2 * hits / (predicted + true_count))
    assert figures["generated_exact"] == pytest.approx(np.mean([set(t) == set(g) for t, _, g, *_ in run]))
    assert figures["choice_accuracy"] == pytest.approx(np.mean([np.argmin(scores) == 0 for *_, scores in run]))
    assert figures["span_f1"] == pytest.approx(np.mean([i % 2 == 1 for i in range(len(run))]))


@settings(max_examples=25, deadline=None)
@given(runs, st.randoms(use_true_random=False))
def test_the_order_of_questions_and_predictions_changes_nothing(run, random):
    questions, predictions = build(run)
    expected = evaluate_predictions(questions, predictions)
    random.shuffle(questions)
    random.shuffle(predictions)
    assert evaluate_predictions(questions, predictions) == expected
    assert list(iou_per_part(questions, predictions)) == sorted(iou_per_part(questions, predictions))


@settings(max_examples=25, deadline=None)
@given(st.lists(visible, min_size=1, max_size=4))
def test_a_perfect_prediction_scores_one_everywhere(truths):
    questions = [make_question(i, true) for i, true in enumerate(truths)]
    answers = [dict(sorted(true.items())) for true in truths]
    predictions = [make_prediction(i, answer, answer) for i, answer in enumerate(answers)]
    figures = evaluate_predictions(questions, predictions)["overall"]
    chance = {name for name in figures if name.endswith("_random")}
    model = {
        name: value
        for name, value in figures.items()
        if name not in chance | {"n", "photographs", "object_choice_accuracy"}
    }
    assert set(model.values()) == {1.0}
    assert all(part == {"mean_iou": 1.0, "n": part["n"]} for part in iou_per_part(questions, predictions).values())


def test_figures_by_type_are_those_of_the_questions_of_that_type_alone():
    left, full = np.zeros(SIZE, bool), np.ones(SIZE, bool)
    left[:, :2] = True
    questions = [make_question(0, {"hull": left}), make_question(1, {"hull": full}, question_type="positive")]
    predictions = [make_prediction(0, {"hull": left}, {}), make_prediction(1, {"hull": left}, {"hull": left})]
    figures = evaluate_predictions(questions, predictions)
    assert list(figures["by_type"]) == ["identification", "positive"]
    assert figures["by_type"]["positive"] == evaluate_predictions(questions[1:], predictions[1:])["overall"]
    assert figures["by_type"]["positive"].keys() == figures["overall"].keys()


def test_strict_punishes_missing_and_surplus_masks_which_reference_forgives():
    left, right = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    left[:, :2], right[:, 3:] = True, True
    question = make_question(0, {"hull": left, "mast": right})
    missing = evaluate_predictions([question], [make_prediction(0, {"hull": left}, {})])["overall"]
    surplus = {"hull": left, "mast": right, "flag": left}
    surplus = evaluate_predictions([question], [make_prediction(0, surplus, {})])["overall"]
    nothing = evaluate_predictions([question], [make_prediction(0, {}, {})])["overall"]
    assert (missing["strict_macro_giou"], missing["reference_macro_giou"]) == (0.5, 1.0)
    assert (surplus["strict_macro_giou"], surplus["reference_macro_giou"]) == (pytest.approx(2 / 3), 1.0)
    assert (nothing["strict_macro_giou"], nothing["reference_macro_giou"]) == (0.0, None)


def test_random_figures_are_the_mean_over_all_choices_of_pooled_counts():
    full = np.ones(SIZE, bool)
    question = make_question(0, {"hull": full, "mast": full}, distractors=(("hull",), ("hull", "keel", "oar")))
    figures = evaluate_predictions([question], [make_prediction(0, {}, {})])["overall"]
    assert figures["choice_accuracy_random"] == pytest.approx(1 / 3)
    # hits 2, 1, 1 of 2, 1, 3 named parts, where 2 are true each time
    assert figures["part_precision_random"] == pytest.approx(4 / 6)
    assert figures["part_recall_random"] == pytest.approx(4 / 6)


def test_the_wrong_image_control_gets_every_figure_under_its_own_suffix():
    full = np.ones(SIZE, bool)
    control = make_prediction(0, {}, {}, scores=(2.0, 1.0, 3.0), tags=())
    prediction = make_prediction(0, {"hull": full}, {"hull": full}, wrong_image=control)
    figures = evaluate_predictions([make_question(0, {"hull": full})], [prediction])["overall"]
    measured = {name for name in figures if not name.endswith(("_random", "_wrong_image"))}
    measured -= {"n", "photographs", "objects"}
    assert {f"{name}_wrong_image" for name in measured} <= figures.keys()
    assert (figures["choice_accuracy"], figures["choice_accuracy_wrong_image"]) == (1.0, 0.0)
    assert (figures["span_f1"], figures["span_f1_wrong_image"]) == (1.0, 0.0)
    assert (figures["strict_macro_giou"], figures["strict_macro_giou_wrong_image"]) == (1.0, 0.0)


def test_object_choices_are_scored_where_a_question_asks_for_the_object():
    full = np.ones(SIZE, bool)
    asked = replace(
        make_question(1, {"hull": full}, question_type="part_to_whole"),
        object_question="What is the object in the image?",
        object_choices=["It is a boat.", "It is a car."],
        object_classes=["boat", "car"],
        object_correct=1,
    )
    predictions = [
        make_prediction(0, {}, {}),
        replace(make_prediction(1, {}, {}), object_choice_scores=[0.5, 0.4]),
    ]
    figures = evaluate_predictions([make_question(0, {"hull": full}), asked], predictions)
    assert figures["overall"]["object_choice_accuracy"] == 1.0
    assert figures["overall"]["object_choice_accuracy_random"] == 0.5
    assert figures["by_type"]["identification"]["object_choice_accuracy"] is None


# ---------------------------------------------------------------- cIoU, average precision, intervals


@given(named_masks, named_masks)
def test_overlaps_of_all_parts_add_up_to_the_dense_pixel_counts(predicted, true):
    overlaps = mask_metrics.strict_overlaps(as_rles(predicted), as_rles(true))
    empty = np.zeros(SIZE, bool)
    pairs = [(predicted.get(name, empty), true.get(name, empty)) for name in {*predicted, *true}]
    assert sum(both for both, _ in overlaps.values()) == sum((left & right).sum() for left, right in pairs)
    assert sum(united for _, united in overlaps.values()) == sum((left | right).sum() for left, right in pairs)


@given(masks, masks)
def test_the_overlap_of_two_masks_is_that_of_their_pixels(left, right):
    assert overlap(encode(left), encode(right)) == ((left & right).sum(), (left | right).sum())


def naive_average_precision(detections, true):
    """COCO's 101 recalls, by walking over every cut of the confidence."""
    cuts = []
    for cut in sorted({score for score, _ in detections}, reverse=True):
        shown = [hit for score, hit in detections if score >= cut]
        cuts.append((sum(shown) / true, sum(shown) / len(shown)))
    return sum(max((p for r, p in cuts if r >= k / 100 - 1e-9), default=0.0) for k in range(101)) / 101


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.5, 0.7, 0.9]), st.booleans()), max_size=8), st.integers(0, 4))
def test_average_precision_equals_a_naive_version_in_any_order_of_equal_scores(detections, missing):
    true = missing + sum(hit for _, hit in detections)
    scores, hits = np.array(detections, dtype=float).reshape(-1, 2).T
    found = average_precision(scores, hits.astype(bool), true=true)
    assert found == (pytest.approx(naive_average_precision(detections, true)) if true else None)
    twice = average_precision(scores, hits.astype(bool), true=2 * true, weights=np.full(len(scores), 2.0))
    assert twice == (pytest.approx(found) if true else None)


@settings(max_examples=20, deadline=None)
@given(runs, st.lists(st.sampled_from("ab"), min_size=6, max_size=6))
def test_every_draw_of_the_images_has_the_figures_of_all_questions_about_them(run, image_ids):
    questions, predictions = build(run)
    image_ids = image_ids[: len(run)]
    tallies = [metrics.tally(*pair, mask_source="gt_answer") for pair in zip(questions, predictions, strict=True)]
    draws = resample(tallies, image_ids, resamples=3, seed=5)
    images = sorted(set(image_ids))
    weights = np.random.default_rng(5).multinomial(len(images), np.full(len(images), 1 / len(images)), size=3)
    for index, counts in enumerate(weights):
        drawn_times = dict(zip(images, counts, strict=True))
        drawn = summarise([t for t, image in zip(tallies, image_ids, strict=True) for _ in range(drawn_times[image])])
        for name, values in draws.items():
            expected = np.nan if drawn[name] is None else drawn[name]
            assert values[index] == pytest.approx(expected, nan_ok=True), name


@pytest.mark.parametrize("questions_per_image", [1, 4])
def test_an_interval_has_the_width_that_the_standard_error_over_images_says(questions_per_image):
    hits = np.repeat(np.arange(400) % 4 == 0, questions_per_image)
    image_ids = np.repeat([f"i{number}" for number in range(400)], questions_per_image).tolist()
    tallies = [Tally({"choice_accuracy": (float(hit), 1)}) for hit in hits]
    low, high = confidence_intervals(tallies, image_ids)["choice_accuracy"]
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (low, high) == (pytest.approx(0.25 - half, abs=0.006), pytest.approx(0.25 + half, abs=0.006))
    assert confidence_intervals(tallies, image_ids) == confidence_intervals(tallies, image_ids)


def test_intervals_stand_beside_the_figures_and_hold_them():
    left, full = np.zeros(SIZE, bool), np.ones(SIZE, bool)
    left[:, :2] = True
    questions = [make_question(number, {"hull": full}) for number in range(6)]
    predictions = [make_prediction(n, {"hull": left if n % 2 else full}, {"hull": left}) for n in range(6)]
    metrics = evaluate_predictions(questions, predictions, intervals=True)
    low, high = metrics["intervals"]["overall"]["strict_macro_giou"]
    assert low < metrics["overall"]["strict_macro_giou"] < high
    assert metrics["intervals"]["overall"]["choice_accuracy"] == (1.0, 1.0)
    assert list(metrics["intervals"]["by_type"]) == ["identification"]


def test_the_mask_figures_speak_of_the_masks_of_the_chosen_source():
    full = np.ones(SIZE, bool)
    question, prediction = make_question(0, {"hull": full}), make_prediction(0, {}, {"hull": full})
    figures = {
        source: evaluate_predictions([question], [prediction], mask_source=source)["overall"]["strict_ciou"]
        for source in ("gt_answer", "generated")
    }
    assert figures == {"gt_answer": 0.0, "generated": 1.0}


# ---------------------------------------------------------------- input that does not fit


def test_questions_and_predictions_that_do_not_belong_together_are_named():
    full = np.ones(SIZE, bool)
    questions = [make_question(0, {"hull": full}), make_question(1, {"hull": full})]
    first, second = make_prediction(0, {}, {}), make_prediction(1, {}, {})
    with pytest.raises(ValueError, match="no question"):
        evaluate_predictions([], [])
    with pytest.raises(ValueError, match=r"1 without \(first: \['q1'\]\)"):
        evaluate_predictions(questions, [first])
    with pytest.raises(ValueError, match=r"1 predictions of other questions \(first: \['q7'\]\)"):
        evaluate_predictions(questions, [first, second, make_prediction(7, {}, {})])
    with pytest.raises(ValueError, match="'q0' has two predictions"):
        evaluate_predictions(questions, [first, first, second])
    with pytest.raises(ValueError, match="ran for 1 of 2 questions"):
        evaluate_predictions(questions, [first, replace(second, wrong_image=second)])


def test_scores_or_masks_that_do_not_fit_the_question_are_named():
    question = make_question(0, {"hull": np.ones(SIZE, bool)})
    with pytest.raises(ValueError, match="'q0' has 3 choices, its prediction has 2 scores"):
        evaluate_predictions([question], [make_prediction(0, {}, {}, scores=(0.1, 0.2))])
    other_size = make_prediction(0, {"hull": np.ones((5, 4), bool)}, {})
    with pytest.raises(ValueError, match=r"\[4, 5\], the predicted mask of 'hull' has \[5, 4\]"):
        evaluate_predictions([question], [other_size])
    with pytest.raises(ValueError, match=r"\[4, 5\], the predicted mask of 'hull' has \[5, 4\]"):
        evaluate_predictions([question], [replace(make_prediction(0, {}, {}), wrong_image=other_size)])


def test_the_examples_of_docstring_and_documentation_run_as_they_stand():
    results = [doctest.testmod(module) for module in (mask_metrics, metrics, bootstrap, scoring_results)]
    results += [doctest.testfile("../../docs/benchmark.md")]
    assert [(result.failed, result.attempted > 0) for result in results] == [(0, True)] * 5
    assert decode({"size": [2, 3], "counts": "024"}).tolist() == [[True, False, False]] * 2
