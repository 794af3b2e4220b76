"""Other benchmarks than PARTONOMY: questions, answers of any model from a file, and the outputs of a run.

    grounded conversations ──> one question per turn, with the masks tagged in its answer    (mask tasks)
    records {id, question, answers} ──> one question each                                    (text tasks)
    questions + predictions ──plum_partonomy.scoring.task_metrics──> metrics.json, report.html

One line of an answers file, `task_answer` in docs/predictions.schema.json; a mask task reads `masks`, a text task
reads `answer`:

    {"id": "refcoco-17", "answer": "Here it is: the left dog.",
     "masks": [{"part": "left dog", "rle": {"size": [480, 640], "counts": "Pm2..."}}]}
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.files import write_whole
from plum_partonomy.masks import DataError
from plum_partonomy.records import PartMask, check_turns, tagged_phrases
from plum_partonomy.scoring.answers import LineReader, check_fields, collect_answers, read_span
from plum_partonomy.scoring.benchmark import load_rows, read_image, read_masks, select_fields
from plum_partonomy.scoring.bootstrap import Tally
from plum_partonomy.scoring.overlays import panel, pick_colours
from plum_partonomy.scoring.pages import pick_evenly, render_page
from plum_partonomy.scoring.predictions import Prediction
from plum_partonomy.scoring.results import describe_left_out
from plum_partonomy.scoring.task_metrics import MASK_TASKS, TASKS, class_name, mask_ratios, summarise_task, text_ratios
from plum_partonomy.sources.untrusted import check_unicode, typed, typed_list

__all__ = [
    "TaskQuestion",
    "cut_off_unfinished",
    "format_task_table",
    "load_task_image",
    "load_task_questions",
    "read_task_answers",
    "score_task",
]

FIELDS = ("id", "answer", "masks")
CONVERSATION_FEATURES = {
    name: GROUNDED_CONVERSATION_FEATURES[name] for name in ("id", "image_id", "messages", "masks")
}
TEXT = datasets.Value("string")
TEXT_FEATURES = {"id": TEXT, "question": TEXT, "answers": datasets.List(TEXT)}
COUNTS = ("n", "photographs")
ANNOTATORS = 4
"""Minimum number of annotators of a question of textvqa: with fewer, no answer is correct."""


@dataclass(frozen=True, kw_only=True)
class TaskQuestion:
    """A question about an image with its correct answer.

    Attributes:
        row: Index of the record with the image.
        text: The question.
        masks: The target of a mask task; empty if the image does not show it.
        answers: The annotators' answers of a text task.
    """

    id: str
    image_id: str
    row: int
    text: str
    masks: list[PartMask] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


def load_task_questions(
    task: str, dataset: str, *, name: str, split: str, limit: int | None = None, **options: Any
) -> tuple[datasets.Dataset, list[TaskQuestion]]:
    """Return a split and its questions.

    The id of a turn is the id of its record, followed by / and the number of the turn if there are several.

    Args:
        task: One of TASKS.
        dataset, name, split, limit, options: As in `plum_partonomy.scoring.benchmark.load_questions`.

    Raises:
        DataError: The split cannot be loaded, its records are not of the task's kind, or an id repeats.
    """
    rows = load_rows(dataset, name=name, split=split, limit=limit, **options)
    features = CONVERSATION_FEATURES if task in MASK_TASKS else TEXT_FEATURES
    missing = sorted(features.keys() - set(rows.column_names))
    if missing:
        raise DataError(f"Records of the task {task!r} have {list(features)}; those of {dataset!r} lack {missing}.")
    questions, ids, valid = [], set(), set()
    for row, record in enumerate(select_fields(rows, features, where=f"The data set {dataset!r}")):
        where = f"data set {dataset!r}, record {row}"
        typed(record, "id", str, where=where)
        if task in MASK_TASKS:
            found = _turns(record, row, read_masks(record["masks"], where=where, valid=valid), where=where)
        else:
            found = [_text_question(record, row, where=where)]
        for question in found:
            if question.id in ids:
                raise DataError(f"{where}, field 'id': {question.id!r} occurs before.")
            ids.add(question.id)
            questions.append(question)
    if task == "semantic_parts":
        for question in questions:
            if len({class_name(mask.label) for mask in question.masks}) > 1:
                raise DataError(f"Question {question.id!r} means parts of several names; semantic_parts asks for one.")
    if task == "textvqa" and (few := [q.id for q in questions if len(q.answers) < ANNOTATORS]):
        raise DataError(
            f"Question {few[0]!r}: textvqa needs the answers of {ANNOTATORS} or more annotators, because three others "
            "must agree with each; use gqa for one answer."
        )
    if task == "pope" and (odd := [q.id for q in questions if q.answers[0].strip().lower() not in ("yes", "no")]):
        raise DataError(f"Question {odd[0]!r}: the answer to a question of pope is yes or no.")
    return rows, questions


def _turns(record: dict[str, Any], row: int, masks: list[PartMask], *, where: str) -> list[TaskQuestion]:
    check_turns(record["messages"] or [], len(masks), where=where)
    turns = list(zip(record["messages"][::2], record["messages"][1::2], strict=True))
    rest = iter(masks)
    return [
        TaskQuestion(
            id=record["id"] if len(turns) == 1 else f"{record['id']}/{number}",
            image_id=record["image_id"],
            row=row,
            text=user["content"],
            masks=[next(rest) for _ in tagged_phrases(assistant["content"], where=where)],
        )
        for number, (user, assistant) in enumerate(turns)
    ]


def _text_question(record: dict[str, Any], row: int, *, where: str) -> TaskQuestion:
    answers = typed_list(record, "answers", str, where=where)
    if not answers:
        raise DataError(f"{where}, field 'answers': expected at least one answer, found none.")
    text = typed(record, "question", str, where=where)
    return TaskQuestion(id=record["id"], image_id=record["id"], row=row, text=text, answers=answers)


def load_task_image(rows: datasets.Dataset, question: TaskQuestion) -> Image.Image:
    """Return the image of a question as RGB. Raises DataError if there is none or it cannot be read."""
    where = f"Question {question.id!r}, image {question.image_id!r}"
    if "image" not in rows.column_names:
        raise DataError(f"{where}: the records have no field 'image'; a model needs one.")
    return read_image(rows, question.row, where=where)


# ---------------------------------------------------------------- answers


def cut_off_unfinished(path: Path) -> set[str]:
    """Remove an incomplete last line from an answers file; return the ids of the other lines."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        write_whole(path, [line.decode() for line in lines])
    try:
        return {json.loads(line)["id"] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected answers of an interrupted run; give another folder ({error!r}).") from error


def read_task_answers(
    path: Path, questions: Sequence[TaskQuestion], *, task: str
) -> tuple[list[Prediction], list[str]]:
    """Return the usable answers in question order, and one sentence for each problem in the file."""
    predictions, problems, _ = collect_answers(_TaskReader(path, questions, task=task), questions, path=path)
    return predictions, problems


class _TaskReader(LineReader):
    def __init__(self, path: Path, questions: Sequence[TaskQuestion], *, task: str):
        super().__init__(path, questions)
        self.needed = "masks" if task in MASK_TASKS else "answer"

    def prediction(self, record: dict[str, Any], question: TaskQuestion, *, where: str) -> Prediction:
        check_fields(record, FIELDS, where=where)
        answer, masks = record.get("answer"), record.get("masks")
        if record.get(self.needed) is None:
            raise DataError(f"{where}: field {self.needed!r} is missing.")
        if answer is not None and not isinstance(answer, str):
            raise DataError(f"{where}, field 'answer': expected a text, found {answer!r:.80}.")
        if answer is not None:
            check_unicode(answer, where=f"{where}, field 'answer'")
        if masks is not None:
            masks = self._spans(masks, question, where=where)
        return Prediction(
            question_id=question.id,
            image_id=question.image_id,
            choice_scores=None,
            given_spans=None,
            true_tags=None,
            predicted_tags=None,
            generated_text=answer,
            generated_spans=masks,
        )

    def _spans(self, masks: Any, question: TaskQuestion, *, where: str) -> list:
        if not isinstance(masks, list):
            raise DataError(f"{where}, field 'masks': expected a list, found {masks!r:.80}.")
        size = tuple(question.masks[0].rle["size"]) if question.masks else None
        spans = []
        for index, mask in enumerate(masks):
            spans.append(read_span(mask, size, where=f"{where}, field 'masks[{index}]'"))
            size = tuple(spans[0].rle["size"])  # without a true mask, all must have the size of the first
        return spans


# ---------------------------------------------------------------- figures and report


def score_task(
    task: str,
    rows: datasets.Dataset,
    questions: Sequence[TaskQuestion],
    predictions: Sequence[Prediction],
    *,
    output_dir: Path,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Write metrics.json and report.html from one prediction per question; return the metrics."""
    by_id = {prediction.question_id: prediction for prediction in predictions}
    pairs = [(question, by_id[question.id]) for question in questions]
    tallies = [Tally(_ratios(task, question, prediction)) for question, prediction in pairs]
    image_ids = [question.image_id for question in questions]
    figures, intervals = summarise_task(task, tallies, image_ids)
    metrics = {
        "overall": {"n": len(pairs), "photographs": len(set(image_ids)), **figures},
        "intervals": {"overall": intervals},
        "run": run,
    }
    order = sorted(range(len(pairs)), key=lambda index: (-_shown_score(tallies[index]), questions[index].id))
    shown = pick_evenly(order)
    page = render_page(
        PAGE,
        title=f"Evaluation: {task.replace('_', ' ')}",
        run=run,
        metrics=metrics,
        names=TASKS[task],
        examples=[
            _example(
                task,
                *pairs[i],
                score=_shown_score(tallies[i]),
                load_image=lambda i=i: load_task_image(rows, questions[i]),
            )
            for i in shown
        ],
    )
    write_whole(output_dir / "report.html", [page])
    write_whole(output_dir / "metrics.json", [json.dumps(metrics, indent=2, allow_nan=False), "\n"])
    return metrics


def _ratios(task: str, question: TaskQuestion, prediction: Prediction) -> dict[str, tuple[float, float]]:
    if task not in MASK_TASKS:
        return text_ratios(task, prediction.generated_text, question.answers)
    found = [span.rle for span in prediction.generated_spans]
    label = question.masks[0].label if question.masks else None
    return mask_ratios(task, found, [mask.rle for mask in question.masks], label=label)


def _shown_score(tally: Tally) -> float:
    """Return the ratio of the question's first metric, or 0 without one."""
    numerator, denominator = next(iter(tally.ratios.values()), (0, 0))
    return numerator / denominator if denominator else 0.0


def _example(
    task: str, question: TaskQuestion, prediction: Prediction, *, score: float, load_image: Callable[[], Image.Image]
) -> dict[str, Any]:
    example = {"question": question.text, "id": question.id, "score": f"{score:.2f}", "panels": []}
    if task not in MASK_TASKS:
        return example | {"answers": list(dict.fromkeys(question.answers)), "answer": prediction.generated_text}
    image = load_image()
    for caption, masks in (("truth", question.masks), ("found", prediction.generated_spans)):
        rles = [mask.rle for mask in masks]
        if rles and list(rles[0]["size"]) != [image.height, image.width]:
            raise DataError(
                f"Question {question.id!r}: its image has [height, width] {[image.height, image.width]}, a mask "
                f"({caption}) has {list(rles[0]['size'])}: resize the mask to the image."
            )
        example["panels"].append((caption, panel(image, rles, pick_colours(1) * len(rles))))
    return example


def format_task_table(metrics: dict[str, Any]) -> str:
    """Return the metrics with their intervals as a table, with the number of skipped questions."""
    overall, intervals = metrics["overall"], metrics["intervals"]["overall"]
    lines = describe_left_out(metrics["run"])
    for name, value in overall.items():
        limits = "[{:.3f}, {:.3f}]".format(*intervals[name]) if name in intervals else ""
        text = "-" if value is None else f"{value:.3f}" if name not in COUNTS else str(value)
        lines.append(f"{name.replace('_', ' '):24}{text:>9}{limits:>18}")
    return "\n".join(lines)


PAGE = """{{ show_left_out(run) }}
<p class="quiet">{{ metrics.overall.n }} questions. Below each value: 95 % bootstrap interval over images.</p>
<div class="box"><table>
{% for name in names %}
<tr><td>{{ name | replace("_", " ") }}</td><td>
{% if metrics.overall[name] is none %}–{% else %}<b>{{ "%.3f" | format(metrics.overall[name]) }}</b>{% endif %}
{% if name in metrics.intervals.overall %}
<small>{{ "%.3f to %.3f" | format(*metrics.intervals.overall[name]) }}</small>
{% endif %}</td></tr>
{% endfor %}
</table></div>
<h2>Answers</h2>
<p class="quiet">{{ examples | length }} questions, evenly spaced from the best to the worst answer.</p>
{% for example in examples %}
<div class="box">
<h3>{{ example.question }}</h3>
<p class="quiet">{{ example.id }} · {{ example.score }}</p>
{% if example.answers %}
<p><span class="quiet">correct</span> {{ example.answers | join(" / ") }}</p>
<p><span class="quiet">predicted</span> {{ example.answer }}</p>
{% endif %}
{{ show_panels(example.panels) }}
</div>
{% endfor %}
"""
