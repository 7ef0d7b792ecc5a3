"""Where in the user's code a node comes from, for messages and reports."""

from __future__ import annotations

from pathlib import Path

from torch.fx import Node

PACKAGE = str(Path(__file__).parent.parent.parent)  # grapefx, whose own frames say nothing


def source_of(node: Node) -> str:
    """``File "model.py", line 7, in forward``: the last frame outside torch; '' where unknown."""
    return _frame(node)[0]


def quoted(node: Node) -> str:
    """The same with the line of code: two indented lines, or ''."""
    return "".join(f"\n  {line}" for line in _frame(node) if line)


def module_path(node: Node) -> list[tuple[str, str]]:
    """The modules around a node, outermost first: (path, class name)."""
    stack = node.meta.get("nn_module_stack") or {}
    out = []
    for path, cls in stack.values():
        name = cls if isinstance(cls, str) else cls.__qualname__
        path = path.removeprefix("L['self'].").removeprefix("model.").removeprefix("model")
        if path:
            out.append((path, name.rsplit(".", 1)[-1]))
    return out


def _frame(node: Node) -> tuple[str, str]:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not starts:
        return _module(node), ""
    files = {i: lines[i].partition('"')[2].partition('"')[0] for i in starts}
    starts = [i for i in starts if not files[i].startswith(PACKAGE)]
    own = [i for i in starts if "/torch/" not in files[i]]
    if not starts:
        return _module(node), ""
    at = (own or starts)[-1]
    code = lines[at + 1] if at + 1 < len(lines) and at + 1 not in starts else ""
    return lines[at], code


def _module(node: Node) -> str:
    """The module that a node is part of, where no line of the user's code is known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, cls = stack[-1]
    return f"in the module {path!r} ({getattr(cls, '__name__', cls)})"
