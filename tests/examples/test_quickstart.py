"""The notebook runs from its first cell to its last, and was saved without anyone's output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.builders import ROOT

nbformat = pytest.importorskip("nbformat", reason="running the notebook needs pip install nbformat nbclient ipykernel")
nbclient = pytest.importorskip("nbclient", reason="running the notebook needs pip install nbformat nbclient ipykernel")
pytest.importorskip("ipykernel", reason="running the notebook needs pip install nbformat nbclient ipykernel")

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_it_was_saved_without_output() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_it_trains_compares_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its lines of the shell are to find the Python that runs the tests, wherever that is.
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("QUICKSTART_RESULTS", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    )
    client.execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in notebook.cells]
    assert not any("error:" in text or "Traceback" in text for text in printed)
    assert sum("macro-F1" in text for text in printed) >= 1
    assert "| " in printed[7]
    assert "আজ খুব ভালো" in printed[-1] and "bully" in printed[-1]
