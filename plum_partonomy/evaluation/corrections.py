"""
`evaluate_plum.py --task correction`: masks of given answers after predicted and true earlier masks, and after clicks.

    records ──> one batch of answers with two or more masks ──> segment repeatedly with different given masks, and
            with a further click on each mask ──> plum_partonomy.scoring.corrections
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm import tqdm

from plum_partonomy.evaluation.processes import open_state
from plum_partonomy.files import write_whole
from plum_partonomy.inference.one_image import load_model, present_masks
from plum_partonomy.inference.packing import encode_conversations
from plum_partonomy.masks import RLE, DataError, decode, encode
from plum_partonomy.records import as_chat, tagged_phrases
from plum_partonomy.scoring.benchmark import data_folder, fingerprint_rows, load_rows
from plum_partonomy.scoring.clicks import Click, next_click
from plum_partonomy.scoring.corrections import (
    CLICKS,
    CURVE_STEPS,
    SHOWN_CLICKS,
    CorrectedAnswer,
    as_line,
    format_correction_table,
    match_equal,
    read_corrections,
    score_corrections,
)
from plum_partonomy.scoring.mask_metrics import iou_matrix
from plum_partonomy.scoring.predictions import check_run
from plum_partonomy.scoring.results import describe_command, fingerprint_model
from plum_partonomy.scoring.tasks import cut_off_unfinished
from plum_partonomy.training.examples import ConversationDataset
from processing_plum import PlumProcessor

# Given masks of one answer: index of a span -> index of its given true mask.
Given = Mapping[int, int]


class _Answers:
    """A batch of answers with their true masks, segmented repeatedly from one pass of the language model."""

    def __init__(self, model, processor: PlumProcessor, answers: Sequence[dict[str, Any]]):
        self.model, self.processor = model, processor
        self.true = [answer["masks"] for answer in answers]
        self.true_rles = [[encode(mask) for mask in masks] for masks in self.true]
        self.first = np.cumsum([0, *(len(masks) for masks in self.true)]).tolist()
        self.phrases = [tagged_phrases(answer["messages"][1]["content"]) for answer in answers]
        inputs = processor.apply_chat_template(
            [as_chat(answer["messages"], answer["image"]) for answer in answers],
            masks=self.true,
            tokenize=True,
            return_dict=True,
            padding_side="right",
        )
        self.inputs = dict(inputs.to(model.device))
        # Beside the pixels, which windows of corrected masks are made of.
        self.inputs["sam_image_embeddings"] = model.get_image_embeddings(self.inputs["sam_pixel_values"])
        self.inputs["hidden_states"] = encode_conversations(model, **self.inputs)

    @cached_property
    def own(self) -> tuple[list[list[RLE]], list[np.ndarray | torch.Tensor]]:
        """The masks of each answer without corrections, and those of all spans as input of further clicks."""
        return self._run()

    def segment(self, given: Sequence[Given]) -> list[list[RLE]]:
        """Return the masks of each answer, with the given true masks in their places."""
        masks = {
            self.first[row] + span: self.true[row][mask]
            for row, of_row in enumerate(given)
            for span, mask in of_row.items()
        }
        return self._run(given_masks=masks)[0]

    def _run(self, **corrections) -> tuple[list[list[RLE]], list[np.ndarray | torch.Tensor]]:
        """Return the masks of each answer, and those of all spans as input of further clicks."""
        outputs = self.model.segment_spans(**self.inputs, **corrections)
        answers = self.processor.post_process_segmentation(outputs)
        present = present_masks(outputs, [span for answer in answers for span in answer.spans])
        return [[encode(span.mask) for span in answer.spans] for answer in answers], list(present)

    def click(self, targets: Sequence[Sequence[int | None]], count: int) -> Iterator[list[list[RLE]]]:
        """
        Yield the masks of each answer after 1 to `count` clicks on each span.

        A click is on the largest error of the span's present mask, which is its dense prompt. A mask with a dense
        prompt does not depend on earlier masks, so the spans of an answer are clicked at the same time. A span without
        an error gets no further click, and its mask stays.

        Args:
            targets: Index of the true mask that the clicks on each span mean, by answer; None for no clicks.
        """
        masks, present = self.own
        clicks: dict[int, list[Click]] = defaultdict(list)
        for _ in range(count):
            clicked = {}
            for row, of_row in enumerate(targets):
                for span, target in enumerate(of_row):
                    if target is None:
                        continue
                    click = next_click(decode(masks[row][span]), self.true[row][target])
                    if click is not None:
                        clicked[self.first[row] + span] = row, span
                        clicks[self.first[row] + span].append(click)
            if clicked:
                found, found_present = self._run(
                    input_points={i: [click[:2] for click in clicks[i]] for i in clicked},
                    input_labels={i: [click.inside for click in clicks[i]] for i in clicked},
                    input_masks={i: present[i] for i in clicked},
                )
                masks, present = [list(of_row) for of_row in masks], list(present)
                for i, (row, span) in clicked.items():
                    masks[row][span], present[i] = found[row][span], found_present[i]
            yield masks

    def compare(self, masks: Sequence[Sequence[RLE]]) -> list[np.ndarray]:
        """Return the `(S, S)` IoU of each mask with each true one, by answer."""
        return [iou_matrix(found, true) for found, true in zip(masks, self.true_rles, strict=True)]


@torch.no_grad()
def measure_answers(model, processor: PlumProcessor, answers: Sequence[dict[str, Any]]) -> list[CorrectedAnswer]:
    """
    Measure the effect of corrections on given answers, each a question and an answer with two or more masks.

    Args:
        answers: `id`, `image_id`, `row`, `image` (RGB), `messages` (two) and `masks` (bool, of the image's size).
    """
    batch, rows = _Answers(model, processor, answers), range(len(answers))
    before, _ = batch.own
    ious = batch.compare(before)
    targets = [match_equal(ious[row], batch.phrases[row], {}) for row in rows]
    given, matched_given = _give_in_listed_order(batch, ious)
    curves, corrected, after = _give_worst_first(batch, ious, targets)
    clicked, after_clicks = _click(batch, targets)
    moved, _ = _click(batch, [_next_equal(targets[row], batch.phrases[row]) for row in rows])
    return [
        CorrectedAnswer(
            id=answers[row]["id"],
            image_id=answers[row]["image_id"],
            row=answers[row]["row"],
            question=answers[row]["messages"][0]["content"],
            phrases=batch.phrases[row],
            own=ious[row].diagonal().tolist(),
            given=given[row],
            matched=[float(ious[row][span, mask]) for span, mask in enumerate(targets[row])],
            matched_given=matched_given[row],
            repeats=_repeats(before[row], batch.phrases[row]),
            curve=curves[row],
            clicked=clicked[row],
            moved=moved[row],
            corrected=corrected[row],
            true=[batch.true_rles[row][mask] for mask in targets[row]],
            before=before[row],
            after=after[row],
            after_clicks=after_clicks[row],
        )
        for row in rows
    ]


def _give_in_listed_order(
    batch: _Answers, own: Sequence[np.ndarray]
) -> tuple[list[list[float]], list[list[list[float]]]]:
    """
    Return the IoU of each span after given true masks of all earlier spans, and, for each number of given masks, the
    matched IoUs of the spans after them.
    """
    ious = [[float(matrix[0, 0])] for matrix in own]
    matched: list[list[list[float]]] = [[] for _ in own]
    for count in range(1, max(len(matrix) for matrix in own)):
        given = [{i: i for i in range(count)} if count < len(matrix) else {} for matrix in own]
        for row, matrix in enumerate(batch.compare(batch.segment(given))):
            if given[row]:
                ious[row].append(float(matrix[count, count]))
                targets = match_equal(matrix, batch.phrases[row], given[row])
                matched[row].append([float(matrix[i, targets[i]]) for i in range(count, len(matrix))])
    return ious, matched


def _give_worst_first(
    batch: _Answers, own: Sequence[np.ndarray], targets: Sequence[Sequence[int]]
) -> tuple[list[list[float]], list[int], list[list[RLE]]]:
    """Return the correction curve of each answer, the span whose mask was given first, and the masks after it."""
    ious, targets = list(own), list(targets)
    given: list[dict[int, int]] = [{} for _ in own]
    curves: list[list[float]] = [[] for _ in own]
    corrected, after = [], []
    for step in range(CURVE_STEPS):
        for row, matrix in enumerate(ious):
            left = {span: float(matrix[span, targets[row][span]]) for span in range(len(matrix))}
            left = {span: iou for span, iou in left.items() if span not in given[row]}
            if left:
                curves[row].append(float(np.mean(list(left.values()))))
                worst = min(left, key=left.get)
                given[row][worst] = targets[row][worst]
        if step == CURVE_STEPS - 1:
            break
        masks = batch.segment(given)
        if step == 0:
            corrected, after = [next(iter(of_row)) for of_row in given], masks
        ious = batch.compare(masks)
        targets = [match_equal(ious[row], batch.phrases[row], given[row]) for row in range(len(ious))]
    return curves, corrected, after


def _click(
    batch: _Answers, targets: Sequence[Sequence[int | None]]
) -> tuple[list[list[list[float]]], list[list[RLE]]]:
    """
    Return the IoU of each span that has a target with it after 1, 2, ... clicks on it, by answer, and the masks after
    SHOWN_CLICKS.
    """
    clicked: list[list[list[float]]] = [[] for _ in targets]
    shown = []
    for count, masks in enumerate(batch.click(targets, max(CLICKS)), 1):
        for row, matrix in enumerate(batch.compare(masks)):
            ious = [float(matrix[span, mask]) for span, mask in enumerate(targets[row]) if mask is not None]
            clicked[row].append(ious)
        if count == SHOWN_CLICKS:
            shown = masks
    return clicked, shown


def _next_equal(targets: Sequence[int], phrases: Sequence[str]) -> list[int | None]:
    """Return the target of the next span with the same words, the first after the last; None for spans without one."""
    following: list[int | None] = []
    for i, phrase in enumerate(phrases):
        equal = [j for j, other in enumerate(phrases) if other == phrase]
        after = equal[(equal.index(i) + 1) % len(equal)]
        following.append(None if after == i else targets[after])
    return following


def _repeats(masks: Sequence[RLE], phrases: Sequence[str]) -> list[float]:
    """Return, for each mask with an earlier one of the same words, its largest IoU with such a mask."""
    ious = iou_matrix(masks, masks)
    earlier = [[j for j in range(i) if phrases[j] == phrases[i]] for i in range(len(phrases))]
    return [float(ious[i, others].max()) for i, others in enumerate(earlier) if others]


# ------------------------------------------------------------------------------------------------ a whole run


def answers_of(records: datasets.Dataset, indices: Iterable[int]) -> list[dict[str, Any]]:
    """Return the answers of some records with two or more masks, with their questions, for `measure_answers`."""
    names = records.select_columns(["image_id"])
    examples = ConversationDataset(records, turns_per_record=0)
    answers = []
    for index in indices:
        example = examples[index]
        answers += [
            {
                "id": f"{example['id']}/{number}",
                "image_id": names[index]["image_id"],
                "row": index,
                "image": example["image"],
                "messages": conversation.messages,
                "masks": [decode(mask) for mask in conversation.masks],
            }
            for number, conversation in enumerate(example["conversations"])
            if len(conversation.masks) > 1
        ]
    return answers


def evaluate_correction(arguments: Any, **options: Any) -> None:
    """
    Measure a model on the answers of a split. Raises DataError before anything is written.

    Args:
        arguments: Arguments of evaluate_plum.py.
        options: Options of the data set's builder, such as data_dir.
    """
    place = {name: getattr(arguments, name) for name in ("name", "split", "limit")}
    records = load_rows(arguments.dataset, **place, **options)
    missing = sorted({"messages", "masks", "image"} - set(records.column_names))
    if missing:
        raise DataError(
            f"--task correction needs grounded conversations, but the records of {arguments.name!r} have no columns "
            f"{missing}: pass another --name, such as mini_instances."
        )
    texts = (message["content"] for messages in records["messages"] for message in messages[1::2])
    if not any(len(tagged_phrases(text)) > 1 for text in texts):
        raise DataError(
            f"--task correction needs answers with two or more masks, but no answer of {arguments.name!r}, split "
            f"{arguments.split!r}, has two: pass another --name or --split."
        )
    folder, plum = load_model(arguments.model, dtype=arguments.dtype, device=open_state(arguments).device)
    settings = {"task": "correction", "dataset": arguments.dataset, **place}
    settings |= {name: getattr(arguments, name) for name in ("dtype", "batch_size")}
    told = records.select_columns(["id", "messages", "masks"])
    settings |= {"data_dir": data_folder(arguments.data_dir), "records_fingerprint": fingerprint_rows(told)}
    settings |= {"model_fingerprint": fingerprint_model(folder)}
    output_dir = Path(arguments.output_dir)
    check_run(output_dir, settings)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / "run.json", [json.dumps(settings, indent=2), "\n"])
    start = time.perf_counter()
    answers = _measure_all(plum, records, output_dir / "predictions.jsonl", batch_size=arguments.batch_size)
    seconds = time.perf_counter() - start
    metrics = score_corrections(
        answers,
        lambda answer: ConversationDataset(records)[answer.row]["image"],
        output_dir=output_dir,
        run={"model": arguments.model, **settings, **describe_command()},
    )
    print(format_correction_table(metrics))
    print(f"{seconds:.0f} s for {len(answers)} answers with {sum(len(answer.phrases) for answer in answers)} masks")
    print(f"report: {output_dir / 'report.html'}")


def _measure_all(plum, records: datasets.Dataset, path: Path, *, batch_size: int) -> list[CorrectedAnswer]:
    """
    Return all answers; those of an interrupted run are read from its file. A batch of which only some are in the file
    is measured as a whole, so that results do not depend on where a run was interrupted.
    """
    if path.is_file():
        cut_off_unfinished(path)
    done = read_corrections(path) if path.is_file() else []
    ids, last = {answer.id for answer in done}, max((answer.row for answer in done), default=0)
    batches = [range(start, min(start + batch_size, len(records))) for start in range(0, len(records), batch_size)]
    for batch in tqdm(batches, desc="correcting", unit="batch"):
        answers = answers_of(records, batch) if last < batch.stop else []
        if any(answer["id"] not in ids for answer in answers):
            found = [each for each in measure_answers(plum.model, plum.processor, answers) if each.id not in ids]
            with path.open("a", encoding="utf-8") as file:
                file.writelines([as_line(answer) for answer in found])
            done += found
    return done
