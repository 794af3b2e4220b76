"""What the tree promises: which code imports which, and how long files and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from scripts.copy_code import CHECKPOINT_CODE

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "plum_partonomy"
WITHOUT_TORCH = ("records", "masks", "images", "seeding", "files", "sources", "drawn", "questions", "scoring")
WITHOUT_TORCH += ("evaluation/answers",)
# Each imports those before it, and none after it.
ORDER = (
    (
        "inputs_plum",
        "chats_plum",
        "configuration_plum",
        "segmenters_plum",
        "supervision_plum",
        "segmentation_plum",
        "modules_plum",
        "generation_plum",
        "backbones_plum",
        "processing_plum",
        "modeling_plum",
    ),
    ("masks", "images", "files", "seeding", "records", "features", "command_line"),
    ("questions", "drawn"),
    ("sources",),
    ("partonomy_dataset", "loading", "scoring"),
    ("inference",),
    ("hub", "baselines"),
    ("training", "lmms"),
    ("evaluation",),
    ("cli", "commands"),
)
LONGEST_FILE, LONGEST_FUNCTION = 900, 60


def imports(path: Path) -> list[str]:
    """The modules that a file imports anywhere in it, as dotted names without leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if node.module not in (None, "plum_partonomy") else []
            found += [f"{node.module or ''}.{alias.name}".lstrip(".") for alias in node.names]
    return found


def room(module: str) -> str:
    """The first name of a module below the library, or the module itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "plum_partonomy" and len(parts) > 1 else parts[0]


def python_files() -> list[Path]:
    """The files whose code is written here once: no tests, no copies."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True)
    copied = ("tests/", "checkpoints/", "metrics/partonomy_masks/inputs_plum.py")
    return [ROOT / name for name in listed.stdout.split() if not name.startswith(copied)]


def test_what_travels_with_a_checkpoint_imports_nothing_of_the_library():
    for name in CHECKPOINT_CODE:
        own = {module.split(".")[0] for module in imports(ROOT / name)}
        assert not own & {"plum_partonomy", "partonomy_dataset", "train", "evaluate_plum"}, name
    for name in ("inputs_plum.py", "chats_plum.py"):
        assert "torch" not in {module.split(".")[0] for module in imports(ROOT / name)}


def test_transformers_finds_every_file_that_travels_with_a_checkpoint():
    found = {Path(name).name for name in get_relative_import_files(ROOT / "modeling_plum.py")}
    assert {*found, "modeling_plum.py"} == set(CHECKPOINT_CODE)


def test_arrows_run_one_way():
    level = {name: number for number, names in enumerate(ORDER) for name in names}
    for path in LIBRARY.rglob("*.py"):
        own = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        for module in imports(path):
            assert room(module) not in ("train", "evaluate_plum", "scripts", "demo", "perf", "tests"), path
            assert own in level or own == "__init__", f"{own} has no place in ORDER"
            if own != "__init__" and module.split(".")[0] in ("plum_partonomy", *level):
                assert level[room(module)] <= level[own], f"{path.relative_to(ROOT)} imports {module}"


def test_records_readers_drawings_questions_scores_and_files_of_answers_do_without_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in WITHOUT_TORCH
        for path in [LIBRARY / f"{name}.py", *(LIBRARY / name).glob("*.py")]
        if path.is_file() and path.stem != "__init__"
    ]
    for module in modules:
        path = ROOT / (module.replace(".", "/") + ".py")
        assert "torch" not in {found.split(".")[0] for found in imports(path)}, module
    script = f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            lines = node.end_lineno - body[0].lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"
