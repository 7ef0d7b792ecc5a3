"""Tail pass: what a calibration step refits and measures is cut off behind its gradients.

In: a step graph. Out: the step without it, whose last outputs are what the rest reads, and the rest
as a graph of its own. It runs uncompiled: the second set of gradients, for their cosine, would take
as many kernels as backpropagation has, for a step in an epoch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from grapefx.ir import Slot, StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.layout import strided
from grapefx.passes.graph.order import ancestors, dead_code
from grapefx.torch_compat import graph_module, size_hint

aten = torch.ops.aten

PHASES = ("projection", "refit", "metric")
STAY = ("output", "buffer", "gradient", "input_gradient")


@dataclass(frozen=True)
class Tail:
    """A graph that takes the step's last outputs and gives ``outputs``.

    ``orders``: for each value taken, its dims from the outermost in memory to the innermost.
    """

    gm: GraphModule
    orders: tuple[tuple[int, ...], ...]
    outputs: tuple[Slot, ...]

    def run(self, results: Sequence[Any]) -> list[Any]:
        """All results of the step, from those of the step without its tail."""
        first = len(results) - len(self.orders)
        kept = [_laid(v, o) for v, o in zip(results[first:], self.orders, strict=True)]
        with torch.no_grad():
            return [*results[:first], *self.gm.forward(*kept)]


def cut_tail(step: StepGraph) -> tuple[StepGraph, Tail | None]:
    """Divide ``step``, which is not changed; None where nothing can be cut off."""
    work = step.copy()
    pairs = list(zip(work.outputs, work.results(), strict=True))
    stay = ancestors(n for s, n in pairs if s.role in STAY and isinstance(n, Node))
    tail: set[Node] = set()
    for node in work.gm.graph.nodes:
        own = node.op == "call_function" and meta.phase(node) in PHASES
        if not own or node in stay:
            continue
        # a part of a result goes where the whole is
        if node.target is not operator.getitem or node.args[0] in tail:
            tail.add(node)
    moved = [(s, n) for s, n in pairs if n in tail]
    if not moved or any(n.target is aten.as_strided.default for n in tail):  # reads strides
        return step, None
    graph = Graph()
    kept: dict[Node, Node] = {}
    twin: dict[Node, Node] = {}

    def fetch(node: Node) -> Node:
        if node in twin:
            return twin[node]
        if node in tail or (node.op == "call_function" and not _is_tensor(node)):  # sizes
            new = graph.node_copy(node, fetch)
        else:
            new = kept[node] = graph.placeholder(node.name)
        new.meta = dict(node.meta)
        twin[node] = new
        return new

    for node in [n for n in work.gm.graph.nodes if n in tail]:
        fetch(node)
    if not all(_is_tensor(n) for n in kept):  # a size that comes as an input
        return step, None
    graph.output(tuple(twin[n] for _, n in moved))
    _inputs_first(graph)
    dead_code(graph)
    outputs = [(s, n) for s, n in pairs if n not in tail]
    outputs += [(Slot("saved", n.name), n) for n in kept]
    orders = tuple(_order(n.meta["val"]) for n in kept)
    return keep_only(work, outputs), Tail(
        graph_module(work.gm, graph), orders, tuple(s for s, _ in moved)
    )


def keep_only(work: StepGraph, outputs: Sequence[tuple[Slot, Any]]) -> StepGraph:
    """The step with these outputs, by their nodes, and without what they do not need."""
    work.output_node().args = (tuple(n for _, n in outputs),)
    dead_code(work.gm.graph)
    return replace(
        work, gm=graph_module(work.gm, work.gm.graph), outputs=tuple(s for s, _ in outputs)
    )


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _order(val: torch.Tensor) -> tuple[int, ...]:
    if not strided(val):
        return ()
    strides = [size_hint(s) for s in val.stride()]
    return tuple(sorted(range(val.ndim), key=lambda d: -strides[d]))


def _laid(value: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """The value in memory as the tail was traced for; a compiler may have chosen otherwise.

    Backward operators of ATen, called directly, take some strides for granted.
    """
    if not strided(value):
        return value
    back = [order.index(d) for d in range(len(order))]
    return value.permute(order).contiguous().permute(back)


def _inputs_first(graph: Graph) -> None:
    first = next(n for n in graph.nodes if n.op == "call_function")
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        first.prepend(node)
