"""Read pickles without executing them: plain containers, text and numbers only.

A pickle is a program that can import and call anything. The reader checks all instructions first, and raises an error
on one that is not needed for plain data before anything runs.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from plum_partonomy.masks import DataError
from plum_partonomy.sources.json_files import check_size

MAX_PICKLE_BYTES = 1024**3
"""Maximum size of a pickle in bytes."""

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
    """Return the content of the pickle. Text of Python 2 is read as UTF-8.

    Raises:
        DataError: The file is missing, larger than MAX_PICKLE_BYTES, damaged, or contains anything but lists, tuples,
            dictionaries, text, numbers, booleans and None.
    """
    check_size(path, limit=MAX_PICKLE_BYTES)
    content = path.read_bytes()
    try:
        _check_instructions(content, where=str(path))
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except DataError:
        raise
    except Exception as error:  # corrupt pickles raise almost any exception
        raise DataError(f"{path}: expected a pickle; the file is damaged or cut short ({error})") from error


def _check_instructions(content: bytes, *, where: str) -> None:
    for number, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if instruction.name not in _PLAIN_INSTRUCTIONS:
            raise DataError(
                f"{where}: expected a pickle of plain lists, dictionaries, text and numbers, found the instruction "
                f"{instruction.name}, which can run code; nothing of it was run, get the file from its publishers"
            )
        # memory grows with the largest index of a stored value, which a few bytes can make huge
        if instruction.name in _STORING_INSTRUCTIONS and argument > number + 1:
            raise DataError(f"{where}: expected a pickle that stores values one by one, found the index {argument}")
