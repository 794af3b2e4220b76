"""Exports the drawn data sets to Parquet, with their images, so that the folder works without this project's code.

python scripts/export_parquet.py --output_dir partonomy
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from datasets import load_dataset
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import partonomy_dataset
from partkit import synthesis

SIZE_LIMIT = 9_500_000
"""Bytes of all Parquet files together: the folder is part of the repository."""

DICTIONARY_BYTES = 64 * 1024**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to; its README.md is kept")
    output_dir = parser.parse_args().output_dir
    total = 0
    with tempfile.TemporaryDirectory() as cache_dir:
        for name in partonomy_dataset.DRAWING_SIZES:
            for split, dataset in load_dataset(partonomy_dataset.DATASET_NAME, name, cache_dir=cache_dir).items():
                path = output_dir / name / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                # the schema carries the features; with a large dictionary an image is stored once per column chunk
                parquet.write_table(
                    dataset.with_format("arrow")[:].cast(dataset.features.arrow_schema),
                    path,
                    row_group_size=len(dataset),
                    compression="zstd",
                    compression_level=19,
                    dictionary_pagesize_limit=DICTIONARY_BYTES,
                )
                total += path.stat().st_size
                print(f"{path}: {len(dataset)} rows, {path.stat().st_size:,} bytes")
    if total > SIZE_LIMIT:
        raise SystemExit(f"{total:,} bytes of Parquet exceed the limit of {SIZE_LIMIT:,}: draw fewer pictures")
    graphs = output_dir / "graphs" / "mini.json"
    graphs.parent.mkdir(exist_ok=True)
    content = {
        "part_graph": synthesis.part_graph(),
        "required_parts": synthesis.required_parts(),
        "instance_graph": synthesis.instance_graph(),
    }
    graphs.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{total:,} bytes in all")


if __name__ == "__main__":
    main()
