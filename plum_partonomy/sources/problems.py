"""What could not be used of somebody's files: one sentence for each record, kept in a file.

{"problem": "descriptor.json, record 6: has the image and the label of record 5"}
"""

import json
from collections.abc import Iterable
from pathlib import Path

from plum_partonomy.files import write_whole

ERRORS_FILE = "errors.jsonl"


def write_problems(path: Path, problems: Iterable[object]) -> None:
    """Writes the file, whole or not at all; a problem is a sentence, or an error that says one."""
    write_whole(path, (json.dumps({"problem": str(problem)}, ensure_ascii=False) + "\n" for problem in problems))


def read_problems(path: Path) -> list[str]:
    """The sentences of a file that `write_problems` wrote."""
    return [json.loads(line)["problem"] for line in path.read_text(encoding="utf-8").splitlines()]
