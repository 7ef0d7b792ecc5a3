"""Imports point one way: the rooms of the house in order, and no circle between two files.

Imports inside functions and under ``TYPE_CHECKING`` count as well: they are where circles hide.
"""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest
import torch

ROOT = Path(__file__).parent.parent
# Each room may import those on lines above its own, and nothing below.
ORDER = [
    ["errors"],
    ["torch_compat"],
    ["ir"],
    ["passes/graph"],
    ["methods", "passes/place"],
    ["maps"],
    ["passes/differentiate"],
    ["passes/feedback", "passes/peephole", "passes/divide"],
    ["passes"],
    ["capture", "lowering", "analysis"],
    ["options"],
    ["plan"],
    ["report"],
    ["runtime"],
    ["api"],
    ["integrations"],
    [""],
    ["__main__"],
]
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in [*ROOT.glob("grapefx/**/*.py"), *ROOT.glob("passes/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] == ("grapefx", "passes"):
            continue  # the link
        name = ".".join(parts if parts[0] == "grapefx" else ("grapefx", *parts))
        found[name.removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """The folder of a module, or the file if it lies beside the folders."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    if parts[0] == "passes":
        inside = len(parts) > 1 and (ROOT / "passes" / parts[1]).is_dir()
        return f"passes/{parts[1]}" if inside else "passes"
    return parts[0]


@pytest.fixture(scope="module")
def imports() -> nx.DiGraph:
    """Who imports whom."""
    known = files()
    graph = nx.DiGraph()
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grapefx"):
                assert node.module is not None
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    graph.add_edge(name, whole if whole in known else node.module)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("grapefx"):
                        graph.add_edge(name, alias.name)
    return graph


def test_no_circle_between_files(imports: nx.DiGraph) -> None:
    circles = [sorted(c) for c in nx.strongly_connected_components(imports) if len(c) > 1]
    assert circles == []


def test_rooms_import_what_lies_below_them(imports: nx.DiGraph) -> None:
    wrong = []
    for importer, imported in imports.edges:
        a, b = room(importer), room(imported)
        if a != b and b != "" and RANK[b] >= RANK[a]:
            wrong.append(f"{importer} imports {imported}")
    assert wrong == []


def test_private_torch_is_in_one_file() -> None:
    """``torch._dynamo`` and the like are named in ``torch_compat.py`` alone."""
    wrong = []
    for name, path in files().items():
        if name == "grapefx.torch_compat":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [a.name for a in node.names]
            private = [m for m in modules if m.startswith("torch.") and "._" in m]
            wrong += [f"{name}: {m}" for m in private]
    assert wrong == []


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_file_reaches_into_private_state_of_another() -> None:
    """A private attribute or method of one of our classes is used in its own file only."""
    owners: dict[str, set[str]] = {}
    trees = {name: ast.parse(path.read_text()) for name, path in files().items()}
    for name, module in trees.items():
        for cls in [n for n in ast.walk(module) if isinstance(n, ast.ClassDef)]:
            for n in ast.walk(cls):
                own = [n.name] if isinstance(n, ast.FunctionDef) else []
                if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
                    own = [n.attr] if n.value.id == "self" else []
                for attribute in filter(_private, own):
                    owners.setdefault(attribute, set()).add(name)
    wrong = [
        f"{name}:{n.lineno} reads {n.attr!r} of {sorted(owners[n.attr])}"
        for name, module in trees.items()
        for n in ast.walk(module)
        if isinstance(n, ast.Attribute)
        and not (isinstance(n.value, ast.Name) and n.value.id in ("self", "cls"))
        and n.attr in owners
        and name not in owners[n.attr]
        and not hasattr(torch.nn.Module(), n.attr)
    ]
    assert wrong == []


def test_functions_are_short() -> None:
    """No function is longer than 60 lines, but for those that a comment above says why."""
    long = []
    for name, path in files().items():
        lines = path.read_text().splitlines()
        for n in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(n)
                length = (n.end_lineno or 0) - n.body[0].lineno + 1
                if doc is not None:
                    length = (n.end_lineno or 0) - (n.body[0].end_lineno or 0)
                if length > 60:
                    long.append(f"{name}.{n.name}: {length}")
    assert long == []
