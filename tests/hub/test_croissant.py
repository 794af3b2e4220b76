"""What Croissant needs of a data set repository, and what is said where it is not there."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plum_partonomy.hub.croissant import check_croissant, data_type
from plum_partonomy.masks import DataError

ROOT = Path(__file__).parents[2]
CARD = """---
license: mit
pretty_name: Small
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*
---

# Small

Two rows.
"""


def repository(folder: Path, *, card: str = CARD, column: pa.Array | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(card)
    column = pa.array(["a", "b"]) if column is None else column
    pq.write_table(pa.table({"id": column}), folder / "train-0.parquet")
    pq.write_table(pa.table({"id": column}), folder / "train-1.parquet")
    return folder


def test_the_released_data_set_can_be_described():
    fields = check_croissant(ROOT / "partonomy")
    assert (
        fields["mini_questions"]["image"] == "sc:ImageObject" and fields["mini_questions"]["correct"] == "sc:Integer"
    )
    assert fields["mini"]["masks"] == [{"label": "sc:Text", "rle": {"size": ["sc:Integer"], "counts": "sc:Text"}}]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: mit\n", "", "Croissant needs a 'license' in the metadata"),
        ("\nTwo rows.\n", "", "Croissant needs a description"),
        ("path: train-*", "path: test-*", "the configuration 'default' names 'test-\\*', where there is no file"),
        ("path: train-*", "path: train-*\n  - split: test\n    path: train-1*", "two splits .* share a file"),
        ("path: train-*", "path: README.md", "README.md: expected Parquet"),
    ],
)
def test_what_is_missing_is_named(tmp_path, old, new, message):
    assert old in CARD
    with pytest.raises(DataError, match=message):
        check_croissant(repository(tmp_path / "data", card=CARD.replace(old, new)))


def test_files_of_another_schema_and_columns_without_a_type_are_named(tmp_path):
    folder = repository(tmp_path / "data")
    pq.write_table(pa.table({"id": [1]}), folder / "train-1.parquet")
    with pytest.raises(DataError, match="train-1.parquet: its columns or types are not those of .*train-0.parquet"):
        check_croissant(folder)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="column 'id': Croissant has no data type for binary"):
        check_croissant(repository(folder, column=pa.array([b"a", b"b"])))


def test_each_kind_of_column_has_a_data_type():
    kinds = {pa.bool_(): "sc:Boolean", pa.float32(): "sc:Float", pa.list_(pa.int64()): ["sc:Integer"]}
    assert {kind: data_type(kind, where="column") for kind in kinds} == kinds
