"""What the README tells people to run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_python_lines_before_the_results_run_as_they_stand(monkeypatch, capsys):
    start = (ROOT / "README.md").read_text().partition("## Measured")[0]
    first, *others = re.findall(r"```python\n(.*?)```", start, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(first, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(first.strip().splitlines()) <= 12
    assert names["answer"].text in printed and names["answer"].spans and printed.splitlines()[0] in start
    assert all(span.mask.shape == (128, 128) for span in names["answer"].spans)
    for lines in others:
        exec(compile(lines, "README.md", "exec"), names)
    assert len(names["answers"]) == 2 and names["answers"][0].text == names["answer"].text


def test_every_file_and_command_that_is_named_exists():
    text = (ROOT / "README.md").read_text()
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in re.findall(r"^make (\w+)", text, re.MULTILINE))
    paths = set(
        re.findall(r"(?<![\w/])(?:recipes|docs|plum_partonomy|partonomy|scripts|checkpoints|demo)/[\w./-]*\w", text)
    )
    assert paths and all((ROOT / path).exists() for path in paths)
