"""Make one static page with a sortable table of all runs under a folder, ready to be a Space:

    python scripts/leaderboard.py runs --output_dir runs/leaderboard
    hf upload user/partonomy-leaderboard runs/leaderboard --repo-type space

It reads every metrics.json of evaluate_plum.py. Models share a table only if they answered the same questions;
published results have a separate table.
"""

import argparse
from pathlib import Path

from plum_partonomy.command_line import Options, check_writable, run_command
from plum_partonomy.scoring.leaderboard import make_leaderboard, read_results
from plum_partonomy.scoring.predictions import write_whole

CARD = """---
title: {title}
emoji: 🧩
colorFrom: blue
colorTo: gray
sdk: static
app_file: index.html
---

Results on PARTONOMY, measured with evaluate_plum.py.
"""


def main() -> None:
    parser = Options(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that contains the folders of runs")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for index.html and README.md")
    parser.add_argument("--title", default="PARTONOMY leaderboard", help="title of the page and the Space")
    options = parser.parse_args()
    check_writable(options.output_dir)
    results, others = read_results(options.folder)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(options.output_dir / "index.html", [make_leaderboard(results, title=options.title)])
    write_whole(options.output_dir / "README.md", [CARD.format(title=options.title)])
    for sentence in others:
        print(f"left out: {sentence}")
    print(f"{len(results)} runs: {options.output_dir / 'index.html'}")


if __name__ == "__main__":
    run_command("leaderboard.py", main, ["output_dir"])
