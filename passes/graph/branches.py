"""``torch.cond`` taken apart: both branches in line, and a choice between their results.

In: a captured graph. Out: the same, or a copy without ``cond`` and without sub-graphs. Passes see
plain operators; a gradient enters the branch that was taken alone. Raises ``CaptureError`` for
other operators that hold graphs of their own (loops).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from grapefx.errors import CaptureError
from grapefx.ir import Captured
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import graph_module

aten = torch.ops.aten


def inline_branches(cap: Captured) -> Captured:
    """The capture with every ``cond`` replaced; itself where there is none."""
    nodes = cap.gm.graph.nodes
    if not any(n.op == "get_attr" and isinstance(_held(cap.gm, n), GraphModule) for n in nodes):
        return cap
    graph = Graph()
    known: dict[Node, Any] = {}
    for node in nodes:
        _copy(cap.gm, node, graph, known)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    gm = graph_module(cap.gm, graph)
    graph.lint()
    return replace(cap, gm=gm)


def _held(gm: GraphModule, node: Node) -> Any:
    found: Any = gm
    for part in str(node.target).split("."):
        found = getattr(found, part, None)
    return found


def _copy(gm: GraphModule, node: Node, graph: Graph, known: dict[Node, Any]) -> None:
    """Put a node of ``gm`` into ``graph``; ``known`` says what stands for each one before."""
    if node.op == "get_attr" and isinstance(_held(gm, node), GraphModule):
        return
    if node.target is torch.ops.higher_order.cond:
        known[node] = _both(gm, node, graph, known)
        return
    if _picks_known(node, known):
        known[node] = known[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    if any(a not in known for a in node.all_input_nodes):
        raise CaptureError(
            f"the operator {node.target} (node {node.name!r}) runs a graph of its own, which has "
            f"no derivative here{quoted(node)}\n  remedy: write the loop in Python with a fixed "
            "number of rounds, or leave it to a part of the model outside grapefx.compile"
        )
    known[node] = graph.node_copy(node, lambda a: known[a])


def _picks_known(node: Node, known: dict[Node, Any]) -> bool:
    """Whether a node picks a result of a ``cond``."""
    first = node.args[0] if node.args else None
    return isinstance(first, Node) and isinstance(known.get(first), list)


def _both(gm: GraphModule, node: Node, graph: Graph, known: dict[Node, Any]) -> list[Any]:
    predicate, *graphs, operands = node.args
    asked = known[predicate] if isinstance(predicate, Node) else predicate
    given = [known[a] if isinstance(a, Node) else a for a in operands]  # type: ignore[union-attr]
    if not isinstance(asked, Node) or not isinstance(asked.meta.get("val"), torch.Tensor):
        raise CaptureError(
            f"torch.cond (node {node.name!r}) asks a number{quoted(node)}\n  remedy: an if of "
            "Python's: the graph is captured again where the answer is another one"
        )
    if asked.meta["val"].ndim:
        asked = _call(graph, node, aten.reshape.default, asked, [])
    results = []
    for branch, taken in zip(graphs, (True, False), strict=True):
        sub = _held(gm, branch)  # type: ignore[arg-type]
        gated = [_gate(graph, node, asked, a, taken) for a in given]
        inner: dict[Node, Any] = {}
        feed = iter(gated)
        found: Any = ()
        for n in sub.graph.nodes:
            if n.op == "placeholder":
                inner[n] = next(feed)
            elif n.op == "output":
                found = [inner[a] if isinstance(a, Node) else a for a in n.args[0]]
            else:
                _copy(sub, n, graph, inner)
        results.append(found)
    return [_choice(graph, node, asked, a, b) for a, b in zip(*results, strict=True)]


def _gate(graph: Graph, cond: Node, asked: Node, value: Any, taken: bool) -> Any:
    """The operand; only the branch that was taken sends a gradient back to it.

    A zero sent into the other one could come back as NaN (a square root at zero).
    """
    val = value.meta.get("val") if isinstance(value, Node) else None
    if not isinstance(val, torch.Tensor) or not (val.is_floating_point() or val.is_complex()):
        return value
    still = _call(graph, cond, aten.detach.default, value)
    pair = (value, still) if taken else (still, value)
    return _call(graph, cond, aten.where.self, asked, *pair)


def _choice(graph: Graph, cond: Node, asked: Node, a: Any, b: Any) -> Any:
    if isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor):
        return _call(graph, cond, aten.where.self, asked, a, b)
    if a is b or (not isinstance(a, Node) and a == b):
        return a
    raise CaptureError(
        f"the branches of torch.cond (node {cond.name!r}) return different numbers{quoted(cond)}\n"
        "  remedy: return tensors"
    )


def _call(graph: Graph, cond: Node, op: Any, *args: Any) -> Node:
    new = graph.call_function(op, args)
    vals = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    mode = next(v.fake_mode for v in vals if hasattr(v, "fake_mode"))
    with mode:
        val = op(*vals)
    new.meta = {k: v for k, v in cond.meta.items() if k not in ("tensor_meta", "unbacked_bindings")}
    new.meta["val"] = val
    return new
