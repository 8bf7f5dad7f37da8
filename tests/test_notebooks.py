"""Every notebook runs from top to bottom, without a word on stderr, and is committed with its outputs."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class ThisPython(AsyncKernelManager):
    """Kernels of this interpreter, whatever kernels are installed."""

    def format_kernel_cmd(self, extra_arguments=None):
        return [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file]


def kinds(cell):
    """What a cell has put out; text that came in pieces counts once."""
    return {output.get("name", output.output_type) for output in cell.outputs}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OPLORA_NOTEBOOK_STEPS", "3")
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    fresh = nbformat.read(path, as_version=4)
    folder = tmp_path / "work"
    folder.mkdir()
    client = NotebookClient(
        fresh, timeout=300, kernel_manager_class=ThisPython, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # raises where a cell does
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        if new.cell_type == "code":
            assert new.execution_count is not None, f"not run:\n{new.source}"
            assert "stderr" not in kinds(new), f"{new.outputs}\nfrom:\n{new.source}"
            assert kinds(old) == kinds(new), f"committed without its outputs:\n{new.source}"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_clean(path):
    """No paths of the machine it ran on, no times, and of a size to read in a diff."""
    text = path.read_text()
    assert not re.search(r'"(/home|/Users|/tmp|/work|/root)/|iopub|shell\.execute_reply', text)
    assert len(text) < 200_000
