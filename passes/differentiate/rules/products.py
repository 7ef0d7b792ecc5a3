"""Bilinear operators: the product rule, with nothing for symbolic zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import (
    add,
    argument,
    cast,
    fit,
    refuse,
    scale,
    view,
)
from grapefx.passes.differentiate.rules.context import Items, Rule, RuleContext

aten = torch.ops.aten


def product(i: int = 0, j: int = 1, op: Any = None) -> Rule:
    """Bilinear in arguments ``i`` and ``j``."""

    def rule(em: RuleContext, node: Node) -> Node | None:
        terms = []
        for k in (i, j):
            t = em.t(node.args[k])
            if t is not None:
                args = list(em.p(node.args))
                args[k] = t
                terms.append(em.call(op or node.target, *args, **em.p(dict(node.kwargs))))
        return add(em, *terms)

    return rule


def plus_product(op: Any) -> Rule:
    """``beta * c + alpha * op(a, b)``."""

    def rule(em: RuleContext, node: Node) -> Node | None:
        c, a, b = node.args[:3]
        terms = []
        if em.t(a) is not None:
            terms.append(em.call(op, em.t(a), em.p(b)))
        if em.t(b) is not None:
            terms.append(em.call(op, em.p(a), em.t(b)))
        made = scale(em, add(em, *terms), argument(node, "alpha", 1))
        return fit(em, add(em, made, scale(em, em.t(c), argument(node, "beta", 1))), node)

    return rule


def addbmm(em: RuleContext, node: Node) -> Node | None:
    """``beta * c + alpha * sum_i a_i @ b_i``."""
    c, a, b = node.args[:3]
    terms = []
    if em.t(a) is not None:
        terms.append(em.call(aten.bmm.default, em.t(a), em.p(b)))
    if em.t(b) is not None:
        terms.append(em.call(aten.bmm.default, em.p(a), em.t(b)))
    made = add(em, *terms)
    if made is not None:
        made = em.call(aten.sum.dim_IntList, made, [0])
    made = scale(em, made, argument(node, "alpha", 1))
    return fit(em, add(em, made, scale(em, em.t(c), argument(node, "beta", 1))), node)


def convolution(em: RuleContext, node: Node) -> Node | None:
    """x, weight and bias; also transposed and grouped."""
    x, w, b, *rest = node.args
    terms = []
    if em.t(x) is not None:
        terms.append(em.call(node.target, em.t(x), em.p(w), None, *rest))
    if em.t(w) is not None:
        terms.append(em.call(node.target, em.p(x), em.t(w), None, *rest))
    tb = em.t(b)
    if tb is not None:
        spatial = node.meta["val"].ndim - tb.meta["val"].ndim - 1
        terms.append(view(em, tb, [-1] + [1] * spatial) if spatial else tb)
    return fit(em, add(em, *terms), node)


def linear(em: RuleContext, node: Node) -> Node | None:
    """``x @ w.T + b`` kept whole."""
    x, w = node.args[:2]
    terms = []
    if em.t(x) is not None:
        terms.append(em.call(aten.linear.default, em.t(x), em.p(w)))
    if em.t(w) is not None:
        terms.append(em.call(aten.linear.default, em.p(x), em.t(w)))
    return fit(em, add(em, *terms, em.t(argument(node, "bias"))), node)


def embedding(em: RuleContext, node: Node) -> Node | None:
    """A row lookup: linear in the table."""
    t = em.t(node.args[0])
    return None if t is None else em.call(aten.embedding.default, t, *em.p(node.args[1:]))


def embedding_bag(em: RuleContext, node: Node) -> Items | None:
    """Sums and means of rows: linear in the table, and in the weights of the samples."""
    weights = argument(node, "per_sample_weights")
    if argument(node, "mode") == 2:
        raise refuse(node, "mode 'max'", "use nn.Embedding and amax")
    terms = []
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, arg in (("weight", node.args[0]), ("per_sample_weights", weights)):
        if em.t(arg) is None:
            continue
        args, kwargs = list(em.p(node.args)), em.p(dict(node.kwargs))
        if name in kwargs:
            kwargs[name] = em.t(arg)
        else:
            args[schema.index(name)] = em.t(arg)
        terms.append(em.get(em.call(node.target, *args, **kwargs), 0))
    return {0: add(em, *terms)}


def mul(em: RuleContext, node: Node) -> Node | None:
    """Product rule with broadcasting."""
    a, b = node.args
    ta, tb = em.t(a), em.t(b)
    left = None if ta is None else em.call(aten.mul.Tensor, ta, em.p(b))
    right = None if tb is None else em.call(aten.mul.Tensor, tb, em.p(a))
    return fit(em, add(em, left, right), node)


def div(em: RuleContext, node: Node) -> Node | None:
    """``ta / b - y * tb / b``."""
    a, b = node.args
    if argument(node, "rounding_mode") is not None:
        return None
    ta, tb = em.t(a), em.t(b)
    top = None if tb is None else em.call(aten.mul.Tensor, em.p(node), tb)
    if top is not None:
        top = em.call(aten.neg.default, top) if ta is None else em.call(aten.sub.Tensor, ta, top)
    else:
        top = ta
    return None if top is None else fit(em, em.call(aten.div.Tensor, top, em.p(b)), node)


def addcmul(em: RuleContext, node: Node) -> Node | None:
    """``c + value * a * b``."""
    c, a, b = node.args[:3]
    left = None if em.t(a) is None else em.call(aten.mul.Tensor, em.t(a), em.p(b))
    right = None if em.t(b) is None else em.call(aten.mul.Tensor, em.t(b), em.p(a))
    made = scale(em, add(em, left, right), argument(node, "value", 1))
    return fit(em, add(em, em.t(c), made), node)


def sum_of(em: RuleContext, node: Node) -> Node | None:
    """add and sub, with alpha."""
    a, b = node.args[:2]
    minus = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    return _sum(em, node, em.t(a), em.t(b), minus)


def rsub(em: RuleContext, node: Node) -> Node | None:
    """``b - alpha * a``."""
    a, b = node.args[:2]
    return _sum(em, node, em.t(b), em.t(a), True)


def _sum(em: RuleContext, node: Node, ta: Node | None, tb: Node | None, minus: bool) -> Node | None:
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    dtype = node.meta["val"].dtype
    if tb is None:
        return fit(em, ta, node)
    extra = {} if alpha == 1 else {"alpha": alpha}
    if ta is not None:
        op = aten.sub.Tensor if minus else aten.add.Tensor
        return fit(em, em.call(op, ta, tb, **extra), node)
    tb = scale(em, cast(em, tb, dtype), alpha)
    return fit(em, em.call(aten.neg.default, tb) if minus else tb, node)


RULES: dict[Any, Rule] = {
    aten.mm.default: product(),
    aten.bmm.default: product(),
    aten.mv.default: product(),
    aten.dot.default: product(),
    aten.vdot.default: product(),
    aten.matmul.default: product(),
    aten.linalg_cross.default: product(),
    aten.addmm.default: plus_product(aten.mm.default),
    aten._sparse_addmm.default: plus_product(aten.mm.default),
    aten.baddbmm.default: plus_product(aten.bmm.default),
    aten.addmv.default: plus_product(aten.mv.default),
    aten.addr.default: plus_product(aten.outer.default),
    aten.addbmm.default: addbmm,
    aten.convolution.default: convolution,
    aten.linear.default: linear,
    aten.embedding.default: embedding,
    aten._embedding_bag.default: embedding_bag,
    aten._embedding_bag_forward_only.default: embedding_bag,
    aten.mul.Tensor: mul,
    aten.mul.Scalar: mul,
    aten.div.Tensor: div,
    aten.div.Scalar: div,
    aten.div.Tensor_mode: div,
    aten.addcmul.default: addcmul,
    aten.add.Tensor: sum_of,
    aten.add.Scalar: sum_of,
    aten.sub.Tensor: sum_of,
    aten.sub.Scalar: sum_of,
    aten.rsub.Tensor: rsub,
    aten.rsub.Scalar: rsub,
}
