"""The file of records that could not be used, one sentence per record.

{"problem": "descriptor.json, record 6: has the image and the label of record 5"}
"""

import json
from collections.abc import Iterable
from pathlib import Path

from plum_partonomy.files import write_whole

ERRORS_FILE = "errors.jsonl"


def write_problems(path: Path, problems: Iterable[object]) -> None:
    """Write the file completely or not at all. A problem is a sentence, or an error with one."""
    write_whole(path, (json.dumps({"problem": str(problem)}, ensure_ascii=False) + "\n" for problem in problems))


def read_problems(path: Path) -> list[str]:
    """Return the sentences of a file written by `write_problems`."""
    return [json.loads(line)["problem"] for line in path.read_text(encoding="utf-8").splitlines()]
