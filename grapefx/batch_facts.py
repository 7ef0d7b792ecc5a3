"""What a capture took for granted of the batch size, and which sizes its graph is right for.

Tracing decides a branch such as ``if x.shape[0] > 8`` once, for the size that it traces with, and
takes a batch of two or more for granted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate

from grapefx.errors import CaptureError
from grapefx.ir import Captured
from grapefx.torch_compat import size_expression


@dataclass(frozen=True)
class Number:
    """A number among a model's outputs that follows from the batch size."""

    expr: Any
    batch: Any

    def at(self, size: int) -> Any:
        """Its value for a batch of ``size`` samples."""
        return _plain(self.expr.subs({self.batch: size}))


def _plain(value: Any) -> Any:
    if value.is_Boolean:
        return bool(value)
    return int(value) if value.is_integer else float(value)


def number(leaf: Any, batch: Any) -> Any:
    """A leaf of a traced output: a symbolic number becomes a ``Number``, or the number that it is.

    Raises:
        CaptureError: it depends on more than the batch size.
    """
    expr = size_expression(leaf)
    if expr is None:
        return leaf
    if not expr.free_symbols:
        return _plain(expr)
    if expr.free_symbols == {batch}:
        return Number(expr, batch)
    raise CaptureError(
        f"the model returns a number that depends on data ({leaf})\n"
        "  remedy: return a tensor, or compute the number outside the model"
    )


def holds(captured: Captured, batch: int) -> bool:
    """Whether what tracing asked of the batch size has the same answers for ``batch``."""
    if captured.batch is None:
        return True
    return all(f.subs({captured.batch: batch}) != False for f in captured.facts)  # noqa: E712


def same_graph(general: Captured, alone: Captured, batch: int) -> bool:
    """Whether the graph for any batch size is the one that was captured at ``batch`` alone."""
    return _text(general, batch) == _text(alone, batch)


def _text(captured: Captured, batch: int) -> list[Any]:
    """A graph as a list: operators on tensors, with numbers in the place of sizes."""
    order: dict[Node, int] = {}

    def plain(arg: Any) -> Any:
        if not isinstance(arg, Node):
            return arg
        if arg in order:
            return f"%{order[arg]}"
        expr = size_expression(arg.meta.get("val"))
        if expr is None:
            return str(arg.target)
        value = expr.subs({captured.batch: batch}) if captured.batch is not None else expr
        return _plain(value) if not value.free_symbols else str(value)

    lines: list[Any] = []
    for node in captured.gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and size_expression(value) is not None:
            continue  # a size
        if node.op in ("placeholder", "call_function"):
            order[node] = len(order)
        if node.op == "call_function":
            args = map_aggregate((node.args, dict(node.kwargs)), plain)
            lines.append((str(node.target), repr(args)))
    return lines


__all__ = ["Number", "holds", "number", "same_graph"]
