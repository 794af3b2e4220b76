"""Expected errors of a command are one sentence and exit status 2; other errors keep their traceback."""

import errno
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from plum_partonomy.command_line import Options, as_options, check_writable, run_command
from plum_partonomy.evaluation.run import main as evaluate
from plum_partonomy.loading import load_split
from plum_partonomy.masks import DataError
from plum_partonomy.training.options import option_names, parse_arguments
from plum_partonomy.training.resume import check_output_folder

ROOT = Path(__file__).parents[1]
RECIPE = str(ROOT / "recipes" / "plum_tiny.yaml")


def ends(capfd, command) -> str:
    """The only line that a command prints before it ends with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        command()
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and out == "" and len(err.splitlines()) == 1
    return err.rstrip("\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([RECIPE, "--max_stepz", "3"], "train.py: there is no option --max_stepz; did you mean --max_steps?"),
        ([RECIPE, "--zzzz"], "train.py: there is no option --zzzz."),
        (["--model", "m"], "train.py: the following arguments are required: --output_dir/--output-dir."),
        ([RECIPE.replace("tiny.", "tinny."), "--output_dir", "x"], f"does not exist; did you mean {RECIPE}?"),
        ([RECIPE, "--output_dir", "x", "--max_steps", "three"], "invalid int value: 'three'."),
        ([RECIPE, "--output_dir", "x", "--lr_scheduler_type", "coosine"], "invalid choice: 'coosine'"),
        ([RECIPE, "--output_dir", "x", "--random_crop", "2"], "train.py: --random_crop must be at least 0"),
        (["--output_dir", "x"], "train.py: Give model (a checkpoint), vlm and sam (backbones) or --model_config"),
    ],
)
def test_a_wrong_option_of_a_training_is_named_in_one_sentence(capfd, words, sentence):
    assert sentence in ends(capfd, lambda: parse_arguments(words))


def test_a_wrong_option_in_a_recipe_is_named_with_the_nearest(capfd, tmp_path):
    (tmp_path / "recipe.yaml").write_text("max_stepz: 3\n")
    line = ends(capfd, lambda: parse_arguments([str(tmp_path / "recipe.yaml"), "--output_dir", "x"]))
    assert line.endswith("has the unknown option 'max_stepz'; did you mean max_steps?")


def test_a_wrong_option_of_an_evaluation_is_named_in_one_sentence(capfd):
    line = ends(capfd, lambda: evaluate(["--modle", "m"]))
    assert line == "evaluate_plum.py: there is no option --modle; did you mean --model?"
    assert "required: --output_dir" in ends(capfd, lambda: evaluate(["--model", "m"]))


def test_a_data_set_that_cannot_be_loaded_says_so_in_words():
    for name, split, message in (
        ("mini_instnces", "test", "there is no name 'mini_instnces'; did you mean mini_instances?"),
        ("mini_instances", "tset", "Unknown split"),
        ("own_parts", "test", "reads your files: give their folder as data_dir=FOLDER"),
    ):
        with pytest.raises(DataError, match=message.replace("?", r"\?")):
            load_split("partonomy", name, split=split)


def test_arguments_become_options_on_a_command_line_only():
    message = "give data_dir=FOLDER; max_spans is 0, not `max_spans` nor --max_spans nor a/data_dir; a name=x"
    assert as_options(message, ["data_dir", "max_spans", "name"]) == (
        "give --data_dir FOLDER; --max_spans is 0, not `max_spans` nor --max_spans nor a/data_dir; a --name x"
    )
    assert as_options(message, []) == message
    assert {"data_dir", "output_dir", "max_steps"} <= set(option_names())


def fails(error):
    def main():
        raise error

    return lambda: run_command("x.py", main, ["data_dir"])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("file a,\nrecord 3: data_dir is bad."), "x.py: file a, record 3: --data_dir is bad."),
        (OSError(errno.EACCES, "Permission denied", "runs/x"), "x.py: runs/x: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), "x.py: No space left on device."),
        (
            ModuleNotFoundError("No module named 'wandb.sdk'", name="wandb.sdk"),
            "pip install wandb.",
        ),
        (PackageNotFoundError("The 'deepspeed>=1' package is missing"), "x.py: The 'deepspeed>=1' package is missing"),
        (RuntimeError("server failed to listen on port: 29500, EADDRINUSE"), "x.py: port 29500 is in use: choose"),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(capfd, error, sentence):
    assert sentence in ends(capfd, fails(error))


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), ImportError("a bug"), KeyError("a")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        fails(error)()


def test_an_option_of_a_command_that_hands_its_options_on_is_left_to_the_other():
    parser = Options()
    parser.knows_all = False
    assert parser.parse_known_args(["--other", "3"])[1] == ["--other", "3"]


@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
        ["torch.distributed.run", "--nproc_per_node", "1"],
    ],
    ids=["accelerate", "torchrun"],
)
def test_under_a_launcher_the_sentence_is_the_last_thing_printed(tmp_path, launcher):
    script = tmp_path / "script.py"
    script.write_text(
        "from plum_partonomy.command_line import run_command\n"
        "from plum_partonomy.masks import DataError\n"
        "def main():\n"
        "    raise DataError('There is nothing here.')\n"
        "run_command('script.py', main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", *launcher, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode and run.stderr.splitlines()[-1] == "script.py: There is nothing here."


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file; give another output_dir=FOLDER"):
        check_writable(tmp_path / "file" / "run")
    check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_a_training_does_not_overwrite_a_finished_run(tmp_path):
    for name in ("recipe.yaml", "model.safetensors"):
        (tmp_path / name).write_text("")

    def check(*words):
        check_output_folder(parse_arguments([RECIPE, "--output_dir", str(tmp_path), "--use_cpu", "true", *words])[2])

    with pytest.raises(DataError, match="contains a finished run: give another output_dir=FOLDER"):
        check()
    check("--resume_from_checkpoint", "true")
    check("--overwrite_output_dir", "true")
    (tmp_path / "recipe.yaml").unlink()
    check()
