"""Where in the user's code a node comes from, for messages and reports."""

from __future__ import annotations

from pathlib import Path

from torch.fx import Node

_PACKAGE = str(Path(__file__).parent.parent.parent)  # grapefx, whose own frames say nothing


def source_of(node: Node) -> str:
    """``File "model.py", line 7, in forward``: the last frame outside torch; '' where unknown."""
    return _frame(node)[0]


def quoted(node: Node) -> str:
    """The same with the line of code: two indented lines, or ''."""
    return "".join(f"\n  {line}" for line in _frame(node) if line)


def _frame(node: Node) -> tuple[str, str]:
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    starts = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not starts:
        return "", ""
    files = {i: lines[i].partition('"')[2].partition('"')[0] for i in starts}
    own = [i for i, f in files.items() if "/torch/" not in f and not f.startswith(_PACKAGE)]
    at = (own or starts)[-1]
    code = lines[at + 1] if at + 1 < len(lines) and at + 1 not in starts else ""
    return lines[at], code


__all__ = ["quoted", "source_of"]
