"""The documentation builds as a site without a warning, and its tutorial runs as a notebook."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.blocks import ROOT

pytestmark = pytest.mark.slow


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def run_module(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """The tutorial as a notebook, as `scripts/docs.sh` makes it."""
    path = tmp_path / "tutorial.ipynb"
    run_module("jupytext", "--quiet", "--to", "ipynb", "--output", str(path), "docs/tutorial.md")
    return path


@needs("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton")
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    made = ROOT / "docs/tutorial.ipynb"
    made.touch()  # the page offers it; what it holds makes no difference here
    site = tmp_path / "site"
    run_module(
        "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-d", str(tmp_path / "trees"), "docs", str(site)
    )
    names = documented_names(site / "objects.inv")
    for page in (ROOT / "docs/reference").glob("*.rst"):
        module = importlib.import_module(page.stem)
        for name in getattr(module, "__all__", ()):
            is_module = f"{page.stem}.{name}" in sys.modules
            assert is_module or f"{page.stem}.{name}" in names, f"{page.stem}.{name} is not in the reference"
    assert (site / "searchindex.js").exists()


def documented_names(inventory: Path) -> set[str]:
    """Returns the Python names that a site describes, from the inventory that Sphinx writes."""
    _, _, compressed = inventory.read_bytes().partition(b"zlib.\n")
    return {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines() if " py:" in line}


@needs("jupytext", "nbclient", "ipykernel")
def test_the_tutorial_runs_as_a_notebook(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = nbformat.read(notebook, as_version=4)
    done = NotebookClient(cells, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert sum(cell.cell_type == "code" for cell in done.cells) == 11
    shown = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert float(re.findall(r"(\d\.\d+)  auc", shown)[0]) > 0.75
    assert "nothing changed since version 1" in shown
