"""The marker operators that passes rewrite: identities with a name.

``cut`` stands at a feedback point, ``tap`` at the error tap, ``stop`` where the user stopped the
gradient. Autograd turns the first two into ``cut_backward`` and ``tap_backward`` in the joint
graph. No marker is left in a lowered graph (``erase``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from grapefx.passes.graph import meta
from grapefx.passes.graph.layout import strides

_LIB = torch.library.Library("grapefx", "DEF")
for _name in ("cut", "cut_backward", "tap", "tap_backward"):
    _LIB.define(f"{_name}(Tensor x, int index) -> Tensor")
    _LIB.impl(_name, lambda x, index: x.clone(), "CompositeExplicitAutograd")
_LIB.define("stop(Tensor x) -> Tensor")
_LIB.impl("stop", lambda x: x.clone(), "CompositeExplicitAutograd")

CUT = torch.ops.grapefx.cut.default
CUT_BACKWARD = torch.ops.grapefx.cut_backward.default
TAP = torch.ops.grapefx.tap.default
TAP_BACKWARD = torch.ops.grapefx.tap_backward.default
STOP = torch.ops.grapefx.stop.default

ALL = (CUT, CUT_BACKWARD, TAP, TAP_BACKWARD, STOP)


class Cut(torch.autograd.Function):
    """``cut`` with ``cut_backward`` as its derivative; used while the joint graph is traced."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        y: torch.Tensor = CUT(x, index)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return CUT_BACKWARD(grads[0], ctx.index), None


class Tap(torch.autograd.Function):
    """``tap`` with ``tap_backward`` as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: int) -> torch.Tensor:
        ctx.index = index
        y: torch.Tensor = TAP(x, index)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return TAP_BACKWARD(grads[0], ctx.index), None


def find(graph: Graph, target: Any) -> dict[int, Node]:
    """The nodes of one marker, by index."""
    return {n.args[1]: n for n in graph.nodes if n.op == "call_function" and n.target is target}  # type: ignore[misc]


def last_points(graph: Graph) -> frozenset[int]:
    """The feedback points behind which there is no other one."""
    before: set[Node] = set()  # nodes that a cut depends on
    last = set()
    for node in reversed(list(graph.nodes)):
        is_cut = node.op == "call_function" and node.target is CUT
        if is_cut and node not in before:
            last.add(node.args[1])
        if is_cut or node in before:
            before.update(node.all_input_nodes)
    return frozenset(last)  # type: ignore[arg-type]


def erase(graph: Graph) -> list[Node]:
    """Replace every marker by the value that it marks; returns those that have other strides."""
    moved: list[Node] = []
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in ALL:
            source: Node = node.args[0]  # type: ignore[assignment]
            if strides(source.meta["val"]) != strides(node.meta["val"]):
                moved.append(source)
            if meta.REDUCE in node.meta:
                source.meta[meta.REDUCE] = node.meta[meta.REDUCE]
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    return moved
