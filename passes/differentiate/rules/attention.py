"""Fused attention: the forward stays fused, the tangent recomputes the softmax."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import (
    add,
    argument,
    cast,
    output,
    refuse,
    scale,
    size_at,
    tensor,
    unmixed,
    view,
)
from grapefx.passes.differentiate.rules.context import Items, Rule, RuleContext
from grapefx.passes.graph.operators import FUSED_ATTENTION

aten = torch.ops.aten


def _flat(em: RuleContext, x: Node, heads: Node | int) -> Node:
    """(N, H, T, D) -> (N*H, T, D); grouped keys and values are repeated for their queries."""
    own = x.meta["val"].shape[1]
    t, d = size_at(em, x, 2), size_at(em, x, 3)
    if isinstance(heads, int) and own != heads:
        wide = em.call(aten.unsqueeze.default, x, 2)
        wide = em.call(aten.expand.default, wide, [-1, -1, heads // own, -1, -1])
        x = em.call(aten.clone.default, wide, memory_format=torch.contiguous_format)
    return view(em, x, [-1, t, d])


def _swap(em: RuleContext, x: Node) -> Node:
    return em.call(aten.transpose.int, x, 1, 2)


def _never(em: RuleContext, logits: Node) -> Node:
    """``logits`` with -inf above the diagonal."""
    val = logits.meta["val"]
    shape = [size_at(em, logits, 1), size_at(em, logits, 2)]
    ones = em.call(aten.full.default, shape, True, dtype=torch.bool, device=val.device)
    above = em.call(aten.triu.default, ones, 1)
    return em.call(aten.masked_fill.Scalar, logits, above, -math.inf)


def _weights(em: RuleContext, logits: Node, masked: bool) -> Node:
    p = em.call(aten._softmax.default, logits, -1, False)
    if not masked:
        return p
    # a row without any key: the fused kernels return zeros there
    gone = em.call(aten.eq.Scalar, logits, -math.inf)
    empty = em.call(aten.all.dim, gone, -1, True)
    return em.call(aten.masked_fill.Scalar, p, empty, 0)


def attention(em: RuleContext, node: Node) -> Items | None:
    """All fused kernels: ``(P * dlogits) V - rowsum(P * dlogits) out + P dV``."""
    if argument(node, "dropout_p", 0.0):
        raise refuse(
            node,
            "attention dropout happens inside the fused kernel, and its mask is not in the graph",
            "set the attention's dropout to 0, run the model under "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or use a method without tangents",
        )
    q, k, v = (tensor(node, i) for i in range(3))
    bias = argument(node, "attn_mask", argument(node, "attn_bias"))
    given = argument(node, "scale")
    for a in (q, k, v):
        unmixed(em, node, a, -2)
    val = node.meta["val"][0]
    heads = size_at(em, em.p(q), 1)  # the batch itself where the operands had three dims
    factor = 1.0 / math.sqrt(int(q.meta["val"].shape[-1])) if given is None else given

    def product(a: Node, b: Node) -> Node:
        return em.call(aten.bmm.default, a, b)

    # the scale goes on the small operand, as the fused kernels do
    query = scale(em, _flat(em, em.p(q), heads), factor)
    key = _swap(em, _flat(em, em.p(k), heads))
    value = _flat(em, em.p(v), heads)
    tangents = (em.t(a) for a in (q, k, v))
    tq, tk, tv = (None if t is None else _flat(em, t, heads) for t in tangents)
    rows, cols = size_at(em, query, 1), size_at(em, key, 2)

    logits = product(query, key)
    if argument(node, "is_causal", False):
        logits = _never(em, logits)
    if isinstance(bias, Node):
        logits = view(em, logits, [-1, heads, rows, cols])
        logits = em.call(aten.add.Tensor, logits, em.p(bias))
        logits = view(em, cast(em, logits, val.dtype), [-1, rows, cols])
    p = _weights(em, logits, isinstance(bias, Node))

    change = add(
        em,
        None if tq is None else product(scale(em, tq, factor), key),
        None if tk is None else product(query, _swap(em, tk)),
    )
    weighted = None if change is None else em.call(aten.mul.Tensor, p, change)
    tb = em.t(bias)
    if tb is not None:
        apart = view(em, p, [-1, heads, rows, cols])
        other = em.call(aten.mul.Tensor, apart, cast(em, tb, val.dtype))
        weighted = add(em, weighted, view(em, other, [-1, rows, cols]))
    terms = []
    if weighted is not None:
        out = _flat(em, output(em, node, 0), heads)
        mean = em.call(aten.sum.dim_IntList, weighted, [-1], True)
        along = em.call(aten.mul.Tensor, mean, out)
        terms.append(em.call(aten.sub.Tensor, product(weighted, value), along))
    if tv is not None:
        terms.append(product(p, tv))
    made = add(em, *terms)
    if made is None:
        return None
    return {0: view(em, cast(em, made, val.dtype), [-1, heads, rows, size_at(em, made, 2)])}


RULES: dict[Any, Rule] = {
    getattr(aten, name).default: attention for name in FUSED_ATTENTION if hasattr(aten, name)
}
