"""
Commands in processes of their own that start at once: one process has imported what they need, and each command is a
fork of it. It differs from `python WORDS` in one point: what imports print goes to the process that imports.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
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
    (done,) = run_together([words], **options)
    return done


def run_together(commands: Sequence[Sequence], environments: Sequence[dict] = (), **options) -> list:
    """Run several commands at the same time, as `run`, each with an environment of its own if these are given."""
    with ThreadPoolExecutor(2 * len(commands)) as readers:
        started = []
        for words, environment in zip_longest(commands, environments, fillvalue={}):
            outputs, writers = zip(*(os.pipe() for _ in range(2)), strict=True)
            process = start(*words, stdout=writers[0], stderr=writers[1], **options, **environment)
            for writer in writers:
                os.close(writer)
            started.append((words, process, [readers.submit(_read, output) for output in outputs]))
        found = []
        for words, process, texts in started:
            process.join(SECONDS)
            if process.exitcode is None:
                process.kill()
            found.append(subprocess.CompletedProcess(words, process.exitcode, *(text.result() for text in texts)))
        return found


def _read(output: int) -> str:
    with open(output, errors="replace") as file:
        return file.read()


def run_distributed(*words: object, processes: int = 2) -> None:
    """Run `python WORDS` in processes that find each other as those of `torchrun`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    for done in run_together([words] * processes, environments):
        assert done.returncode == 0, done.stderr


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
