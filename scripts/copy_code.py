"""
Write the copies of code into each folder of checkpoints/ and beside the mask metric.

    python scripts/copy_code.py
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKPOINT_CODE = (
    "backbones_plum.py",
    "chats_plum.py",
    "configuration_plum.py",
    "generation_plum.py",
    "inputs_plum.py",
    "modeling_plum.py",
    "modules_plum.py",
    "processing_plum.py",
    "segmentation_plum.py",
    "segmenters_plum.py",
    "supervision_plum.py",
)
METRIC_CODE = ("inputs_plum.py", "plum_partonomy/scoring/mask_metrics.py")


def copies() -> dict[Path, Path]:
    """Return the source of each copy, by the path of the copy."""
    checkpoints = [path.parent for path in (ROOT / "checkpoints").glob("*/config.json")]
    pairs = {folder / name: ROOT / name for folder in checkpoints for name in CHECKPOINT_CODE}
    return pairs | {ROOT / "metrics" / "partonomy_masks" / Path(name).name: ROOT / name for name in METRIC_CODE}


def main():
    for copy, source in copies().items():
        shutil.copyfile(source, copy)
        print(f"{source.relative_to(ROOT)} -> {copy.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
