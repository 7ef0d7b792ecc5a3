"""Feedback maps: how an error becomes a cotangent at a feedback point.

A map sees everything as rows: the error as (R, C), the value as (R, n), with R = N samples, or
R = N x T tokens where one matrix serves all tokens (Launay et al. 2020). ``B`` is (C, n), shaped
like the Jacobian d yhat / d h_l (docs/method.md). What makes a map smaller changes the rows alone,
so that every method works on them as they are:

- pooled: n entries stand for blocks of the value, whose cotangent is constant (channel-shared where
  the block is the whole plane). The mean over a block of J^'s columns is its projection onto that.
- low-rank: the error is projected on r fixed random directions P (signs / sqrt r; C becomes r), so
  the dense map is P B with B (r, n).
- sparse: the columns fall into G groups, each of which reads a seeded C / G of the error's entries.
- seeded: a fixed B is computed anew in every step and never stored.

Which kind a layer gets is decided in ``choice.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grapefx.ir import Layer
from grapefx.maps.seeded import signs
from grapefx.methods.base import Rows, State


@dataclass(frozen=True)
class FeedbackMap:
    """One layer's map.

    ``rows``: "dense" (a row a sample) or "token" (a row a token), the key of its ``ErrorRows``.
    ``error_dim``: C as the method sees it. ``pool``: the block's size in each dim of the sample.
    ``groups``: G. ``seed``: of a B that is never stored.
    """

    layer: Layer
    rows: str
    error_dim: int
    value_dim: int
    classes: int | None = None  # the last dim of the output where a row holds several positions
    pool: tuple[int, ...] = ()
    rank: int | None = None
    groups: int = 1
    seed: int | None = None

    @property
    def kind(self) -> str:
        """What a reader is told, "dense" or "token" and what makes it smaller."""
        parts = [] if self.rows == "dense" else [self.rows]
        if self.pool:
            sizes = zip(self.layer.sample_shape, self.pool, strict=True)
            parts.append("pooled " + "x".join(str(s // b) for s, b in sizes))
        if self.rank is not None:
            parts.append(f"low-rank {self.rank}")
        if self.groups > 1:
            parts.append(f"sparse 1/{self.groups}")
        if self.seed is not None:
            parts.append("seeded")
        return ", ".join(parts) or "dense"

    def reading(self, seed: int) -> str:
        """The random parts that B stands behind: with others it is another map."""
        parts = [f"low-rank {self.rank}"] if self.rank is not None else []
        parts += [f"sparse 1/{self.groups}"] if self.groups > 1 else []
        return ", ".join([*parts, f"seed {seed}"]) if parts else ""

    @property
    def shape(self) -> tuple[int, int]:
        """(C, n): the shape of B; C / G rows in a sparse map."""
        return (-(-self.error_dim // self.groups), self.value_dim)

    @property
    def tokens(self) -> int | None:
        """Rows of one sample where there is one a token, else None."""
        return self.layer.sample_shape[0] if self.rows == "token" else None

    @property
    def trace_key(self) -> tuple[object, ...]:
        """All that a traced computation depends on (see ``passes/graph/trace_key.py``)."""
        sizes = (self.error_dim, self.value_dim, self.tokens, self.classes)
        offset = self.layer.index if self.groups > 1 else 0
        return (self.rows, sizes, self.layer.fold, self.pool, self.groups, offset, self.seed)

    @property
    def bytes(self) -> int:
        """Bytes of one float32 matrix of this shape; 0 if it is never stored."""
        return 0 if self.seed is not None else 4 * math.prod(self.shape)

    # values

    def value_rows(self, h: Tensor) -> Tensor:
        """A value (or noise, or cotangent) at the feedback point, as rows (R, n)."""
        x = to_samples(h, self.layer.fold)
        within = []
        for done, (dim, block) in enumerate(self._blocks()):
            x = x.unflatten(dim + done, (-1, block))
            within.append(dim + done + 1)
        # one mean: Inductor writes a short one out, and two nested ones as their product
        x = x.mean(within) if within else x
        return x.reshape(-1, self.value_dim)

    def from_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        """Back from rows (a block's entries are equal), in the shape and dtype of ``like``."""
        fold = self.layer.fold
        shape = to_samples(like, fold).shape
        blocks = dict(self._blocks())
        small = [s if d not in blocks else s // blocks[d] for d, s in enumerate(shape)]
        x = rows.reshape(small)
        for dim, block in blocks.items():
            x = x.unsqueeze(dim + 1).expand(*x.shape[: dim + 1], block, *x.shape[dim + 1 :])
            x = x.flatten(dim, dim + 1)
        return from_samples(x, fold).to(like.dtype)

    def _blocks(self) -> list[tuple[int, int]]:
        return [(d + 1, b) for d, b in enumerate(self.pool) if b > 1]

    # groups

    def columns(self, g: int) -> slice:
        """The columns of a group."""
        n = self.value_dim
        return slice(g * n // self.groups, (g + 1) * n // self.groups)

    def pick(self, e: Tensor, g: int) -> Tensor:
        """The error's entries that a group reads: an affine permutation of them, cut in G parts."""
        if self.groups == 1:
            return e
        c, own = self.error_dim, self.shape[0]
        step = next(a for a in range(int(0.618 * c) | 1, 2 * c + 3) if math.gcd(a, c) == 1)
        places = torch.arange(g * own, (g + 1) * own, device=e.device)
        return e.index_select(1, (places * step + self.layer.index) % c)

    def outer(self, e: Tensor, x: Tensor) -> Tensor:
        """e^T x as this map keeps it: (C, n)."""
        if self.groups == 1:
            return e.t() @ x
        parts = [self.pick(e, g).t() @ x[:, self.columns(g)] for g in range(self.groups)]
        return torch.cat(parts, 1)

    def part(self, rows: Rows, g: int) -> Rows:
        """What a method reads of one group."""
        cut = self.columns(g)
        wide = {k: getattr(rows, k) for k in ("error", "target", "output", "tangent")}
        own = {k: getattr(rows, k) for k in ("incoming", "value", "noise", "estimate")}
        fields: dict[str, Any] = {
            **{k: None if t is None else self.pick(t, g) for k, t in wide.items()},
            **{k: None if t is None else t[:, cut] for k, t in own.items()},
        }
        return replace(rows, state=self.state_part(rows.state, g), **fields)

    def state_part(self, state: State, g: int) -> State:
        """A group's columns of a state."""
        cut, n = self.columns(g), self.value_dim
        return {k: t[..., cut] if t.shape[-1] == n else t for k, t in state.items()}

    def cotangent(self, method: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
        """``method`` on every group, (R, n)."""
        if self.groups == 1:
            return method(rows)
        return torch.cat([method(self.part(rows, g)) for g in range(self.groups)], 1)

    def learned(self, method: Callable[[Rows], State], rows: Rows) -> State:
        """``method`` on every group, and the state put together again."""
        if self.groups == 1:
            return method(rows)
        return self.joined([method(self.part(rows, g)) for g in range(self.groups)], rows.state)

    def joined(self, parts: list[State], like: State) -> State:
        """The state of all groups."""
        n = self.value_dim
        return {
            k: torch.cat([p[k] for p in parts], -1) if t.shape[-1] == n else parts[0][k]
            for k, t in like.items()
        }


@dataclass(frozen=True)
class StateSpec:
    """Something that keeps a state: its key in the state dict, and the shape that ``init`` gets.

    ``reading``: what else gives the state its meaning, see ``FeedbackMap.reading``. ``memory``:
    tensors beside the method's, by name and shape, which start at zero.
    """

    key: str
    shape: tuple[int, ...]
    reading: str = ""
    memory: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class ErrorRows:
    """How the cotangents of the error taps become rows (R, C); with ``rank``, C random sums."""

    kind: str
    folds: tuple[tuple[int, int, int], ...]
    dim: int
    rank: int | None = None
    seed: int = 0

    def __call__(self, taps: list[Tensor]) -> Tensor:
        if self.kind == "token":
            e = to_samples(taps[0], self.folds[0]).flatten(0, 1)
        else:
            rows = [to_samples(t, f).flatten(1) for t, f in zip(taps, self.folds, strict=True)]
            e = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        if self.rank is None:
            return e
        drawn = signs((self.dim, self.rank), self.seed, e.device, e.dtype)
        return e @ (drawn * float(self.rank**-0.5))


def to_samples(x: Tensor, fold: tuple[int, int, int]) -> Tensor:
    """(N, ...) from a value that holds the batch in one of its dims, see ``ir.Layer.fold``.

    What shares that dim with the batch comes next to it, as one dim: (N, outer * inner, ...).
    """
    dim, outer, inner = fold
    if outer * inner > 1:
        apart: Tensor = x.unflatten(dim, (outer, -1, inner))
        return apart.movedim(_folded(dim), (0, 1, 2)).flatten(1, 2)
    x = x.movedim(dim, 0) if dim else x
    return x if x.ndim > 1 else x.unsqueeze(1)


def from_samples(x: Tensor, fold: tuple[int, int, int]) -> Tensor:
    """The inverse of ``to_samples``."""
    dim, outer, inner = fold
    if outer * inner > 1:
        x = x.unflatten(1, (outer, inner)).movedim((0, 1, 2), _folded(dim))
        return x.flatten(dim, dim + 2)
    return x.movedim(0, dim) if dim else x


def _folded(dim: int) -> tuple[int, int, int]:
    """Where batch, outer and inner are when the dim that holds them is taken apart."""
    return (dim + 1, dim, dim + 2)


def plain_maps(
    layers: tuple[Layer, ...],
    tap_shapes: list[tuple[int, ...]],
    tap_folds: list[tuple[int, int, int]],
) -> tuple[tuple[FeedbackMap, ...], dict[str, ErrorRows]]:
    """Full maps: one a token where value and error share the tokens, else dense.

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
            maps.append(FeedbackMap(layer, "token", rows["token"].dim, math.prod(shape[1:])))
        else:
            maps.append(FeedbackMap(layer, "dense", total, math.prod(shape), classes))
    return tuple(maps), rows
