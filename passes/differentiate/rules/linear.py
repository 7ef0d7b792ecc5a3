"""Linear operators: the operator itself applied to the tangent."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from grapefx.passes.differentiate.rules.common import (
    add,
    argument,
    cast,
    dense,
    fit,
    refuse,
    results,
    select,
    sizes,
    tensor,
    unmixed,
    view,
    zero_scalar,
)
from grapefx.passes.differentiate.rules.context import Items, Rule, RuleContext

aten = torch.ops.aten


def same(em: RuleContext, node: Node) -> Node | None:
    """The first argument's tangent through the same operator, other arguments as they are."""
    t = em.t(node.args[0])
    if t is None:
        return None
    return em.call(node.target, t, *em.p(node.args[1:]), **em.p(dict(node.kwargs)))


def along(em: RuleContext, node: Node) -> Node | None:
    """Linear and mixing one dim (cumsum, flip, roll)."""
    dims = argument(node, "dim", argument(node, "dims"))
    unmixed(em, node, node, *([dims] if isinstance(dims, int) else dims or []))
    return same(em, node)


def reshape(em: RuleContext, node: Node) -> Node | None:
    """A view of the tangent, which may have other strides than the primal."""
    t = em.t(node.args[0])
    if t is None:
        return None
    return view(em, t, node.args[1] if em.rows is None else sizes(em, node))


def expand(em: RuleContext, node: Node) -> Node | None:
    """Broadcast; on a sub-batch the sizes are the tangent's own."""
    t = em.t(node.args[0])
    if t is None:
        return None
    return em.call(node.target, t, node.args[1] if em.rows is None else sizes(em, node))


def as_strided(em: RuleContext, node: Node) -> Node | None:
    """Only where the tangent lies in memory as the primal does."""
    x = tensor(node)
    t = em.t(x)
    if t is None:
        return None
    have, want = t.meta["val"], x.meta["val"]
    if em.rows is None and have.stride() == want.stride() and not have.storage_offset():
        return em.call(aten.as_strided.default, t, *em.p(node.args[1:]))
    own = node.meta["val"]
    # torch writes as_strided where nothing but the strides changes: the tangent need not follow
    if list(own.shape) == list(want.shape) and all(
        a == b or (isinstance(n, int) and n == 1)
        for n, a, b in zip(own.shape, own.stride(), want.stride(), strict=True)
    ):
        return t
    raise refuse(node, "its input's memory layout is not the tangent's", "use view or permute")


def pieces(em: RuleContext, node: Node) -> Items | None:
    """Operators that return a list of pieces (split, unbind)."""
    made = same(em, node)
    return None if made is None else results(em, node, made)


def join(em: RuleContext, node: Node) -> Node | None:
    """cat and stack: zero tangents are materialised."""
    parts = []
    for a in node.args[0]:  # type: ignore[union-attr]
        t = dense(em, a)
        parts.append(cast(em, t, node.meta["val"].dtype) if isinstance(t, Node) else t)
    return em.call(node.target, parts, *node.args[1:], **dict(node.kwargs))


def jointly(*names: str) -> Rule:
    """Linear in several arguments at once (scatter, index_put): each gets its tangent or zeros."""

    def rule(em: RuleContext, node: Node) -> Node | None:
        args, kwargs = list(em.p(node.args)), em.p(dict(node.kwargs))
        for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            if a.name not in names:
                continue
            if a.name in node.kwargs:
                kwargs[a.name] = dense(em, node.kwargs[a.name])
            elif i < len(args):
                args[i] = dense(em, node.args[i])
        return em.call(node.target, *args, **kwargs)

    return rule


def where(em: RuleContext, node: Node) -> Node | None:
    """The tangent of the side that was taken."""
    mask, a, b = node.args
    dtype = node.meta["val"].dtype
    ta, tb = cast(em, em.t(a), dtype), cast(em, em.t(b), dtype)
    some = ta if ta is not None else tb
    if some is None:
        return None
    zero = zero_scalar(em, some) if ta is None or tb is None else None
    out = em.call(
        aten.where.self, em.p(mask), zero if ta is None else ta, zero if tb is None else tb
    )
    return fit(em, out, node)


def masked_fill(em: RuleContext, node: Node) -> Node | None:
    """Zero where the constant was written (its own tangent, where it is a tensor with one)."""
    x, mask, value = node.args
    t, tv = em.t(x), em.t(value)
    kept = None if t is None else em.call(aten.masked_fill.Scalar, t, em.p(mask), 0)
    filled = None if tv is None else select(em, em.p(tensor(node, 1)), tv)
    return fit(em, add(em, kept, filled), node)


def copy(em: RuleContext, node: Node) -> Node | None:
    """``copy(self, src)`` is src in self's dtype and shape."""
    return fit(em, em.t(node.args[1]), node)


def pad(em: RuleContext, node: Node) -> Node | None:
    """Constant padding has no tangent of its own."""
    t = em.t(node.args[0])
    return None if t is None else em.call(aten.constant_pad_nd.default, t, node.args[1], 0)


def fill_index(em: RuleContext, node: Node) -> Node | None:
    """A constant written at an index (index_fill, scatter with a number)."""
    t = em.t(node.args[0])
    if t is None:
        return None
    args = list(em.p(node.args))
    args[0], args[3] = t, 0
    return em.call(node.target, *args, **em.p(dict(node.kwargs)))


def nansum(em: RuleContext, node: Node) -> Node | None:
    """A NaN counts as the constant 0."""
    x = node.args[0]
    t = em.t(x)
    if t is None:
        return None
    kept = em.call(aten.masked_fill.Scalar, t, em.call(aten.isnan.default, em.p(x)), 0)
    return em.call(node.target, kept, *node.args[1:], **dict(node.kwargs))


def nothing(em: RuleContext, node: Node) -> Node | None:
    """Piecewise constant, random or made from sizes only: no tangent."""
    return None


_SAME = (
    aten.t.default, aten.transpose.int, aten.permute.default, aten.clone.default,
    aten.alias.default, aten.contiguous.default, aten.slice.Tensor, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.diagonal.default, aten.unfold.default, aten.repeat.default,
    aten.tril.default, aten.triu.default,
    aten.trace.default, aten.diag_embed.default, aten.lift_fresh_copy.default,
    aten.mean.default, aten.mean.dim, aten.sum.default, aten.sum.dim_IntList,
    aten._to_copy.default, aten.neg.default,
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_select.default,
    aten.gather.default, aten.take.default, aten.masked_select.default,
    aten.avg_pool2d.default, aten.avg_pool3d.default, aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default,
    aten.upsample_nearest1d.default, aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default, aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default, aten._upsample_nearest_exact3d.default,
    aten.upsample_linear1d.default, aten.upsample_bilinear2d.default,
    aten.upsample_trilinear3d.default, aten.upsample_bicubic2d.default,
    aten._upsample_bilinear2d_aa.default, aten._upsample_bicubic2d_aa.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec,
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default,
    aten.replication_pad1d.default, aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
    aten.native_channel_shuffle.default, aten.im2col.default, aten.col2im.default,
    aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default,
    aten.view_as_real.default, aten.view_as_complex.default, aten._conj.default,
    aten._conj_physical.default, aten.conj_physical.default, aten.real.default, aten.imag.default,
    aten.view_as_real_copy.default, aten.resolve_conj.default, aten.resolve_neg.default,
    aten.alias_copy.default, aten.diagonal_copy.default, aten.narrow_copy.default,
    aten.permute_copy.default, aten.select_copy.int, aten.slice_copy.Tensor,
    aten.squeeze_copy.default, aten.squeeze_copy.dim, aten.t_copy.default,
    aten.transpose_copy.int, aten.unfold_copy.default, aten.unsqueeze_copy.default,
    aten.max_unpool2d.default, aten.max_unpool3d.default,
)  # fmt: skip

_NOTHING = (
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.new_empty.default, aten.new_empty_strided.default,
    aten.rand_like.default, aten.randn_like.default, aten.bernoulli.default, aten.bernoulli.p,
    aten.normal.Tensor_Tensor, aten.normal.Tensor_float, aten.normal.float_Tensor,
    aten.fill.Scalar, aten.zero.default, aten.sign.default, aten.sgn.default, aten.floor.default,
    aten.ceil.default, aten.round.default, aten.round.decimals, aten.trunc.default,
    aten.floor_divide.default, aten.heaviside.default, aten.detach.default, aten.poisson.default,
)  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_NOTHING, nothing),
    **dict.fromkeys(
        (
            aten.view.default, aten._unsafe_view.default, aten.reshape.default,
            aten.view_copy.default,
        ),
        reshape,
    ),
    **dict.fromkeys(
        (aten.cumsum.default, aten.flip.default, aten.roll.default, aten.rot90.default), along
    ),
    aten.expand.default: expand,
    aten.expand_copy.default: expand,
    aten.as_strided.default: as_strided,
    aten.as_strided_.default: as_strided,
    **dict.fromkeys(
        (
            aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
            aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default, aten.chunk.default,
            aten.split_with_sizes_copy.default, aten.unbind_copy.int,
        ),
        pieces,
    ),
    aten.cat.default: join,
    aten.stack.default: join,
    aten.where.self: where,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten.copy.default: copy,
    aten.nansum.default: nansum,
    aten.constant_pad_nd.default: pad,
    aten.index_fill.int_Scalar: fill_index,
    aten.scatter.value: fill_index,
    aten.slice_scatter.default: jointly("self", "src"),
    aten.select_scatter.default: jointly("self", "src"),
    aten.diagonal_scatter.default: jointly("self", "src"),
    aten.as_strided_scatter.default: jointly("self", "src"),
    aten.scatter.src: jointly("self", "src"),
    aten.scatter_add.default: jointly("self", "src"),
    aten.index_put.default: jointly("self", "values"),
    aten._unsafe_index_put.default: jointly("self", "values"),
    aten.index_add.default: jointly("self", "source"),
    aten.index_copy.default: jointly("self", "source"),
    aten.index_fill.int_Tensor: jointly("self", "value"),
    aten.masked_scatter.default: jointly("self", "source"),
    aten.put.default: jointly("self", "source"),
    aten.fill.Tensor: jointly("value"),
    aten.complex.default: jointly("real", "imag"),
}  # fmt: skip
