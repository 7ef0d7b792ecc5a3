"""Reductions that are not linear.

Each input element belongs to one output element, so the Jacobian's rows do not overlap: the
gradient for a cotangent of ones holds all of it, and ``sum(gradient * tangent)`` is the tangent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import argument, cast, dims_of, fit, output
from grapefx.passes.differentiate.rules.context import Result, Rule, RuleContext
from grapefx.passes.differentiate.rules.derived import derive
from grapefx.passes.differentiate.rules.linear import jointly

aten = torch.ops.aten


def reduction(em: RuleContext, node: Node) -> Result:
    """A reduction over ``dim`` by its gradient."""
    x = node.args[0]
    t = em.t(x)
    if t is None:
        return None
    if t.meta["val"].is_complex() or node.meta["val"].is_complex():
        return derive(em, node)
    dims, keep = dims_of(node), bool(argument(node, "keepdim", False))
    rest, kwargs = em.p((node.args[1:], dict(node.kwargs)))

    def fn(x: Any, t: Any, rest: Any, kwargs: Any) -> Any:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = node.target(leaf, *rest, **kwargs)  # type: ignore[operator]
            (g,) = torch.autograd.grad(out, leaf, torch.ones_like(out), allow_unused=True)
        if g is None:  # counts (the norm of order 0)
            return None
        made = g.to(out.dtype) * t
        return made.sum(dims, keep) if dims else made

    made: Node | None = em.trace(fn, em.p(x), t, list(rest), kwargs, reuse=node)
    return made


def variance(em: RuleContext, node: Node) -> Result:
    """var, std, var_mean: ``2 / (n - c) * sum((x - mean) t)``."""
    x = node.args[0]
    t = em.t(x)
    if t is None:
        return None
    op = node.target
    if t.meta["val"].is_complex():
        return derive(em, node)
    pair = op in (aten.var_mean.correction, aten.std_mean.correction)
    root = op in (aten.std.correction, aten.std_mean.correction)
    dims, keep = dims_of(node), bool(argument(node, "keepdim", False))
    correction = argument(node, "correction")
    c = 1 if correction is None else correction

    def fn(x: Any, t: Any, y: Any) -> Any:
        n = 1
        for d in dims:
            n = n * x.shape[d] if x.ndim else 1
        centred = x - x.mean(dims, True)
        change = (centred * t).sum(dims, keep) / (n - c)
        if not root:
            return change * 2
        return torch.where(y == 0, 0.0, change / y)

    y = (output(em, node, 0) if pair else em.p(node)) if root else None
    made = em.trace(fn, em.p(x), t, y)
    if not pair:
        return fit(em, made, node)
    return {0: made, 1: em.call(aten.mean.dim, t, dims, keep)}


def extremum(em: RuleContext, node: Node) -> Result:
    """amax and amin: the mean over ties, as torch's gradient shares it."""
    return reduction(em, node)


def aminmax(em: RuleContext, node: Node) -> Result:
    """(min, max)."""
    x = node.args[0]
    t = em.t(x)
    if t is None:
        return None
    dim, keep = argument(node, "dim"), bool(argument(node, "keepdim", False))
    dims = [] if dim is None else [dim]

    def fn(x: Any, t: Any) -> Any:
        outs = []
        for op in (torch.amin, torch.amax):
            mask = (x == op(x, dims, True)).to(t.dtype)
            outs.append((t * mask).sum(dims, keep) / mask.sum(dims, keep))
        return tuple(outs)

    made: tuple[Node, Node] = em.trace(fn, em.p(x), t)
    return made


def scatter_reduce(em: RuleContext, node: Node) -> Result:
    """sum and mean are linear; the others are derived (forward AD of prod is wrong in torch)."""
    if argument(node, "reduce") in ("sum", "mean"):
        return jointly("self", "src")(em, node)
    return derive(em, node, forward=argument(node, "reduce") != "prod")


def logsumexp(em: RuleContext, node: Node) -> Result:
    """``sum(softmax * t)``, the softmax from the primal output."""
    x = node.args[0]
    t = em.t(x)
    if t is None:
        return None
    if t.meta["val"].is_complex():
        return derive(em, node)
    dims, keep = dims_of(node), bool(argument(node, "keepdim", False))

    def fn(x: Any, t: Any, y: Any) -> Any:
        if not keep and x.ndim:
            for d in sorted(dims):
                y = y.unsqueeze(d)
        y = torch.where(y.abs() == torch.inf, 0.0, y)  # a row of -inf only
        return ((x - y).exp() * t).sum(dims, keep) if x.ndim else (x - y).exp() * t

    made: Node = em.trace(fn, em.p(x), t, em.p(node))
    return cast(em, made, node.meta["val"].dtype)


RULES: dict[Any, Rule] = {
    aten.var.correction: variance,
    aten.std.correction: variance,
    aten.var_mean.correction: variance,
    aten.std_mean.correction: variance,
    aten.amax.default: extremum,
    aten.amin.default: extremum,
    aten.max.default: reduction,
    aten.min.default: reduction,
    aten.aminmax.default: aminmax,
    aten.prod.default: reduction,
    aten.prod.dim_int: reduction,
    aten.logsumexp.default: logsumexp,
    aten.scatter_reduce.two: scatter_reduce,
    aten.median.default: reduction,
    aten.nanmedian.default: reduction,
}
