"""
Preview the data of a training run: a table of its sources, and a page of samples as the model sees them.

Turns, tags and masks of all memory-mapped records are checked and counted. Tokens and images are measured on a few
evenly spaced records (of a stream: the first), which are read as in training.
"""

import statistics
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from chats_plum import parse_span_tags
from plum_partonomy.files import write_whole
from plum_partonomy.records import DataError, check_turns, tagged_phrases
from plum_partonomy.scoring.overlays import highlight, panel, pick_colours
from plum_partonomy.scoring.pages import render_page
from plum_partonomy.scoring.predictions import SpanMask
from plum_partonomy.seeding import seeded_generator
from plum_partonomy.training.examples import Collator, ConversationDataset, cut_answers, stream_examples
from plum_partonomy.training.mixture import Source
from processing_plum import PlumProcessor

MEASURED = 100
SHOWN = 10
COLUMNS = ("source", "share", "records", "masks", "spans per answer", "tokens", "cut", "left out", "image sizes")


def survey(
    sources: list[Source],
    parts: list[Dataset] | list[IterableDataset],
    processor: PlumProcessor,
    *,
    max_length: int | None = None,
    turns_per_record: int | None = None,
) -> list[dict[str, str]]:
    """
    Return a row of `COLUMNS` for each source.

    Raises:
        DataError: A record that cannot be used; the message names it and the field. Or `max_length` leaves out all
            measured conversations of a source.
    """
    total = sum(source.rate for source in sources)
    rows = []
    for source, records in zip(sources, parts, strict=True):
        row = {"source": str(source), "share": f"{source.rate / total:.1%}"}
        streamed = isinstance(records, IterableDataset)
        row |= dict.fromkeys(COLUMNS[2:5], "unknown") if streamed else count_records(records)
        rows.append(row | _measure(source, records, processor, max_length, turns_per_record))
    return rows


def count_records(records: Dataset) -> dict[str, str]:
    """Return the counts of all records that follow from their turns. Raises DataError for bad turns, tags or masks."""
    spans, masks = [], 0
    tables = records.select_columns(["id", "messages", "masks"]).with_format("arrow")
    for table in tables.iter(batch_size=1000):
        mask_counts = pc.fill_null(pc.list_value_length(table["masks"]), 0).to_pylist()
        rows = zip(table["id"].to_pylist(), table["messages"].to_pylist(), mask_counts, strict=True)
        for identity, messages, mask_count in rows:
            check_turns(messages, mask_count, where=f"record {identity}")
            masks += mask_count
            spans += [len(tagged_phrases(answer["content"])) for answer in messages[1::2]]
    mean = f"{statistics.fmean(spans):.1f} (up to {max(spans)})"
    return {"records": f"{len(records):,}", "masks": f"{masks:,}", "spans per answer": mean}


def _measure(source: Source, records, processor, max_length, turns_per_record) -> dict[str, str]:
    """Return lengths in tokens, numbers of cut and left out conversations, and image sizes of some records."""
    collate, lengths, sizes = Collator(processor), [], set()
    cut = left_out = 0
    for example in _samples(records, turns_per_record):
        if example["image"] is not None:
            sizes.add(example["image"].size)
        batch = collate([example])
        lengths += batch["attention_mask"].sum(1).tolist()
        if max_length is not None and batch["attention_mask"].shape[1] > max_length:
            rows = cut_answers(batch, max_length, pad_token_id=0)
            cut, left_out = cut + len(rows[0]), left_out + len(rows[1])
    if left_out == len(lengths):
        raise DataError(
            f"max_length={max_length} leaves out all {left_out} measured conversations of {source}: images and first "
            f"questions take more tokens; whole conversations have up to {max(lengths)}."
        )
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    ends = dict.fromkeys(f"{width} x {height}" for width, height in (ordered[:1] + ordered[-1:]))
    return {
        "tokens": f"{statistics.median(lengths):.0f} (up to {max(lengths)})",
        "cut": f"{cut} of {len(lengths)}",
        "left out": f"{left_out} of {len(lengths)}",
        "image sizes": " to ".join(ends) or "no images",
    }


def _samples(records: Dataset | IterableDataset, turns_per_record: int | None) -> Iterable[dict]:
    if isinstance(records, IterableDataset):
        return stream_examples(records.take(MEASURED), turns_per_record=turns_per_record)
    indices = np.unique(np.linspace(0, len(records) - 1, MEASURED).astype(int))
    examples = ConversationDataset(records.select(indices), turns_per_record=turns_per_record)
    return (examples[i] for i in range(len(examples)))


def format_table(rows: list[dict[str, str]]) -> str:
    """Return the rows of a survey as a Markdown table."""
    cells = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_samples(path: Path, rows: list[dict[str, str]], examples: torch.utils.data.Dataset, *, seed: int):
    """Write an HTML page with the rows of a survey and random training examples, with supervised spans coloured."""
    if isinstance(examples, IterableDataset):
        shown = islice(examples, SHOWN)
    else:
        indices = seeded_generator(seed, "samples").permutation(len(examples))[:SHOWN]
        shown = (examples[i] for i in indices.tolist())
    page = render_page(
        PAGE,
        title="Training data",
        columns=COLUMNS,
        rows=[[row[name] for name in COLUMNS] for row in rows],
        measured=MEASURED,
        samples=[{"id": example["id"], "conversations": list(_drawn(example))} for example in shown],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [page])


def _drawn(example: dict) -> Iterator[dict]:
    """Yield for each conversation its turns in pieces (as split by `highlight`) and its image with the masks."""
    for conversation in example["conversations"]:
        rles = [conversation.masks[i] for i in conversation.chosen]
        chosen = conversation.chosen.tolist()
        colours = dict(zip(chosen, pick_colours(len(chosen)), strict=True))
        turns, first = [], 0
        for message in conversation.messages:
            if message["role"] == "user":
                turns.append([(message["content"], None)])
                continue
            text, ranges = parse_span_tags(message["content"])
            places = {first + i: place for i, place in enumerate(ranges) if first + i in colours}
            spans = [
                SpanMask(text=text[start:end], start=start, end=end, rle=rles[list(colours).index(span)], score=1.0)
                for span, (start, end) in places.items()
            ]
            turns.append(highlight(text, spans, colours=[colours[span] for span in places]))
            first += len(ranges)
        image = example["image"]
        yield {
            "turns": turns,
            "panel": None if image is None else panel(image, rles, list(colours.values())),
        }


PAGE = """<p class="quiet">Tokens and images of up to {{ measured }} records of each source; a token count includes the
image's tokens. "cut" counts conversations that exceed max_length, "left out" those whose first question does not
fit.</p>
<div class="box"><table class="wide">
<tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>

<h2>Samples</h2>
<p class="quiet">{{ samples | length }} random records, augmented as in training. A supervised span has the colour of
its mask.</p>
{% for sample in samples %}
<div class="box">
<h3>{{ sample.id }}</h3>
{% for conversation in sample.conversations %}
<div class="panels">
{% if conversation.panel %}<figure><img src="{{ conversation.panel }}" alt="image and masks"></figure>{% endif %}
<div>
{% for turn in conversation.turns %}
<p{% if loop.index is odd %} class="quiet"{% endif %}>
{{ show_pieces(turn) }}</p>
{% endfor %}
</div>
</div>
{% endfor %}
</div>
{% endfor %}
"""
