"""Scores a PLUM checkpoint on a benchmark of part questions:

    python evaluate_plum.py --model runs/demo/model --dataset partonomy --name mini_questions --split test \\
        --output_dir runs/demo/evaluation

Every question is put to the model three times: the choices are scored, the correct answer is given with its parts
tagged and is segmented, and an answer is generated, tagged and segmented freely. The control asks all of it again with
the image of another record. Then the figures are computed from the questions and what was written down, no more:

    questions --model--> predictions.jsonl --partkit.metrics--> metrics.json --partkit.report--> report.html

A run that was interrupted goes on where it stopped. `torchrun --nproc_per_node 2 evaluate_plum.py ...` shares the
batches out over processes; what a batch holds depends on neither, so that the figures are those of one process.
"""

import hashlib
import itertools
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from huggingface_hub import snapshot_download
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, HfArgumentParser

import partonomy_dataset  # noqa: F401  (makes load_dataset("partonomy", ...) work)
from modeling_plum import decode_spans
from partkit.benchmark import CONTROL_SEED, fingerprint, load_image, load_questions, make_batches, pick_wrong_images
from partkit.masks import DataError, encode
from partkit.metrics import evaluate_predictions, iou_per_part, true_parts
from partkit.predictions import (
    Prediction,
    SpanMask,
    append_predictions,
    check_run,
    merge_predictions,
    read_predictions,
    write_whole,
)
from partkit.report import FIGURES, write_report
from partkit.schema import Question, as_chat, escape_tags
from partkit.spans import tag_phrases
from processing_plum import PlumProcessor, parse_span_tags

IGNORE_INDEX = -100

Message = dict[str, Any]
Row = tuple[Image.Image, list[Message]]  # a conversation and the image its first message is about


@dataclass
class EvaluationArguments:
    """What to score, on what, and how."""

    model: str = field(metadata={"help": "Folder of a PLUM checkpoint, or its name on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for predictions.jsonl, metrics.json and report.html."})
    dataset: str = field(default="partonomy", metadata={"help": "Data set, as in datasets.load_dataset."})
    name: str = field(default="mini_questions", metadata={"help": "Its configuration; it must hold questions."})
    split: str = field(default="test", metadata={"help": "Its split."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of raw data, for `--name official`."})
    control: Literal["wrong_image", "none"] = field(
        default="wrong_image", metadata={"help": "Ask everything again with the image of another record, or not."}
    )
    choice_reduction: Literal["answer_mean", "answer_sum", "sequence_mean"] = field(
        default="answer_mean",
        metadata={"help": "Log-likelihood of a choice; sequence_mean is the protocol of the published figures."},
    )
    max_new_tokens: int = field(default=96, metadata={"help": "Longest generated answer, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Questions per step."})
    limit: int | None = field(default=None, metadata={"help": "Only the first questions of the split."})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "auto takes a GPU if any."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Of the model's weights."})

    def __post_init__(self):
        for name in ("max_new_tokens", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name} must be at least 1, found {value}.")


# ---------------------------------------------------------------- model


def load_model(arguments: EvaluationArguments, device: torch.device) -> tuple[Path, Any, Any]:
    """Folder, model (in evaluation mode) and processor.

    Raises:
        DataError: the folder holds no PLUM checkpoint, or its processor does not belong to its model.
    """
    folder = Path(arguments.model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(arguments.model))
        except (ValueError, OSError) as error:
            raise DataError(
                f"--model {arguments.model!r} is neither a folder nor to be had from the Hub: {error}"
            ) from error
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} is no model configuration: {error}") from error
    if model_type != "plum":
        raise DataError(f"{folder} holds a model of type {model_type!r}, expected 'plum'.")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, arguments.dtype))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    expected, found = model.config.vlm_config.image_token_id, processor.image_token_id
    if found != expected:
        raise DataError(
            f"{folder}: the processor's image token {processor.image_token!r} has id {found}, the model expects "
            f"{expected}: save the processor that the model was trained with."
        )
    return folder, model.to(device).eval(), processor


class Predictor:
    """Puts questions to one model; an image is encoded once per batch, however many questions it has."""

    def __init__(self, model, processor: PlumProcessor, *, max_new_tokens: int, choice_reduction: str):
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.choice_reduction = choice_reduction
        self._embeddings: dict[int, torch.Tensor] = {}

    def predict(
        self, questions: Sequence[Question], images: Sequence[Image.Image], image_ids: Sequence[str]
    ) -> list[Prediction]:
        """One prediction per question, from the image given beside it. The same image must be the same object."""
        self._encode_images(images)
        tagged = self.processor.seg_token is not None
        choice_scores = self._score(
            [[(image, c) for c in choose(q, tagged=tagged)] for q, image in zip(questions, images, strict=True)]
        )
        asked = [index for index, question in enumerate(questions) if question.object_question is not None]
        object_scores = self._score(
            [[(images[i], c) for c in choose_object(questions[i], tagged=tagged)] for i in asked]
        )
        object_scores = dict(zip(asked, object_scores, strict=True))
        given = self._segment_given(questions, images)
        generated = self._segment_freely(questions, images)
        return [
            Prediction(
                question_id=question.id,
                image_id=image_ids[index],
                choice_scores=choice_scores[index],
                object_choice_scores=object_scores.get(index),
                **given[index],
                **generated[index],
            )
            for index, question in enumerate(questions)
        ]

    def _encode_images(self, images: Sequence[Image.Image]) -> None:
        unique = list({id(image): image for image in images}.values())
        pixels = self.processor.sam_image_processor(unique, return_tensors="pt")["pixel_values"]
        embeddings = self.model.get_image_embeddings(pixels.to(self.model.device, self.model.dtype))
        self._embeddings = dict(zip(map(id, unique), embeddings, strict=True))

    def _encode(self, rows: Sequence[Row], *, prompt: bool = False) -> dict[str, torch.Tensor]:
        conversations = [as_chat(messages, image) for image, messages in rows]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            padding_side="left" if prompt else "right",
        )
        inputs = dict(inputs.to(self.model.device))
        del inputs["sam_pixel_values"]
        unique = dict.fromkeys(id(image) for image, _ in rows)
        inputs["sam_image_embeddings"] = torch.stack([self._embeddings[key] for key in unique])
        if prompt:
            inputs.pop("labels", None)
        else:
            inputs["labels"] = keep_last_answer(inputs["labels"])
        return inputs

    def _score(self, questions: Sequence[Sequence[Row]]) -> list[list[float]]:
        """Negative log-likelihood of every choice of every question."""
        scores = []
        for count, group in itertools.groupby(questions, key=len):
            inputs = self._encode(list(itertools.chain.from_iterable(group)))
            scores += self.model.score_choices(**inputs, num_choices=count, reduction=self.choice_reduction).tolist()
        return scores

    def _segment_given(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        tagged = [write_choice(question, question.correct, tagged=True) for question in questions]
        rows = [
            (image, [*ask(question), {"role": "assistant", "content": answer}])
            for question, image, answer in zip(questions, images, tagged, strict=True)
        ]
        inputs = self._encode(rows)
        outputs = self.model.segment(**inputs)
        answers = self.processor.post_process_segmentation(outputs)
        starts = outputs.answer_mask.int().argmax(dim=1).tolist()
        true = tags_by_row(inputs["spans"], starts)
        predicted = tags_by_row(decode_spans(outputs.span_logits.argmax(dim=-1), outputs.answer_mask), starts)
        return [
            {
                "given_spans": [
                    make_span(part, start, end, span, question=question)
                    for part, (start, end), span in zip(
                        true_parts(question), parse_span_tags(tagged[row])[1], answers[row].spans, strict=True
                    )
                ],
                "true_tags": true[row],
                "predicted_tags": predicted[row],
            }
            for row, question in enumerate(questions)
        ]

    def _segment_freely(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        rows = [(image, ask(question)) for question, image in zip(questions, images, strict=True)]
        inputs = self._encode(rows, prompt=True)
        outputs = self.model.segment(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        answers = self.processor.post_process_segmentation(outputs)
        return [
            {
                "generated_text": answer.text,
                "generated_spans": [
                    make_span(span.text, span.start, span.end, span, question=question) for span in answer.spans
                ],
            }
            for question, answer in zip(questions, answers, strict=True)
        ]


def ask(question: Question) -> list[Message]:
    """The messages up to the part question; `whole_to_part` asks for the object first, and is told."""
    messages = [{"role": "user", "content": question.question}]
    if question.question_type != "whole_to_part":
        return messages
    answer = escape_tags(question.object_choices[question.object_correct])
    return [{"role": "user", "content": question.object_question}, {"role": "assistant", "content": answer}, *messages]


def write_choice(question: Question, index: int, *, tagged: bool) -> str:
    """A choice as the model would write it: with its parts tagged if a token follows each grounded phrase."""
    choice = question.choices[index]
    return tag_phrases(choice, question.choice_parts[index]) if tagged else escape_tags(choice)


def choose(question: Question, *, tagged: bool) -> list[list[Message]]:
    """One conversation per choice of the part question."""
    choices = [write_choice(question, index, tagged=tagged) for index in range(len(question.choices))]
    return [[*ask(question), {"role": "assistant", "content": choice}] for choice in choices]


def choose_object(question: Question, *, tagged: bool) -> list[list[Message]]:
    """One conversation per choice of the object question; `part_to_whole` asks for the parts first, and is told."""
    messages = [{"role": "user", "content": question.object_question}]
    if question.question_type == "part_to_whole":
        answer = write_choice(question, question.correct, tagged=tagged)
        messages = [*ask(question), {"role": "assistant", "content": answer}, *messages]
    return [[*messages, {"role": "assistant", "content": escape_tags(choice)}] for choice in question.object_choices]


def keep_last_answer(labels: torch.LongTensor) -> torch.LongTensor:
    """Labels (B, L) of the last answer of each row; earlier answers, which were given, become -100."""
    answered = labels != IGNORE_INDEX
    number = (answered & ~F.pad(answered, (1, 0))[:, :-1]).cumsum(dim=1)
    return labels.masked_fill(number < number[:, -1:], IGNORE_INDEX)


def tags_by_row(spans: torch.LongTensor, starts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Token spans (S, 3) as [start, end) of each row, counted from the first token of its answer."""
    tags: list[list[tuple[int, int]]] = [[] for _ in starts]
    for row, start, end in spans.tolist():
        tags[row].append((start - starts[row], end - starts[row]))
    return tags


def make_span(text: str, start: int, end: int, span: Any, *, question: Question) -> SpanMask:
    """The record of a segmented span. A mask in the frame of a wrong image is stretched to the question's image."""
    height, width = question.masks[0].rle["size"]
    mask = span.mask
    if mask.shape != (height, width):
        mask = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return SpanMask(text=text, start=start, end=end, rle=encode(np.asarray(mask)), score=span.score)


# ---------------------------------------------------------------- stage 1: predictions


def fingerprint_model(folder: Path) -> str:
    """Changes with the weights, configuration, processor or code of a checkpoint; not with its place."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".py")):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def run_settings(arguments: EvaluationArguments, *, folder: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """All that a prediction depends on; a run goes on only under the same."""
    names = ("name", "split", "control", "choice_reduction", "max_new_tokens", "batch_size", "limit", "dtype")
    return {
        "model_fingerprint": fingerprint_model(folder),
        "dataset": arguments.dataset,
        **{name: getattr(arguments, name) for name in names},
        "questions": len(questions),
        "questions_fingerprint": fingerprint(questions),
        "control_seed": CONTROL_SEED,
    }


def predict(
    predictor: Predictor,
    rows: datasets.Dataset,
    questions: Sequence[Question],
    *,
    wrong_images: dict[str, str],
    batch_size: int,
    output_dir: Path,
    state: PartialState,
) -> int:
    """Brings predictions.jsonl to completion, each process its share of the batches; returns how many were there.

    A batch is predicted whole even where some of its questions are done, so that a prediction never depends on where a
    run was interrupted.
    """
    ids = [question.id for question in questions]
    if state.is_main_process:
        merge_predictions(output_dir, ids)
    state.wait_for_everyone()
    done = {prediction.question_id for prediction in read_predictions(output_dir / "predictions.jsonl")}
    row_of_image: dict[str, int] = {}
    for index, question in enumerate(questions):
        row_of_image.setdefault(question.image_id, index)

    batches = [batch for batch in make_batches(questions, batch_size) if {ids[index] for index in batch} - done]
    share = batches[state.process_index :: state.num_processes]
    for batch in tqdm(share, desc="predicting", unit="batch", disable=not state.is_main_process):
        asked = [questions[index] for index in batch]
        shown = [question.image_id for question in asked]
        wrong = [wrong_images[image_id] for image_id in shown if wrong_images]
        indices = {image_id: row_of_image[image_id] for image_id in [*shown, *wrong]}
        images = {image_id: load_image(rows, index, questions[index]) for image_id, index in indices.items()}
        predictions = predictor.predict(asked, [images[image_id] for image_id in shown], shown)
        if wrong_images:
            control = predictor.predict(asked, [images[image_id] for image_id in wrong], wrong)
            predictions = [replace(p, wrong_image=c) for p, c in zip(predictions, control, strict=True)]
        own_file = output_dir / f"predictions.rank{state.process_index}.jsonl"
        append_predictions(own_file, [p for p in predictions if p.question_id not in done])
    state.wait_for_everyone()
    if state.is_main_process:
        merge_predictions(output_dir, ids)
    return len(done)


# ---------------------------------------------------------------- stage 2: figures


def score(
    rows: datasets.Dataset, questions: Sequence[Question], *, output_dir: Path, run: dict[str, Any], curves: Path
) -> dict[str, Any]:
    """Writes metrics.json and report.html from the questions and predictions.jsonl alone; returns the metrics."""
    predictions = read_predictions(output_dir / "predictions.jsonl")
    metrics = evaluate_predictions(questions, predictions)
    metrics |= {"by_part": iou_per_part(questions, predictions), "run": run}
    write_whole(output_dir / "metrics.json", [json.dumps(metrics, indent=2, allow_nan=False), "\n"])
    row_of_question = {question.id: index for index, question in enumerate(questions)}
    write_report(
        output_dir / "report.html",
        metrics=metrics,
        questions=questions,
        predictions=predictions,
        load_image=lambda question: load_image(rows, row_of_question[question.id], question),
        training_curves=curves if curves.is_file() else None,
    )
    return metrics


def format_table(overall: dict[str, Any]) -> str:
    """The figures beside their wrong-image control and their chance level."""
    lines = [f"{'':34}{'model':>9}{'wrong image':>13}{'random':>9}"]
    for name, title in FIGURES.items():
        cells = [overall.get(name + suffix) for suffix in ("", "_wrong_image", "_random")]
        texts = ["-" if cell is None else f"{cell:.3f}" for cell in cells]
        lines.append(f"{title:34}{texts[0]:>9}{texts[1]:>13}{texts[2]:>9}")
    return "\n".join(lines)


# ---------------------------------------------------------------- run


def describe_run(arguments: EvaluationArguments, settings: dict[str, Any], state: PartialState) -> dict[str, Any]:
    packages = ("torch", "transformers", "datasets", "accelerate", "pycocotools")
    return {
        "model": arguments.model,
        **settings,
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(state.device),
        "processes": state.num_processes,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def evaluate(arguments: EvaluationArguments) -> None:
    """The whole run; raises DataError before anything is written if it cannot be done."""
    started = time.perf_counter()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda was asked for, but there is no GPU: use auto or cpu.")
    # Without a GPU accelerate starts its processes apart, each believing to be the only one, unless it is told so.
    state = PartialState(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    with state.main_process_first():
        rows, questions = load_questions(
            arguments.dataset,
            name=arguments.name,
            split=arguments.split,
            data_dir=arguments.data_dir,
            limit=arguments.limit,
        )
    wrong_images = {}
    if arguments.control == "wrong_image":
        wrong_images = pick_wrong_images({question.image_id: question.image_label for question in questions})
    folder, model, processor = load_model(arguments, state.device)
    settings = run_settings(arguments, folder=folder, questions=questions)
    output_dir = Path(arguments.output_dir)
    check_run(output_dir, settings)
    state.wait_for_everyone()
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / "run.json", [json.dumps(settings, indent=2), "\n"])

    predictor = Predictor(
        model, processor, max_new_tokens=arguments.max_new_tokens, choice_reduction=arguments.choice_reduction
    )
    resumed = predict(
        predictor,
        rows,
        questions,
        wrong_images=wrong_images,
        batch_size=arguments.batch_size,
        output_dir=output_dir,
        state=state,
    )
    if state.is_main_process:
        run = describe_run(arguments, settings, state)
        run |= {"predictions_found": resumed, "wall_seconds": round(time.perf_counter() - started, 1)}
        metrics = score(rows, questions, output_dir=output_dir, run=run, curves=folder / "training_curves.csv")
        print(format_table(metrics["overall"]))
        print(f"report: {output_dir / 'report.html'}")
    state.wait_for_everyone()
    state.destroy_process_group()


def main() -> None:
    try:
        (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
        evaluate(arguments)
    except DataError as error:
        sys.exit(f"evaluate_plum.py: {error}")


if __name__ == "__main__":
    main()
