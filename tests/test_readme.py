"""What the README tells people to run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_first_python_lines_run_as_they_stand(monkeypatch, capsys):
    (lines, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    exec(compile(lines, "README.md", "exec"), names)
    assert len(lines.strip().splitlines()) <= 12
    assert names["answer"].text in capsys.readouterr().out and names["answer"].spans
    assert all(span.mask.shape == (128, 128) for span in names["answer"].spans)


def test_every_file_and_command_that_is_named_exists():
    text = (ROOT / "README.md").read_text()
    targets = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in targets for target in re.findall(r"^make (\w+)", text, re.MULTILINE))
    paths = set(
        re.findall(r"(?<![\w/])(?:recipes|docs|plum_partonomy|partonomy|scripts|checkpoints|demo)/[\w./-]*\w", text)
    )
    assert paths and all((ROOT / path).exists() for path in paths)
