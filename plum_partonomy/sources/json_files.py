"""Read untrusted JSON with limits on size, depth and length of numbers, in UTF-8 or a declared encoding.

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
"""Maximum size of a JSON file in bytes. Files are parsed as streams, so only the records in use take memory."""

MAX_LINE_BYTES = 64_000_000
"""Maximum line length in bytes, in a file with one JSON object per line."""

MAX_JSON_DEPTH = 100
"""Maximum nesting depth of a JSON file; parsing time grows with the square of the depth."""

MAX_DIGITS = 1000
"""Maximum length of a number; Python refuses integers of more than 4300 digits, and ijson crashes on one."""

_MAX_BLOCK_BYTES = 16 * 1024**2
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXT = {
    b"\x1f\x8b": "a gzip file; unpack it with gunzip",
    b"PK\x03\x04": "a zip file; unpack it",
    b"BZh": "a bzip2 file; unpack it with bunzip2",
    b"\xfd7zX": "an xz file; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "a zstd file; unpack it with unzstd",
    b"\x89PNG": "a PNG image; give the file of its annotations",
    b"\xff\xd8\xff": "a JPEG image; give the file of its annotations",
}
"""First bytes of files that are no text -> what they are, and what to do."""
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_OPEN_ESCAPE = re.compile(rb"(?:%b)?\\(?:u[0-9a-fA-F]{0,3})?\Z|%b\Z" % (_HIGH, _HIGH))
_ESCAPE = re.compile(rb"%b(%b)?|%b|\\." % (_HIGH, _LOW, _LOW), re.DOTALL)
_WORD = b"+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises DataError if it is missing, larger than MAX_JSON_BYTES or not JSON."""
    (content,) = _stream(path, prefix="")
    return content


def stream_records(path: Path, *, field: str | None = None) -> Iterator[Any]:
    """Yield the items of a JSON file that is a list, or of one list field of an object. Other content yields nothing.

    Raises DataError as `read_json` does. An error near the end of a file is raised after its first records were
    yielded, and the message gives their number.
    """
    return _stream(path, prefix="item" if field is None else f"{field}.item", field=field)


def list_records(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for each item of a list field of a JSON file.

    Raises DataError as `stream_records` does, and if the list is empty.
    """
    number = -1
    for number, record in enumerate(stream_records(path, field=field)):
        yield record_place(path, field, number), record
    if number < 0:
        raise DataError(f"{path}, field {field!r}: expected a non-empty list, found none")


def record_place(path: Path, field: str, number: int) -> str:
    """Return the place of an item of a list field, for error messages."""
    return f"{path}, record {field}[{number}]"


def stream_fields(path: Path) -> Iterator[str]:
    """Yield the field names of a JSON file that is an object, in their order. Other content yields nothing.

    Raises DataError as `stream_records` does.
    """
    events = _stream(path, prefix=None)
    return (name for prefix, event, name in events if event == "map_key" and not prefix)


def json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line) for each line of a file that is not blank; the line is UTF-8 bytes including its end.

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
    """Return the content of a line of UTF-8. NaN and Infinity are accepted here; the fields that contain them reject
    them.

    Raises DataError, starting with `where`, if the line is not JSON or nested too deeply.
    """
    try:
        return json.loads(CheckedJSON(io.BytesIO(line), where=where, for_ijson=False).read(-1))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: expected JSON, found no valid JSON ({error})") from error


def check_size(path: Path, *, limit: int) -> None:
    """Raise DataError if the file does not exist or is longer than `limit` bytes."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data_dir must be the folder that holds {path.name} and the images")
    size = path.stat().st_size
    if size > limit:
        raise DataError(f"{path}: {size} bytes exceed the limit of {limit}; split the file")


def open_utf8(path: Path) -> BinaryIO:
    """
    Open the file as UTF-8 without a byte order mark, decoded according to its own byte order mark. Raises DataError
    if it is compressed or an image.
    """
    file = path.open("rb")
    head = file.read(4)
    kind = next((name for magic, name in _NO_TEXT.items() if head.startswith(magic)), None)
    if kind is not None:
        file.close()
        raise DataError(f"{path}: expected text, found {kind}")
    mark, encoding = next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), (b"", None))
    if encoding is None and b"\0" in head[:2]:  # UTF-16 of ASCII characters without a mark
        encoding = "utf-16-le" if head[1:2] == b"\0" else "utf-16-be"
    if encoding in (None, "utf-8-sig"):
        file.seek(len(mark))
        return file
    file.seek(0)
    return _Recoded(file, encoding)


def guess_encoding(content: bytes) -> str:
    """Return, in words, the most likely encoding of bytes that are not UTF-8."""
    runs = re.findall(rb"[\x80-\xff]+", content)
    if all(len(run) % 2 == 0 for run in runs):  # letters of two bytes; accents in Western texts are single bytes
        try:
            content.decode("gbk")
            return "GBK (Chinese Windows)"
        except UnicodeDecodeError:
            pass
    return "cp1252 (Western Windows) or another encoding of one byte a character"


class _Recoded:
    """A text file that is read as UTF-8."""

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
    """Yield the items at a prefix, or the events of ijson without one."""
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
            reason = str(error).partition("\n")[0]  # the rest shows the place with lines and arrows
            raise DataError(
                f"{path}: expected JSON; the file is damaged or cut short{after}; fetch it again ({reason})"
            ) from error
        except (ijson.JSONError, ValueError, OverflowError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"{path}: expected JSON ({reason}); write the file again") from error


def _whole_character(escape: re.Match[bytes]) -> bytes:
    """Return the escape, or U+FFFD for half of a surrogate pair."""
    half = escape[0][:3].lower() == rb"\ud" and escape[0][3:4].lower() in b"89abcdef" and escape[1] is None
    return rb"\ufffd" if half else escape[0]


class CheckedJSON:
    """
    A JSON file in UTF-8 that raises an error on nesting deeper than MAX_JSON_DEPTH, numbers of more than MAX_DIGITS
    characters, and other encodings. With `for_ijson`, NaN and Infinity raise an error as well, and lone surrogate
    escapes are replaced by U+FFFD, because ijson reads neither.
    """

    def __init__(self, file: BinaryIO, *, where: str, for_ijson: bool = True):
        self._file, self._where, self._for_ijson = file, where, for_ijson
        self._depth, self._in_string, self._word = 0, False, b""
        self._open_string = 0  # at least the number of bytes read of a string that has not ended
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def read(self, size: int) -> bytes:
        """
        Return the next bytes, all with a negative `size`. Within a long string they are more than `size`: ijson scans
        a string from its start with each further block, which takes a time proportional to its length only if the
        blocks grow with it.
        """
        if 0 <= size < self._open_string:
            size = max(size, min(self._open_string, _MAX_BLOCK_BYTES))
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
        self._open_string = (self._open_string * (len(pieces) == 1) + len(block)) if self._in_string else 0
        self._check(outside)
        # a number or a name may continue in the next block
        self._word = b"" if self._in_string else outside[len(outside.rstrip(_WORD)) :][-MAX_DIGITS - 1 :]
        return _ESCAPE.sub(_whole_character, block) if self._for_ijson and rb"\ud" in block.lower() else block

    def _check(self, outside: bytes) -> None:
        """Raise DataError for invalid content outside strings."""
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
