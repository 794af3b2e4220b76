"""The confidence of an answer: what images of other kinds do to it, and what people are told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from configuration_plum import PlumConfig
from plum_partonomy.inference.checkpoint import load_checkpoint
from plum_partonomy.inference.one_image import Plum, ask, finish, segment_phrases, warn_of_unknown_image
from processing_plum import PlumPipeline
from scripts import calibrate_confidence as script
from tests.runs import make_records, record
from tests.tiny import conversation, random_image, tiny_config, tiny_model, tiny_processor

NOISE = {"mean": [[0.0] * 32], "std": [[1.0] * 32], "intercept": 1.0, "slope": 2.0, "threshold": 0.5}


def calibrated_model(**changes):
    model = tiny_model()
    model.config.image_statistics = {**NOISE, **changes}
    return model


def test_the_confidence_is_the_logistic_of_the_log_distance_written_out():
    model = calibrated_model(mean=[[0.1] * 32, [-0.2] * 32], std=[[2.0] * 32, [1.5] * 32])
    embeddings = torch.randn(3, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    found = model.rate_images(embeddings)
    for embedding, confidence in zip(embeddings.numpy(), found.tolist(), strict=True):
        kinds = [(0.1, 2.0), (-0.2, 1.5)]
        distance = min(np.mean([((channel.mean() - m) / s) ** 2 for channel in embedding]) for m, s in kinds)
        assert confidence == pytest.approx(1 / (1 + np.exp(-(1.0 - 2.0 * np.log(distance)))), rel=1e-4)
    assert tiny_model().rate_images(embeddings) is None


def test_answers_carry_the_confidence_of_their_own_image_and_none_without_one():
    model, processor = calibrated_model(), tiny_processor()
    images = [random_image(seed=1), random_image(seed=2)]
    chats = [conversation(image, "It is red.") for image in (images[1], None, images[0])]
    inputs = processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    answers = processor.post_process_segmentation(model.segment_answers(**inputs))
    alone = []
    for image in images:
        single = processor.apply_chat_template([conversation(image, "It is red.")], tokenize=True, return_dict=True)
        (answer,) = processor.post_process_segmentation(model.segment_answers(**single))
        alone.append(answer.confidence)
    assert answers[1].confidence is None
    assert [answers[2].confidence, answers[0].confidence] == pytest.approx(alone, rel=1e-4)
    assert alone[0] != alone[1]
    pipe = PlumPipeline(model, processor=processor)
    questions = [{"image": image, "text": "Which parts?"} for image in (images[1], None, images[0])]
    found = [answer["confidence"] for answer in pipe(questions, batch_size=3, max_new_tokens=1)]
    assert found[1] is None and [found[2], found[0]] == pytest.approx(alone, rel=1e-4)


def test_a_person_is_warned_below_the_threshold_alone():
    plum = Plum(calibrated_model(kinds="drawings of objects"), tiny_processor())
    answer = finish(plum, segment_phrases(plum, random_image(), ["wheel"]))
    assert 0 < answer.confidence < 1
    sure, unsure = replace(answer, confidence=0.6), replace(answer, confidence=0.4)
    assert warn_of_unknown_image(plum, sure) is None
    said = "This image is unlike the training images, drawings of objects: answer and masks may be"
    assert warn_of_unknown_image(plum, unsure) == f"{said} meaningless."
    uncalibrated = Plum(tiny_model(), plum.processor)
    reply = ask(uncalibrated, random_image(), "Which?", max_new_tokens=3)
    assert finish(uncalibrated, reply).confidence is None
    assert warn_of_unknown_image(uncalibrated, finish(uncalibrated, reply)) is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"threshold": None}, r"image_statistics lacks \['threshold'\]; run scripts/calibrate_confidence.py again"),
        (
            {"mean": [[0.0] * 3]},
            r"a mean and a deviation of 32 channels, SAM's, .* found 1 and 1 of \[3, 32\] channels",
        ),
        ({"std": [[1.0] * 32] * 2}, "for each kind of images, found 1 and 2"),
        ({"slope": "3"}, "image_statistics has slope = '3', expected a number"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(changes, message):
    statistics = {name: value for name, value in {**NOISE, **changes}.items() if value is not None}
    fields = tiny_config().to_dict() | {"image_statistics": statistics}
    with pytest.raises(Exception, match=message):
        PlumConfig(**fields)


def test_calibration_tells_two_kinds_apart_and_writes_it_into_the_config(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    for kind in ("noise", "dark"):
        (tmp_path / kind).mkdir()
        for number, split in enumerate(("validation", "test")):
            rows = [record(100 * number + i, 1) for i in range(12)]
            for row in rows:
                if kind == "dark":
                    row["image"] = row["image"].point(lambda value: value // 12)
            make_records(rows).to_parquet(str(tmp_path / kind / f"{split}.parquet"))
    sources = [json.dumps({"dataset": str(tmp_path / kind), "name": "default"}) for kind in ("noise", "dark")]
    words = ["script", "--model", str(tmp_path / "model"), "--kinds", "noise", "--known", sources[0]]
    monkeypatch.setattr("sys.argv", [*words, "--other", sources[1]])
    script.main()
    assert "auroc 1.000" in capsys.readouterr().out
    model, processor = load_checkpoint(tmp_path / "model")
    plum = Plum(model.eval(), processor)
    noise = finish(plum, segment_phrases(plum, random_image(40, 70, seed=400), ["wheel"]))
    dark = finish(
        plum, segment_phrases(plum, random_image(40, 70, seed=401).point(lambda value: value // 12), ["wheel"])
    )
    assert noise.confidence > 0.5 > dark.confidence
    assert warn_of_unknown_image(plum, noise) is None and "unlike" in warn_of_unknown_image(plum, dark)


def test_the_logistic_fit_is_finite_where_two_kinds_never_meet():
    intercept, slope = script.fit_logistic(np.array([-1.0, -0.5]), np.array([3.0, 4.0]))
    assert np.isfinite([intercept, slope]).all() and slope > 0
    assert intercept - slope * -0.5 > 0 > intercept - slope * 3.0
