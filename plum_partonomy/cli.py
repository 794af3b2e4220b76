"""PLUM in the shell:

    plum ask IMAGE "Which parts does it have?" --save answer/     # the answer; overlay, masks and COCO json as files
    plum segment IMAGE --spans "left wing, tail" --json           # masks of parts that you name
    plum chat IMAGE                                               # question after question, until the input ends
    plum eval --model MODEL --output_dir DIR ...                  # evaluate_plum.py with its options
    plum train recipes/NAME.yaml --output_dir DIR ...             # train.py with its options
    plum data validate [SOURCE] FOLDER                            # and stats, preview

IMAGE is a file, or - for standard input. Answers go to standard output, as plain text unless it is a terminal. Errors
go to standard error, one sentence each. Exit codes: 0 success, 1 the input cannot be used, 2 wrong usage, 3 the model
cannot be loaded, 130 interrupted.
"""

import os
import signal
import sys

BAD_INPUT, NO_MODEL, INTERRUPTED = 1, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """
    Run one command and return its exit code. Slow imports are inside the functions, so that Ctrl-C works from the
    start.
    """
    if arguments is None:
        signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not support the characters of an answer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        try:
            from plum_partonomy.commands import run

            return run(arguments)
        finally:
            if sys.stdout is not None:  # closed by the parent process
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe
        return 0
    except OSError as error:
        from plum_partonomy.command_line import complain

        complain("plum", f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return BAD_INPUT
    finally:
        _discard_unwritable()


def _interrupt(number: int, frame: object) -> None:
    """
    End the process at once. As an exception, Ctrl-C would be reported or swallowed by imports, callbacks and
    threads. Files are written so that a process may be killed at any time.
    """
    os._exit(INTERRUPTED)


def _discard_unwritable() -> None:
    """Discard unwritten output, so that Python does not try and fail to write it again on exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # closed by the parent process
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
