"""Streamed JSON: equal to `json`, bounded in memory and depth."""

import gzip
import io
import itertools
import json
import tracemalloc
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plum_partonomy.masks import DataError
from plum_partonomy.sources.json_files import (
    CheckedJSON,
    json_lines,
    parse_json,
    read_json,
    stream_fields,
    stream_records,
)
from plum_partonomy.sources.untrusted import check_labels, find_file, typed

TEXT = st.text(alphabet='[]{}"\\\\,: a\u00e9', max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXT, children, max_size=4),
    max_leaves=30,
)


@given(content=JSON, ascii_only=st.booleans())
def test_a_file_reads_as_json_reads_it(tmp_path_factory, content, ascii_only):
    path = tmp_path_factory.mktemp("json") / "file.json"
    path.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8")
    assert read_json(path) == content


@given(content=JSON, size=st.integers(1, 9))
def test_blocks_of_any_size_pass_unchanged_and_leave_no_depth(content, size):
    text = json.dumps(content).encode()
    file = CheckedJSON(io.BytesIO(text), where="file.json")
    assert b"".join(iter(lambda: file.read(size), b"")) == text
    assert (file._depth, file._in_string) == (0, False)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"]": ', "[1, "])
def test_deep_nesting_is_refused_before_it_is_parsed(tmp_path, opening):
    path = tmp_path / "file.json"
    path.write_text(opening * 1_000_000)
    with pytest.raises(DataError, match="file.json: expected JSON of a data set, found more than 100 levels"):
        read_json(path)


@pytest.mark.parametrize("read", [read_json, lambda path: list(stream_fields(path)), lambda path: list(lines(path))])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "[" * 3000 + "]" * 3000 + "}", "more than 100 levels"),
        ('{"a": 1' + "0" * 4400 + "}", "a number of more than 1000 digits"),
        ('{"a": 0.' + "1" * 100_000 + "}", "a number of more than 1000 digits"),
    ],
)
def test_what_the_parsers_do_not_survive_or_know_is_named(tmp_path, read, text, message):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"file.json.*{message}"):
        read(path)


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_what_is_no_number_is_named_and_not_taken_for_damage(tmp_path, number):
    path = tmp_path / "file.json"
    path.write_text(f'{{"images": [{{"id": 1, "area": {number}}}]}}')
    with pytest.raises(DataError, match=f"found {number.strip('-')}, which is none of its numbers; write null"):
        list(stream_records(path, field="images"))


def lines(path):
    return (parse_json(line, where=where) for where, line in json_lines(path))


@settings(deadline=None)
@given(size=st.integers(1, 40), content=st.sampled_from(["NaN", "Infinity", "1" * 1001, "[" * 101 + "]" * 101]))
def test_the_borders_of_blocks_hide_nothing(size, content):
    text = json.dumps({"a": ["NaN Infinity", "1" * 2000, "[" * 200], "b": 0})[:-2].encode() + content.encode() + b"}"
    file = CheckedJSON(io.BytesIO(text), where="file.json")
    with pytest.raises(DataError, match="file.json"):
        list(iter(lambda: file.read(size), b""))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_with_a_byte_order_mark_or_in_utf_16_is_read(tmp_path, encoding):
    path, record = tmp_path / "file.json", {"label": "R\u00fccklicht \u2028 \U0001f600"}
    path.write_bytes(json.dumps(record, ensure_ascii=False).encode(encoding))
    assert read_json(path) == record
    path.write_bytes("\n".join(json.dumps(item, ensure_ascii=False) for item in [record] * 3).encode(encoding))
    assert list(lines(path)) == [record] * 3


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("R\u00fccklicht", "cp1252", "cp1252 .Western Windows."),
        ("\u8f66\u8f6e \u8f66\u95e8", "gbk", "GBK .Chinese Windows."),
    ],
)
def test_another_encoding_is_named(tmp_path, text, encoding, named):
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps({"label": text}, ensure_ascii=False).encode(encoding))
    for read in (read_json, lambda path: list(lines(path))):
        with pytest.raises(DataError, match=f"file.json.*expected text in UTF-8, found bytes that look like {named}"):
            read(path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (gzip.compress(b"{}", mtime=0), "a gzip file; unpack it"),
        (b"PK\3\4..", "a zip file"),
        (b"\x89PNG\r\n", "a PNG image"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, found):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    for read in (read_json, lambda path: list(lines(path))):
        with pytest.raises(DataError, match=f"file.json: expected text, found {found}"):
            read(path)


def test_a_file_cut_within_a_character_is_called_cut_short(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps([1, "\u00fc"], ensure_ascii=False).encode()[:-3])
    with pytest.raises(DataError, match="damaged or cut short"):
        read_json(path)


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'\n{"a": 1}\n  \r\n{"a": 2}')
    assert [(where.split(", ")[1], json.loads(line)["a"]) for where, line in json_lines(path)] == [
        ("line 2", 1),
        ("line 4", 2),
    ]


@pytest.mark.parametrize("size", [*range(1, 16), 1000])
def test_half_a_character_is_replaced_where_a_file_is_streamed_wherever_a_block_ends(size):
    text = rb'["\ud83d\ude00 \udcff \ud800x \\\\ud800 \\\\\udfff\u00fc", "\ud800"]'
    file = CheckedJSON(io.BytesIO(text), where="file.json")
    content = b"".join(iter(lambda: file.read(size), b""))
    assert json.loads(content) == ["\U0001f600 \ufffd \ufffdx \\\\ud800 \\\\\ufffd\u00fc", "\ufffd"]


def test_half_a_character_is_refused_in_texts_and_names(tmp_path):
    with pytest.raises(DataError, match="record 3, field 'label': expected text, found half a character") as caught:
        typed({"label": "a\ud800"}, "label", str, where="record 3")
    str(caught.value).encode("utf-8")
    assert find_file(tmp_path, ["a\ud800", "b" * 5000, "c\0"]) is None


@pytest.mark.parametrize(("stored", "written"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_match_however_their_accents_are_stored(tmp_path, stored, written):
    name = "photos/R\u00fcck\u00e9.png"
    path = tmp_path / normalize(stored, name)
    path.parent.mkdir()
    path.write_bytes(b"")
    assert find_file(tmp_path, ["none.png", normalize(written, name)]) == normalize(stored, name)


def test_records_stream_without_the_file_in_memory(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"images": [{"id": id, "name": "x" * 1000} for id in range(5000)]}))
    tracemalloc.start()
    count = sum(1 for _ in stream_records(path, field="images"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < path.stat().st_size / 5


@pytest.mark.parametrize("character", ["a", r"\n", r"\"", r"\u00e9"])
def test_a_long_string_is_read_in_blocks_that_grow_with_it_and_shrink_after_it(character):
    """With blocks of one size, each of which has the string scanned from its start, a photograph takes seconds."""
    text = f'["{character * (2**20 // len(character))}"]{" " * 2**21}'.encode()
    file = CheckedJSON(io.BytesIO(text), where="file.json")
    blocks = list(iter(lambda: file.read(2**14), b""))
    assert b"".join(blocks) == text
    within = sum(end <= 2**20 for end in itertools.accumulate(map(len, blocks)))
    assert within < 8 and len(blocks[-1]) <= 2**14


def test_what_a_damaged_file_lost_shows_once_its_beginning_is_out(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([1, 2, 3])[:-1])
    records = stream_records(path)
    assert [next(records), next(records), next(records)] == [1, 2, 3]
    with pytest.raises(DataError, match="damaged or cut short"):
        next(records)


def test_equal_labels_may_repeat_but_not_vary_and_none_is_empty():
    check_labels(["left wing", "left wing", "leftwing"], where="file")
    for labels in (["left wing", "left  wing"], ["Wing", "wing"], ["wing", " wing"], ["STRASSE", "stra\u00dfe"]):
        with pytest.raises(DataError, match="file: the labels .* differ only in case or spaces"):
            check_labels(labels, where="file")
    with pytest.raises(DataError, match="file: a label is empty"):
        check_labels(["wing", " "], where="file")
