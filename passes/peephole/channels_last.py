"""Cotangents computed in the memory order of the values that they meet.

In: an update graph and the strides of its saved values. Out: the same graph (changed in place) in
which ``(e @ B)`` as (N, C, H, W) becomes ``e @ B'`` as (N, H, W, C), seen with its dims moved back,
where saved values of that shape lie with their channels last (Inductor's choice for convolutions).
B' is B with its columns reordered: C by n, no N. Without this every kernel behind the product
transposes what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from grapefx.passes.graph import meta
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.order import dead_code
from grapefx.passes.graph.restride import restride
from grapefx.torch_compat import size_hint

aten = torch.ops.aten

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def channels_last(gm: GraphModule, strides: Sequence[Any]) -> int:
    """Reorder what can be reordered; returns the number of products changed."""
    graph = gm.graph
    saved = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"][: len(strides)]
    shapes = {_shape(v) for v, s in zip(saved, strides, strict=True) if _last(v, s)}
    found = [n for n in graph.nodes if n.target in VIEWS and _shape(n.meta["val"]) in shapes]
    moved = []
    for view in found:
        product = view.args[0]
        if (
            isinstance(product, Node)
            and product.target is aten.mm.default
            and len(product.users) == 1
            and _shape(product.meta["val"])[0] == _shape(view.meta["val"])[0]
        ):
            moved.append(_reordered(graph, view, product))
    if moved:
        dead_code(graph)
        restride(graph, moved)
        gm.recompile()
    return len(moved)


def _last(value: Any, stride: Any) -> bool:
    """Whether a value of (N, C, ...) lies in memory with C last, and not otherwise as well."""
    if not isinstance(value, Tensor) or value.ndim < 4 or stride is None:
        return False
    return size_hint(stride[1]) == 1 and size_hint(stride[-1]) == size_hint(value.shape[1]) > 1


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(size_hint(s) for s in value.shape) if isinstance(value, Tensor) else ()


def _reordered(graph: Any, view: Node, product: Node) -> Node:
    rows, columns = product.args
    channels, *space = (int(s) for s in view.meta["val"].shape[1:])
    dims = tuple(range(2, 2 + len(space)))

    def ordered(e: Tensor, b: Tensor) -> Tensor:
        wide = b.reshape(b.shape[0], channels, *space).permute(0, *dims, 1).reshape(b.shape)
        made = (e @ wide).view(e.shape[0], *space, channels)
        return made.permute(0, len(dims) + 1, *(d - 1 for d in dims))

    em = Emitter(graph, meta.notes(view))
    with em.before(view):
        new: Node = em.trace(ordered, rows, columns)
    view.replace_all_uses_with(new)
    return new
