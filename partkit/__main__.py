"""python -m partkit validate [SOURCE] FOLDER [--errors FILE.jsonl]

Checks your copy of a data set, or without SOURCE a folder of your own (docs/own_data.md), and prints what is missing
or damaged: the first problems, or with --errors each of them as a line {"problem": ...} of a file. Exits with 1 if
there is one, else with 0.
"""

import argparse
import sys
from pathlib import Path

from partkit.problems import write_problems
from partkit.validate import CHECKS, validate

LISTED_PROBLEMS = 20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m partkit", description="The PARTONOMY toolkit.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("validate", help="check your copy of a data set before a long build")
    command.add_argument("source", nargs="?", choices=CHECKS, default="own_parts")
    command.add_argument("folder", type=Path)
    command.add_argument("--errors", type=Path, metavar="FILE.jsonl", help="write every problem to this file")
    options = parser.parse_args(arguments)

    report = validate(options.source, options.folder)
    if options.errors is not None:
        write_problems(options.errors, report.problems)
    for note in report.notes:
        print(note)
    for problem in report.problems[:LISTED_PROBLEMS]:
        print(f"problem: {problem}")
    if len(report.problems) > LISTED_PROBLEMS:
        print(f"and {len(report.problems) - LISTED_PROBLEMS} more problems")
    if report.problems:
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        print(f"{options.folder} is not fit for a build: {count}")
        return 1
    print(f"{options.folder} is complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
