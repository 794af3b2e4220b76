"""Every notebook runs from its first cell to its last."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_with_its_outputs_and_without_noise_or_places_of_a_disk(name):
    text = (FOLDER / name).read_text()
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert code and all(cell["execution_count"] for cell in code)
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert not re.search(r"(?<!\w)/(tmp|home|root|work)/", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_cell_of_a_notebook_fails(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install .[notebook]")
    import nbformat

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "before {'precision'" in printed and "after {'precision'" in printed
