"""The tutorial notebook runs, from its folder and from the repository's, and shows what it says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
pytest.importorskip("ipykernel", reason="needs ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after a run of all cells; a cell that fails fails the test."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    finally:
        os.environ["PYTHONPATH"] = before
    return notebook


def shown(notebook: Any, kind: str) -> list[str]:
    """Outputs of a kind, in order; of text, what cells print as well."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    texts = [o.text for o in outputs if kind == "text/plain" and "text" in o]
    return texts + [o.data[kind] for o in outputs if kind in o.get("data", {})]


def test_it_shows_what_it_says(executed: Any) -> None:
    assert len(shown(executed, "image/png")) == 4
    text = "\n".join(shown(executed, "text/plain"))
    last = {name: float(v) for name, v in re.findall(r"'([^']+)': (\d+\.\d)[,}]", text)}
    exact, default = last["backpropagation"], last["grape + refit (the default)"]
    assert default > last["dfa"] + 20 and default > exact - 5
    assert re.search(r"bp +longest chain of updates: 7", text)
    assert re.search(r"grape +longest chain of updates: 1", text)
    mean = re.search(r"mean cosine (-?[\d.]+) lowest", text)
    assert mean and float(mean[1]) < 0.4


def test_the_stored_outputs_name_no_machine() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "/home/" not in text and str(ROOT) not in text and "Traceback" not in text
    assert NOTEBOOK.stat().st_size < 600_000
