"""
Train PLUM on grounded conversations.

    python train.py recipes/plum_tiny.yaml --output_dir runs/plum_tiny

`--help` lists the options (plum_partonomy/training/options.py). The run is in plum_partonomy/training/run.py.
"""

import sys

from plum_partonomy.command_line import run_command
from plum_partonomy.training.options import option_names
from plum_partonomy.training.run import main

if __name__ == "__main__":
    run_command("train.py", lambda: main(sys.argv[1:]), option_names())
