"""Functions for the yaml files of tasks/: questions as messages, replies as predictions, addends as metrics.

A reply of a model is plain text, or the JSON of lmms-eval's `saco` tasks with labels and an answer added:

    {"answer": "It has a hull.", "labels": ["hull"], "masks": [{"size": [128, 128], "counts": "Pm2..."}],
     "boxes": [[8, 40, 120, 96]], "scores": [0.97]}

`labels` name the masks, one each; `answer` and `boxes` are optional. Metrics are those of evaluate_plum.py: each
question contributes addends, and the aggregation returns the ratio of their sums.
"""

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import partonomy_dataset  # noqa: F401  registers the data set that the tasks load
from inputs_plum import check_number
from plum_partonomy.baselines.model import ask
from plum_partonomy.baselines.plain_text import find_parts
from plum_partonomy.images import read_image
from plum_partonomy.masks import DataError, validate_rle
from plum_partonomy.questions.spans import tag_phrases
from plum_partonomy.records import QUESTION_TYPES, PartMask, Question
from plum_partonomy.scoring.bootstrap import FIGURES, Tally, summarise
from plum_partonomy.scoring.letters import letter_question, read_letter
from plum_partonomy.scoring.metrics import part_counts, tally, true_parts
from plum_partonomy.scoring.predictions import Prediction, SpanMask
from plum_partonomy.sources.json_files import parse_json
from plum_partonomy.sources.untrusted import typed

Doc = dict[str, Any]
Addends = dict[str, Any]
ANSWER_METRICS = (
    *(f"generated_part_{name}" for name in ("precision", "recall", "f1")),
    "generated_exact",
    "end_to_end_giou",
)
MASK_METRICS = (
    *(f"strict_{name}" for name in ("macro_giou", "micro_giou", "ciou")),
    "ap50",
    "reference_macro_giou",
    "reference_micro_giou",
)
CHOICE_METRICS = ("choice_accuracy", "part_precision", "part_recall", "part_f1")
ONLY = "only_"
_LOSS = re.compile(r"\((?:[\w.]+\()?([^,()]+)")
_FENCED = re.compile(r"\s*```(?:json)?\s*(\{.*\})\s*```\s*", re.DOTALL)
UNREADABLE = "unreadable"
"""Metric: share of the replies with masks of another size, without a letter or a finite loss, or with other JSON; each
counts as an empty answer."""


def as_question(doc: Doc) -> Question:
    """Return the question of a record, without its image."""
    masks = [PartMask(**mask) for mask in doc["masks"]]
    return Question(
        **{name: value for name, value in doc.items() if name not in ("image", "masks")}, image=None, masks=masks
    )


# ---------------------------------------------------------------- questions


def messages_of(doc: Doc, lmms_eval_specific_kwargs: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the part question, after the earlier messages, between `pre_prompt` and `post_prompt` of a model."""
    return _with_image(doc, _prompted(doc, lmms_eval_specific_kwargs))


def _prompted(doc: Doc, prompts: dict[str, str] | None) -> list[dict[str, str]]:
    *earlier, last = ask(as_question(doc))
    prompts = prompts or {}
    content = f"{prompts.get('pre_prompt', '')}{last['content']}{prompts.get('post_prompt', '')}"
    return [*earlier, {**last, "content": content}]


def messages_with_answer(doc: Doc) -> list[dict[str, Any]]:
    """Return the part question and its correct answer with span tags around the parts to segment."""
    question = as_question(doc)
    parts = question.choice_parts[question.correct]
    answer = tag_phrases(question.choices[question.correct], parts)
    return _with_image(doc, [*ask(question), {"role": "assistant", "content": answer}])


def messages_with_letters(doc: Doc) -> list[dict[str, Any]]:
    """Return the part question with its lettered choices."""
    question = as_question(doc)
    return _with_image(doc, letter_question(ask(question), question.choices))


def _with_image(doc: Doc, messages: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    chat = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    chat[0]["content"].insert(0, {"type": "image", "url": image_of(doc)[0]})
    return chat


def text_of(doc: Doc, lmms_eval_specific_kwargs: dict[str, str] | None = None) -> str:
    """Return the messages of `messages_of` as one text."""
    return "\n".join(message["content"] for message in _prompted(doc, lmms_eval_specific_kwargs))


def text_with_letters(doc: Doc) -> str:
    question = as_question(doc)
    return "\n".join(message["content"] for message in letter_question(ask(question), question.choices))


def text_with_answer(doc: Doc) -> str:
    question = as_question(doc)
    parts = question.choice_parts[question.correct]
    return f"{text_of(doc)}\n{tag_phrases(question.choices[question.correct], parts)}"


def image_of(doc: Doc) -> list[Any]:
    """Return the image as RGB, in a list, or None in its place if lmms-eval removed it from the record."""
    return [read_image(doc["image"], where=f"question {doc['id']!r}")] if "image" in doc else [None]


def choices_of(doc: Doc) -> list[str]:
    return doc["choices"]


def target_of(doc: Doc) -> str:
    return doc["choices"][doc["correct"]]


# ---------------------------------------------------------------- replies


def score_answer(doc: Doc, results: Sequence[str]) -> dict[str, Addends]:
    """Return the addends of the generated answer."""
    question = as_question(doc)
    text, spans, unreadable = read_reply(results[0], question)
    parts = None
    if spans is None:
        known = {part for choice in question.choice_parts for part in choice}
        parts = [name for name, _, _ in find_parts(text, known)]
    fields = {"generated_text": text, "generated_spans": spans, "generated_parts": parts}
    return _addends(question, ANSWER_METRICS, **fields) | {UNREADABLE: {"ratio": (int(unreadable), 1)}}


def score_masks(doc: Doc, results: Sequence[str]) -> dict[str, Addends]:
    """Return the addends of the masks of the correct answer."""
    question = as_question(doc)
    _, spans, unreadable = read_reply(results[0], question)
    unread = {UNREADABLE: {"ratio": (int(unreadable or spans is None), 1)}}
    return _addends(question, MASK_METRICS, given_spans=spans or []) | unread


def score_letter(doc: Doc, results: Sequence[str]) -> dict[str, Addends]:
    """Return the addends of a chosen letter; a reply without one chooses nothing."""
    question = as_question(doc)
    index = read_letter(results[0], len(question.choices))
    if index is None:
        return _no_choice(question)
    return _choice(question, [float(position != index) for position in range(len(question.choices))])


def score_choices(doc: Doc, results: Sequence[tuple[float, bool] | str]) -> dict[str, Addends]:
    """Return the addends of the choice with the smallest loss, as returned by lmms-eval's models.

    A loss that is not a finite number is never the smallest; without a finite loss nothing is chosen.
    """
    losses = [_loss(result) for result in results]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return _no_choice(as_question(doc))
    return _choice(as_question(doc), [loss if math.isfinite(loss) else max(finite) + 1 for loss in losses])


def _loss(result: tuple[float, bool] | str) -> float:
    """Return the loss of a result (loss, is greedy), which lmms-eval 0.7.3 passes as text, or NaN."""
    text = result if isinstance(result, str) else str(tuple(result))
    found = _LOSS.match(text)  # such as (0.5, False) or (np.float64(0.5), False)
    try:
        return float(found[1]) if found else math.nan
    except ValueError:
        return math.nan


def _choice(question: Question, scores: list[float]) -> dict[str, Addends]:
    return _addends(question, CHOICE_METRICS, choice_scores=scores) | {UNREADABLE: {"ratio": (0, 1)}}


def _no_choice(question: Question) -> dict[str, Addends]:
    ratios = {"choice_accuracy": (0, 1), **part_counts([], true_parts(question)).ratios("part"), UNREADABLE: (1, 1)}
    return {name: {"ratio": ratio} for name, ratio in ratios.items()}


def read_reply(reply: str, question: Question) -> tuple[str, list[SpanMask] | None, bool]:
    """Return the answer of a reply, its masks (None if it is plain text), and whether it could not be read.

    JSON may be in a code fence.
    """
    fenced = _FENCED.fullmatch(reply)
    content = fenced[1] if fenced else reply
    if not content.lstrip().startswith("{"):
        return reply, None, False
    where, size = f"question {question.id!r}", tuple(question.masks[0].rle["size"])
    try:
        record = parse_json(content.encode("utf-8", "replace"), where=where)
        masks, labels = (typed(record, name, list, where=where) for name in ("masks", "labels"))
        scores = record.get("scores")
        spans = [
            SpanMask(
                text=typed({"label": label}, "label", str, where=where),
                start=0,
                end=0,
                rle=validate_rle(mask, expected_size=size, where=where),
                score=_score(score),
            )
            for label, mask, score in zip(labels, masks, [1.0] * len(masks) if scores is None else scores, strict=True)
        ]
        return str(record.get("answer", "")), spans, False
    except (ValueError, TypeError):  # other JSON (DataError is a ValueError), or lists of other lengths
        return reply, [], True


def _score(value: Any) -> float:
    check_number(value, name="a score")
    return float(value)


def _addends(question: Question, metrics: Sequence[str], **fields: Any) -> dict[str, Addends]:
    """Return the contribution of one question to each metric that applies to it, as JSON values."""
    empty = dict.fromkeys(("choice_scores", "given_spans", "generated_text", "generated_spans"))
    fields = {**empty, "true_tags": None, "predicted_tags": None, **fields}
    prediction = Prediction(question_id=question.id, image_id=question.image_id, **fields)
    found = tally(question, prediction, mask_source="gt_answer")
    addends: dict[str, Addends] = {name: {"ratio": found.ratios[name]} for name in metrics if name in found.ratios}
    if "ap50" in metrics:
        addends["ap50"] = {"detections": found.detections, "true_masks": found.true_masks}
    return addends


# ---------------------------------------------------------------- metrics and subsets by name


def _aggregation(name: str) -> Callable[[Sequence[Addends]], float | None]:
    def aggregate(items: Sequence[Addends]) -> float | None:
        if name == UNREADABLE:
            return fmean(item["ratio"][0] for item in items)
        tallies = [
            Tally(
                ratios={name: tuple(item["ratio"])} if "ratio" in item else {},
                detections=[tuple(detection) for detection in item.get("detections", ())],
                true_masks=item.get("true_masks", 0),
            )
            for item in items
        ]
        return summarise(tallies)[name]

    return aggregate


def _subset(question_type: str) -> Callable[[Any], Any]:
    def subset(rows: Any) -> Any:
        chosen = [index for index, found in enumerate(rows["question_type"]) if found == question_type]
        if not chosen:
            raise DataError(f"The data set has no question of the type {question_type!r}: give another task.")
        return rows.select(chosen)

    return subset


def __getattr__(name: str) -> Callable:
    """Return the aggregation of a metric (`choice_accuracy`) or the filter of a type (`only_identification`)."""
    if name in FIGURES or name == UNREADABLE:
        return _aggregation(name)
    if name.startswith(ONLY) and name.removeprefix(ONLY) in QUESTION_TYPES:
        return _subset(name.removeprefix(ONLY))
    if name.startswith("__"):
        raise AttributeError(name)
    known = ", ".join((*FIGURES, UNREADABLE))
    raise DataError(
        f"A task uses {name!r}, which is neither a function of {__name__} nor a metric; known are {known}."
    )
