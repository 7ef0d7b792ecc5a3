"""A layer's forward product and those of its tangents become one product of more rows.

In: a forward graph (behind the split). Out: the same graph (changed in place) in which ``x @ W``
and ``dx @ W`` are halves of ``[x; dx] @ W``: the weight is read once, and a product of few rows is
far from a processor's peak. The halves are views; Inductor computes ``x`` and ``dx`` in their
places, so that nothing is copied.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from grapefx.passes.graph import meta
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.order import aliases
from grapefx.torch_compat import size_hint

aten = torch.ops.aten

# Of more rows a product alone is near its peak, and the wider buffers cost more than is won: joined
# over apart took 0.86 of a step at 128 rows (MLP 8x1024), 0.91 at 512, 1.09 at 8,192 (transformer).
MOST_ROWS = 1024


@dataclass(frozen=True)
class _Product:
    """``rows @ weight``, with a bias or without."""

    node: Node
    bias: Node | None
    rows: Node
    weight: Node


def join_products(gm: GraphModule) -> int:
    """Join what can be joined; returns how many products went."""
    graph = gm.graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    returned = _returned(graph)
    groups: dict[Node, list[_Product]] = {}
    for node in graph.nodes:
        product = _product(node)
        if product is not None:
            groups.setdefault(product.weight, []).append(product)
    gone = 0
    for found in groups.values():
        tangents = [p for p in found if meta.phase(p.node) == "tangent"]
        for i, first in enumerate(found):
            if first in tangents or (first.bias is None and first.node in returned):
                continue  # a user's output must not lie in memory that holds more
            # its tangent's rule emitted that one behind it, in front of the next with this weight
            later = [p for p in found[i + 1 :] if p not in tangents]
            end = order[later[0].node] if later else sys.maxsize
            own = [
                p
                for p in tangents
                if p.bias is None
                and order[p.rows] < order[first.node] < order[p.node] < end
                and _alike(p.rows, first.rows)
            ]
            if own:
                _join(graph, first, own)
                gone += len(own)
    if gone:
        gm.recompile()
    return gone


def _product(node: Node) -> _Product | None:
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target is aten.mm.default:
        return _Product(node, None, *node.args)  # type: ignore[arg-type]
    if node.target is aten.addmm.default:
        return _Product(node, *node.args)  # type: ignore[arg-type]
    return None


def _returned(graph: Graph) -> set[Node]:
    """The outputs, and what they may be views of."""
    found: set[Node] = set()
    stack = [a for n in graph.nodes if n.op == "output" for a in n.all_input_nodes]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if aliases(node):
            stack.extend(node.all_input_nodes[:1])
    return found


def _alike(a: Node, b: Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    few = size_hint(y.shape[0]) <= MOST_ROWS
    return bool(few and x.dtype == y.dtype and x.device == y.device)


def _join(graph: Graph, first: _Product, tangents: list[_Product]) -> None:
    em = Emitter(graph)
    with em.before(first.node, meta.labels(first.node), phase="forward"):
        rows = [first.rows, *(p.rows for p in tangents)]
        joined = em.call(aten.cat.default, rows, 0)
        product = em.call(aten.mm.default, joined, first.weight)
        start: Any = 0
        for p, x in zip([first, *tangents], rows, strict=True):
            size = x.meta["val"].shape[0]
            count = size if isinstance(size, int) else em.call(aten.sym_size.int, x, 0)
            end = start + count if isinstance(count, int) else em.call(operator.add, start, count)
            part = em.call(aten.slice.Tensor, product, 0, start, end)
            if p.bias is not None:
                part = em.call(aten.add.Tensor, part, p.bias)
            p.node.replace_all_uses_with(part)
            part.meta[meta.PHASE] = meta.phase(p.node) or "forward"
            start = end
    for p in (first, *tangents):
        graph.erase_node(p.node)
