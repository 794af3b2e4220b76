"""Reading untrusted JSON: bounded in size, depth and length of numbers, in any encoding that says what it is.

file ──> open_utf8 ──> CheckedJSON ──> read_json, stream_records (streamed), parse_json (a line)
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np

from plum_partonomy.masks import DataError

MAX_JSON_BYTES = 8 * 1024**3
"""Largest JSON file read, in bytes. Files are parsed as they stream in, so only what is kept of them is in memory."""

MAX_LINE_BYTES = 64_000_000
"""Longest line of a file of one JSON object per line, in bytes."""

MAX_JSON_DEPTH = 100
"""Deepest nesting of a JSON file; the time to parse it grows with the square of its depth."""

MAX_DIGITS = 1000
"""Longest number; Python converts no integer of more than 4300 digits, and ijson does not survive one."""

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_OPEN_ESCAPE = re.compile(rb"(?:%b)?\\(?:u[0-9a-fA-F]{0,3})?\Z|%b\Z" % (_HIGH, _HIGH))
_ESCAPE = re.compile(rb"%b(%b)?|%b|\\." % (_HIGH, _LOW, _LOW), re.DOTALL)
_WORD = b"+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError if it is missing, larger than MAX_JSON_BYTES or no JSON."""
    (content,) = _stream(path, prefix="")
    return content


def stream_records(path: Path, *, field: str | None = None) -> Iterator[Any]:
    """Yields the items of a JSON file that holds a list, or of one list field of it; of anything else none.

    Raises DataError as `read_json` does; what is wrong with the end of a file shows once its beginning is out, and
    the error says after how many records.
    """
    return _stream(path, prefix="item" if field is None else f"{field}.item", field=field)


def list_records(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) for every item of a list field of a JSON file.

    Raises DataError as `stream_records` does, and if there is no item.
    """
    number = -1
    for number, record in enumerate(stream_records(path, field=field)):
        yield record_place(path, field, number), record
    if number < 0:
        raise DataError(f"{path}, field {field!r}: expected a non-empty list, found none")


def record_place(path: Path, field: str, number: int) -> str:
    """How errors name an item of a list field."""
    return f"{path}, record {field}[{number}]"


def stream_fields(path: Path) -> Iterator[str]:
    """Yields the names of the fields of a JSON file that holds an object, as they come; of anything else none.

    Raises DataError as `stream_records` does.
    """
    events = _stream(path, prefix=None)
    return (name for prefix, event, name in events if event == "map_key" and not prefix)


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (place, line in UTF-8 with its end) for every line of a file that is not blank.

    Raises DataError if the file is missing or a line is longer than MAX_LINE_BYTES.
    """
    check_size(path, limit=MAX_JSON_BYTES)
    with open_utf8(path) as file:
        number = 0
        while line := _read_line(file, where=str(path)):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes; write one object per line")
            if line.strip():
                yield where, line


def _read_line(file: BinaryIO, *, where: str) -> bytes:
    try:
        return file.readline(MAX_LINE_BYTES + 1)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected text in UTF-16 or UTF-32, as its first bytes say ({error})") from error


def parse_json(line: bytes, *, where: str) -> Any:
    """The content of a line of UTF-8, NaN and Infinity among its numbers, which the fields that hold them refuse.

    Raises DataError, opening with `where`, if it is no JSON or too deep.
    """
    try:
        return json.loads(CheckedJSON(io.BytesIO(line), where=where, for_ijson=False).read(-1))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: expected JSON, found no valid JSON ({error})") from error


def check_size(path: Path, *, limit: int) -> None:
    """Raises DataError if there is no such file, or it is longer than `limit` bytes."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data_dir must be the folder that holds {path.name} and the images")
    size = path.stat().st_size
    if size > limit:
        raise DataError(f"{path}: {size} bytes exceed the limit of {limit}; split the file")


def open_utf8(path: Path) -> BinaryIO:
    """The file as UTF-8 without a byte order mark, whatever its byte order mark says it is."""
    file = path.open("rb")
    head = file.read(4)
    mark, encoding = next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), (b"", None))
    if encoding is None and b"\0" in head[:2]:  # UTF-16 of ASCII characters without a mark
        encoding = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    if encoding in (None, "utf-8-sig"):
        file.seek(len(mark))
        return file
    file.seek(0)
    return _Recoded(file, encoding)


def guess_encoding(content: bytes) -> str:
    """The likeliest encoding of bytes that are no UTF-8, in words."""
    runs = re.findall(rb"[\x80-\xff]+", content)
    if all(len(run) % 2 == 0 for run in runs):  # letters of two bytes; accents in Western texts stand alone
        try:
            content.decode("gbk")
            return "GBK (Chinese Windows)"
        except UnicodeDecodeError:
            pass
    return "cp1252 (Western Windows) or another encoding of one byte a character"


class _Recoded:
    """A text file, read as UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._text = io.TextIOWrapper(file, encoding=encoding, newline="\n")

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode()

    def readline(self, limit: int) -> bytes:
        return self._text.readline(limit).encode()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._text.close()


def _stream(path: Path, *, prefix: str | None, field: str | None = None) -> Iterator[Any]:
    """The items at a prefix, or without one the events of ijson."""
    check_size(path, limit=MAX_JSON_BYTES)
    found = 0
    with open_utf8(path) as file:
        try:
            content = CheckedJSON(file, where=str(path))
            parse = ijson.parse(content, use_float=True) if prefix is None else None
            for item in parse or ijson.items(content, prefix, use_float=True):
                yield item
                found += 1
        except DataError:
            raise
        except ijson.IncompleteJSONError as error:
            after = f" after {found} records{f' of {field!r}' if field else ''}" if prefix else ""
            raise DataError(
                f"{path}: expected JSON; the file is damaged or cut short{after}; fetch it again ({error})"
            ) from error
        except (ijson.JSONError, ValueError, OverflowError) as error:
            raise DataError(f"{path}: expected JSON ({error})") from error


def _whole_character(escape: re.Match[bytes]) -> bytes:
    """The escape, or U+FFFD in the place of half a surrogate pair."""
    half = escape[0][:3].lower() == rb"\ud" and escape[0][3:4].lower() in b"89abcdef" and escape[1] is None
    return rb"\ufffd" if half else escape[0]


class CheckedJSON:
    """
    A JSON file of UTF-8 that refuses to be read on where it is nested deeper than MAX_JSON_DEPTH, holds a number of
    more than MAX_DIGITS characters, or is in another encoding. `for_ijson`, which reads neither, NaN and Infinity are
    refused, too, and half characters (escapes of lone surrogates) are replaced by U+FFFD.
    """

    def __init__(self, file: BinaryIO, *, where: str, for_ijson: bool = True):
        self._file, self._where, self._for_ijson = file, where, for_ijson
        self._depth, self._in_string, self._word = 0, False, b""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        while _OPEN_ESCAPE.search(block[-12:]) and (following := self._file.read(1)):  # escapes stay in one block
            block += following
        try:
            self._decoder.decode(block)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._where}: expected text in UTF-8, found bytes that look like {guess_encoding(block)}; save the "
                "file as UTF-8"
            ) from error
        pieces = block.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        outside = self._word + b" ".join(pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        self._check(outside)
        # a number or a name may go on in the next block
        self._word = b"" if self._in_string else outside[len(outside.rstrip(_WORD)) :][-MAX_DIGITS - 1 :]
        return _ESCAPE.sub(_whole_character, block) if self._for_ijson and rb"\ud" in block.lower() else block

    def _check(self, outside: bytes) -> None:
        """Raises DataError for what stands outside of strings."""
        depths = self._depth + np.cumsum(_STEPS[np.frombuffer(outside, dtype=np.uint8)], dtype=np.int64)
        if depths.size:
            self._depth = int(depths[-1])
            if depths.max() > MAX_JSON_DEPTH:
                raise DataError(f"{self._where}: expected JSON of a data set, found more than {MAX_JSON_DEPTH} levels")
        if re.search(rb"[-+.0-9eE]{%d}" % (MAX_DIGITS + 1), outside):
            raise DataError(f"{self._where}: expected JSON, found a number of more than {MAX_DIGITS} digits")
        if self._for_ijson and (found := re.search(rb"NaN|Infinity", outside)):
            raise DataError(
                f"{self._where}: expected JSON, found {found[0].decode()}, which is none of its numbers; write null "
                "or a number"
            )
