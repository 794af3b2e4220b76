"""Build the Space of the demo: its card and requirements, the code and the checkpoints.

python scripts/build_space.py --output_dir runs/space
python scripts/push_to_hub.py space runs/space --repo_id user/plum-demo
"""

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ["*.py", "plum_partonomy/**/*.py", "demo/*.py", "demo/*.css", "demo/*.js"]
CHECKPOINTS = ["checkpoints/*/*"]


def build_space(folder: Path) -> None:
    """Copy the files to the same relative paths in a new folder."""
    folder.mkdir(parents=True)
    for name in ("README.md", "requirements.txt"):
        shutil.copyfile(ROOT / "demo" / name, folder / name)
    for path in (path for pattern in [*CODE, *CHECKPOINTS] for path in ROOT.glob(pattern)):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    build_space(parser.parse_args().output_dir)
