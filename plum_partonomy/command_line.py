"""
What commands share: options with the nearest known one in the message, and expected errors as one sentence, without a
traceback. Imports neither torch nor transformers, so that a mistake is named at once.
"""

import argparse
import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plum_partonomy.masks import DataError

WRONG_USE, INTERRUPTED = 2, 130
LAUNCHER_SECONDS = 60
"""Longest time that the launcher of a process is waited for."""


def nearest(word: str, known: Iterable[str]) -> str:
    """
    A half sentence that names the known word that is most like a word; empty if none is like it.

    >>> nearest("--max_stepz", ["--max_steps", "--save_steps"])
    '; did you mean --max_steps?'
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


class Options(argparse.ArgumentParser):
    """
    A parser that names an unknown option and the nearest known one, before it misses others, in one sentence.

    `knows_all` is set to False for a command that hands its options on to another.
    """

    knows_all = True

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        words = sys.argv[1:] if args is None else list(map(str, args))
        if self.knows_all and self._subparsers is None:
            for word in words:
                name = word.partition("=")[0]
                if word.startswith("--") and word != "--" and name not in self._option_string_actions:
                    self.error(f"there is no option {name}{nearest(name, self._option_string_actions)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str):
        """Ends the command with the sentence alone; all options are in --help."""
        ending = "" if message.endswith((".", "?")) else "."
        end(self.prog, f"{message}{ending}", WRONG_USE)


def run_command(name: str, main: Callable[[], None], options: Sequence[str] = ()) -> None:
    """
    Runs a command. What a person can mend becomes one sentence on the standard error and exit status 2; whatever else
    is raised is a fault of the program and keeps its traceback.

    Args:
        name: Of the command, before the sentence.
        options: Names of its options. An argument of that name in the sentence becomes the option.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except DataError as error:
        end(name, as_options(str(error), options), WRONG_USE)
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "plum_partonomy":
            raise
        end(name, f"this needs the package {error.name}: pip install {error.name.partition('.')[0]}.", WRONG_USE)
    except OSError as error:  # such as a folder that cannot be written or a disk without room
        place = f"{error.filename}: " if error.filename else ""
        end(name, f"{place}{error.strerror or error}.", WRONG_USE)
    except RuntimeError as error:
        port = re.search(r"port:? (\d+)", str(error))
        if "EADDRINUSE" not in str(error) or port is None:
            raise
        other = "another with torchrun --master_port or accelerate launch --main_process_port"
        end(name, f"port {port[1]} is in use: choose {other}.", WRONG_USE)


def check_writable(folder: str | Path) -> None:
    """Raises DataError unless a folder can be made or written; makes nothing."""
    found = Path(folder)
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        raise DataError(f"{folder} cannot be made: {found} is a file; give another output_dir=FOLDER.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise DataError(f"{folder} cannot be written: {found} is not yours to write; give another output_dir=FOLDER.")


def as_options(message: str, names: Iterable[str]) -> str:
    """
    The message with the arguments of these names as options of a command line.

    >>> as_options("Pass data_dir=FOLDER; max_spans is 0.", ["data_dir", "max_spans", "name"])
    'Pass --data_dir FOLDER; --max_spans is 0.'
    """
    plain, joined = [name for name in names if "_" in name], list(names)
    if not joined:
        return message
    free = r"(?<![\w./'\"`=-])"
    message = re.sub(rf"{free}({'|'.join(joined)})(?:=|: (?=true|false|\d))", r"--\1 ", message)
    return re.sub(rf"{free}({'|'.join(plain)})(?![\w=./'\"`])", r"--\1", message) if plain else message


def end(name: str, sentence: str, status: int) -> None:
    """Ends the process with a sentence on the standard error, the last one also under a launcher that adds its own."""
    line = f"{Path(name).name}: {' '.join(sentence.split())}\n"
    sys.stderr.write(line)
    sys.stderr.flush()
    launched = any(variable in os.environ for variable in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    if launched and os.environ.get("LOCAL_RANK", "0") == "0" and hasattr(os, "fork"):
        _repeat_after_launcher(line)
    sys.exit(status)


def _repeat_after_launcher(line: str) -> None:
    """Writes the line once more after the launcher, which reports the exit status of a process with a traceback."""
    launcher = os.getppid()
    if os.fork():
        return
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deadline = time.monotonic() + LAUNCHER_SECONDS
        while _lives(launcher) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.write(2, line.encode(errors="backslashreplace"))
    finally:
        os._exit(0)


def _lives(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
