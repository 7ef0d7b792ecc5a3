"""Rules that torch derives: pointwise operators by their gradient, others by forward AD.

``derive`` tries, in this order: forward AD of the operator, the gradient of its gradient, and the
same two on its decomposition. What it handled is reported (``StepGraph.derived``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.autograd.forward_ad as fwAD
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import fit
from grapefx.passes.differentiate.rules.context import Result, Rule, RuleContext
from grapefx.passes.graph import custom_functions as functions
from grapefx.torch_compat import decompositions, pytree


def pointwise(em: RuleContext, node: Node) -> Result:
    """A pointwise operator's Jacobian is diagonal: its gradient applied to the tangent is it."""
    tangents = [em.t(a) for a in node.args]
    which = [i for i, t in enumerate(tangents) if t is not None]
    vals = [node.meta["val"], *(t.meta["val"] for t in tangents if t is not None)]
    real = all(isinstance(v, torch.Tensor) and not v.is_complex() for v in vals)
    if not real or not which or any(em.t(v) for v in node.kwargs.values()):
        return derive(em, node)  # a complex gradient is conjugated, and tuples have several
    args, kwargs = em.p((node.args, dict(node.kwargs)))

    def fn(args: Any, kwargs: Any, ts: Any) -> Any:
        total = None
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        shape = torch.broadcast_shapes(*[a.shape for a in tensors])
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        for i, t in zip(which, ts, strict=True):
            leaf = plain[i] if plain[i].shape == shape else plain[i].expand(shape)
            leaf = leaf.detach().requires_grad_()
            full = [leaf if j == i else a for j, a in enumerate(plain)]
            with torch.enable_grad():
                out = node.target(*full, **kwargs)  # type: ignore[operator]
                if not out.requires_grad:
                    continue
                t = t if t.shape == shape else t.expand(shape)
                (g,) = torch.autograd.grad(out, leaf, t.to(out.dtype), allow_unused=True)
            if g is not None:
                g = g.to(out.dtype)
                total = g if total is None else total + g
        return total

    made = em.trace(fn, list(args), kwargs, [tangents[i] for i in which], reuse=node)
    return fit(em, made, node)


def derive(em: RuleContext, node: Node, forward: bool = True) -> Result:
    """torch's own derivative of this one operator, traced."""
    args, kwargs = em.p((node.args, dict(node.kwargs)))
    flat, spec = pytree.tree_flatten((list(args), dict(kwargs)))
    source, _ = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
    tangents = [em.t(a) for a in source]
    which = [i for i, t in enumerate(tangents) if t is not None]
    ts = [tangents[i] for i in which]
    table = decompositions(node.target)
    failure: Exception | None = None
    for op in (node.target, None):
        if op is None:
            if not table:
                break
            op = _decomposed(node.target, table)
        for way in (_forward, _backward_twice) if forward else (_backward_twice,):
            try:
                made: Result = em.trace(way(op, spec, which), list(flat), ts, reuse=node)
                return made
            except Exception as e:
                failure = failure or e
    assert failure is not None
    raise failure


def function(em: RuleContext, node: Node) -> Result:
    """A custom autograd function: its backward transposed, whatever its forward computes."""
    tensors, key = em.p(cast(Any, node.args))
    tangents = [em.t(a) for a in node.args[0]]  # type: ignore[union-attr]
    which = [i for i, t in enumerate(tangents) if t is not None]

    def op(*xs: Any) -> Any:
        return functions.applied(xs, key)

    _, spec = pytree.tree_flatten((list(tensors), {}))
    made = em.trace(_backward_twice(op, spec, which), list(tensors), [tangents[i] for i in which])
    return dict(enumerate(made))


def _floating(out: Any) -> bool:
    return isinstance(out, torch.Tensor) and (out.is_floating_point() or out.is_complex())


def _forward(op: Any, spec: Any, which: list[int]) -> Callable[..., Any]:
    """Forward AD."""

    def fn(flat: Any, ts: Any) -> Any:
        with fwAD.dual_level(), torch.no_grad():
            leaves = list(flat)
            for i, t in zip(which, ts, strict=True):
                leaves[i] = fwAD.make_dual(leaves[i], t)
            a, k = pytree.tree_unflatten(leaves, spec)
            out = op(*a, **k)

            def tangent(o: Any) -> Any:
                t = fwAD.unpack_dual(o).tangent if _floating(o) else None
                return None if t is None else t.clone()

            made = pytree.tree_map(tangent, out)
            if all(t is None for t in pytree.tree_flatten(made)[0]):
                # zero, or forward AD stopped without saying so
                raise NotImplementedError(f"forward AD of {op} gave no tangent")
            return made

    return fn


def _backward_twice(op: Any, spec: Any, which: list[int]) -> Callable[..., Any]:
    """``J t = d/du <J^T u, t>``: needs a backward that is differentiable itself."""

    def fn(flat: Any, ts: Any) -> Any:
        with torch.enable_grad():
            leaves = [x.detach() if isinstance(x, torch.Tensor) else x for x in flat]
            for i in which:
                leaves[i] = leaves[i].requires_grad_()
            a, k = pytree.tree_unflatten(leaves, spec)
            outs, out_spec = pytree.tree_flatten(op(*a, **k))
            made: list[Any] = [None] * len(outs)
            for j, o in enumerate(outs):
                if not _floating(o) or not o.requires_grad:
                    continue
                u = torch.zeros_like(o).requires_grad_()
                found = torch.autograd.grad(
                    o, [leaves[i] for i in which], u, create_graph=True, allow_unused=True
                )
                pairs = [(g, t) for g, t in zip(found, ts, strict=True) if g is not None]
                if pairs:
                    gs, used = zip(*pairs, strict=True)
                    (made[j],) = torch.autograd.grad(gs, u, used)
            return pytree.tree_unflatten(made, out_spec)

    return fn


def _decomposed(op: Any, table: dict[Any, Any]) -> Callable[..., Any]:
    """The operator by its decomposition."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return table[op](*args, **kwargs)

    return run


RULES: dict[Any, Rule] = {functions.FUNCTION: function}
