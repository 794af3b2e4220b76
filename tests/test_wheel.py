"""The built wheel, installed without this repository beside it: what it brings, and that it works from anywhere."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from scripts.copy_code import CHECKPOINT_CODE

ROOT = Path(__file__).parents[1]
LIBRARY = "plum_partonomy/**/*.py"
MODULES = {Path(name).stem for name in CHECKPOINT_CODE} | {"partonomy_dataset"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """The folder of a new environment with the wheel; the libraries it needs are those of the environment of tests."""
    folder = tmp_path_factory.mktemp("wheel")
    # built from a copy: setuptools leaves folders beside what it builds
    copied = ["*.py", "*/tasks/*", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(["git", "ls-files", *copied], cwd=ROOT, check=True, capture_output=True, text=True)
    names = listed.stdout.split()
    for name in names:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    subprocess.run([*pip, *build, folder / "source"], check=True, env=variables())
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    install = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run([*pip, *install], check=True, env=variables())
    # A folder named in a .pth file is searched, but the .pth files in it, such as an editable install's, are not read.
    (site_packages(folder / "environment") / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "environment"


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


def variables() -> dict[str, str]:
    """Environment variables without the one that would show the repository to Python."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(environment: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    command = [environment / "bin" / words[0], *words[1:]]
    return subprocess.run(command, cwd=cwd, env=variables(), capture_output=True, text=True)


def test_the_wheel_holds_the_tasks_of_lmms_eval_and_the_entry_point_of_its_model(environment):
    tasks, installed = Path("plum_partonomy", "lmms", "tasks"), site_packages(environment)
    names = {path.name for path in (installed / tasks).iterdir()}
    assert names == {path.name for path in (ROOT / tasks).iterdir()}
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "[lmms_eval.models]\nplum = plum_partonomy.lmms.models:manifest" in entry_points.read_text()


def test_the_wheel_installs_the_whole_library_and_modules_of_names_of_its_own(environment):
    installed = site_packages(environment)
    names = {path.name for path in installed.iterdir() if ".dist-info" not in path.name}
    found = {name.removesuffix(".py") for name in names - {"__pycache__", "libraries.pth"}}
    assert found == MODULES | {"plum_partonomy"}
    library = [
        {path.relative_to(root) for path in (root / "plum_partonomy").rglob("*.py")} for root in (ROOT, installed)
    ]
    assert library[0] == library[1]


def test_the_commands_run_from_another_folder(environment, tmp_path):
    for words in (["--help"], ["eval", "--help"]):
        done = run(environment, tmp_path, "plum", *words)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    image = ROOT / "examples" / "sailboat.png"
    question = ["ask", str(image), "Which parts does it have?"]
    done = run(environment, tmp_path, "plum", *question)
    (sentence,) = done.stderr.splitlines()
    assert done.returncode == 3 and "pass --model with a folder or a name on the Hub" in sentence
    done = run(environment, tmp_path, "plum", *question, "--model", str(ROOT / "checkpoints" / "plum-tiny"))
    assert done.returncode == 0 and done.stdout, done.stderr
    code = "import plum_partonomy, partonomy_dataset; print(plum_partonomy.__file__, partonomy_dataset.__file__)"
    assert run(environment, tmp_path, "python", "-c", code).stdout.count(str(environment)) == 2
