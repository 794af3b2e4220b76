"""
Make the training folder of checkpoints/plum-photos, with photographs and masks scaled down once.

    python scripts/prepare_photographs.py FOLDER prepared --longest_side 384

FOLDER contains `real_parts` (cars and outfits), `facades` and `faces`, each with images and a `descriptor.json` in the
format of docs/own_data.md. The prepared folder contains the same, with two changes: the wall masks of facades, coarse
boxes that include sky and trees, are removed; and the photographs of some people of `faces` are in `faces_held_out`,
because most photographs show the same fifteen people.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from plum_partonomy.images import read_image
from plum_partonomy.masks import decode, encode

LEFT_OUT = {"facades": {"wall"}}
HELD_OUT_PEOPLE = re.compile(r"personne(13|14|15)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--longest_side", type=int, default=384, help="Maximum side in pixels; smaller photographs are unchanged."
    )
    parser.add_argument("--quality", type=int, default=85, help="Quality of the JPEG files.")
    arguments = parser.parse_args()
    for name in ("real_parts", "facades", "faces"):
        folder = arguments.source / name
        descriptor = json.loads((folder / "descriptor.json").read_text(encoding="utf-8"))
        left_out = LEFT_OUT.get(name, set())
        parts = {label: sorted(set(parts) - left_out) for label, parts in descriptor["part_graph"].items()}
        written = {}
        for instance in tqdm(descriptor["instances"], desc=name):
            held_out = name == "faces" and HELD_OUT_PEOPLE.search(instance["image_path"])
            target = arguments.target / ("faces_held_out" if held_out else name)
            scaled = scale(instance, folder, target, arguments.longest_side, arguments.quality, left_out)
            written.setdefault(target, []).append(scaled)
        for target, instances in written.items():
            content = json.dumps({**descriptor, "part_graph": parts, "instances": instances})
            (target / "descriptor.json").write_text(content, encoding="utf-8")


def scale(instance: dict, source: Path, target: Path, longest_side: int, quality: int, left_out: set[str]) -> dict:
    """Write the scaled photograph and return its record, without masks that vanish at the new size."""
    image = read_image(source / instance["image_path"], where=instance["image_path"])
    share = min(1.0, longest_side / max(image.size))
    size = tuple(max(1, round(share * side)) for side in image.size)
    path = target / instance["image_path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(size, Image.Resampling.LANCZOS).save(path, format="JPEG", quality=quality)
    segmentations = {}
    for label, rles in instance["segmentations"].items():
        masks = [np.asarray(Image.fromarray(decode(rle)).resize(size, Image.Resampling.NEAREST)) for rle in rles]
        kept = [encode(mask) for mask in masks if mask.any()]
        if kept and label not in left_out:
            segmentations[label] = kept
    return {**instance, "segmentations": segmentations, "segmentation_labels": list(segmentations)}


if __name__ == "__main__":
    main()
