"""
Commands in processes of their own that start at once: one process has imported what they need, and each command is a
fork of it. It differs from `python WORDS` in one point: what imports print goes to the process that imports.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 240
# `python -c PLUM segment ...` is what the command `plum segment ...` runs.
PLUM = "import sys; from plum_partonomy.cli import main; sys.exit(main())"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["plum_partonomy.training.run", "plum_partonomy.evaluation.run", "plum_partonomy.evaluation.partonomy"]
    + ["plum_partonomy.commands", "plum_partonomy.inference.one_image", "partonomy_dataset", "evaluate"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llama", "llava", "sam")]
    + [f"transformers.models.{name}.image_processing_{name}" for name in ("clip", "sam")]
)


def start(*words: object, stdin=None, stdout=None, stderr=None, cwd: Path = ROOT, **environment) -> ForkServerProcess:
    """
    Start `python SCRIPT ...` or `python -c CODE ...` and return the process, see `join` and `exitcode`.

    Args:
        stdin: Open file or file descriptor, as stdout and stderr; by default nothing is read and the output is lost.
        environment: Changes of environment variables.
    """
    with open(os.devnull, "r+") as nothing:
        files = [nothing if file is None else file for file in (stdin, stdout, stderr)]
        streams = [Connection(os.dup(file if isinstance(file, int) else file.fileno())) for file in files]
    process = _context.Process(target=_run, args=([str(word) for word in words], streams, str(cwd), environment))
    process.start()
    for stream in streams:
        stream.close()
    return process


def run(*words: object, **options) -> subprocess.CompletedProcess:
    """Run `python WORDS` to its end, with the options of `start`; the output is text."""
    with tempfile.TemporaryFile("w+", errors="replace") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(*words, stdout=stdout, stderr=stderr, **options)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(words, process.exitcode, stdout.read(), stderr.read())


def _run(words: list[str], streams: list[Connection], cwd: str, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding=environment.get("PYTHONIOENCODING", "utf-8"), closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
