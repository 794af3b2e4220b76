"""The built wheel, installed without this repository beside it: what it brings, and that it works from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts.copy_code import CHECKPOINT_CODE

ROOT = Path(__file__).parents[1]
MODULES = {Path(name).stem for name in CHECKPOINT_CODE} | {"partonomy_dataset"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the unpacked wheel, which Python is told to look in first."""
    folder = tmp_path_factory.mktemp("wheel")
    # built from a copy: setuptools leaves folders beside what it builds
    copied = ["*.py", "*/tasks/*", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(["git", "ls-files", *copied], cwd=ROOT, check=True, capture_output=True, text=True)
    names = listed.stdout.split()
    for name in names:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, "-P", *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_tasks_of_lmms_eval_and_the_entry_point_of_its_model(installed):
    tasks = Path("plum_partonomy", "lmms", "tasks")
    names = {path.name for path in (installed / tasks).iterdir()}
    assert names == {path.name for path in (ROOT / tasks).iterdir()}
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "[lmms_eval.models]\nplum = plum_partonomy.lmms.models:manifest" in entry_points.read_text()


def test_the_wheel_holds_the_library_and_modules_of_names_of_its_own(installed):
    found = {path.name.removesuffix(".py") for path in installed.iterdir() if ".dist-info" not in path.name}
    assert found == MODULES | {"plum_partonomy"}


def test_the_commands_run_from_another_folder(installed, tmp_path):
    for words in (["--help"], ["train", "--help"], ["eval", "--help"]):
        done = run(installed, tmp_path, "-m", "plum_partonomy.cli", *words)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    image = ROOT / "examples" / "sailboat.png"
    done = run(installed, tmp_path, "-m", "plum_partonomy.cli", "ask", str(image), "Which parts does it have?")
    (sentence,) = done.stderr.splitlines()
    assert done.returncode == 3 and "pass --model with a folder or a name on the Hub" in sentence
    model = ["--model", str(ROOT / "checkpoints" / "plum-tiny")]
    done = run(installed, tmp_path, "-m", "plum_partonomy.cli", "ask", str(image), "Which parts does it have?", *model)
    assert done.returncode == 0 and done.stdout, done.stderr
    code = "import plum_partonomy, partonomy_dataset; print(plum_partonomy.__file__, partonomy_dataset.__file__)"
    assert run(installed, tmp_path, "-c", code).stdout.count(str(installed)) == 2
