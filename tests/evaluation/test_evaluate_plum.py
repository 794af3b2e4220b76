"""Whole runs on seven questions with a tiny model of random weights, most of them inside the test's own process."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import datasets
import pytest
import torch

from modeling_plum import PlumForConditionalGeneration
from modules_plum import keep_last_answer
from plum_partonomy.evaluation.answers import evaluate_answers
from plum_partonomy.evaluation.options import EvaluationArguments
from plum_partonomy.evaluation.partonomy import evaluate
from plum_partonomy.features import QUESTION_FEATURES
from plum_partonomy.inference.predictor import Predictor
from plum_partonomy.masks import DataError, encode
from plum_partonomy.records import PartMask, Question, as_row
from plum_partonomy.scoring.benchmark import Asked, fingerprint, load_questions
from plum_partonomy.scoring.metrics import evaluate_predictions, true_masks
from plum_partonomy.scoring.predictions import read_predictions
from tests import forks
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
PARTS = ("left wing", "tail", "wheel")
SIZES = {"image0": (50, 70), "image1": (64, 40), "image2": (64, 64)}  # (height, width)


def answer(parts):
    return f"The object in the image has the following visible parts: {', and '.join(parts)}."


def make_question(number, image_id, *, question_type="identification", **object_fields):
    height, width = SIZES[image_id]
    seed = int(image_id[-1])
    choice_parts = [["left wing", "tail"], ["tail"], ["tail", "wheel"]]
    correct = number % 3
    choice_parts = choice_parts[-correct:] + choice_parts[:-correct] if correct else choice_parts
    return Question(
        id=f"question{number}",
        image=random_image(height, width, seed=seed),
        image_id=image_id,
        image_label=f"label{seed}",
        question_type=question_type,
        question="What visible parts does the object in the image have?",
        choices=[answer(parts) for parts in choice_parts],
        correct=correct,
        choice_parts=choice_parts,
        masks=[PartMask(label=part, rle=encode(random_mask(height, width, seed=seed))) for part in PARTS],
        **object_fields,
    )


OBJECT_FIELDS = {
    "object_question": "What is the object in the image?",
    "object_choices": ["It is a plane.", "It is a car."],
    "object_classes": ["plane", "car"],
    "object_correct": 1,
}


@pytest.fixture(scope="module")
def question_set(tmp_path_factory):
    """A folder that load_dataset reads: seven questions about three images of different sizes."""
    folder = tmp_path_factory.mktemp("questions")
    questions = [make_question(number, f"image{number % 3}") for number in range(5)]
    questions += [make_question(5, "image0", question_type="whole_to_part", **OBJECT_FIELDS)]
    questions += [make_question(6, "image1", question_type="part_to_whole", **OBJECT_FIELDS)]
    rows = datasets.Dataset.from_list([as_row(question) for question in questions], features=QUESTION_FEATURES)
    rows.to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    with torch.no_grad():  # random weights tag next to nothing: lean towards B, so that answers have masks
        [*model.span_tagger.modules()][-1].bias.copy_(torch.tensor([0.0, 0.4, 0.0]))
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    (folder / "training_curves.csv").write_text("step,loss,eval_span_f1\n10,2.5,\n20,1.5,0.5\n")
    return folder


def arguments(model_dir, question_set, output_dir, **options):
    fields = {"dataset": str(question_set), "name": "default", "output_dir": str(output_dir)}
    if model_dir is not None:
        fields |= {"model": str(model_dir), "max_new_tokens": 12, "batch_size": 3, "device": "cpu"}
    return EvaluationArguments(**(fields | options))


def load_metrics(output_dir):
    """The metrics of a run without what tells runs apart."""
    metrics = json.loads((output_dir / "metrics.json").read_text())
    assert metrics.pop("run")["questions"] == 7
    return metrics


@pytest.fixture(scope="module")
def finished(model_dir, question_set, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    evaluate(arguments(model_dir, question_set, output_dir))
    return output_dir


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- a run and what it writes


def test_a_run_leaves_predictions_metrics_and_report_and_nothing_else(finished):
    assert listed(finished) == ["metrics.json", "predictions.jsonl", "report.html", "run.json"]
    predictions = read_predictions(finished / "predictions.jsonl")
    assert [prediction.question_id for prediction in predictions] == [f"question{number}" for number in range(7)]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["overall"]["n"] == 7
    assert metrics["overall"]["photographs"] == len({prediction.image_id for prediction in predictions})
    assert set(metrics["by_type"]) == {"identification", "part_to_whole", "whole_to_part"}
    for name in ("strict_macro_giou", "choice_accuracy", "span_f1", "generated_part_precision", "end_to_end_giou"):
        assert {name, f"{name}_wrong_image"} <= metrics["overall"].keys()
    assert metrics["overall"]["choice_accuracy_random"] == pytest.approx(1 / 3)
    assert metrics["run"]["versions"]["torch"] == version("torch")
    assert metrics["run"]["protocol"]["name"] == "published"
    report = (finished / "report.html").read_text()
    assert 'alt="training curves"' in report
    assert f"{metrics['overall']['span_f1']:.3f}" in report


def test_the_metrics_follow_from_questions_and_predictions_alone(finished, question_set):
    _, questions = load_questions(str(question_set), name="default", split="test")
    figures = evaluate_predictions(questions, read_predictions(finished / "predictions.jsonl"))
    assert {name: load_metrics(finished)[name] for name in figures} == figures


def test_a_prediction_speaks_of_its_question_in_the_frame_of_its_image(finished):
    for prediction in read_predictions(finished / "predictions.jsonl"):
        number = int(prediction.question_id[-1])
        for seen in (prediction, prediction.wrong_image):
            assert [span.text for span in seen.given_spans] == ["left wing", "tail"]
            text = answer(["left wing", "tail"])
            assert [text[span.start : span.end] for span in seen.given_spans] == ["left wing", "tail"]
            assert [end > start >= 0 for start, end in seen.true_tags] == [True, True]
            assert (seen.object_choice_scores is None) == (number < 5)
            for span in seen.given_spans + seen.generated_spans:
                assert tuple(span.rle["size"]) == SIZES[prediction.image_id]
        assert prediction.wrong_image.image_id != prediction.image_id
    assert any(prediction.generated_spans for prediction in read_predictions(finished / "predictions.jsonl"))


def test_without_the_control_no_figure_of_it_is_made(model_dir, question_set, tmp_path, finished):
    evaluate(arguments(model_dir, question_set, tmp_path / "run", control="none"))
    figures = load_metrics(tmp_path / "run")["overall"]
    assert not [name for name in figures if name.endswith("_wrong_image")]
    expected = load_metrics(finished)["overall"]
    assert figures == {name: expected[name] for name in figures}


def test_limit_takes_the_first_questions_only(model_dir, question_set, tmp_path):
    evaluate(arguments(model_dir, question_set, tmp_path / "run", limit=2))
    ids = [prediction.question_id for prediction in read_predictions(tmp_path / "run" / "predictions.jsonl")]
    assert ids == ["question0", "question1"]


# ---------------------------------------------------------------- what is asked of the model


def flat(prediction):
    """All numbers of a prediction's scores, and everything about it that is discrete."""
    scores = torch.tensor(prediction.choice_scores + (prediction.object_choice_scores or []))
    spans = [(span.text, span.start, span.end) for span in prediction.given_spans + prediction.generated_spans]
    return scores, (prediction.true_tags, prediction.predicted_tags, prediction.generated_text, spans)


@pytest.fixture(scope="module")
def predictor(model_dir):
    model = PlumForConditionalGeneration.from_pretrained(model_dir)
    return Predictor(
        model, tiny_processor(), max_new_tokens=8, choice_reduction="answer_mean", mask_source="gt_answer"
    )


def test_questions_asked_together_get_the_answers_they_get_alone(predictor):
    questions = [
        make_question(0, "image0"),
        make_question(5, "image1", question_type="whole_to_part", **OBJECT_FIELDS),
        make_question(6, "image1", question_type="part_to_whole", **OBJECT_FIELDS),
    ]
    asked = [Asked(question, question.image, question.image_id) for question in questions]
    for each, prediction in zip(asked, predictor.predict(asked), strict=True):
        (alone,) = predictor.predict([each])
        scores, discrete = flat(prediction)
        torch.testing.assert_close(scores, flat(alone)[0], rtol=1e-4, atol=1e-5)
        assert discrete == flat(alone)[1]


def test_a_kept_image_is_encoded_once_and_a_forgotten_one_again_with_the_same_result(predictor):
    questions = [make_question(number, f"image{number % 2}") for number in range(4)]
    asked = [Asked(question, question.image, question.image_id) for question in questions]
    cache = predictor.images
    uses, encoded = cache.uses, cache.encoded
    first = predictor.predict(asked)
    again = predictor.predict(asked)
    assert cache.uses - uses == 8 and cache.encoded - encoded <= 2
    assert cache.summary()["hit_rate"] == 1 - cache.encoded / cache.uses
    cache.size, encoded = 1, cache.encoded
    for _ in range(2):  # one image is kept, two are asked about
        forgotten = predictor.predict(asked)
    assert cache.encoded - encoded == 1
    for expected, *found in zip(first, again, forgotten, strict=True):
        for prediction in found:
            torch.testing.assert_close(flat(prediction)[0], flat(expected)[0], rtol=1e-4, atol=1e-5)
            assert flat(prediction)[1] == flat(expected)[1]


def test_choice_scores_are_the_mean_loss_of_the_last_answer_alone(predictor):
    question = make_question(5, "image1", question_type="whole_to_part", **OBJECT_FIELDS)
    (prediction,) = predictor.predict([Asked(question, question.image, "image1")])
    context = "USER: <image>\nWhat is the object in the image? ASSISTANT: It is a car.</s>USER: "
    expected = []
    for choice in question.choices:
        prompt = predictor.processor(question.image, f"{context}{question.question} ASSISTANT:")
        full = predictor.processor(question.image, f"{context}{question.question} ASSISTANT: {choice}</s>")
        length = prompt["input_ids"].shape[1]
        with torch.no_grad():
            logits = predictor.model(**full).logits[0, length - 1 : -1]
        expected.append(torch.nn.functional.cross_entropy(logits, full["input_ids"][0, length:]).item())
    assert prediction.choice_scores == pytest.approx(expected, rel=1e-4)


def test_only_the_last_answer_keeps_its_labels():
    labels = torch.tensor([[-100, 5, 6, -100, 7, 8], [-100, -100, 5, 6, 7, -100], [4, -100, 5, -100, 6, -100]])
    expected = [[-100] * 4 + [7, 8], [-100, -100, 5, 6, 7, -100], [-100] * 4 + [6, -100]]
    assert keep_last_answer(labels).tolist() == expected


def test_a_literal_tag_in_a_choice_is_text_and_grounds_nothing(predictor):
    question = make_question(0, "image2")
    question.choices[1] = "It has a <p>tail</p>."
    question.choices[2] = "It has an unbalanced </p>."
    (prediction,) = predictor.predict([Asked(question, question.image, "image2")])
    assert len(prediction.choice_scores) == 3


def test_the_masks_of_the_predicted_answer_are_those_of_the_parts_the_model_chose(predictor):
    predictor = Predictor(
        predictor.model,
        predictor.processor,
        max_new_tokens=8,
        choice_reduction="answer_sum",
        mask_source="predicted_answer",
    )
    questions = [make_question(number, "image0") for number in range(3)]
    predictions = predictor.predict([Asked(question, questions[0].image, "image0") for question in questions])
    assert any(p.choice != q.correct for p, q in zip(predictions, questions, strict=True))
    for question, prediction in zip(questions, predictions, strict=True):
        assert [span.text for span in prediction.given_spans] == question.choice_parts[prediction.choice]


# ---------------------------------------------------------------- answers without a model


def test_a_file_of_answers_is_scored_without_a_model(question_set, tmp_path, capsys):
    _, questions = load_questions(str(question_set), name="default", split="test")
    path = tmp_path / "answers.jsonl"
    lines = []
    for question in questions:
        masks = [{"part": mask.label.upper(), "rle": mask.rle} for mask in true_masks(question)]
        line = {"id": question.id, "choice": question.correct, "masks": masks}
        if question.object_question is not None:
            line["object_choice_scores"] = [-2.0, -1.0]
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(reversed(lines)))
    run = arguments(None, question_set, tmp_path / "run", predictions=str(path))
    evaluate_answers(run)
    assert listed(tmp_path / "run") == ["metrics.json", "report.html", "run.json"]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    names = ("strict_macro_giou", "strict_ciou", "ap50", "choice_accuracy", "object_choice_accuracy", "part_f1")
    assert [metrics["overall"][name] for name in names] == [1.0] * len(names)
    assert metrics["overall"]["span_f1"] is metrics["overall"]["generated_exact"] is None
    assert metrics["intervals"]["overall"]["choice_accuracy"] == [1.0, 1.0]
    assert metrics["run"]["protocol"]["name"] == "custom: choice_reduction as given"
    assert "[1.000, 1.000]" in capsys.readouterr().out

    path.write_text("".join(lines[:-1]) + "{")
    with pytest.raises(DataError, match="another run, with predictions_fingerprint"):
        evaluate_answers(run)
    with pytest.raises(DataError, match=r"line 7: expected JSON.*\(and 1 more"):
        evaluate_answers(replace(run, output_dir=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    evaluate_answers(replace(run, output_dir=str(tmp_path / "other"), on_error="report"))
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())["run"]
    assert other["left_out"] == 1
    assert other["questions_fingerprint"] == fingerprint(questions[:-1]) != metrics["run"]["questions_fingerprint"]
    assert len((tmp_path / "other" / "errors.jsonl").read_text().splitlines()) == 2
    assert "left out: 1 questions" in capsys.readouterr().out
    assert "Left out: 1 questions" in (tmp_path / "other" / "report.html").read_text()


def test_the_ground_truth_scores_one_in_every_figure(question_set, tmp_path):
    evaluate_answers(arguments(None, question_set, tmp_path / "run", baseline="ground_truth"))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for figures in (metrics["overall"], *metrics["by_type"].values()):
        scored = {name for name in figures if not name.endswith("_random")} - {"n", "photographs", "objects"}
        if figures["object_choice_accuracy"] is None:
            scored.remove("object_choice_accuracy")
        assert {figures[name] for name in scored} == {1.0}


def test_the_majority_is_counted_over_the_training_split_where_there_is_one(question_set, tmp_path):
    shutil.copytree(question_set, tmp_path / "both")
    shutil.copy(question_set / "test.parquet", tmp_path / "both" / "train.parquet")
    for folder, counted_over in ((question_set, "the other images of test"), (tmp_path / "both", "train")):
        run = arguments(None, folder, tmp_path / counted_over, baseline="majority")
        evaluate_answers(run)
        settings = json.loads((tmp_path / counted_over / "run.json").read_text())
        assert settings["counted_over"] == counted_over
        assert len(read_predictions(tmp_path / counted_over / "predictions.jsonl")) == 7


# ---------------------------------------------------------------- interruption and processes


KILLED_WHILE_WRITING = """
import os, signal
from plum_partonomy.evaluation.run import main as evaluate_plum
from plum_partonomy.evaluation import partonomy

append = partonomy.append_predictions

def append_half(path, predictions):
    is_second = path.exists()
    append(path, predictions)
    if is_second:
        os.truncate(path, path.stat().st_size - 40)
        os.kill(os.getpid(), signal.SIGKILL)

partonomy.append_predictions = append_half
evaluate_plum()
"""


def test_a_run_killed_while_it_writes_goes_on_and_ends_with_the_same_numbers(
    model_dir, question_set, tmp_path, finished
):
    run = arguments(model_dir, question_set, tmp_path / "run")
    names = ("model", "dataset", "name", "output_dir", "max_new_tokens", "batch_size", "device")
    options = [word for name in names for word in (f"--{name}", str(getattr(run, name)))]
    killed = forks.run("-c", KILLED_WHILE_WRITING, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert listed(tmp_path / "run") == ["predictions.jsonl", "predictions.rank0.jsonl", "run.json"]

    evaluate(run)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["run"]["predictions_found"]
    assert 3 <= found < 6
    assert load_metrics(tmp_path / "run") == load_metrics(finished)
    predictions = (tmp_path / "run" / "predictions.jsonl").read_bytes()
    assert predictions == (finished / "predictions.jsonl").read_bytes()


def test_a_finished_run_is_scored_again_without_asking_the_model(
    model_dir, question_set, tmp_path, finished, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(Predictor, "predict", None)
    evaluate(arguments(model_dir, question_set, tmp_path / "run"))
    assert load_metrics(tmp_path / "run") == load_metrics(finished)


def test_another_model_or_other_settings_are_refused_a_folder_in_use_which_stays_as_it_was(
    model_dir, question_set, tmp_path, finished
):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(DataError, match=r"another run, with choice_reduction 'sequence_mean' \(now 'answer_sum'\)"):
        evaluate(arguments(model_dir, question_set, finished, choice_reduction="answer_sum"))
    other = shutil.copytree(model_dir, tmp_path / "other")
    with (other / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match="another run, with model_fingerprint"):
        evaluate(arguments(other, question_set, finished))
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


FILES_OF_A_SIZE = """
import resource, runpy, sys

size = 1024 * int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.argv[0] = "evaluate_plum.py"
runpy.run_path(f"{root}/evaluate_plum.py", run_name="__main__")
"""


@pytest.mark.parametrize("kilobytes", [1, 20])
def test_a_disk_without_room_is_one_sentence_and_leaves_no_half_file(question_set, tmp_path, kilobytes):
    """The limit on the size of a file makes the system refuse to write on."""
    options = ["--baseline", "full_image", "--dataset", question_set, "--name", "default", "--output_dir", "run"]
    code = FILES_OF_A_SIZE.format(root=ROOT)
    done = forks.run("-c", code, kilobytes, *options, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate_plum.py: ") and "File too large" in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_place_that_cannot_be_written_to_is_one_sentence(question_set, tmp_path):
    (tmp_path / "file").write_text("")
    options = ["--baseline", "full_image", "--dataset", question_set, "--name", "default"]
    done = forks.run("evaluate_plum.py", *options, "--output_dir", tmp_path / "file" / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate_plum.py: ")


def test_two_processes_give_the_numbers_of_one(model_dir, question_set, tmp_path, finished):
    options = ["--model", model_dir, "--dataset", question_set, "--name", "default", "--output_dir", tmp_path / "run"]
    options += ["--max_new_tokens", "12", "--batch_size", "3"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "evaluate_plum.py", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["run"]["processes"] == 2
    assert listed(tmp_path / "run") == listed(finished)
    found, expected = load_metrics(tmp_path / "run"), load_metrics(finished)
    assert found["overall"] == pytest.approx(expected["overall"], abs=1e-3)
    assert done.stdout.count("gIoU, macro (strict)") == 1


# ---------------------------------------------------------------- input that cannot be used


def test_the_script_ends_with_one_sentence_and_an_exit_code_for_bad_input(model_dir, question_set, tmp_path):
    options = ["--model", model_dir, "--dataset", question_set, "--name", "default", "--split", "dev"]
    done = forks.run("evaluate_plum.py", *options, "--output_dir", tmp_path / "run")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("evaluate_plum.py: Cannot load data set")
    assert not (tmp_path / "run").exists()


def save_other_model(folder):
    (folder / "config.json").write_text('{"model_type": "llava"}')


def save_no_model(folder):
    (folder / "config.json").unlink()


def save_other_processor(folder):
    processor = tiny_processor()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<picture>"]})
    processor.image_token = "<picture>"
    processor.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (save_other_model, "contains a 'llava' model, expected 'plum'"),
        (save_no_model, "config.json cannot be read"),
        (save_other_processor, "image token '<picture>' has id \\d+, the model expects 3"),
    ],
)
def test_a_folder_without_a_fitting_model_and_processor_is_refused(model_dir, question_set, tmp_path, damage, message):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    damage(folder)
    with pytest.raises(DataError, match=message):
        evaluate(arguments(folder, question_set, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_neither_a_folder_nor_on_the_hub_is_refused(question_set, tmp_path):
    with pytest.raises(DataError, match="'no/such-model' is not a local folder"):
        evaluate(arguments("no/such-model", question_set, tmp_path / "run"))
