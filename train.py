"""
Trains PLUM on grounded conversations.

    python train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny

`--help` lists the options (plum_partonomy/training/options.py); plum_partonomy/training/run.py is the run.
"""

import sys

from plum_partonomy.masks import DataError
from plum_partonomy.training.run import main

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DataError as error:
        sys.exit(f"train.py: {error}")
