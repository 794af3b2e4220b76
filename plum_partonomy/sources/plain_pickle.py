"""Reading pickles without running them: plain containers, text and numbers, and nothing else.

A pickle is a program that can import and call anything. Here its instructions are read first, and one that is not
needed to build plain data is refused before any of them runs.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from plum_partonomy.masks import DataError
from plum_partonomy.sources.json_files import check_size

MAX_PICKLE_BYTES = 1024**3
"""Largest pickle read, in bytes."""

_PLAIN_INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS".split()
)
_STORING_INSTRUCTIONS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """What the pickle holds. Text of Python 2 is read as UTF-8.

    Raises DataError if the file is missing, larger than MAX_PICKLE_BYTES, damaged, or holds anything but lists,
    tuples, dictionaries, text, numbers, booleans and None.
    """
    check_size(path, limit=MAX_PICKLE_BYTES)
    content = path.read_bytes()
    try:
        _check_instructions(content, where=str(path))
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except DataError:
        raise
    except Exception as error:  # on corrupt pickles nearly anything is raised
        raise DataError(f"{path}: expected a pickle; the file is damaged or cut short ({error})") from error


def _check_instructions(content: bytes, *, where: str) -> None:
    for number, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if instruction.name not in _PLAIN_INSTRUCTIONS:
            raise DataError(
                f"{where}: expected a pickle of plain lists, dictionaries, text and numbers, found the instruction "
                f"{instruction.name}, which can run code; nothing of it was run, get the file from its publishers"
            )
        # the memory for what is stored grows with the largest index, which a few bytes can make enormous
        if instruction.name in _STORING_INSTRUCTIONS and argument > number + 1:
            raise DataError(f"{where}: expected a pickle that stores values one by one, found the index {argument}")
