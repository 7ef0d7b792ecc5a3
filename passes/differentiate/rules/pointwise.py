"""Pointwise operators by hand: the existing backward operator, with what the graph already has.

A pointwise Jacobian is diagonal, so the operator's backward applied to the tangent is the tangent.
Those not listed here are derived (``derived.pointwise``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import add, argument, fit, select, tensor
from grapefx.passes.differentiate.rules.context import Items, Result, Rule, RuleContext
from grapefx.passes.differentiate.rules.derived import pointwise as derived_pointwise

aten = torch.ops.aten


def unary(fn: Callable[[RuleContext, Node, Node], Result]) -> Rule:
    """A rule from ``fn(em, tangent, node)``; complex values are left to forward AD."""

    def rule(em: RuleContext, node: Node) -> Result:
        t = em.t(node.args[0])
        if t is None:
            return None
        if t.meta["val"].is_complex() or node.meta["val"].is_complex():
            return derived_pointwise(em, node)
        made = fn(em, t, node)
        return fit(em, made, node) if isinstance(made, Node) else made

    return rule


def _x(em: RuleContext, node: Node) -> Node:
    return em.p(tensor(node))


def by_input(op: Any, *names: str) -> Rule:
    """``op(t, x, *arguments)``."""

    def fn(em: RuleContext, t: Node, node: Node) -> Node | None:
        return em.call(op, t, _x(em, node), *[argument(node, n) for n in names])

    return unary(fn)


def by_output(op: Any, *rest: Any) -> Rule:
    """``op(t, y, ...)``: the primal output saves the recomputation."""
    return unary(lambda em, t, node: em.call(op, t, em.p(node), *rest))


def _leaky_relu(em: RuleContext, t: Node, node: Node) -> Node | None:
    slope = argument(node, "negative_slope")
    return em.call(aten.leaky_relu_backward.default, t, _x(em, node), slope, False)


def _elu(em: RuleContext, t: Node, node: Node) -> Node | None:
    alpha, scale = argument(node, "alpha", 1), argument(node, "scale", 1)
    inner = argument(node, "input_scale", 1)
    if node.target is aten.celu.default:
        inner = 1.0 / alpha
    return em.call(aten.elu_backward.default, t, alpha, scale, inner, False, _x(em, node))


def _gelu(em: RuleContext, t: Node, node: Node) -> Node | None:
    kind = argument(node, "approximate")
    return em.call(aten.gelu_backward.default, t, _x(em, node), approximate=kind)


def _threshold(em: RuleContext, t: Node, node: Node) -> Node | None:
    return em.call(aten.threshold_backward.default, t, _x(em, node), argument(node, "threshold"))


def _square(em: RuleContext, t: Node, node: Node) -> Node | None:
    return em.call(aten.mul.Tensor, em.call(aten.mul.Tensor, _x(em, node), 2), t)


def _power(em: RuleContext, t: Node, node: Node) -> Result:
    n = node.args[1]
    if not isinstance(n, (int, float)):
        return derived_pointwise(em, node)
    if n == 0:
        return None
    if n == 1:
        return t
    if n == 2:
        return _square(em, t, node)
    slope = em.call(aten.pow.Tensor_Scalar, _x(em, node), n - 1)
    return em.call(aten.mul.Tensor, em.call(aten.mul.Tensor, slope, n), t)


def _times(fn: Callable[[RuleContext, Node], Node]) -> Rule:
    return unary(lambda em, t, node: em.call(aten.mul.Tensor, t, fn(em, node)))


def _rsqrt(em: RuleContext, node: Node) -> Node:
    cube = em.call(aten.pow.Tensor_Scalar, em.p(node), 3)
    return em.call(aten.mul.Tensor, cube, -0.5)


def _reciprocal(em: RuleContext, node: Node) -> Node:
    y = em.p(node)
    return em.call(aten.neg.default, em.call(aten.mul.Tensor, y, y))


def _sqrt(em: RuleContext, t: Node, node: Node) -> Node | None:
    return em.call(aten.div.Tensor, t, em.call(aten.mul.Tensor, em.p(node), 2))


def _call(op: Any) -> Callable[[RuleContext, Node], Node]:
    return lambda em, node: em.call(op, _x(em, node))


def _log_sigmoid(em: RuleContext, node: Node) -> Items | None:
    """Returns a buffer too, which is empty on some devices."""
    t = em.t(node.args[0])
    if t is None:
        return None
    slope = em.call(aten.sigmoid.default, em.call(aten.neg.default, _x(em, node)))
    return {0: em.call(aten.mul.Tensor, t, slope)}


def _glu(em: RuleContext, t: Node, node: Node) -> Node | None:
    """``a * s``, s = sigmoid(b): ``ta * s + y * (1 - s) * tb``."""
    dim = argument(node, "dim")
    half = node.meta["val"].shape[dim]

    def part(x: Node, k: int) -> Node:
        return em.call(aten.slice.Tensor, x, dim, k * half, (k + 1) * half)

    gate = em.call(aten.sigmoid.default, part(_x(em, node), 1))
    rest = em.call(aten.mul.Tensor, em.p(node), em.call(aten.rsub.Scalar, gate, 1))
    left = em.call(aten.mul.Tensor, part(t, 0), gate)
    return em.call(aten.add.Tensor, left, em.call(aten.mul.Tensor, part(t, 1), rest))


def _prelu(em: RuleContext, node: Node) -> Node | None:
    """Both the input and the slope."""
    x, w = node.args
    tx, tw = em.t(x), em.t(w)
    dead = em.call(aten.le.Scalar, em.p(x), 0)
    left = right = None
    if tx is not None:
        left = em.call(aten.where.self, dead, em.call(aten.mul.Tensor, tx, em.p(w)), tx)
    if tw is not None:
        right = select(em, dead, em.call(aten.mul.Tensor, em.p(x), tw))
    return fit(em, add(em, left, right), node)


RULES: dict[Any, Rule] = {
    aten.relu.default: by_output(aten.threshold_backward.default, 0),
    aten.threshold.default: unary(_threshold),
    aten.sigmoid.default: by_output(aten.sigmoid_backward.default),
    aten.tanh.default: by_output(aten.tanh_backward.default),
    aten.silu.default: by_input(aten.silu_backward.default),
    aten.mish.default: by_input(aten.mish_backward.default),
    aten.hardswish.default: by_input(aten.hardswish_backward.default),
    aten.hardsigmoid.default: by_input(aten.hardsigmoid_backward.default),
    aten.hardtanh.default: by_input(aten.hardtanh_backward.default, "min_val", "max_val"),
    aten.relu6.default: unary(
        lambda em, t, node: em.call(aten.hardtanh_backward.default, t, _x(em, node), 0, 6)
    ),
    aten.softplus.default: by_input(aten.softplus_backward.default, "beta", "threshold"),
    aten.softshrink.default: by_input(aten.softshrink_backward.default, "lambd"),
    aten.hardshrink.default: by_input(aten.hardshrink_backward.default, "lambd"),
    aten.leaky_relu.default: unary(_leaky_relu),
    aten.elu.default: unary(_elu),
    aten.celu.default: unary(_elu),
    aten.gelu.default: unary(_gelu),
    aten.exp.default: _times(lambda em, node: em.p(node)),
    aten.log.default: unary(lambda em, t, node: em.call(aten.div.Tensor, t, _x(em, node))),
    aten.sqrt.default: unary(_sqrt),
    aten.rsqrt.default: _times(_rsqrt),
    aten.reciprocal.default: _times(_reciprocal),
    aten.square.default: unary(_square),
    aten.pow.Tensor_Scalar: unary(_power),
    aten.sin.default: _times(_call(aten.cos.default)),
    aten.cos.default: _times(
        lambda em, node: em.call(aten.neg.default, em.call(aten.sin.default, _x(em, node)))
    ),
    aten.abs.default: _times(_call(aten.sgn.default)),
    aten.glu.default: unary(_glu),
    aten._prelu_kernel.default: _prelu,
    aten.log_sigmoid_forward.default: _log_sigmoid,
}
