"""Normalisations and softmax: their x-part has a symmetric Jacobian, so it is its own backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from grapefx.passes.differentiate.rules.common import (
    add,
    argument,
    cast,
    fit,
    fit_first,
    output,
    refuse,
    scale,
    size_of,
    solid,
    statistic,
    tensor,
    unmixed,
    view,
)
from grapefx.passes.differentiate.rules.context import Items, Result, Rule, RuleContext
from grapefx.passes.differentiate.rules.reductions import reduction

aten = torch.ops.aten
_ONLY_X = [True, False, False]


def _affine(
    em: RuleContext,
    core: Node | None,
    xhat: Callable[[], Node],
    w: Argument,
    b: Argument,
    shape: list[int] | None,
) -> Node | None:
    """``w * core + tw * xhat + tb``, ``core`` being the tangent of xhat.

    ``shape`` is the view of weight and bias that broadcasts with x; None where they do as they are.
    """

    def shaped(v: Node) -> Node:
        return v if shape is None else view(em, v, shape)

    terms = [core]
    if core is not None and isinstance(w, Node):
        terms = [em.call(aten.mul.Tensor, core, shaped(em.p(w)))]
    tw, tb = em.t(w), em.t(b)
    if tw is not None:
        terms.append(em.call(aten.mul.Tensor, xhat(), shaped(tw)))
    if tb is not None:
        terms.append(shaped(tb))
    return add(em, *terms)


def _finish(em: RuleContext, node: Node, t: Node | None) -> Items | None:
    return None if t is None else {0: fit_first(em, t, node)}


def _xhat(em: RuleContext, x: Argument, mean: Node, rstd: Node) -> Node:
    return em.call(aten.mul.Tensor, em.call(aten.sub.Tensor, em.p(x), mean), rstd)


def layer_norm(em: RuleContext, node: Node) -> Items | None:
    """native_layer_norm: (out, mean, rstd)."""
    x, shape, w, b = node.args[:4]
    t = em.t(x)
    mean, rstd = output(em, node, 1), output(em, node, 2)
    core = None
    if t is not None:
        core = em.get(
            em.call(
                aten.native_layer_norm_backward.default,
                t, em.p(x), shape, solid(em, mean), solid(em, rstd), None, None, _ONLY_X,
            ),
            0,
        )  # fmt: skip
    return _finish(em, node, _affine(em, core, lambda: _xhat(em, x, mean, rstd), w, b, None))


def group_norm(em: RuleContext, node: Node) -> Items | None:
    """native_group_norm: (out, mean, rstd), statistics (N, groups)."""
    w, b, _, channels, spatial, groups = node.args[1:7]
    x = tensor(node)
    t = em.t(x)
    mean, rstd = output(em, node, 1), output(em, node, 2)
    val = x.meta["val"]
    n = size_of(em, x, 0)
    core = None
    if t is not None:
        core = em.get(
            em.call(
                aten.native_group_norm_backward.default,
                solid(em, t), solid(em, em.p(x)), solid(em, mean), solid(em, rstd), None,
                n, channels, em.p(spatial), groups, _ONLY_X,
            ),
            0,
        )  # fmt: skip
    per_channel = [1, -1] + [1] * (val.ndim - 2)

    def xhat() -> Node:
        apart = view(em, em.p(x), [n, groups, -1])
        centred = _xhat_of(em, apart, mean, rstd)
        return view(em, centred, [n, *[int(s) for s in val.shape[1:]]])

    return _finish(em, node, _affine(em, core, xhat, w, b, per_channel))


def _xhat_of(em: RuleContext, x: Node, mean: Node, rstd: Node) -> Node:
    centred = em.call(aten.sub.Tensor, x, em.call(aten.unsqueeze.default, mean, -1))
    return em.call(aten.mul.Tensor, centred, em.call(aten.unsqueeze.default, rstd, -1))


def rms_norm(em: RuleContext, node: Node) -> Items | None:
    """_fused_rms_norm: (out, rstd)."""
    x, shape, w = node.args[:3]
    t = em.t(x)
    rstd = output(em, node, 1)
    xhat = em.call(aten.mul.Tensor, em.p(x), rstd)
    core = None
    if t is not None:
        dims = list(range(-len(shape), 0))  # type: ignore[arg-type]
        inner = em.call(aten.mean.dim, em.call(aten.mul.Tensor, xhat, t), dims, True)
        along = em.call(aten.mul.Tensor, xhat, inner)
        core = em.call(aten.mul.Tensor, em.call(aten.sub.Tensor, t, along), rstd)
    return _finish(em, node, _affine(em, core, lambda: xhat, w, None, None))


def batch_norm(em: RuleContext, node: Node) -> Items | None:
    """Every batch norm: (out, save_mean, save_invstd, ...).

    In training the statistics are frozen (``batch_stats="frozen"``): each sample's tangent is then
    its own, which a tangent on a sub-batch needs. ``"full"`` differentiates them too.
    """
    x = tensor(node)
    w, b = node.args[1:3]
    mean, var = argument(node, "running_mean"), argument(node, "running_var")
    eps = argument(node, "eps", argument(node, "epsilon"))
    if node.target in _NO_TRAINING:
        training = False
    elif node.target in _ALWAYS_TRAINING:
        training = True
    else:
        training = bool(argument(node, "training", argument(node, "train")))
    t = em.t(x)
    if training:
        mean, invstd = statistic(em, node, 1), statistic(em, node, 2)
    else:
        for s in (mean, var):
            if em.t(s) is not None:
                raise refuse(node, "its running statistics have a tangent", "detach them")
        invstd = em.call(aten.rsqrt.default, em.call(aten.add.Scalar, var, eps))
    val = x.meta["val"]
    shape = [-1] + [1] * (val.ndim - 2)

    def shaped(v: Node) -> Node:
        return view(em, v, shape) if val.ndim > 2 else v

    core = None
    if t is not None and training and em.batch_stats == "full":
        if em.rows is not None:
            raise refuse(node, "full batch statistics on a sub-batch", 'batch_stats="frozen"')
        core = em.get(
            em.call(
                aten.native_batch_norm_backward.default,
                _laid_out_as(em, t, em.p(x)), em.p(x), None, None, None, mean, invstd, True, eps,
                _ONLY_X,
            ),
            0,
        )  # fmt: skip
    elif t is not None:
        slope = invstd if w is None else em.call(aten.mul.Tensor, invstd, w)
        core = em.call(aten.mul.Tensor, t, shaped(slope))

    def xhat() -> Node:
        return _xhat(em, x, shaped(mean), shaped(invstd))

    if training and em.batch_stats == "full":
        return _finish(em, node, _affine(em, core, xhat, w, b, shape))
    tw, tb = em.t(w), em.t(b)
    terms = [core]
    if tw is not None:
        terms.append(em.call(aten.mul.Tensor, xhat(), shaped(tw)))
    if tb is not None:
        terms.append(shaped(tb))
    return _finish(em, node, add(em, *terms))


def _laid_out_as(em: RuleContext, t: Node, x: Node) -> Node:
    """``t`` in x's memory order: the kernel's result has x's, its fake value says t's."""
    order = torch.contiguous_format
    for ndim, last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.meta["val"].ndim == ndim and x.meta["val"].is_contiguous(memory_format=last):
            order = last
    if t.meta["val"].is_contiguous(memory_format=order):
        return t
    return em.call(aten.clone.default, t, memory_format=order)


def softmax(em: RuleContext, node: Node) -> Node | None:
    """Softmax's Jacobian is symmetric: its backward with the primal output."""
    t = em.t(node.args[0])
    if t is None:
        return None
    t = cast(em, t, node.meta["val"].dtype)
    dim = argument(node, "dim")
    unmixed(em, node, node, dim)
    return em.call(aten._softmax_backward_data.default, t, em.p(node), dim, node.meta["val"].dtype)


def log_softmax(em: RuleContext, node: Node) -> Node | None:
    """``t - sum(softmax * t)``."""
    t = em.t(node.args[0])
    if t is None:
        return None
    t = cast(em, t, node.meta["val"].dtype)
    unmixed(em, node, node, node.args[1])  # type: ignore[arg-type]
    weighted = em.call(aten.mul.Tensor, em.call(aten.exp.default, em.p(node)), t)
    mean = em.call(aten.sum.dim_IntList, weighted, [node.args[1]], True)
    return em.call(aten.sub.Tensor, t, mean)


def dropout(em: RuleContext, node: Node) -> Items | None:
    """native_dropout: (out, mask); the mask in the graph, never drawn again."""
    x, p, train = node.args
    t = em.t(x)
    if t is None:
        return None
    if train is False or p == 0:
        return {0: t}
    mask = output(em, node, 1)
    keep = 1.0 - float(p)  # type: ignore[arg-type]
    kept = em.call(aten.mul.Tensor, t, mask)
    return {0: scale(em, kept, 1.0 / keep if keep else 0.0)}


def rrelu(em: RuleContext, node: Node) -> Items | None:
    """rrelu_with_noise_functional: (out, noise); the slopes drawn are in the noise."""
    t = em.t(node.args[0])
    if t is None:
        return None
    x = em.p(node.args[0])
    lower, upper = argument(node, "lower"), argument(node, "upper")
    training = argument(node, "training")
    noise = output(em, node, 1) if training else em.p(node.args[1])
    made = em.call(
        aten.rrelu_with_noise_backward.default, t, x, noise, lower, upper, training, False
    )
    return {0: made}


def vector_norm(em: RuleContext, node: Node) -> Result:
    """The Euclidean norm: ``sum(x t) / norm``, 0 where the norm is; other orders are derived."""
    order = argument(node, "ord", argument(node, "p", 2))
    t = em.t(node.args[0])
    if t is None:
        return None
    if order is None:
        order = 2
    if (
        not isinstance(order, (int, float))
        or not math.isclose(order, 2)
        or argument(node, "dtype")
        or t.meta["val"].is_complex()
    ):
        return reduction(em, node)
    dim, keep = argument(node, "dim"), argument(node, "keepdim", False)
    product = em.call(aten.mul.Tensor, em.p(node.args[0]), t)
    if dim is None:
        dots = em.call(aten.sum.dim_IntList, product, None, keep)
    else:
        dots = em.call(aten.sum.dim_IntList, product, [dim] if isinstance(dim, int) else dim, keep)
    y = em.p(node)
    dead = em.call(aten.eq.Scalar, y, 0)
    ratio = em.call(aten.div.Tensor, dots, y)
    return fit(em, em.call(aten.masked_fill.Scalar, ratio, dead, 0), node)


def _ops(*names: str) -> list[Any]:
    """Overloads that this torch has."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet, None), overload or "default", None)
        if op is not None:
            found.append(op)
    return found


_NO_TRAINING = set(_ops("_native_batch_norm_legit_no_training", "_batch_norm_no_update"))
_ALWAYS_TRAINING = set(_ops("_batch_norm_with_update", "_batch_norm_with_update_functional"))
_BATCH_NORMS = [
    *_NO_TRAINING,
    *_ALWAYS_TRAINING,
    *_ops(
        "_native_batch_norm_legit_functional",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit.no_stats",
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
    ),
]

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    **dict.fromkeys(_ops("native_layer_norm"), layer_norm),
    **dict.fromkeys(_ops("native_group_norm"), group_norm),
    **dict.fromkeys(_ops("_fused_rms_norm"), rms_norm),
    **dict.fromkeys(_ops("_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(_ops("_log_softmax"), log_softmax),
    **dict.fromkeys(_ops("native_dropout"), dropout),
    **dict.fromkeys(_ops("rrelu_with_noise_functional"), rrelu),
    **dict.fromkeys(_ops("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar"), vector_norm),
}
