"""``residual="leak"``: feedback at the input of every weight layer, shortcuts left to the chain.

In: a captured graph. Out: a copy in which each weight layer (but those fed by the model's inputs)
reads its input through an ``alias``, marked as a feedback point. A gradient that comes through a
shortcut passes beside these points, as in libraries that replace each layer's input gradient.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from grapefx.ir import Captured, copied
from grapefx.passes.graph import meta
from grapefx.passes.graph.operators import HEAVY, op_name
from grapefx.torch_compat import graph_module

aten = torch.ops.aten


def with_edges(cap: Captured) -> Captured:
    """The capture with a node on every edge into a weight layer."""
    gm = graph_module(cap.gm, copied(cap.gm.graph))
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or op_name(node) not in HEAVY or not node.all_input_nodes:
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_function":
            continue
        with gm.graph.inserting_before(node):
            edge = gm.graph.call_function(aten.alias.default, (source,))
        edge.meta = {**node.meta, "val": source.meta["val"], meta.EDGE: True}
        node.replace_input_with(source, edge)
    gm.recompile()
    return replace(cap, gm=gm)


def is_edge(node: Node) -> bool:
    """Whether a node was put there by ``with_edges``."""
    return bool(node.meta.get(meta.EDGE))
