"""Write Parquet shards of bounded size with embedded images, and a file of their checksums."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import embed_table_storage
from pyarrow import parquet

CHECKSUMS_FILE = "SHA256SUMS"
MAX_SHARD_BYTES = 300_000_000
MAX_GROUP_BYTES = 64 * 1024**2
"""Maximum size of a row group and of a dictionary, in bytes before compression; repeated images count once."""

_BATCH_ROWS = 100
_FOOTER_BYTES = 16 * 1024
"""Upper bound of the schema and row group metadata at the end of a file."""


def write_shards(rows: datasets.Dataset, folder: Path, *, split: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write SPLIT-00000-of-0000N.parquet files, with the rows in order.

    A shard ends before a row group would exceed `max_shard_bytes`; only a single row that is larger makes a larger
    shard. An image that several rows of a group share is stored once. The same rows and library versions give the same
    bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unnumbered: list[Path] = []
    room = max(max_shard_bytes - _FOOTER_BYTES, 1)
    with ExitStack() as shard:
        written = 0
        for group, size in _row_groups(rows, limit=min(MAX_GROUP_BYTES, room)):
            if not unnumbered or written + size > room:
                shard.close()
                unnumbered.append(folder / f"{split}-{len(unnumbered):05d}.unfinished")
                sink = shard.enter_context(pa.OSFile(str(unnumbered[-1]), "wb"))
                writer = shard.enter_context(_writer(sink, group.schema))
            writer.write_table(group, row_group_size=len(group))
            written = sink.tell()
    for number, path in enumerate(unnumbered):
        path.rename(folder / f"{split}-{number:05d}-of-{len(unnumbered):05d}.parquet")


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of all Parquet and JSON files below the folder, in the format of `sha256sum --check`."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".parquet", ".json", ".jsonl"))
    lines = []
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / CHECKSUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _row_groups(rows: datasets.Dataset, *, limit: int) -> Iterator[tuple[pa.Table, int]]:
    """Yield tables with embedded images, and their sizes: at most `limit` bytes unless a single row is larger."""
    pieces, size = [], 0
    schema = rows.features.arrow_schema
    for batch in rows.with_format("arrow").iter(_BATCH_ROWS):
        table = embed_table_storage(batch.cast(schema))
        for piece in _pieces(table, limit=limit):
            extra = _distinct_bytes(piece)
            if pieces and size + extra > limit:
                yield pa.concat_tables(pieces), size
                pieces, size = [], 0
            pieces.append(piece)
            size += extra
    if pieces:
        yield pa.concat_tables(pieces), size


def _pieces(table: pa.Table, *, limit: int) -> Iterator[pa.Table]:
    """Yield the table, halved until each piece is at most `limit` bytes or one row."""
    if len(table) < 2 or _distinct_bytes(table) <= limit:
        yield table
        return
    middle = len(table) // 2
    yield from _pieces(table.slice(0, middle), limit=limit)
    yield from _pieces(table.slice(middle), limit=limit)


def _distinct_bytes(table: pa.Table) -> int:
    images = table["image"].combine_chunks().field("bytes")
    return table.drop_columns("image").nbytes + images.unique().nbytes


def _writer(sink: pa.NativeFile, schema: pa.Schema) -> parquet.ParquetWriter:
    # the schema contains the features; a large dictionary stores an image once per row group
    return parquet.ParquetWriter(
        sink, schema, compression="zstd", compression_level=19, dictionary_pagesize_limit=MAX_GROUP_BYTES
    )
