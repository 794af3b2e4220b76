"""
Record the settings of a training run in its checkpoints, and find the checkpoint that a run may resume from.

    options, training records, processes ──describe_run──┐
    files of checkpoint-N ───────────────────────────────┴─seal──> checkpoint-N/resume.json

A run resumes from the last checkpoint of its folder that is complete and belongs to the same run: all files unchanged,
the same options, records and number of processes. Skipped checkpoints are printed.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from inputs_plum import check_number
from plum_partonomy.command_line import check_writable
from plum_partonomy.files import write_whole
from plum_partonomy.hub.model_card import RECIPE_FILE
from plum_partonomy.masks import DataError

SEAL_FILE = "resume.json"
LISTED = 6
"""Maximum number of settings in a message."""

# What decides where a run is, what it says, keeps and measures, and not what it learns.
FREE = re.compile(
    "output_dir|overwrite_output_dir|run_name|project|local_rank|use_cpu|no_cuda|use_mps_device|disable_tqdm|"
    "prediction_loss_only|debug|"
    "per_device_eval_batch_size|dry_run|sources|cache_image_embeddings|data_dir|resume_from_checkpoint|report_to|"
    "(trackio|hub|push_to_hub|logging|log|save|eval|batch_eval|do|ddp|include|load_best|metric_for|greater_is)_.*|"
    "dataloader_(?!drop_last).*|.*_token"
)
SETTINGS_OF_STREAMS = ("data_dir", "dataloader_num_workers")
"""The records of a stream are unknown before reading, and their order depends on the number of readers."""


def describe_run(model: Any, data: Any, args: TrainingArguments, parts: Sequence[Dataset | IterableDataset]) -> dict:
    """
    Return the settings that a resumed run must match, as JSON values.

    Args:
        model, data: The options of train.py, dataclasses.
        parts: The training records of each source.
    """
    options = dataclasses.asdict(model) | dataclasses.asdict(data) | args.to_dict()
    kept = {name: value for name, value in options.items() if not FREE.fullmatch(name)}
    if data.streaming:
        kept |= {name: options[name] for name in SETTINGS_OF_STREAMS}
    kept["image embeddings from a cache"] = data.cache_image_embeddings is not None
    kept["processes"] = args.world_size
    kept["training records"] = [fingerprint_records(part) for part in parts]
    return json.loads(json.dumps(kept, default=str))


def fingerprint_records(records: Dataset | IterableDataset) -> str | None:
    """Return a hash of the ids, texts and masks of records, independent of their folder; None for a stream."""
    if isinstance(records, IterableDataset):
        return None
    digest = hashlib.sha256()
    for table in records.select_columns(["id", "messages", "masks"]).with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def seal(folder: Path, run: dict) -> None:
    """Write `resume.json`: the run and a digest of each file, after all other files but the Trainer's state."""
    files = {path.relative_to(folder).as_posix(): _digest(path) for path in _files(folder)}
    write_whole(folder / SEAL_FILE, [json.dumps({"run": run, "files": files}, indent=1)])


def _files(folder: Path) -> list[Path]:
    unsealed = (SEAL_FILE, TRAINER_STATE_NAME, "README.md")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in unsealed)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output_folder(args: TrainingArguments) -> None:
    """
    Check the output folder before data and model are loaded.

    Raises:
        DataError: It cannot be written, or contains a finished run that would be overwritten.
    """
    folder = Path(args.output_dir)
    check_writable(folder)
    finished = (folder / RECIPE_FILE).is_file() and any(folder.glob("model*.safetensors"))
    if finished and not args.overwrite_output_dir and (args.resume_from_checkpoint or "false").lower() == "false":
        raise DataError(
            f"{folder} contains a finished run: give another output_dir=FOLDER, resume_from_checkpoint=true, or "
            "overwrite_output_dir=true."
        )


def find_checkpoint(args: TrainingArguments, run: dict) -> str | None:
    """
    Return the checkpoint to resume from: the given folder, or for `true` the last matching one of the output folder;
    None if nothing is resumed. Skipped checkpoints are named on standard error.

    Raises:
        DataError: There is none; the message gives the reason for each.
    """
    wanted = args.resume_from_checkpoint or "false"
    if wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        numbered = {}
        for folder in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", folder.name):
                numbered[folder] = int(match[1])
        folders = sorted(numbered, key=numbered.get, reverse=True)
    else:
        folders = [Path(wanted)]
    problems = []
    for folder in folders:
        problem = find_problem(folder, run)
        if problem is None:
            if problems and args.process_index == 0:
                print(f"Resuming from {folder}, as {'; '.join(problems)}.", file=sys.stderr)
            return str(folder)
        problems.append(f"{folder.name} {problem}")
    if not problems:
        raise DataError(f"resume_from_checkpoint is true but {args.output_dir} contains no checkpoint.")
    raise DataError(f"No checkpoint to resume from in {folders[0].parent}: {'; '.join(problems)}.")


def find_problem(folder: Path, run: dict) -> str | None:
    """Return why a run cannot resume from a checkpoint, as the end of a sentence; None if it can."""
    if not folder.is_dir():
        return "is not a folder"
    try:
        sealed = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        step = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
        check_number(step, name=f"global_step of {TRAINER_STATE_NAME}", least=1, whole=True)
        files, found = sealed["files"], sealed["run"]
        damaged = sorted(name for name in files if _digest(folder / name) != files[name])
    except FileNotFoundError as error:
        return f"is not whole: {Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is damaged: {error}"
    if damaged:
        return f"is damaged: {', '.join(damaged)} changed since it was saved"
    names = sorted(name for name in {**found, **run} if found.get(name) != run.get(name))
    if names:
        listed = "; ".join(f"{name} was {found.get(name)!r:.80}, is {run.get(name)!r:.80}" for name in names[:LISTED])
        return f"is of another run ({listed}{' ...' if len(names) > LISTED else ''})"
    return None
