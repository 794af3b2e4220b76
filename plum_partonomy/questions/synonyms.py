"""When two part names mean the same part: as written, by lemma, or by a file of judged synonyms.

A comparison is a function from a name to its key; names with equal keys are the same part. Being an equivalence by
construction, it can never call a and b, and b and c, the same but not a and c.
"""

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from pathlib import Path

from plum_partonomy.masks import DataError
from plum_partonomy.questions.wording import inflect_engine
from plum_partonomy.sources.json_files import read_json

MAX_FILE_BYTES = 16 * 1024**2

PartKey = Callable[[str], str]


def exact(name: str) -> str:
    return name


@cache
def lemmatised(name: str) -> str:
    """Lower case, hyphens and underscores as spaces, the last word in the singular.

    >>> lemmatised("Front_Wheels"), lemmatised("side-mirror")
    ('front wheel', 'side mirror')
    """
    words = re.split(r"[\s_-]+", name.strip().casefold())
    words[-1] = inflect_engine().singular_noun(words[-1]) or words[-1] if words[-1] else words[-1]
    return " ".join(words)


def judged_synonyms(path: str | Path) -> PartKey:
    """Compares by a JSON file, a list of groups of synonyms [["tyre", "tire"], ...]; other names by their lemma.

    `judge_synonyms` writes such a file, and so can a person. Raises DataError if it is malformed, or if two of its
    groups share a name.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path}: expected a file of at most {MAX_FILE_BYTES} bytes with groups of synonyms")
    groups = read_json(path)
    if not isinstance(groups, list) or not all(
        isinstance(group, list) and group and all(isinstance(name, str) for name in group) for group in groups
    ):
        raise DataError(f"{path}: expected a list of non-empty lists of part names, found {groups!r:.80}")
    keys: dict[str, str] = {}
    for index, group in enumerate(groups):
        for lemma in map(lemmatised, group):
            if keys.setdefault(lemma, lemmatised(group[0])) != lemmatised(group[0]):
                raise DataError(f"{path}, group {index}: {lemma!r} is in an earlier group too; unite the two")
    return lambda name: keys.get(lemmatised(name), lemmatised(name))


def judge_synonyms(names: Iterable[str], judge: Callable[[str, str], bool], path: str | Path) -> None:
    """Asks `judge` (a language model, say) about every pair of names whose lemmas differ; writes the groups.

    Pairs already known to be the same through a third name are not asked about. The file is all that later runs need.
    """
    groups = [[lemma] for lemma in sorted(set(map(lemmatised, names)))]
    for first, second in combinations([group[0] for group in groups], 2):
        ours = next(group for group in groups if first in group)
        theirs = next(group for group in groups if second in group)
        if ours is not theirs and judge(first, second):
            groups.remove(theirs)
            ours += theirs
    synonyms = [sorted(group) for group in groups if len(group) > 1]
    Path(path).write_text(json.dumps(synonyms, indent=1) + "\n", encoding="utf-8")
