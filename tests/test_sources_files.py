"""Streamed JSON: equal to `json`, bounded in memory and depth."""

import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partkit.masks import DataError
from partkit.sources.files import _ShallowJSON, check_labels, read_json, stream_records

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
    file = _ShallowJSON(io.BytesIO(text), where="file.json")
    assert b"".join(iter(lambda: file.read(size), b"")) == text
    assert (file._depth, file._in_string) == (0, False)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"]": ', "[1, "])
def test_deep_nesting_is_refused_before_it_is_parsed(tmp_path, opening):
    path = tmp_path / "file.json"
    path.write_text(opening * 1_000_000)
    with pytest.raises(DataError, match="file.json: expected JSON of a data set, found more than 100 levels"):
        read_json(path)


def test_records_stream_without_the_file_in_memory(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"images": [{"id": id, "name": "x" * 1000} for id in range(5000)]}))
    tracemalloc.start()
    count = sum(1 for _ in stream_records(path, field="images"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert peak < path.stat().st_size / 5


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
