"""examples/jlora.ipynb and its script: one text in two forms, and it runs. The notebook is kept without its outputs: every machine
would write others, and what they look like is made here."""

import os
import re

import jupytext
import nbformat
import pytest
from pages import ROOT

NOTEBOOK, SCRIPT = ROOT / "examples" / "jlora.ipynb", ROOT / "examples" / "jlora_notebook.py"


def _cells(file):
    return [(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]


def test_notebook_and_script_agree():
    assert _cells(NOTEBOOK) == _cells(SCRIPT), "run: jupytext --sync examples/jlora.ipynb"


def test_ten_cells_and_no_output():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [int(re.search(r"^# (\d+)\. ", cell.source, re.MULTILINE)[1]) for cell in cells] == [*range(1, 11)]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
def test_it_runs_and_the_model_learns(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    before, after = map(float, re.search(r"held-out perplexity ([\d.]+) -> ([\d.]+)", said).groups())
    assert after < 0.9 * before
    assert "image/png" in {kind for output in outputs if "data" in output for kind in output.data}
    assert (tmp_path / "notebook-output" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "notebook-output" / "model-q8_0.gguf").is_file()
