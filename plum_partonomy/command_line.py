"""
Options and errors of all commands: an unknown option suggests the nearest known one, and an expected error is one
sentence without a traceback. Imports neither torch nor transformers, so that errors appear at once.
"""

import argparse
import contextlib
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from plum_partonomy.masks import DataError

WRONG_USE, INTERRUPTED = 2, 130
LAUNCHER_SECONDS = 60
"""Maximum time to wait for the launcher of a process."""


def nearest(word: str, known: Iterable[str]) -> str:
    """
    Return a clause with the known word that is most similar to a word; empty if none is similar.

    >>> nearest("--max_stepz", ["--max_steps", "--save_steps"])
    '; did you mean --max_steps?'
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


class Options(argparse.ArgumentParser):
    """
    A parser whose error names the first unknown option and the nearest known one, before it reports missing
    options.

    Set `knows_all` to False for a command that passes its options on to another.
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
        """End the command with one sentence; --help lists all options."""
        ending = "" if message.endswith((".", "?")) else "."
        end(self.prog, f"{message}{ending}", WRONG_USE)


def run_command(name: str, main: Callable[[], None], options: Sequence[str] = ()) -> None:
    """
    Run a command. An error that the user can fix becomes one sentence on standard error and exit status 2. Any
    other exception is a bug and keeps its traceback.

    Args:
        name: Name of the command, printed before the sentence.
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
        if not re.fullmatch(r"[\w.]+", error.name):  # a sentence in place of the name
            end(name, error.name, WRONG_USE)
        end(name, f"this needs the package {error.name}: pip install {error.name.partition('.')[0]}.", WRONG_USE)
    except OSError as error:  # such as a folder without write permission or a full disk
        place = f"{error.filename}: " if error.filename else ""
        end(name, f"{place}{str(error.strerror or error).rstrip('.')}.", WRONG_USE)
    except RuntimeError as error:
        port = re.search(r"port:? (\d+)", str(error))
        if "EADDRINUSE" not in str(error) or port is None:
            raise
        other = "another with torchrun --master_port or accelerate launch --main_process_port"
        end(name, f"port {port[1]} is in use: choose {other}.", WRONG_USE)


def check_writable(folder: str | Path, option: str = "output_dir") -> None:
    """Raise DataError unless the folder of an option can be created or written; creates nothing."""
    found = Path(folder)
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        raise DataError(f"{folder} cannot be made: {found} is a file; give another {option}=FOLDER.")
    if not os.access(found, os.W_OK | os.X_OK):
        raise DataError(f"{folder} cannot be written: {found} is not yours to write; give another {option}=FOLDER.")


def as_options(message: str, names: Iterable[str]) -> str:
    """
    Return the message with arguments of these names written as command-line options.

    >>> as_options("Pass data_dir=FOLDER; max_spans is 0.", ["data_dir", "max_spans", "name"])
    'Pass --data_dir FOLDER; --max_spans is 0.'
    """
    plain, joined = [name for name in names if "_" in name], list(names)
    if not joined:
        return message
    free = r"(?<![\w./'\"`=-])"
    message = re.sub(rf"{free}({'|'.join(joined)})(?:=|: (?=true|false|\d))", r"--\1 ", message)
    return re.sub(rf"{free}({'|'.join(plain)})(?![\w=./'\"`])", r"--\1", message) if plain else message


def complain(name: str, sentence: str) -> str:
    """Write a sentence to standard error as one line, whatever names it contains, and return the line."""
    line = f"{name}: {' '.join(sentence.split())}\n"
    sys.stderr.write(line)
    sys.stderr.flush()
    return line


def end(name: str, sentence: str, status: int) -> None:
    """End the process with a sentence on standard error, which is the last line also under a launcher with its own
    output.
    """
    line = complain(Path(name).name, sentence)
    launched = any(variable in os.environ for variable in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
    if launched and os.environ.get("LOCAL_RANK", "0") == "0" and hasattr(os, "fork"):
        _repeat_after_launcher(line)
    sys.exit(status)


def _repeat_after_launcher(line: str) -> None:
    """Write the line again after the launcher, which reports the exit status of a process with a traceback."""
    launcher = os.getppid()
    if os.fork():
        return
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # the launcher has ended
                select.select([os.pidfd_open(launcher)], [], [], LAUNCHER_SECONDS)
        os.write(2, line.encode(errors="backslashreplace"))
    finally:
        os._exit(0)
