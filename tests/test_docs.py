"""What the pages of docs/ say of this repository."""

import ast
import re
from pathlib import Path

from plum_partonomy.scoring.answers import read_answers
from plum_partonomy.scoring.benchmark import load_questions

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_page_on_reliability_names_exists():
    named = re.findall(r"`([\w/]*test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text())
    assert len(named) > 15
    for file, name in named:
        functions = ast.parse((ROOT / "tests" / file).read_text()).body
        assert name in [each.name for each in functions if isinstance(each, ast.FunctionDef)], f"{file}::{name}"


def test_the_loop_that_writes_a_file_of_answers_writes_one_that_is_scored(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "benchmark.md").read_text()
    (loop,) = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    questions = load_questions("partonomy", name="mini_questions", split="test", limit=3)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(loop.replace('split="test"', 'split="test[:3]"'), "benchmark.md", "exec"), {})
    predictions, problems = read_answers(tmp_path / "answers.jsonl", questions)
    assert [prediction.question_id for prediction in predictions] == [question.id for question in questions]
    assert not problems


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))


def heading(line: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-")


def test_every_link_between_the_pages_leads_to_a_file_and_a_heading():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    headings = {page: {heading(line) for line in re.findall(r"^#+ (.*)$", page.read_text(), re.M)} for page in pages}
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    for page, link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not link.startswith("http"):
            assert target.exists(), f"{page.name}: {link}"
            inside = page.parent != ROOT / "docs" or target.is_relative_to(ROOT / "docs")
            assert inside, f"{page.name}: {link} is not a page of the site; write the path in backticks"
            assert not anchor or target not in headings or anchor in headings[target], f"{page.name}: {link}"
    assert len(links) > 50
