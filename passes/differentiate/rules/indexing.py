"""Operators that pick elements: the tangent is gathered with the indices that they return."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import (
    argument,
    output,
    size_at,
    tensor,
    unmixed,
    view,
)
from grapefx.passes.differentiate.rules.context import Items, Result, Rule, RuleContext

aten = torch.ops.aten


def max_pool(spatial: int) -> Rule:
    """(out, indices): indices into the flattened plane of each channel."""

    def rule(em: RuleContext, node: Node) -> Result:
        x = node.args[0]
        t = em.t(x)
        if t is None:
            return None
        index = output(em, node, 1)
        plane = [-1]
        lead = list(range(t.meta["val"].ndim - spatial))
        shape = [size_at(em, t, d) for d in lead]
        flat = view(em, t, shape + plane)
        where = view(em, index, shape + plane)
        picked = em.call(aten.gather.default, flat, -1, where)
        out_shape = [int(s) for s in index.meta["val"].shape[-spatial:]]
        return {0: view(em, picked, shape + out_shape)}

    return rule


def pick(em: RuleContext, node: Node) -> Items | None:
    """(values, indices) along one dim: sort, topk, max, cummax, ..."""
    t = em.t(node.args[0])
    if t is None:
        return None
    ndim = t.meta["val"].ndim
    dim = argument(node, "dim", -1)
    unmixed(em, node, tensor(node), dim)
    index = output(em, node, 1)
    if ndim == 0:
        return {0: t}
    gone = index.meta["val"].ndim < ndim
    if gone:
        index = em.call(aten.unsqueeze.default, index, dim)
    out = em.call(aten.gather.default, t, dim, index)
    return {0: em.call(aten.squeeze.dim, out, dim) if gone else out}


RULES: dict[Any, Rule] = {
    aten.max_pool2d_with_indices.default: max_pool(2),
    aten.max_pool3d_with_indices.default: max_pool(3),
    aten.adaptive_max_pool2d.default: max_pool(2),
    aten.adaptive_max_pool3d.default: max_pool(3),
    aten.fractional_max_pool2d.default: max_pool(2),
    aten.fractional_max_pool3d.default: max_pool(3),
    aten.sort.default: pick,
    aten.sort.stable: pick,
    aten.topk.default: pick,
    aten.max.dim: pick,
    aten.min.dim: pick,
    aten.median.dim: pick,
    aten.nanmedian.dim: pick,
    aten.mode.default: pick,
    aten.kthvalue.default: pick,
    aten.cummax.default: pick,
    aten.cummin.default: pick,
}
