"""Several sources as one: rates, order, shards, and what a training run says about them before it starts."""

import itertools
import json
import pickle
import re
from collections import Counter
from itertools import islice

import datasets
import pytest
import yaml
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from modules_plum import IGNORE_INDEX
from partonomy_dataset import shards_of
from plum_partonomy.features import GROUNDED_CONVERSATION_FEATURES
from plum_partonomy.masks import DataError, encode
from plum_partonomy.training import mixture
from plum_partonomy.training.examples import Collator, ConversationDataset, stream_examples
from plum_partonomy.training.mixture import Source, load_eval_records, load_records, mix, parse_source
from plum_partonomy.training.model import conversation_texts
from plum_partonomy.training.preview import SHOWN, format_table, survey, write_samples
from plum_partonomy.training.run import main as train
from tests.runs import ROOT
from tests.sources.test_own_parts import coco_content, coco_folder
from tests.tiny import random_image, random_mask, tiny_model, tiny_processor

DEFAULTS = {"dataset": "partonomy", "name": "mini", "data_dir": "data", "train_split": "train", "eval_split": "test"}


def record(identity: str, turns: int = 1, has_image: bool = True) -> dict:
    """A grounded conversation of short turns with one span each, or plain ones without an image."""
    question = {"role": "user", "content": "And what else?"}
    answer = {"role": "assistant", "content": "It has a <p>tail</p>." if has_image else "It is red."}
    return {
        "id": identity,
        "image": random_image(40, 60) if has_image else None,
        "image_id": "",
        "image_label": "bird",
        "messages": [question, answer] * turns,
        "masks": [{"label": "tail", "rle": encode(random_mask(40, 60, seed=i))} for i in range(turns * has_image)],
        "source": "random",
        "licence": "CC0-1.0",
    }


def make_records(rows: list[dict]) -> Dataset:
    return Dataset.from_list(rows, features=GROUNDED_CONVERSATION_FEATURES)


def named(prefix: str, count: int) -> Dataset:
    return make_records([record(f"{prefix}{number}", has_image=False) for number in range(count)])


def names_of(records, count: int | None = None) -> list[str]:
    return [row["id"] for row in islice(records, count)]


# ------------------------------------------------------------------------------------------------ rates and order


def test_a_single_data_set_is_a_mixture_of_one_in_its_own_order():
    assert names_of(mix([named("a", 30)], [7.0], seed=3)) == names_of(named("a", 30))


@pytest.mark.parametrize("streamed", [False, True], ids=["memory_mapped", "streamed"])
def test_records_come_by_their_rates_and_every_one_of_them_comes(streamed):
    parts = [named("a", 400), named("b", 20), named("c", 60)]
    parts = [part.to_iterable_dataset(num_shards=4) for part in parts] if streamed else parts
    names = names_of(mix(parts, [9, 5, 1], seed=0), 2000 if streamed else None)
    counts = Counter(name[0] for name in names)
    for source, rate in zip("abc", (9, 5, 1), strict=True):
        assert counts[source] / len(names) == pytest.approx(rate / 15, abs=0.03)
    # A stream that comes round again is shuffled with what is left in its buffer.
    assert len(set(names)) > 450 if streamed else len(set(names)) == 480


@pytest.mark.parametrize("streamed", [False, True], ids=["memory_mapped", "streamed"])
def test_one_seed_governs_the_order(streamed):
    def order(seed):
        parts = [named("a", 50), named("b", 50)]
        parts = [part.to_iterable_dataset(num_shards=2) for part in parts] if streamed else parts
        return names_of(mix(parts, [1, 2], seed), 80)

    assert order(0) == order(0) != order(1)


def test_processes_and_workers_of_a_stream_read_shards_of_their_own_which_are_all_of_it():
    parts = [named(prefix, 40).to_iterable_dataset(num_shards=4) for prefix in "ab"]
    stream, seen = stream_examples(mix(parts, [1, 1], seed=0)), []
    for process in range(2):
        loader = DataLoader(
            stream.shard(2, process), batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0]["id"]
        )
        names = list(islice(loader, 160))
        seen += [set(names[worker::2]) for worker in range(2)]
    assert [len(names) for names in seen] == [20] * 4
    assert len(set().union(*seen)) == 80


def test_eight_processes_stream_stage_1_without_reading_shards_of_one_another(monkeypatch):
    """The rates of the recipe, and sources of a hundredth of their images but for the smallest, which is whole."""
    sizes = {"ade20k": 202, "coco_stuff": 1183, "mapillary": 180, "semantic_paco_lvis": 458}
    sizes |= {"semantic_pascal_part": 44, "refclef": 180, "refcoco": 170, "refcoco+": 170, "refcocog": 219}
    sizes |= {"llava_instruct_150k": 1577, "reasonseg": 239}
    recipe = yaml.safe_load((ROOT / "recipes" / "stage1_plum_7b.yaml").read_text())
    rates = {entry["name"]: entry["rate"] for entry in recipe["mixture"]}
    assert rates.keys() == sizes.keys()
    monkeypatch.setattr(mixture, "SHUFFLE_BUFFER", 200)  # at least the records of a source that a process reads
    reads = []

    def read(name, shards):
        for index in itertools.chain.from_iterable(shards):
            reads.append((name, index))
            yield {"id": f"{name}-{index}"}

    def read_by(process):
        parts = [
            IterableDataset.from_generator(read, gen_kwargs={"name": name, "shards": shards_of(list(range(size)))})
            for name, size in sizes.items()
        ]
        stream = mix(parts, list(rates.values()), seed=0)
        assert stream.num_shards >= 8
        reads.clear()
        names_of(stream.shard(8, process), 300)
        return set(reads)

    found = [read_by(process) for process in range(8)]
    assert sum(map(len, found)) == len(set().union(*found)) == sum(sizes.values())


def test_a_streamed_example_varies_with_its_seed_and_place_and_nothing_else():
    def pixels(seed):
        stream = mix([make_records([record("a"), record("b")]).to_iterable_dataset()], [1], seed=0)
        return [example["image"].tobytes() for example in islice(stream_examples(stream, seed, jitter=0.2), 4)]

    assert pixels(0) == pixels(0) != pixels(1)
    assert len(set(pixels(0))) == 4


# ------------------------------------------------------------------------------------------------ sources


def test_an_entry_goes_over_the_options_and_its_folder_lies_in_theirs():
    assert parse_source({"name": "refcoco", "data_dir": "refer", "rate": 5}, DEFAULTS) == Source(
        "partonomy", "refcoco", "data/refer", "train", "test", 5
    )
    assert parse_source({"data_dir": "/refer", "eval_split": None}, DEFAULTS).data_dir == "/refer"
    assert parse_source({}, DEFAULTS) == Source("partonomy", "mini", "data", "train", "test")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"rates": 1}, r"fields \['rates'\]; known are \['dataset', 'name'"),
        ({"rate": 0}, "has the rate 0 for partonomy mini data; a rate is a number above 0"),
        ({"rate": "9"}, "has the rate '9'"),
        ({"rate": True}, "has the rate True"),
    ],
)
def test_a_wrong_entry_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_source(entry, DEFAULTS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Source]:
    """Two sources on disk: three turns about an image, and text alone."""
    folder = tmp_path_factory.mktemp("sources")
    for name, has_image in (("parts", True), ("text", False)):
        for split in ("train", "validation"):
            rows = [record(f"{name}-{split}-{number}", 3, has_image) for number in range(12)]
            make_records(rows).to_parquet(folder / name / f"{split}.parquet")
    return [Source(str(folder / name), "default", eval_split="validation", rate=rate) for name, rate in
            (("parts", 3), ("text", 1))]  # fmt: skip


@pytest.mark.parametrize("sources, bytes_per_record", [(1, 0), (2, 8)])
def test_a_worker_is_sent_where_the_records_lie_and_their_order_but_no_records(tmp_path, sources, bytes_per_record):
    sent, lengths = [], []
    for count in (10, 200):
        make_records([record(f"r{number}") for number in range(count)]).to_parquet(tmp_path / f"{count}/train.parquet")
        part = load_records(Source(str(tmp_path / str(count)), "default"), "train")
        dataset = ConversationDataset(mix([part] * sources, [1.0] * sources, seed=0))
        sent.append(pickle.dumps(dataset))
        lengths.append(len(dataset))
        assert pickle.loads(sent[-1])[7]["id"] == dataset[7]["id"]
    assert len(sent[1]) - len(sent[0]) == pytest.approx(bytes_per_record * (lengths[1] - lengths[0]), abs=200)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_evaluated_splits_are_those_of_all_sources_that_name_one(folders, streaming):
    parts, text = folders
    records = load_eval_records([parts, text], streaming)
    assert isinstance(records, Dataset) and records[0]["image"].size == (60, 40) and records[-1]["image"] is None
    assert names_of(records) == [f"{name}-validation-{number}" for name in ("parts", "text") for number in range(12)]
    silent = Source(text.dataset, "default", eval_split=None)
    assert len(load_eval_records([parts, silent], streaming)) == 12
    assert load_eval_records([silent], streaming) is None


def test_images_given_as_paths_are_read(tmp_path):
    random_image(20, 30).save(tmp_path / "bird.png")
    row = {**record("a", has_image=False), "image": str(tmp_path / "bird.png")}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    for streaming in (False, True):
        records = load_records(Source("json", data_dir=str(tmp_path)), "train", streaming)
        assert next(iter(records))["image"].size == (30, 20)


def test_a_bad_record_of_a_folder_is_named_where_training_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = coco_folder(tmp_path / "data", coco_content(images=12))
    (folder / "3.png").write_bytes(b"no image")
    source = Source(**DEFAULTS | {"name": "own_parts", "data_dir": str(folder)})
    with pytest.raises(DataError, match=r"record images\[3\], field 'file_name': .*3.png: not a readable image"):
        load_records(source, "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_without_records_or_conversations_is_named(tmp_path, streaming):
    rows = make_records([record("a")])
    (rows.select([]) if streaming else rows).to_parquet(tmp_path / "empty" / "train.parquet")
    Dataset.from_dict({"id": ["a"], "question": ["b"]}).to_parquet(tmp_path / "questions" / "train.parquet")
    message = "Split 'train' of .*empty default has no records" if streaming else r"train\[:0\].* no data"
    with pytest.raises(ValueError, match=message):
        load_records(Source(str(tmp_path / "empty"), "default"), "train" if streaming else "train[:0]", streaming)
    with pytest.raises(DataError, match=r"questions default has no columns \['image', 'masks', 'messages'\]"):
        load_records(Source(str(tmp_path / "questions"), "default"), "train", streaming)


# ------------------------------------------------------------------------------------------------ longest conversation


def collate(rows: list[dict], max_length: int | None, **options) -> dict:
    examples = ConversationDataset(make_records(rows), **options)
    return Collator(tiny_processor(), max_length)([examples[i] for i in range(len(rows))])


def lengths(rows: list[dict]) -> list[int]:
    return collate(rows, None)["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("spans", [1, 2, 3, 4])
def test_a_long_conversation_is_cut_at_every_limit_but_never_within_a_span(spans):
    rows = [record("long", spans), record("text", 3, has_image=False)]
    full = collate(rows, None)
    first = int((full["labels"][0] != IGNORE_INDEX).nonzero()[0])
    for max_length in range(first + 1, full["input_ids"].shape[1]):
        batch = collate(rows, max_length)
        end = int(batch["attention_mask"][0].sum())
        assert first < end <= max_length and batch["record_counts"]["left_out"] == 0
        for name in ("input_ids", "labels", "span_labels"):
            assert batch[name][0, :end].equal(full[name][0, :end])
        assert (batch["labels"][0, end:] == IGNORE_INDEX).all() and batch["labels"][0, end - 1] != IGNORE_INDEX
        whole = full["spans"][(full["spans"][:, 0] == 0) & (full["spans"][:, 2] <= end)]
        assert batch["spans"][batch["spans"][:, 0] == 0].equal(whole)
        assert len(batch["mask_labels"]) == len(batch["spans"])
        # Where less is kept than there is room for, a span or a question stands in the way.
        assert all(full["span_labels"][0, i] > 0 or full["labels"][0, i] < 0 for i in range(end, max_length))
        assert not any(start < end < stop for row, start, stop in full["spans"].tolist() if row == 0)


def test_of_the_masks_that_were_chosen_those_behind_the_cut_go_too():
    rows, max_length = [record("long", 4)], lengths([record("long", 2)])[0]
    batch = collate(rows, max_length, max_spans=3)
    assert len(batch["spans"]) == len(batch["mask_labels"]) <= 2
    assert (batch["spans"][:, 2] <= batch["input_ids"].shape[1]).all()
    output = tiny_model()(**{name: value for name, value in batch.items() if not name.startswith("record_")})
    assert output.loss.isfinite()


def test_conversations_whose_question_alone_is_too_long_are_left_out_and_counted():
    long, short = record("long", 3), record("text", 3, has_image=False)
    long["messages"][0]["content"] = "What? " * 200
    max_length = lengths([short])[0]
    alone, both = collate([short], max_length), collate([long, short], max_length)
    assert both["record_counts"] == {"cut": 0, "left_out": 1}
    assert both["record_index"].tolist() == [1] and both["record_ids"] == ["long", "text"]
    for name in ("input_ids", "labels", "span_labels", "spans"):
        assert both[name].equal(alone[name])


def test_a_batch_of_which_all_is_left_out_teaches_nothing():
    rows = [record("a", 2), record("b", 3)]
    batch = collate(rows, 8)
    assert batch["record_counts"] == {"cut": 0, "left_out": 2}
    output = tiny_model()(**{name: value for name, value in batch.items() if not name.startswith("record_")})
    assert output.loss == 0 and batch["input_ids"].shape[1] <= 8


# ------------------------------------------------------------------------------------------------ survey


@pytest.mark.parametrize("streaming", [False, True])
def test_the_survey_counts_records_masks_spans_tokens_cut_conversations_and_image_sizes(folders, streaming):
    parts = [load_records(source, "train", streaming) for source in folders]
    rows = [record("parts", 3), record("text", 3, has_image=False)]
    longest = lengths(rows)
    with_images, text = survey(folders, parts, tiny_processor(), max_length=longest[0] - 1)
    assert (with_images["share"], text["share"]) == ("75.0%", "25.0%")
    known = ("unknown",) * 3 if streaming else ("12", "36", "1.0 (up to 1)")
    assert (with_images["records"], with_images["masks"], with_images["spans per answer"]) == known
    assert text["masks"] == ("unknown" if streaming else "0")
    assert [row["tokens"] for row in (with_images, text)] == [f"{length} (up to {length})" for length in longest]
    assert (with_images["cut"], text["cut"]) == ("12 of 12", "0 of 12")
    assert (with_images["left out"], text["left out"]) == ("0 of 12", "0 of 12")
    nothing_fits = f"max_length=8 leaves out all 12 measured conversations of {folders[0]}"
    with pytest.raises(DataError, match=re.escape(nothing_fits)):
        survey(folders, parts, tiny_processor(), max_length=8)
    assert (with_images["image sizes"], text["image sizes"]) == ("60 x 40", "no images")
    table = format_table([with_images, text]).splitlines()
    assert len(table) == 4 and len({len(line) for line in table}) == 1


def test_the_survey_names_the_record_of_bad_turns_wherever_it_stands(folders):
    rows = [record(str(number), has_image=False) for number in range(1500)]
    rows[1234]["messages"] = rows[1234]["messages"][:1]
    with pytest.raises(DataError, match=r"record 1234, field 'messages\[0\]': the conversation ends with the user"):
        survey(folders[:1], [make_records(rows)], tiny_processor())


def test_the_page_of_samples_shows_ten_records_with_their_spans_in_colour(folders, tmp_path):
    rows = [record(f"record-{number}", 2, has_image=number != 3) for number in range(12)]
    rows[0]["messages"][0]["content"] = "<script>alert()</script>"
    for examples in (ConversationDataset(make_records(rows), max_spans=1),
                     stream_examples(make_records(rows).to_iterable_dataset(), max_spans=1)):  # fmt: skip
        write_samples(tmp_path / "samples.html", [], examples, seed=0)
        page = (tmp_path / "samples.html").read_text()
        shown = re.findall(r"<h3>(record-\d+)</h3>", page)
        assert len(set(shown)) == SHOWN == 10
        with_image = len(set(shown) - {"record-3"})
        assert page.count("data:image/jpeg") == page.count("<mark") == page.count(">tail</mark>") == with_image
        assert "<script>alert" not in page


def test_a_dry_run_surveys_the_mixture_writes_the_page_and_trains_nothing(folders, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    mixture = [json.dumps({"dataset": source.dataset, "name": "default", "rate": source.rate}) for source in folders]
    train([*options, "--mixture", *mixture, "--dry_run", "true"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:4:2] for line in lines[2:-1]] == [[source.dataset, "|"] for source in folders]
    assert lines[-1] == f"Samples of the data: {tmp_path / 'out' / 'samples.html'}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.html"]


def test_a_stream_has_no_end_to_learn_a_tokenizer_from():
    stream = mix([named("a", 3).to_iterable_dataset()], [1], seed=0)
    assert isinstance(stream, IterableDataset)
    with pytest.raises(ValueError, match="learns its tokenizer from all texts first; leave streaming out"):
        conversation_texts(stream)
