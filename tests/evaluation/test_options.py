"""Options of an evaluation: each is refused where it has no effect, and --help lists it with its users."""

import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from plum_partonomy.command_line import run_command
from plum_partonomy.commands import run as plum
from plum_partonomy.evaluation.options import BASELINES, EvaluationArguments, EvaluationOptions, parse_arguments
from plum_partonomy.evaluation.run import main

ROOT = Path(__file__).parents[2]
OUTPUT = ["--output_dir", "runs/none"]
# A value of each option that not all evaluations use, other than its default.
OTHER = {
    "on_error": "report",
    "mask_source": "generated",
    "match": "lemmatised",
    "match_model": "encoder",
    "format": "official",
    "control": "none",
    "image_cache_size": "2",
    "batch_size": "2",
    "choice_reduction": "answer_sum",
    "max_new_tokens": "7",
    "device": "cpu",
    "dtype": "bfloat16",
    "cache_image_embeddings": "cache",
    "vlm": "other",
    "choices_by": "letter",
    "sam3": "other",
    "sam3_prompt": "part_of_object",
    "sam3_threshold": "0.5",
}
SCORED = {"on_error", "mask_source", "match"}
ASKED = SCORED | {"control", "image_cache_size", "batch_size"}
SPEAKS = {"vlm", "choices_by", "max_new_tokens"}
SEGMENTS = {"sam3", "sam3_prompt", "sam3_threshold"}
LOADED = {"device", "dtype"}
# The options that a run uses, of those above.
USED = {
    "--model m": ASKED | LOADED | {"choice_reduction", "max_new_tokens", "cache_image_embeddings"},
    "--model m --dataset mine": (ASKED - {"on_error"})
    | LOADED
    | {"choice_reduction", "max_new_tokens", "cache_image_embeddings"},
    "--model m --task correction": {"on_error", "batch_size"} | LOADED,
    "--model m --task pope": {"on_error", "max_new_tokens"} | LOADED,
    "--predictions a.jsonl": SCORED | {"format"},
    "--predictions a.jsonl --dataset mine": SCORED | {"format"},
    "--predictions a.jsonl --task referring": {"on_error"},
    **dict.fromkeys((f"--baseline {name}" for name in BASELINES), SCORED),
    "--baseline mine.py": ASKED,
    "--baseline sam3 --sam3 s": ASKED | LOADED | SEGMENTS,
    "--baseline vlm --vlm v": ASKED | LOADED | SPEAKS | {"choice_reduction"},
    "--baseline vlm --vlm v --choices_by letter": ASKED | LOADED | SPEAKS,
    "--baseline vlm --vlm https://localhost/v1": ASKED | SPEAKS,
    "--baseline vlm+sam3 --vlm v --sam3 s": ASKED | LOADED | SPEAKS | SEGMENTS | {"choice_reduction"},
}


def refusal(capfd, *words: str) -> str:
    """The sentence that ends a command line."""
    with pytest.raises(SystemExit) as stopped:
        parse_arguments([*OUTPUT, *words])
    assert stopped.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line.removeprefix("evaluate_plum.py: ")


@pytest.mark.parametrize("run", USED)
def test_an_option_without_effect_is_refused_and_named_with_its_users(run, capfd):
    users = {each.name: each.metadata["group"].users for each in fields(EvaluationArguments)}
    for name in OTHER.keys() - {"match_model"} - USED[run]:
        line = refusal(capfd, *run.split(), f"--{name}", OTHER[name])
        assert line == f"--{name} has no effect here, it is used by {users[name]}: leave it out."
    for name in USED[run] - {"vlm"}:
        parse_arguments([*OUTPUT, *run.split(), f"--{name}", OTHER[name]])


@pytest.mark.parametrize("run", USED)
def test_an_option_at_its_default_is_never_refused(run):
    defaults = {each.name: each.default for each in fields(EvaluationArguments) if each.default not in (MISSING, None)}
    words = [word for name, default in defaults.items() for word in (f"--{name}", str(default))]
    assert parse_arguments([*OUTPUT, *words, *run.split()]) == parse_arguments([*OUTPUT, *run.split()])


def test_every_option_is_in_one_group_of_the_help_named_after_its_users():
    listed = {
        group.title: {action.dest for action in group._group_actions}
        for group in EvaluationOptions(EvaluationArguments)._action_groups
    }
    for each in fields(EvaluationArguments):
        title = f"used by {each.metadata['group'].users}"
        assert [name for name, options in listed.items() if each.name in options] == [title]
    everywhere = listed["used by every evaluation"]
    assert everywhere | OTHER.keys() == {each.name for each in fields(EvaluationArguments)}
    assert not everywhere & OTHER.keys()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "Expected one of --model, --predictions and --baseline"),
        ("--model m --baseline random", "Expected one of --model, --predictions and --baseline"),
        ("--baseline majorty", "did you mean majority?"),
        ("--baseline sam", "--baseline sam: expected one of random, majority, full_image, ground_truth, sam3, vlm,"),
        ("--predictions a --task correction", "--task correction gives a model true masks: pass --model."),
        ("--baseline random --task gqa", "--task gqa scores a --model or --predictions: pass one of these."),
        ("--baseline random --match embedding", "--match embedding and --match_model belong together"),
        ("--model m --batch_size 0", "--batch_size must be at least 1, found 0."),
        ("--model m --max_new_tokens 0", "--max_new_tokens must be at least 1, found 0."),
        ("--model m --limit 0", "--limit must be at least 1, found 0."),
    ],
)
def test_options_that_do_not_fit_together_are_refused(capfd, words, sentence):
    assert sentence in refusal(capfd, *words.split())


@pytest.mark.parametrize("start", [lambda words: run_command("x", lambda: main(words)), lambda w: plum(["eval", *w])])
def test_a_wrong_option_ends_both_commands_with_status_2(capfd, start):
    with pytest.raises(SystemExit) as stopped:
        start([*OUTPUT, "--baseline", "random", "--sam3_threshold", "0.5"])
    assert stopped.value.code == 2 and "--sam3_threshold has no effect here" in capfd.readouterr().err


def test_every_evaluation_that_the_pages_show_is_accepted():
    pages = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.py")]
    texts = [path.read_text().replace("\\\n", " ") for path in pages]
    shown = re.findall(r"^\s*(?:python|\$\(PYTHON\)) evaluate_plum\.py (.*)", "\n".join(texts), re.MULTILINE)
    for words in shown:
        parse_arguments(shlex.split(words, comments=True))
    assert len(shown) > 20
