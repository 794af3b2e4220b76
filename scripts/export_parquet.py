"""Export configs of the data set to Parquet with embedded images, checksums and a card, as a repository for the Hub.

    python scripts/export_parquet.py --output_dir partonomy --overwrite
    python scripts/export_parquet.py --name core --data_dir FOLDER --output_dir partonomy-core
    python scripts/export_parquet.py --name pascal_part pascal_part_questions --data_dir FOLDER --scheme balanced \\
        --num_proc 2 --output_dir partonomy-pascal-part

The first form writes the drawn miniature of this repository again. The folder appears once it is complete: a failure
leaves nothing behind, or the old folder unchanged. The same data and library versions give the same bytes.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

import partonomy_dataset
from plum_partonomy.drawn import miniature
from plum_partonomy.hub.dataset_card import ConfigFacts, make_card
from plum_partonomy.hub.model_card import CITATION
from plum_partonomy.hub.shards import MAX_SHARD_BYTES, write_checksums, write_shards
from plum_partonomy.questions.maker import SCHEMES
from plum_partonomy.records import DataError, Question
from plum_partonomy.scoring.blind_baselines import leak_of_copy, leak_of_drawings, leak_of_published
from plum_partonomy.sources.problems import ERRORS_FILE, write_problems
from plum_partonomy.sources.splits import PART_SOURCES, Survey, survey
from plum_partonomy.sources.statistics import Statistics
from plum_partonomy.sources.untrusted import refuse


def main() -> None:
    options = parse_options()
    try:
        write_folder(options.output_dir, lambda folder: export(folder, options), overwrite=options.overwrite)
    except (DataError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        sys.exit(f"export_parquet.py: {error.__cause__ or error}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", nargs="+", default=list(partonomy_dataset.DRAWING_SIZES), help="configs to export")
    parser.add_argument("--data_dir", help="folder of your files, if a config needs one")
    parser.add_argument("--scheme", choices=SCHEMES, help="distractor scheme of questions about your files")
    parser.add_argument("--on_error", choices=("refuse", "report"), help="how to handle bad records; default: refuse")
    parser.add_argument("--max_shard_bytes", type=int, default=MAX_SHARD_BYTES, help="largest Parquet file")
    parser.add_argument("--num_proc", type=int, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args()
    if options.max_shard_bytes < 1:
        parser.error(f"--max_shard_bytes must be at least 1, found {options.max_shard_bytes}")
    return options


def write_folder(folder: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Call `write` with a new folder beside `folder`, and replace `folder` with it on success."""
    if folder.exists() and not overwrite:
        raise DataError(f"{folder}: already exists; name a new folder, or give --overwrite")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        write(unfinished)
        if folder.exists():
            replaced = unfinished.with_name(unfinished.name + ".replaced")
            folder.rename(replaced)
            unfinished.rename(folder)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def export(folder: Path, options: argparse.Namespace) -> None:
    configs, problems = [], []
    surveys: dict[str, Survey | None] = {}
    with tempfile.TemporaryDirectory() as cache_dir:
        for name in options.name:
            splits = load(name, options, cache_dir)
            for split, rows in splits.items():
                write_shards(rows, folder / name, split=split, max_shard_bytes=options.max_shard_bytes)
            first = next(iter(splits.values()))
            problems = max(problems, partonomy_dataset.left_out(first), key=len)
            source = name.removesuffix("_questions").removesuffix("_instances")
            if source not in surveys:
                surveys[source] = look_at(source, options) if source in PART_SOURCES else None
            configs.append(describe(name, splits, source=source, found=surveys[source], scheme=options.scheme))
    for source, found in surveys.items():
        if (graphs := graphs_of(source, found)) is not None:
            (folder / "graphs").mkdir(exist_ok=True)
            (folder / "graphs" / f"{source}.json").write_text(json.dumps(graphs, indent=1) + "\n", encoding="utf-8")
    if problems:
        write_problems(folder / ERRORS_FILE, problems)
    card = make_card(
        configs,
        folder=options.output_dir.name,
        command=command(options),
        citation=CITATION,
        graphs=(folder / "graphs").is_dir(),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_checksums(folder)


def load(name: str, options: argparse.Namespace, cache_dir: str) -> datasets.DatasetDict:
    asked = {"data_dir": options.data_dir, "num_proc": options.num_proc, "cache_dir": cache_dir}
    if name.endswith("_questions") and name not in partonomy_dataset.DRAWING_SIZES:
        asked["scheme"] = options.scheme
    asked["on_error"] = options.on_error
    asked = {option: value for option, value in asked.items() if value is not None}
    return datasets.load_dataset(partonomy_dataset.DATASET_NAME, name, **asked)


def describe(
    name: str, splits: datasets.DatasetDict, *, source: str, found: Survey | None, scheme: str | None
) -> ConfigFacts:
    first = next(iter(splits.values()))
    facts = ConfigFacts(
        name=name,
        source=source,
        rows_are=first.info.description,
        features=first.features,
        splits={split: count(rows) for split, rows in splits.items()},
        left_out=len(partonomy_dataset.left_out(first)),
    )
    if "question_type" in first.features:
        facts.made_with, facts.leaks = measure(splits, source=source, found=found, scheme=scheme)
    return facts


def count(rows: datasets.Dataset) -> Statistics:
    statistics = Statistics()
    for row in rows.remove_columns("image"):
        statistics.add(row)
    return statistics


def measure(
    splits: datasets.DatasetDict, *, source: str, found: Survey | None, scheme: str | None
) -> tuple[str, dict[str, Any]]:
    """Return the scheme of the questions, and the leak of this scheme and of the other possible ones."""
    seed = partonomy_dataset.SEED
    if source in partonomy_dataset.SCENES:
        sizes = partonomy_dataset.DRAWING_SIZES[f"{source}_questions"]
        return "balanced", leak_of_drawings(sizes, scene=partonomy_dataset.SCENES[source], seed=seed)
    if found is not None:
        return scheme or SCHEMES[0], leak_of_copy(found, seed=seed)
    rows = splits["test"].remove_columns(["image", "masks"])
    questions = [Question(image=None, masks=[], **row) for row in rows]
    return "official", {"official": leak_of_published(questions, seed=seed)}


def look_at(source: str, options: argparse.Namespace) -> Survey:
    skips, ignored = options.on_error == "report", []
    place, on_error = Path(options.data_dir).expanduser(), ignored.append if skips else refuse
    return survey(source, place, seed=partonomy_dataset.SEED, on_error=on_error, read_all=skips)


def graphs_of(source: str, found: Survey | None) -> dict[str, Any] | None:
    if source in partonomy_dataset.SCENES:
        scene = partonomy_dataset.SCENES[source]
        return {
            "part_graph": miniature.part_graph(scene),
            "required_parts": miniature.required_parts(scene),
            "instance_graph": miniature.instance_graph(scene),
        }
    if found is None or not found.part_graph:
        return None
    return {"part_graph": found.part_graph, "instance_graph": found.instance_graph}


def command(options: argparse.Namespace) -> str:
    """Return the command that writes these files, without local paths."""
    words = ["python", "scripts/export_parquet.py"]
    if options.name != list(partonomy_dataset.DRAWING_SIZES):
        words += ["--name", *options.name]
    words += ["--data_dir", "FOLDER"] if options.data_dir else []
    words += ["--scheme", options.scheme] if options.scheme else []
    words += ["--on_error", "report"] if options.on_error == "report" else []
    return shlex.join([*words, "--output_dir", options.output_dir.name])


if __name__ == "__main__":
    main()
