"""Dead work inside multi-output backward operators: masks follow use.

A cut makes input gradients unnecessary, but ``convolution_backward`` computes them as long as its
mask says so. In: a step graph after dead-code elimination. Out: the same graph with masks that name
only outputs in use. Batch norm in training mode drops its running statistics: it reads none.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph

aten = torch.ops.aten

# operator -> position of its output mask
_MASKED = {
    op: next(i for i, a in enumerate(op._schema.arguments) if a.name == "output_mask")
    for op in (
        aten.convolution_backward.default,
        aten.native_layer_norm_backward.default,
        aten.native_group_norm_backward.default,
        aten.native_batch_norm_backward.default,
    )
}


def prune_masks(graph: Graph) -> int:
    """Narrow output masks to what is used; returns how many outputs were switched off."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _MASKED:
            continue
        position = _MASKED[node.target]
        mask = list(node.args[position])  # type: ignore[arg-type]
        used = [False] * len(mask)
        for user in list(node.users):
            if user.target is operator.getitem:
                used[user.args[1]] = True  # type: ignore[index]
            else:
                used = [True] * len(mask)
        new = [bool(m and u) for m, u in zip(mask, used, strict=True)]
        count += sum(mask) - sum(new)
        node.update_arg(position, new)
        val = node.meta.get("val")
        if isinstance(val, (tuple, list)):
            node.meta["val"] = tuple(v if keep else None for v, keep in zip(val, new, strict=True))
        if node.target is aten.native_batch_norm_backward.default and node.args[7] is True:
            node.update_arg(3, None)
            node.update_arg(4, None)
    return count
