"""PLUM in the shell:

    plum ask IMAGE "Which parts does it have?" --save answer/     # the answer; overlay, masks and COCO json as files
    plum segment IMAGE --spans "left wing, tail" --json           # masks of parts that you name
    plum chat IMAGE                                               # question after question, until the input ends
    plum eval --model MODEL --output_dir DIR ...                  # evaluate_plum.py with its options
    plum train recipes/NAME.yaml --output_dir DIR ...             # train.py with its options
    plum data validate [SOURCE] FOLDER                            # and stats, preview

IMAGE is a file, or - for the standard input. Answers go to the standard output and are plain text unless that is a
terminal; problems go to the standard error, one sentence each. Exit codes: 0 done, 1 the input cannot be used,
2 wrong usage, 3 the model cannot be loaded, 130 interrupted.
"""

import os
import signal
import sys

BAD_INPUT, NO_MODEL, INTERRUPTED = 1, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """
    Runs one command and returns its exit code. Whatever takes time to import is imported in here, so that Ctrl-C is
    obeyed from the beginning.
    """
    if arguments is None:
        signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of an answer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        try:
            from plum_partonomy.commands import run

            return run(arguments)
        finally:
            if sys.stdout is not None:  # closed by whoever started this
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        return 0
    except OSError as error:
        print(f"plum: {error.filename}: {error.strerror}" if error.filename else f"plum: {error}", file=sys.stderr)
        return BAD_INPUT
    finally:
        _discard_unwritable()


def _interrupt(number: int, frame: object) -> None:
    """
    Ends the process at once. As an exception, Ctrl-C is reported or swallowed by what it happens to meet: imports,
    callbacks and threads. Files are written so that a process may be killed at any moment.
    """
    os._exit(INTERRUPTED)


def _discard_unwritable() -> None:
    """What could not be written is not tried once more, with another complaint, when Python closes the output."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by whoever started this
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
