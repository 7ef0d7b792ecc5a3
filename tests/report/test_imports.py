"""Imports inside the report point one way: records, rendering, building, what users call."""

import ast
from pathlib import Path

import grapefx.report

FOLDER = Path(grapefx.report.__file__).parent
# each may import those before it, and its own kind
ORDER = (
    {"records", "training_records"},
    {"render"},
    {"report", "training"},
    {"build", "from_plan", "step"},
    {"inspect", "load", "stages"},
    {"cli"},
)
LEVEL = {name: i for i, names in enumerate(ORDER) for name in names}


def imported(file: Path) -> set[str]:
    """Modules (or folders) of the report that a file imports, anywhere in it."""
    names = [
        node.module
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    parts = [n.split(".") for n in names if n.startswith("grapefx.report.")]
    return {p[2] for p in parts}


def test_imports_point_one_way() -> None:
    files = [f for f in FOLDER.rglob("*.py") if f.stem not in ("__init__", "__main__")]
    assert {f.relative_to(FOLDER).parts[0].removesuffix(".py") for f in files} == set(LEVEL)
    for file in files:
        own = file.relative_to(FOLDER).parts[0].removesuffix(".py")
        later = {n for n in imported(file) if LEVEL[n] > LEVEL[own]}
        assert not later, f"{file.name} imports {later}"
