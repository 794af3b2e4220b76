"""
Write the table of vision-language models in docs/model.md from the families that the tests run with.

    python -m scripts.backbone_table

A family is a line of `FAMILIES` or `REFUSED` in tests/tiny_backbones.py.
"""

from pathlib import Path

from tests.tiny_backbones import FAMILIES, REFUSED

PAGE = Path(__file__).parents[1] / "docs" / "model.md"
BEGIN, END = "<!-- written by scripts/backbone_table.py -->\n", "<!-- end of the table -->"
# Every test of a family runs with every family, so these columns say "yes" for each that is not refused.
TESTED = ("trains", "generates", "segments", "scores", "LoRA")
LACKS = ("own template", "image once", "beginnings once", "answer once", "static answer once")
HEADER = ("family", "for example", *TESTED, *LACKS, "needs", "why not")


def format_families() -> str:
    """Return the Markdown table: families that work with what they lack, then those that are refused."""
    lines = [_row(HEADER), _row(("---",) * len(HEADER))]
    for family in FAMILIES:
        has = (family.keeps_template, family.shares_images, family.shares_beginnings)
        has += (family.answers_once, family.static_once)
        marks = ["yes"] * len(TESTED) + ["yes" if each else "no" for each in has]
        example, needs = (name and f"`{name}`" for name in (family.example, family.needs))
        lines.append(_row((family.name, example, *marks, needs, family.why)))
    lines += [_row((name, "", *["no"] * (len(TESTED) + len(LACKS)), "", why)) for name, _, why in REFUSED]
    return "\n".join(lines) + "\n"


def insert(page: str) -> str:
    """Return the text of the page with the table of today between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + format_families() + END + rest.split(END)[1]


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
