"""Holds what several tangent rules need: sums of tangents, primal outputs, zeros, shapes."""

from __future__ import annotations

import operator
from typing import Any, TypeVar

import torch
from torch.fx import Node
from torch.fx.node import Argument

from grapefx.errors import TangentError
from grapefx.passes.differentiate.rules.context import Items, RuleContext
from grapefx.passes.graph.folds import fold_of
from grapefx.passes.graph.source import quoted

aten = torch.ops.aten
N = TypeVar("N", Node, Node | None)


def add(em: RuleContext, *terms: Node | None) -> Node | None:
    """The sum of the terms that are not symbolic zeros; None if all are."""
    out: Node | None = None
    for term in terms:
        if term is not None:
            out = term if out is None else em.call(aten.add.Tensor, out, term)
    return out


def scale(em: RuleContext, t: N, factor: Any) -> N:
    """``t * factor`` without a node for a factor of one."""
    return t if t is None or factor == 1 else em.call(aten.mul.Tensor, t, factor)


def cast(em: RuleContext, t: N, dtype: torch.dtype) -> N:
    """``t`` in another dtype (autocast graphs mix them)."""
    if t is None or t.meta["val"].dtype == dtype:
        return t
    return em.call(aten._to_copy.default, t, dtype=dtype)


def output(em: RuleContext, node: Node, index: int) -> Node:
    """Result ``index`` of a node that returns a tuple, as a primal operand."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return em.p(user)
    with em.after(node):
        item = em.get(node, index)
    if em.rows is not None:
        fold = fold_of(item, em.batch, em.batch_size, em.folds)
        if fold is not None:
            em.folds[item] = fold
    return em.p(item)


def statistic(em: RuleContext, node: Node, index: int) -> Node:
    """Result ``index`` of a node, never cut down: it has no batch."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with em.after(node):
        return em.get(node, index)


def results(em: RuleContext, node: Node, made: Node) -> Items:
    """The items of a tuple-valued tangent that the graph asks for."""
    wanted: set[Any] = {u.args[1] for u in node.users if u.target is operator.getitem}
    return {i: em.get(made, i) for i in sorted(wanted)}


def zeros(em: RuleContext, arg: Node) -> Node:
    """A materialised zero tangent, for operators that need one beside another's."""
    return em.call(aten.zeros_like.default, em.p(arg))


def dense(em: RuleContext, arg: Argument) -> Node | int | None:
    """The tangent of an argument, zeros if it has none; a plain number's is 0."""
    if not isinstance(arg, Node):
        return None if arg is None else 0
    t = em.t(arg)
    return zeros(em, arg) if t is None else t


def zero_scalar(em: RuleContext, like: Node) -> Node:
    """A zero of no dims with the dtype and device of ``like``."""
    val = like.meta["val"]
    return em.call(aten.full.default, [], 0, dtype=val.dtype, device=val.device)


def select(em: RuleContext, mask: Node, t: Node) -> Node:
    """``t`` where ``mask`` holds, zero elsewhere (also where ``t`` is not finite)."""
    return em.call(aten.where.self, mask, t, zero_scalar(em, t))


def size_of(em: RuleContext, node: Node, dim: int) -> Node | int:
    """The size of a dim of ``node``'s tangent, as an int or a node."""
    fold = em.folds.get(node)
    if fold is not None and fold.dim == dim:
        return em.count(fold.outer * fold.inner)
    size = node.meta["val"].shape[dim]
    if not isinstance(size, torch.SymInt):
        return int(size)
    return em.p(em.call(aten.sym_size.int, node, dim))


def size_at(em: RuleContext, node: Node, dim: int) -> Node | int:
    """The size of a dim of ``node`` itself, as an int or a node."""
    size = node.meta["val"].shape[dim]
    return em.call(aten.sym_size.int, node, dim) if isinstance(size, torch.SymInt) else int(size)


def sizes(em: RuleContext, node: Node) -> list[Node | int]:
    """The shape of ``node``'s tangent."""
    return [size_of(em, node, d) for d in range(node.meta["val"].ndim)]


def _one(size: Any) -> bool:
    return not isinstance(size, torch.SymInt) and size == 1


def fit(em: RuleContext, t: Node | None, node: Node) -> Node | None:
    """``t`` with the dtype and the (broadcast) shape of ``node``."""
    return None if t is None else _grow(em, cast(em, t, node.meta["val"].dtype), node)


def fit_first(em: RuleContext, t: Node | None, node: Node) -> Node | None:
    """The same for result 0 of ``node``, which has the shape of its first argument."""
    if t is None:
        return None
    return _grow(em, cast(em, t, node.meta["val"][0].dtype), tensor(node))


def _grow(em: RuleContext, t: Node, node: Node) -> Node:
    want, have = node.meta["val"], t.meta["val"]
    lead = want.ndim - have.ndim
    grown = [d for d in range(have.ndim) if _one(have.shape[d]) and not _one(want.shape[d + lead])]
    if not lead and not grown:
        return t
    keep = {d + lead for d in range(have.ndim)} - {d + lead for d in grown}
    shape = [-1 if d in keep else size_of(em, node, d) for d in range(want.ndim)]
    return em.call(aten.expand.default, t, shape)


def view(em: RuleContext, t: Node, shape: Any) -> Node:
    """A view; a copy first where the tangent's strides do not allow it (the primal's may)."""
    try:
        return em.call(aten.view.default, t, shape)
    except (RuntimeError, ValueError):
        copied = em.call(aten.clone.default, t, memory_format=torch.contiguous_format)
        return em.call(aten.view.default, copied, shape)


def solid(em: RuleContext, t: Node) -> Node:
    """``t`` contiguous: some backward kernels take that for granted (a slice may not be)."""
    if t.meta["val"].is_contiguous():
        return t
    return em.call(aten.clone.default, t, memory_format=torch.contiguous_format)


def tensor(node: Node, index: int = 0) -> Node:
    """An argument that is a tensor."""
    arg = node.args[index]
    assert isinstance(arg, Node), f"{node.name!r} ({node.target}): argument {index} is no tensor"
    return arg


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument by name, however it was passed."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    for i, a in enumerate(schema):
        if a.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if not a.kwarg_only and i < len(node.args):
                return node.args[i]
            return a.default_value if a.has_default_value() else default
    return default


def dims_of(node: Node, name: str = "dim") -> list[int]:
    """The reduced dims of a reduction, non-negative; all of them where none is named."""
    ndim = tensor(node).meta["val"].ndim
    dim = argument(node, name)
    if dim is None or dim == []:
        return list(range(ndim))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return [d % ndim if ndim else 0 for d in dims]


def unmixed(em: RuleContext, node: Node, x: Node, *dims: int) -> None:
    """Check that a sub-batch is not cut out of a dim that ``node`` mixes."""
    fold = em.folds.get(x)
    ndim = x.meta["val"].ndim
    if fold is not None and fold.dim in [d % ndim for d in dims if ndim]:
        raise refuse(
            node,
            f"it mixes dim {fold.dim}, which holds the batch, and tangents are taken on a part",
            "tangent_fraction=1 (or batch_dim=, if the batch is another dim)",
        )


def refuse(node: Node, why: str, remedy: str) -> TangentError:
    """An error that names the operator, the user's line and what to do."""
    return TangentError(
        f"{node.target} (node {node.name!r}) has no forward derivative: {why}{quoted(node)}\n"
        f"  remedy: {remedy}"
    )
