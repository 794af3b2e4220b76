"""`--task correction`: measured on a tiny model against segmenting one answer at a time, and its metrics by hand."""

import json

import numpy as np
import pytest
import torch

from plum_partonomy.evaluation.corrections import measure_answers
from plum_partonomy.evaluation.run import main as evaluate_plum
from plum_partonomy.masks import DataError, decode, encode
from plum_partonomy.scoring.clicks import next_click
from plum_partonomy.scoring.corrections import match_equal, read_corrections, summarise_corrections
from plum_partonomy.scoring.mask_metrics import iou_matrix
from tests.runs import make_records, record
from tests.tiny import conversation, random_image, random_mask, tiny_model, tiny_processor

WHEELS = "I can see a <p>wheel</p>, another <p>wheel</p>, a <p>tail</p> and a third <p>wheel</p>."
TWO = "A <p>wheel</p> and a <p>wheel</p>."


def answer(number: int, text: str) -> dict:
    count = text.count("<p>")
    return {
        "id": f"{number}/0",
        "image_id": str(number),
        "row": number,
        "image": random_image(40, 60, seed=number),
        "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": text}],
        "masks": [random_mask(40, 60, seed=10 * number + i) for i in range(count)],
    }


def restless_model(correction_window: float | None):
    """A tiny model whose later masks depend visibly on earlier ones."""
    model = tiny_model(correction_window=correction_window)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.mask_feedback.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def segment_alone(model, processor, asked: dict, given: dict) -> list:
    """The masks of one answer by itself, given true masks by span."""
    chat = conversation(asked["image"], asked["messages"][1]["content"], "Which?")
    inputs = processor.apply_chat_template([chat], masks=[asked["masks"]], tokenize=True, return_dict=True)
    outputs = model.segment_spans(**inputs, given_masks={span: asked["masks"][mask] for span, mask in given.items()})
    return [encode(span.mask) for span in processor.post_process_segmentation(outputs)[0].spans]


@pytest.fixture(scope="module", params=[None, 1.5], ids=["image", "window"])
def measured(request):
    model, processor = restless_model(request.param), tiny_processor()
    answers = [answer(1, WHEELS), answer(2, TWO), answer(3, WHEELS)]
    return model, processor, answers, measure_answers(model, processor, answers)


def test_each_iou_equals_that_of_the_answer_segmented_alone(measured):
    model, processor, answers, results = measured
    for asked, found in zip(answers, results, strict=True):
        true = [encode(mask) for mask in asked["masks"]]
        own = iou_matrix(segment_alone(model, processor, asked, {}), true)
        assert found.own == pytest.approx(own.diagonal().tolist(), abs=1e-6)
        for span in range(len(true)):
            masks = segment_alone(model, processor, asked, {i: i for i in range(span)})
            matrix = iou_matrix(masks, true)
            assert found.given[span] == pytest.approx(matrix[span, span], abs=1e-6)
            if span:
                targets = match_equal(matrix, found.phrases, {i: i for i in range(span)})
                wanted = [matrix[i, targets[i]] for i in range(span, len(true))]
                assert found.matched_given[span - 1] == pytest.approx(wanted, abs=1e-6)
    assert any(found.given[1:] != pytest.approx(found.own[1:], abs=1e-3) for found in results)


def test_the_curve_gives_the_worst_mask_first_and_looks_at_those_not_given(measured):
    model, processor, answers, results = measured
    for asked, found in zip(answers, results, strict=True):
        true, given, curve = [encode(mask) for mask in asked["masks"]], {}, []
        while len(given) < min(4, len(true)):
            masks = segment_alone(model, processor, asked, given)
            matrix = iou_matrix(masks, true)
            targets = match_equal(matrix, found.phrases, given)
            left = {i: matrix[i, targets[i]] for i in range(len(true)) if i not in given}
            curve.append(np.mean(list(left.values())))
            worst = min(left, key=left.get)
            if len(given) == 1:
                assert found.corrected == next(iter(given)) and found.after == masks
            given[worst] = targets[worst]
        assert found.curve == pytest.approx(curve, abs=1e-6)
        assert len(found.curve) == min(4, len(true))


def click_alone(model, processor, asked: dict, span: int, target: int) -> list:
    """Clicks on one span, with the masks and IoUs after each."""
    chat = conversation(asked["image"], asked["messages"][1]["content"], "Which?")
    inputs = processor.apply_chat_template([chat], masks=[asked["masks"]], tokenize=True, return_dict=True)
    outputs, true, clicks, results = model.segment_spans(**inputs), asked["masks"][target], [], []
    mask = processor.post_process_segmentation(outputs)[0].spans[span].mask
    for _ in range(5):
        clicks.append(next_click(mask, true))
        outputs = model.segment_spans(
            **inputs,
            input_points={span: [(x, y) for x, y, _ in clicks]},
            input_labels={span: [int(inside) for *_, inside in clicks]},
            input_masks={span: outputs.pred_masks[span] if outputs.mask_windows is None else torch.from_numpy(mask)},
        )
        mask = processor.post_process_segmentation(outputs)[0].spans[span].mask
        results.append((clicks[-1], encode(mask), (mask & true).sum() / (mask | true).sum()))
    return results


def test_clicks_are_those_on_each_span_alone_with_its_present_mask(measured):
    model, processor, answers, results = measured
    clicks, next_equal = set(), {WHEELS: {0: 1, 1: 3, 3: 0}, TWO: {0: 1, 1: 0}}
    for asked, found in zip(answers, results, strict=True):
        own = iou_matrix(segment_alone(model, processor, asked, {}), [encode(mask) for mask in asked["masks"]])
        targets = match_equal(own, found.phrases, {})
        for span, target in enumerate(targets):
            alone = click_alone(model, processor, asked, span, target)
            assert [ious[span] for ious in found.clicked] == pytest.approx([iou for *_, iou in alone], abs=1e-6)
            assert found.after_clicks[span] == alone[2][1]
            clicks |= {click for click, *_ in alone}
        for place, (span, other) in enumerate(next_equal[asked["messages"][1]["content"]].items()):
            alone = click_alone(model, processor, asked, span, targets[other])
            assert [ious[place] for ious in found.moved] == pytest.approx([iou for *_, iou in alone], abs=1e-6)
        assert {len(ious) for ious in found.moved} == {len(next_equal[asked["messages"][1]["content"]])}
    assert len(clicks) > 20


def test_a_mask_without_errors_gets_no_click_and_stays(measured):
    model, processor, answers, _ = measured
    own = [decode(mask) for mask in segment_alone(model, processor, answers[1], {})]
    assert all(mask.any() for mask in own)
    (found,) = measure_answers(model, processor, [{**answers[1], "masks": own}])
    assert found.matched == [1, 1] and found.clicked == [[1, 1]] * 5
    assert found.after_clicks == found.before


def test_an_answer_without_equal_words_has_no_other_instance_to_click_on(measured):
    model, processor, *_ = measured
    results = measure_answers(model, processor, [answer(4, "A <p>wheel</p> and a <p>tail</p>.")])
    assert results[0].moved == [[]] * 5
    metrics = summarise_corrections(results)
    assert metrics["overall"]["moved_iou_after_1_click"] is None and metrics["overall"]["iou_after_1_click"] >= 0
    assert "moved_iou_after_1_click" not in metrics["intervals"]["overall"]


def test_equal_spans_are_matched_among_themselves_and_without_those_given():
    ious = np.array([[0.1, 0.9, 0.9, 0.2], [0.0, 0.8, 0.9, 0.3], [0.9, 0.9, 0.3, 0.9], [0.5, 0.6, 0.9, 0.0]])
    phrases = ["wheel", "wheel", "tail", "wheel"]
    assert match_equal(ious, phrases, {}) == [1, 3, 2, 0]
    assert match_equal(ious, phrases, {1: 0}) == [1, 0, 2, 3]


def test_metrics_are_means_over_spans_with_intervals_over_images(measured):
    *_, results = measured
    metrics = summarise_corrections(results)
    overall, intervals = metrics["overall"], metrics["intervals"]["overall"]
    assert (overall["n"], overall["images"]) == (3, 3)
    own = np.concatenate([found.own[1:] for found in results])
    given = np.concatenate([found.given[1:] for found in results])
    assert overall["later_iou_own"] == pytest.approx(own.mean())
    assert overall["later_iou_given"] == pytest.approx(given.mean())
    assert overall["correction_gain"] == pytest.approx(given.mean() - own.mean())
    assert overall["matched_iou"] == pytest.approx(np.concatenate([found.matched for found in results]).mean())
    assert overall["matched_iou"] >= np.concatenate([found.own for found in results]).mean()
    for count, name in ((1, "iou_after_1_click"), (3, "iou_after_3_clicks"), (5, "iou_after_5_clicks")):
        clicked = np.concatenate([found.clicked[count - 1] for found in results])
        assert overall[name] == pytest.approx(clicked.mean())
        assert intervals[name][0] <= overall[name] <= intervals[name][1]
        moved = np.concatenate([found.moved[count - 1] for found in results])
        assert len(moved) == 3 + 2 + 3 and overall[f"moved_{name}"] == pytest.approx(moved.mean())
    repeats = np.concatenate([found.repeats for found in results])
    assert len(repeats) == 2 + 1 + 2 and overall["repeat_overlap"] == pytest.approx(repeats.mean())
    assert overall["correction_curve"][2] == pytest.approx(np.mean([results[0].curve[2], results[2].curve[2]]))
    for name in ("later_iou_own", "correction_gain", "matched_iou"):
        assert intervals[name][0] <= overall[name] <= intervals[name][1]


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint, and a data set of six answers with two masks and two with one."""
    folder = tmp_path_factory.mktemp("correction")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    records = make_records([record(number, 2 if number < 6 else 1) for number in range(8)])
    (folder / "data").mkdir()
    records.to_parquet(str(folder / "data" / "test.parquet"))
    return folder


def options(folder, output_dir, **changes) -> list[str]:
    chosen = {"model": folder / "model", "task": "correction", "dataset": folder / "data", "name": "default"}
    chosen |= {"batch_size": 2, "device": "cpu", "output_dir": output_dir} | changes
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def test_a_run_writes_metrics_report_and_answers_and_goes_on_where_it_stopped(folders, tmp_path, capsys):
    evaluate_plum(options(folders, tmp_path / "whole"))
    printed = capsys.readouterr().out
    assert "correction gain" in printed and "iou after 3 clicks" in printed
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics["overall"]["n"] == 6 and metrics["run"]["task"] == "correction"
    report = (tmp_path / "whole" / "report.html").read_text()
    assert report.count("<figcaption>after one given mask") == report.count("<figcaption>after 3 clicks on each") == 6
    lines = (tmp_path / "whole" / "predictions.jsonl").read_text().splitlines(keepends=True)
    whole = read_corrections(tmp_path / "whole" / "predictions.jsonl")
    for count in (2, 3):  # after a batch, and within one
        part = tmp_path / f"part{count}"
        part.mkdir()
        (part / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
        (part / "predictions.jsonl").write_text("".join(lines[:count]) + lines[count][:40])
        evaluate_plum(options(folders, part))
        assert read_corrections(part / "predictions.jsonl") == whole
        assert json.loads((part / "metrics.json").read_text())["overall"] == metrics["overall"]
    with pytest.raises(DataError, match=r"another run, with batch_size 2 \(now 3\): give another folder"):
        evaluate_plum(options(folders, part, batch_size=3))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset": "partonomy", "name": "mini_questions"}, "needs grounded conversations, .* 'mini_questions' have"),
        ({"split": "test[6:]"}, r"no answer of 'default', split 'test\[6:\]', has two: "),
    ],
)
def test_records_without_later_masks_are_refused(folders, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        evaluate_plum(options(folders, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
