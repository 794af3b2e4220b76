"""Measure the accuracy of blind heuristics on questions of both distractor schemes.

    python scripts/measure_leak.py                                         # the drawn miniature
    python scripts/measure_leak.py --name descriptor --data_dir FOLDER     # a data set of parts

Prints one line per scheme: chance, and the accuracy of each heuristic without an image. The test questions are the
last split, or half of the images of a single split.
"""

import argparse
import sys
from pathlib import Path

from partonomy_dataset import MINI_QUESTIONS_SIZES, SEED
from plum_partonomy.masks import DataError
from plum_partonomy.scoring.blind_baselines import leak_of_copy, leak_of_drawings
from plum_partonomy.sources.splits import PART_SOURCES, survey


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=("mini", *PART_SOURCES), default="mini", help="the data set")
    parser.add_argument("--data_dir", type=Path, help="folder of the data set")
    options = parser.parse_args()
    if options.name == "mini":
        leaks = leak_of_drawings(MINI_QUESTIONS_SIZES, seed=SEED)
    elif options.data_dir is None:
        parser.error(f"--name {options.name} reads your copy: give its --data_dir")
    else:
        try:
            leaks = leak_of_copy(survey(options.name, options.data_dir, seed=SEED), seed=SEED)
        except DataError as error:
            sys.exit(f"measure_leak.py: {error}")
    for scheme, leak in leaks.items():
        figures = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in leak.items()) if leak else "no questions"
        print(f"{scheme}: {figures}")


if __name__ == "__main__":
    main()
