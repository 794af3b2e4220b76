"""What the pages of docs/ say of this repository."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_page_on_reliability_names_exists():
    named = re.findall(r"`([\w/]*test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 15
    for file, name in named:
        functions = ast.parse((ROOT / "tests" / file).read_text()).body
        assert name in [each.name for each in functions if isinstance(each, ast.FunctionDef)], f"{file}::{name}"


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
