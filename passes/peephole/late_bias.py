"""A product's bias is added where the product is read.

In: a forward graph. Out: the same graph (changed in place) in which ``addmm(b, x, W)`` is
``x @ W`` and an addition. On a CPU the one call first fills the result with b; the addition goes
into the kernel of the activation behind it (``tools/bench/what_pays.py --only bias``). GPU
libraries add in the product's last step, and half precision would be rounded once more.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from grapefx.passes.graph import meta
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.order import aliases

aten = torch.ops.aten


def add_bias_late(gm: GraphModule) -> int:
    """Take the biases out of products that something reads; returns how many."""
    found = [n for n in gm.graph.nodes if n.target is aten.addmm.default and _apart(n)]
    for node in found:
        bias, rows, weight = node.args
        em = Emitter(gm.graph, meta.notes(node))
        with em.before(node):
            product = em.call(aten.mm.default, rows, weight)
            # Inductor makes one call again of a product and an ``add``
            total = em.call(aten.sub.Tensor, product, em.call(aten.neg.default, bias))
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)
    if found:
        gm.recompile()
    return len(found)


def _apart(node: Node) -> bool:
    val = node.meta["val"]
    exact = val.dtype in (torch.float32, torch.float64)
    return exact and val.device.type == "cpu" and not node.kwargs and _read(node)


def _read(node: Node) -> bool:
    """Whether a kernel of the graph reads a value: what is only returned needs one more."""
    return any(_read(u) if aliases(u) else u.op != "output" for u in node.users)
