"""Strides after a rewrite: what takes a value's place may lie in memory in another order.

In: a graph in which some values were replaced by others of the same shape. Out: the same graph with
fake values that are true again; a ``view`` that the new strides do not allow becomes a ``reshape``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Graph, Node

from grapefx.passes.graph.emit import graph_mode, values
from grapefx.passes.graph.layout import strides
from grapefx.torch_compat import python_dispatcher

aten = torch.ops.aten


def differs(old: Node, new: Node) -> bool:
    """Whether ``new`` has other strides than ``old``, whose place it takes."""
    a, b = old.meta.get("val"), new.meta.get("val")
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and strides(a) != strides(b)


def restride(graph: Graph, moved: Iterable[Node]) -> int:
    """Follow new strides from the values in ``moved``; returns how many views became reshapes."""
    pending = {u for n in moved for u in n.users}
    if not pending:
        return 0
    count = 0
    with graph_mode(graph), python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            if node not in pending or node.op != "call_function":
                continue
            args, kwargs = values(node.args), values(node.kwargs)
            try:
                val = node.target(*args, **kwargs)
            except (RuntimeError, ValueError):
                if node.target is not aten.view.default:
                    raise
                node.target = aten.reshape.default
                count += 1
                val = node.target(*args, **kwargs)
            old, node.meta["val"] = node.meta["val"], val
            if not isinstance(val, torch.Tensor) or strides(val) != strides(old):
                pending |= set(node.users)
    return count
