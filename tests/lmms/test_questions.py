"""The functions that the tasks of lmms-eval call, and the tasks themselves."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from plum_partonomy.baselines.vlm import LIST_PROMPT
from plum_partonomy.lmms import questions
from plum_partonomy.masks import DataError
from plum_partonomy.records import QUESTION_TYPES, as_row
from plum_partonomy.scoring.bootstrap import FIGURES
from tests.baselines.tiny_models import make_question
from tests.tiny import random_image

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "plum_partonomy" / "lmms" / "tasks"
QUESTION = make_question()
DOC = as_row(QUESTION)
DOC.pop("image")
TRUE = {mask.label: mask.rle for mask in QUESTION.masks}


class Loader(yaml.SafeLoader):
    """Reads `!function MODULE.NAME` as the function."""


Loader.add_constructor(
    "!function",
    lambda loader, node: getattr(
        importlib.import_module(loader.construct_scalar(node).rpartition(".")[0]),
        loader.construct_scalar(node).rpartition(".")[2],
    ),
)


def reply(labels=("left wing", "tail"), **changes) -> str:
    masks = [TRUE[label] for label in labels]
    return json.dumps(
        {"answer": "It has two.", "labels": list(labels), "masks": masks, "scores": [0.9] * len(masks), **changes}
    )


def metric(name: str, *addends: dict) -> float:
    """One metric of some questions, as lmms-eval takes it, after a round through JSON."""
    return getattr(questions, name)(json.loads(json.dumps([found[name] for found in addends])))


def test_masks_and_names_of_a_reply_are_scored_as_elsewhere():
    whole, half = questions.score_answer(DOC, [reply()]), questions.score_answer(DOC, [reply(["tail"])])
    assert [metric(name, whole) for name in questions.ANSWER_METRICS] == [1.0] * 5
    assert metric("generated_part_recall", whole, half) == 0.75 and metric("end_to_end_giou", whole, half) == 0.75
    given = questions.score_masks(DOC, [reply()])
    assert [metric(name, given) for name in questions.MASK_METRICS] == [1.0] * 6 and metric("unreadable", given) == 0


def test_masks_in_a_code_fence_are_read():
    found = questions.score_answer(DOC, [f"```json\n{reply()}\n```"])
    assert metric("end_to_end_giou", found) == 1.0 and metric("unreadable", found) == 0


def test_plain_text_is_read_for_names_and_has_no_masks():
    found = questions.score_answer(DOC, ["A left wing, and the tail."])
    assert metric("generated_exact", found) == 1.0 and "end_to_end_giou" not in found
    assert metric("unreadable", found) == 0
    assert metric("unreadable", questions.score_masks(DOC, ["A left wing."])) == 1


@pytest.mark.parametrize(
    "text",
    [
        reply()[:-1],
        reply(labels=[]).replace('"labels": []', '"labels": ["tail"]'),
        reply(masks=[{"size": [4, 4], "counts": "0"}] * 2),
        reply(scores=[0.5, float("nan")]),
        reply(scores=[0.5, 10**400]),
        reply(scores=[0.5, True]),
        reply(scores=[]),
        reply(labels=["left wing", "tail"]).replace('"tail"', "7"),
        '{"masks": ' + "[" * 100_000,
        f"```json\n{reply()[:-1]}}}}}\n```",
        reply(masks=None),
        "{}",
    ],
)
def test_a_reply_that_cannot_be_read_counts_as_nothing_and_is_counted(text):
    found = questions.score_answer(DOC, [text])
    assert (metric("unreadable", found), metric("generated_part_recall", found)) == (1, 0)
    assert metric("strict_macro_giou", questions.score_masks(DOC, [text])) == 0


def test_letters_and_losses_choose():
    right, none = questions.score_letter(DOC, ["C"]), questions.score_letter(DOC, ["no idea"])
    assert metric("choice_accuracy", right, none) == 0.5 and metric("unreadable", right, none) == 0.5
    assert metric("part_recall", right, none) == 0.5 and metric("part_precision", right, none) == 1.0
    assert set(right) == set(none)
    losses = questions.score_choices(DOC, [(0.5, False), (0.7, False), "(0.4, False)"])
    assert metric("choice_accuracy", losses) == 1.0
    odd = questions.score_choices(DOC, ["(nan, False)", (float("-inf"), False), "(np.float64(0.4), False)"])
    nothing = questions.score_choices(DOC, ["(nan, False)", "None", (float("inf"), False)])
    assert metric("choice_accuracy", odd, nothing) == metric("unreadable", odd, nothing) == 0.5
    assert set(odd) == set(nothing) == set(right)


def test_messages_hold_the_image_first_and_the_answer_in_tags_where_it_is_given():
    doc = as_row(make_question(question_type="whole_to_part")) | {"image": random_image(60, 84)}
    chat = questions.messages_of(doc)
    assert [message["role"] for message in chat] == ["user", "assistant", "user"]
    assert chat[0]["content"][0]["url"].size == (84, 60)
    given = questions.messages_with_answer(doc)
    assert given[-1]["content"][0]["text"] == "It has a <p>left wing</p>, and <p>tail</p>."
    assert "C. It has a left wing, and tail." in questions.text_with_letters(doc)


def test_an_image_with_transparency_is_the_one_that_evaluate_plum_shows():
    image = Image.new("RGBA", (84, 60), (200, 0, 0, 0))
    (shown,) = questions.image_of({**DOC, "image": image})
    assert shown.mode == "RGB" and shown.getpixel((0, 0)) == (255, 255, 255)


def test_models_of_text_are_asked_for_names_as_in_evaluate_plum_and_plum_is_not():
    doc = as_row(make_question(question_type="whole_to_part")) | {"image": random_image(60, 84)}
    prompts = yaml.load((TASKS / "_answer_yaml").read_text(), Loader)["lmms_eval_specific_kwargs"]
    assert prompts["default"]["post_prompt"] == f"\n{LIST_PROMPT}"
    for ask in (questions.messages_of, questions.text_of):
        assert ask(doc, prompts["plum"]) == ask(doc)
    assert questions.text_of(doc, prompts["default"]) == f"{questions.text_of(doc)}\n{LIST_PROMPT}"
    *earlier, asked = questions.messages_of(doc, prompts["default"])
    assert earlier == questions.messages_of(doc)[:-1] and asked["content"][0]["text"].endswith(f"?\n{LIST_PROMPT}")


def test_a_task_with_an_unknown_metric_is_refused_by_its_name():
    with pytest.raises(
        DataError, match="A task uses 'mean_iou', which is neither a function of .*known are strict_macro"
    ):
        _ = questions.mean_iou


def test_there_is_a_task_for_each_way_to_ask_and_each_question_type_and_its_metrics_are_those_of_its_function():
    tasks = {path.stem: yaml.load(path.read_text(), Loader) for path in TASKS.glob("*.yaml")}
    for name in ("mini", "core"):
        group = tasks.pop(f"partonomy_{name}_types")
        types = [f"partonomy_{name}_{kind}" for kind in sorted(QUESTION_TYPES)]
        assert group == {"group": f"partonomy_{name}_types", "task": types}
        expected = [f"partonomy_{name}{kind}" for kind in ("", "_masks", "_choices", "_letters")]
        expected += [f"partonomy_{name}_{kind}" for kind in QUESTION_TYPES]
        assert [task for task in sorted(tasks) if task.startswith(f"partonomy_{name}")] == sorted(expected)
    assert all(task["task"] == name for name, task in tasks.items())
    metrics = {"answer": questions.ANSWER_METRICS, "masks": questions.MASK_METRICS}
    metrics |= dict.fromkeys(("choices", "letters"), questions.CHOICE_METRICS)
    for kind, names in metrics.items():
        template = yaml.load((TASKS / f"_{kind}_yaml").read_text(), Loader)
        listed = [item["metric"] for item in template["metric_list"] if item["metric"] != questions.UNREADABLE]
        assert listed == list(names) and set(names) <= set(FIGURES)


def test_the_documentation_installs_what_the_extra_lists():
    setup, page = ((ROOT / name).read_text() for name in ("setup.cfg", "docs/benchmark.md"))
    listed = re.search(r"\nlmms_eval =\n((?:    .*\n)+)", setup)[1]
    command = re.search(r"pip install --no-deps -c constraints.txt -e \. ((?:.*\\\n)*.*)\n", page)[1]
    assert set(command.replace("\\", " ").split()) == set(re.findall(r"^ *([\w-]+)", listed, re.MULTILINE))


def test_a_subset_holds_one_question_type(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"question_type": kind} for kind in ("positive", "negative", "positive")])
    assert len(questions.only_positive(rows)) == 2
    with pytest.raises(DataError, match="no question of the type 'part_to_whole'"):
        questions.only_part_to_whole(rows)


# ---------------------------------------------------------------- the real program


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="pip install .[lmms_eval]")
def test_lmms_eval_finds_the_metrics_of_evaluate_plum(tmp_path):
    """20 questions, each way to ask; the entry point is that of setup.cfg."""
    registered = tmp_path / "path" / "plum_here-0.dist-info"
    registered.mkdir(parents=True)
    (registered / "METADATA").write_text("Metadata-Version: 2.1\nName: plum_here\nVersion: 0\n")
    line = next(line for line in (ROOT / "setup.cfg").read_text().splitlines() if "lmms.models:manifest" in line)
    (registered / "entry_points.txt").write_text(f"[lmms_eval.models]\n{line.strip()}\n")
    path = os.pathsep.join([str(ROOT), str(registered.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}

    def run(*options: str) -> None:
        subprocess.run([sys.executable, *options], check=True, cwd=ROOT, env=environment)

    model = str(ROOT / "checkpoints" / "plum-tiny")
    run(
        "evaluate_plum.py",
        "--model",
        model,
        "--name",
        "mini_questions",
        "--limit",
        "20",
        "--control",
        "none",
        "--choice_reduction",
        "answer_mean",
        "--output_dir",
        str(tmp_path / "ours"),
    )
    ours = json.loads((tmp_path / "ours" / "metrics.json").read_text())["overall"]
    common = ["--model", "plum", "--include_path", str(TASKS), "--limit", "20", "--batch_size", "1"]
    common += ["--model_args", f"pretrained={model},choice_reduction=answer_mean"]
    theirs = {}
    by_model = {"chat": "partonomy_mini,partonomy_mini_masks", "simple": "partonomy_mini_choices"}
    for kind, tasks in by_model.items():
        output, options = tmp_path / kind, ["--force_simple"] if kind == "simple" else []
        run("-m", "lmms_eval", *common, "--tasks", tasks, *options, "--output_path", str(output))
        (results,) = output.rglob("*results.json")
        theirs |= json.loads(results.read_text())["results"]
    found = {
        key.split(",")[0]: value
        for task in theirs.values()
        for key, value in task.items()
        if key.split(",")[0] in FIGURES
    }
    expected = {*questions.ANSWER_METRICS, *questions.MASK_METRICS, *questions.CHOICE_METRICS}
    assert found == {name: pytest.approx(ours[name], abs=1e-6) for name in expected}
    assert {task["unreadable,none"] for task in theirs.values() if "unreadable,none" in task} == {0}
