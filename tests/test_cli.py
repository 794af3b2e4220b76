import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plum_partonomy import cli
from plum_partonomy.masks import encode
from tests import forks
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plum")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def image_file(tmp_path):
    random_image().save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def raw_data(tmp_path, image_file):
    """A folder with a descriptor of ten images, one of which becomes the validation split."""
    rles = [encode(random_mask(seed=seed)) for seed in range(2)]
    instances = []
    for index in range(10):
        random_image(seed=index).save(tmp_path / f"{index}.png")
        instances.append(
            {
                "image_path": f"{index}.png",
                "image_label": "car",
                "segmentations": {"wheel": rles[:1], "door": rles[1:]},
                "segmentation_labels": ["wheel", "door"],
            }
        )
    descriptor = {
        "dataset_name": "cars",
        "instances": instances,
        "part_graph": {"car": ["door", "wheel"]},
        "instance_graph": {"vehicle": ["car"]},
    }
    (tmp_path / "descriptor.json").write_text(json.dumps(descriptor))
    return tmp_path


def test_an_image_from_a_pipe_is_segmented_and_nothing_but_the_answer_comes_out(checkpoint, image_file):
    command = [sys.executable, "-m", "plum_partonomy.cli", "segment", "-", "--spans", "left wing, tail", "--json"]
    done = subprocess.run(
        [*command, "--model", checkpoint], input=image_file.read_bytes(), capture_output=True, timeout=120, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, b"")
    (line,) = done.stdout.decode().splitlines()
    spans = json.loads(line)["spans"]
    assert [span["text"] for span in spans] == ["left wing", "tail"]
    assert all(span["mask"]["size"] == [50, 70] for span in spans)


def test_a_problem_is_one_sentence_on_the_standard_error(tmp_path, capfd):
    assert cli.main(["data", "stats", "descriptor", "--data_dir", str(tmp_path), "--split", "train"]) == 1
    out, err = capfd.readouterr()
    assert (
        out == ""
        and err.startswith("plum: Cannot load data set 'partonomy', name 'descriptor'")
        and len(err.splitlines()) == 1
    )


def test_an_answer_off_the_terminal_is_plain_and_its_files_are_named(checkpoint, image_file, tmp_path, capsys):
    folder = tmp_path / "answer"
    options = ["--spans", "tail", "--model", str(checkpoint), "--save", str(folder)]
    assert cli.main(["segment", str(image_file), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("The object in the image has the following visible parts: tail.\n  tail  score 0.")
    assert "\x1b" not in out and str(folder / "overlay.png") in out
    assert max(Image.open(folder / "overlay.png").size) >= 512
    assert np.asarray(Image.open(folder / "01_tail.png")).shape == (50, 70)


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_an_answer_is_printed_although_it_cannot_be_saved(checkpoint, image_file, capsys, form):
    (image_file.parent / "overlay.png").write_text("mine")
    options = ["--spans", "tail", "--model", str(checkpoint), "--save", str(image_file.parent), *form]
    assert cli.main(["segment", str(image_file), *options]) == 1
    captured = capsys.readouterr()
    assert "has the following visible parts: tail." in captured.out
    assert "overlay.png is not of an earlier answer: delete it, or give another --save FOLDER." in captured.err


def test_a_chat_goes_on_after_a_bad_line_and_has_failed_in_the_end(checkpoint, image_file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which parts?\n\nWhat is </s>?\nIs it red?\n"))
    assert cli.main(["chat", str(image_file), "--model", str(checkpoint), "--json"]) == 1
    captured = capsys.readouterr()
    assert [sorted(json.loads(line)) for line in captured.out.splitlines()] == [
        ["confidence", "is_truncated", "spans", "text"]
    ] * 2
    assert captured.err.startswith("plum: Conversation 0, message 2: the text contains '</s>'")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["ask", "IMAGE", "Which parts?", "--model", "no/such-model"],
            3,
            "is not a local folder and was not found on the Hub",
        ),
        (["ask", "absent.png", "Which parts?"], 1, "there is no image file"),
        (["chat", "-"], 1, "pass the image as a file"),
        (["ask", "IMAGE"], 2, "required: question"),
        (["segment", "IMAGE", "--spans", "tail", "--jsno"], 2, "there is no option --jsno; did you mean --json?"),
        (["segment", "IMAGE", "--spans", "tail", "--boxes", "1 2 3"], 1, "--boxes needs x0 y0 x1 y1 of each box"),
        (["segment", "IMAGE", "--spans", "tail", "--boxes", "1 2 a 4"], 1, "--boxes needs four numbers of each box"),
        (["segment", "IMAGE", "--spans", "tail", "--save", "IMAGE"], 1, "is a file; give another --save FOLDER."),
        (["segment", "IMAGE", "--spans", "tail", "--save", ""], 2, "argument --save: expected a name, found an empty"),
        (["segment", "IMAGE", "--spans", "tail", "--model", " "], 2, "argument --model: expected a name"),
        (
            ["segment", "IMAGE", "--spans", "a, b", "--boxes", "1 2 3 4"],
            1,
            "a box for each of 2 parts of --spans, found 1",
        ),
        (["ask", "IMAGE", "Which", "parts?"], 2, "found further words ['parts?']: put the question in quotes"),
        (["ask", "two\nlines.png", "Which parts?"], 1, "plum: two lines.png: there is no image file"),
        (["ask", "x" * 1000, "Which parts?"], 1, f"plum: {'x' * 200}...: expected the path of an image"),
        (["data", "preview", "mini", "--save", "absent", "--count", "0"], 2, "expected a number from 1, found '0'"),
        (["data", "validate", "descriptor", "absent"], 1, ""),
        (["eval", "--output_dir", "absent"], 2, "Expected one of --model, --predictions and --baseline"),
        (
            ["eval", "--output_dir", "absent", "--model", "no/such-model"],
            3,
            "is not a local folder and was not found on the Hub",
        ),
    ],
)
def test_each_kind_of_problem_has_its_exit_code(arguments, code, message, image_file, capsys, monkeypatch):
    monkeypatch.chdir(image_file.parent)
    arguments = [str(image_file) if argument == "IMAGE" else argument for argument in arguments]
    try:
        found = cli.main(arguments)
    except SystemExit as error:
        found = error.code if isinstance(error.code, int) else 1  # a text is printed and counts as 1
    assert found == code and message in capsys.readouterr().err


def test_questions_that_are_no_text_end_the_chat_with_one_sentence(checkpoint, image_file, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert cli.main(["chat", str(image_file), "--model", str(checkpoint)]) == 1
    assert capsys.readouterr().err.startswith("plum: The questions are not text in UTF-8")


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["data", "stats", "descriptor", "--data_dir", "DATA", "--split", "train"],
        ["segment", "IMAGE", "--spans", "tail"],
    ],
)
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_no_command_minds_a_reader_that_has_left(command, closed, checkpoint, image_file, raw_data):
    command = [{"IMAGE": image_file, "DATA": raw_data}.get(word, word) for word in command]
    model = ["--model", checkpoint] if "segment" in command else []
    reader, writer = os.pipe()
    os.close(reader)
    left = raw_data / "left"
    with left.open("w") as file:
        streams = {"stdout": file, "stderr": file} | {closed: writer}
        process = forks.start("-c", forks.PLUM, *command, *model, **streams)
    os.close(writer)
    process.join(forks.SECONDS)
    assert (left.read_text() == "", process.exitcode) == (closed == "stdout", 0)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_letters_that_the_output_lacks_are_written_as_escapes(encoding, checkpoint, image_file):
    command = ["segment", image_file, "--spans", "\u8f66\u8f6e", "--model", checkpoint]
    run = forks.run("-c", forks.PLUM, *command, PYTHONIOENCODING=encoding)
    assert (run.returncode, run.stderr) == (0, "") and r"parts: \u8f66\u8f6e." in run.stdout


CTRL_C_AT_IMPORTS = """
import json, os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name not in modules:
            return
        if os.fork():
            modules.remove(name)
            codes[name] = os.waitstatus_to_exitcode(os.wait()[1])
            if not modules:
                print(json.dumps(codes), flush=True)
                os._exit(0)
        else:
            modules.clear()
            os.dup2(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY), 2)
            os.kill(os.getpid(), signal.SIGINT)

folder, codes, modules = sys.argv[1], {}, set(sys.argv[2].split())
sys.argv = ["plum", *sys.argv[3:]]
sys.meta_path.insert(0, Interrupting())
from plum_partonomy.cli import main
main()
sys.exit(f"not imported: {modules}")
"""
INTERRUPTED_IMPORTS = [
    *("plum_partonomy.commands", "argparse", "rich.console", "numpy", "torch", "torch.distributed", "modeling_plum"),
    *("transformers.models.sam.modeling_sam", "safetensors.torch", "plum_partonomy.scoring.overlays"),
]


@pytest.fixture(scope="module")
def interrupted(checkpoint, tmp_path_factory):
    """Exit code and standard error of a command that gets Ctrl-C at an import, by the name of the module."""
    folder = tmp_path_factory.mktemp("interrupted")
    words = ["segment", ROOT / "examples" / "sailboat.png", "--spans", "tail", "--model", checkpoint]
    command = [sys.executable, "-c", CTRL_C_AT_IMPORTS, folder, " ".join(INTERRUPTED_IMPORTS), *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr
    return {name: (code, (folder / name).read_text()) for name, code in json.loads(run.stdout).items()}


@pytest.mark.parametrize("module", INTERRUPTED_IMPORTS)
def test_ctrl_c_ends_the_command_quietly_whatever_is_being_imported(module, interrupted):
    assert interrupted[module] == (cli.INTERRUPTED, "")


def test_ctrl_c_ends_a_chat_that_waits_for_a_question(checkpoint, image_file, tmp_path):
    (read_questions, write_questions), (read_answers, write_answers) = os.pipe(), os.pipe()
    with (tmp_path / "errors").open("w") as errors, open(read_answers) as answers:
        command = ["chat", image_file, "--json", "--model", checkpoint]
        streams = {"stdin": read_questions, "stdout": write_answers, "stderr": errors}
        process = forks.start("-c", forks.PLUM, *command, **streams)
        os.close(read_questions)
        os.close(write_answers)
        os.write(write_questions, b"Which parts?\n")
        assert "spans" in json.loads(answers.readline())
        os.kill(process.pid, signal.SIGINT)
        assert answers.read() == ""
        os.close(write_questions)
    process.join(forks.SECONDS)
    assert ((tmp_path / "errors").read_text(), process.exitcode) == ("", cli.INTERRUPTED)


def test_data_is_validated_counted_and_drawn(raw_data, capsys):
    assert cli.main(["data", "validate", "descriptor", str(raw_data)]) == 0
    captured = capsys.readouterr()
    assert "is complete" in captured.out and captured.err == ""
    of_train = ["descriptor", "--data_dir", str(raw_data), "--split", "train"]
    assert cli.main(["data", "stats", *of_train, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["images"], counts["objects"], counts["parts"], counts["masks"]) == (8, 1, 2, 16)
    assert counts["masks by part"] == {"door": 8, "wheel": 8}
    assert cli.main(["data", "preview", *of_train, "--save", str(raw_data / "drawn"), "--count", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(list((raw_data / "drawn").iterdir())) == 3


IMPORTED_BY_COMMANDS = """
import contextlib, io, json, sys
from plum_partonomy.cli import main

costly, found = ("torch", "transformers", "datasets", "inflect", "pandas", "matplotlib", "peft"), []
for command in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(command)
    found.append([name for name in costly if name in sys.modules])
print(json.dumps(found))
"""


def test_a_command_imports_only_what_it_needs(checkpoint, image_file):
    """The commands in one process, so that each adds its imports to those of the commands before it."""
    expected = [
        (["--help"], []),
        (["data", "validate", "--help"], []),
        (["ask", image_file, "Which parts?", "--jsno"], []),
        (["ask", "absent.png", "Which parts?"], []),
        (["ask", image_file, " "], []),
        (["segment", image_file, "--spans", "tail,"], []),
        (["eval", "--help"], ["transformers"]),
        (["eval", "--output_dir", "out", "--modle", "none"], ["transformers"]),
        (["segment", image_file, "--spans", "tail", "--model", checkpoint], ["torch", "transformers"]),
    ]
    commands = json.dumps([[str(word) for word in command] for command, _ in expected])
    command = [sys.executable, "-c", IMPORTED_BY_COMMANDS, commands]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [imported for _, imported in expected]


def test_an_unknown_kind_of_data_set_is_answered_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "validate", "no_such", str(tmp_path)])
    assert "expected one of core, own_parts, descriptor, pascal_part" in capsys.readouterr().err
