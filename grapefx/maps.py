"""Feedback maps: how an error becomes a cotangent at a feedback point.

A map sees everything as rows: the error as (R, C), the value as (R, n), with R = N samples for a
``dense`` map, and R = N x T tokens for a ``token`` map, which one matrix serves (Launay et al.
2020). ``B`` is (C, n), shaped like the Jacobian d yhat / d h_l (docs/method.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grapefx.ir import Layer


@dataclass(frozen=True)
class FeedbackMap:
    """One layer's map. ``kind`` is "dense" or "token"."""

    layer: Layer
    kind: str
    error_dim: int
    value_dim: int
    classes: int | None = None  # the last dim of the output where a row holds several positions

    @property
    def shape(self) -> tuple[int, int]:
        """(C, n): the shape of B."""
        return (self.error_dim, self.value_dim)

    @property
    def tokens(self) -> int | None:
        """Rows of one sample where there is one a token, else None."""
        return self.layer.sample_shape[0] if self.kind == "token" else None

    @property
    def trace_key(self) -> tuple[object, ...]:
        """All that a traced computation depends on (see ``passes.trace_key``)."""
        sizes = (self.error_dim, self.value_dim, self.tokens, self.classes)
        return (self.kind, sizes, self.layer.fold)

    @property
    def bytes(self) -> int:
        """Bytes of one float32 matrix of this shape."""
        return 4 * self.error_dim * self.value_dim

    def value_rows(self, h: Tensor) -> Tensor:
        """A value (or noise, or cotangent) at the feedback point, as rows (R, n)."""
        return to_samples(h, self.layer.fold).reshape(-1, self.value_dim)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``value_rows``, in the shape and dtype of ``like``."""
        fold = self.layer.fold
        shape = to_samples(like, fold).shape
        return from_samples(rows.reshape(shape), fold).to(like.dtype)


@dataclass(frozen=True)
class StateSpec:
    """Something that keeps a state: its key in the state dict, and the shape that ``init`` gets."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ErrorRows:
    """How the cotangents of the error taps become rows (R, C)."""

    kind: str
    folds: tuple[tuple[int, int, int], ...]
    dim: int

    def __call__(self, taps: list[Tensor]) -> Tensor:
        if self.kind == "token":
            return to_samples(taps[0], self.folds[0]).flatten(0, 1)
        rows = [to_samples(t, f).flatten(1) for t, f in zip(taps, self.folds, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def to_samples(x: Tensor, fold: tuple[int, int, int]) -> Tensor:
    """(N, ...) from a value that holds the batch in one of its dims, see ``ir.Layer.fold``."""
    dim, outer, inner = fold
    if outer * inner > 1:
        x = x.unflatten(dim, (outer, -1, inner))
        dim += 1
    x = x.movedim(dim, 0) if dim else x
    return x if x.ndim > 1 else x.unsqueeze(1)


def from_samples(x: Tensor, fold: tuple[int, int, int]) -> Tensor:
    """The inverse of ``to_samples``."""
    dim, outer, inner = fold
    if outer * inner > 1:
        return x.movedim(0, dim + 1).flatten(dim, dim + 2)
    return x.movedim(0, dim) if dim else x


def plan_maps(
    layers: tuple[Layer, ...],
    tap_shapes: list[tuple[int, ...]],
    tap_folds: list[tuple[int, int, int]],
) -> tuple[tuple[FeedbackMap, ...], dict[str, ErrorRows]]:
    """Choose a kind for each layer: one map a token where value and error share the tokens.

    ``tap_shapes`` are the sample shapes of the error taps.
    """
    tokens = tap_shapes[0][0] if len(tap_shapes) == 1 and len(tap_shapes[0]) == 2 else None
    total = sum(math.prod(s) for s in tap_shapes)
    rows = {"dense": ErrorRows("dense", tuple(tap_folds), total)}
    if tokens is not None:
        rows["token"] = ErrorRows("token", tuple(tap_folds), tap_shapes[0][1])
    several = len(tap_shapes) == 1 and len(tap_shapes[0]) > 1
    classes = tap_shapes[0][-1] if several else None
    maps = []
    for layer in layers:
        shape = layer.sample_shape
        if tokens is not None and len(shape) > 1 and shape[0] == tokens:
            kind = "token"
            maps.append(FeedbackMap(layer, kind, rows[kind].dim, math.prod(shape[1:])))
        else:
            maps.append(FeedbackMap(layer, "dense", total, math.prod(shape), classes))
    return tuple(maps), rows
