"""Evaluate PARTONOMY's questions: the answers of a PLUM model or of another one.

`arguments` are those of evaluate_plum.py.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from tqdm import tqdm

import partonomy_dataset
from plum_partonomy.baselines.model import UnderTest
from plum_partonomy.evaluation.answers import describe_run, finish, load
from plum_partonomy.evaluation.processes import open_state
from plum_partonomy.files import write_whole
from plum_partonomy.inference.embedding_cache import EmbeddingCache
from plum_partonomy.inference.one_image import load_model
from plum_partonomy.inference.predictor import IMAGES_KEPT, Predictor
from plum_partonomy.records import Question
from plum_partonomy.scoring.benchmark import (
    CONTROL_SEED,
    Asked,
    data_folder,
    fingerprint,
    load_image,
    make_batches,
    pick_wrong_images,
)
from plum_partonomy.scoring.predictions import append_predictions, check_run, merge_predictions, read_predictions
from plum_partonomy.scoring.results import fingerprint_model
from plum_partonomy.sources.problems import ERRORS_FILE, write_problems

# ---------------------------------------------------------------- stage 1: predictions


def run_settings(arguments: Any, *, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the settings that every prediction depends on; a run resumes only with the same settings."""
    names = ("name", "split", "control", "choice_reduction", "mask_source", "max_new_tokens", "batch_size")
    names += ("limit", "dtype")
    return {
        "dataset": arguments.dataset,
        **{name: getattr(arguments, name) for name in names},
        "data_dir": data_folder(arguments.data_dir),
        "questions": len(questions),
        "questions_fingerprint": fingerprint(questions),
        "control_seed": CONTROL_SEED,
    }


def predict(
    predictor: Any,
    rows: datasets.Dataset,
    questions: Sequence[Question],
    *,
    wrong_images: dict[str, str],
    batch_size: int,
    output_dir: Path,
    state: PartialState,
) -> int:
    """Complete predictions.jsonl, with each process taking its share of the images; return the number of earlier
    predictions.

    A batch is predicted as a whole even if some of its questions are done, so that predictions do not depend on where
    a run was interrupted.
    """
    ids = [question.id for question in questions]
    if state.is_main_process:
        merge_predictions(output_dir, ids)
    state.wait_for_everyone()
    done = {prediction.question_id for prediction in read_predictions(output_dir / "predictions.jsonl")}
    first_use: dict[str, tuple[int, Question]] = {}
    for index, question in enumerate(questions):
        first_use.setdefault(question.image_id, (index, question))

    groups = [
        [batch for batch in group if {ids[index] for index in batch} - done]
        for group in make_batches(questions, batch_size)
    ]
    share = list(filter(None, groups))[state.process_index :: state.num_processes]
    for batch in tqdm(
        list(chain.from_iterable(share)), desc="predicting", unit="batch", disable=not state.is_main_process
    ):
        shown = [(questions[index], questions[index].image_id) for index in batch]
        wrong = [(question, wrong_images[image_id]) for question, image_id in shown if wrong_images]
        stored = {image_id: first_use[image_id] for _, image_id in shown + wrong}
        images = {image_id: load_image(rows, *place) for image_id, place in stored.items()}
        asked = [Asked(question, images[image_id], image_id) for question, image_id in shown + wrong]
        predictions = predictor.predict(asked)
        if wrong_images:
            pairs = zip(predictions[: len(shown)], predictions[len(shown) :], strict=True)
            predictions = [replace(prediction, wrong_image=control) for prediction, control in pairs]
        own_file = output_dir / f"predictions.rank{state.process_index}.jsonl"
        append_predictions(own_file, [p for p in predictions if p.question_id not in done])
    state.wait_for_everyone()
    if state.is_main_process:
        merge_predictions(output_dir, ids)
    return len(done)


# ---------------------------------------------------------------- run


def open_plum(arguments: Any, questions: Sequence[Question], device: torch.device) -> UnderTest:
    """Return the PLUM model of `--model` on a device. Raises DataError if it cannot be opened."""
    folder, plum = load_model(arguments.model, dtype=arguments.dtype, device=device)
    embedding_cache = None
    if arguments.cache_image_embeddings is not None:
        embedding_cache = EmbeddingCache(arguments.cache_image_embeddings, plum.model)
        if PartialState().is_main_process:
            print(embedding_cache.describe(len({question.image_id for question in questions})))
    predictor = Predictor(
        plum.model,
        plum.processor,
        max_new_tokens=arguments.max_new_tokens,
        choice_reduction=arguments.choice_reduction,
        mask_source=arguments.mask_source,
        image_cache_size=arguments.image_cache_size or IMAGES_KEPT,
        embedding_cache=embedding_cache,
    )
    settings = {
        "model_fingerprint": fingerprint_model(folder),
        "image_embeddings": None if embedding_cache is None else "bfloat16",
    }
    # the folder of a model from the Hub is named after its commit
    revision = folder.name if folder.parent.name == "snapshots" else None
    return UnderTest(
        predictor,
        settings,
        choice_reduction=arguments.choice_reduction,
        run={"model": arguments.model, "model_revision": revision},
        training_curves=folder / "training_curves.csv",
    )


def evaluate(
    arguments: Any, open_model: Callable[[Any, Sequence[Question], torch.device], UnderTest] = open_plum
) -> None:
    """Run the whole evaluation of a model. Raises DataError before anything is written."""
    started = time.perf_counter()
    state = open_state(arguments)
    with state.main_process_first():
        rows, questions, unusable = load(arguments)
    wrong_images = {}
    if arguments.control == "wrong_image":
        wrong_images = pick_wrong_images(questions)
    model = open_model(arguments, questions, state.device)
    settings = {**model.settings, **run_settings(arguments, questions=questions)}
    output_dir = Path(arguments.output_dir)
    check_run(output_dir, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / "run.json", [json.dumps(settings, indent=2), "\n"])
        if unusable:
            write_problems(output_dir / ERRORS_FILE, unusable)
    resumed = predict(
        model.predictor,
        rows,
        questions,
        wrong_images=wrong_images,
        batch_size=arguments.batch_size,
        output_dir=output_dir,
        state=state,
    )
    if state.is_main_process:
        described = describe_run(arguments, settings, choice_reduction=model.choice_reduction, started=started)
        run = {"model": None, **model.run, **described}
        run |= {"device": str(state.device), "processes": state.num_processes, "predictions_found": resumed}
        run["image_cache"] = model.predictor.images.summary()  # of the first process
        run |= {"left_out": 0, "records_left_out": len(unusable)}
        run["masks_resized"] = partonomy_dataset.masks_resized(rows)
        predictions = read_predictions(output_dir / "predictions.jsonl")
        finish(arguments, rows, questions, predictions, run=run, training_curves=model.training_curves)
    state.wait_for_everyone()
    state.destroy_process_group()
