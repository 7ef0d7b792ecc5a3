"""Where the batch sits in every value of a graph, also when a view has folded it into another dim.

In: a graph whose fake values carry the batch symbol. Out: ``{node: Fold}``. A value without an
entry has no batch, or holds it in a way that this analysis cannot follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Graph, Node

from grapefx.passes.graph.operators import op_name
from grapefx.torch_compat import batch_symbol

_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias"}


@dataclass(frozen=True)
class Fold:
    """The batch N in one dim: its size is ``outer * N * inner``, in that order of strides."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether the dim is the batch and nothing else."""
        return self.outer == 1 and self.inner == 1


def _symbolic_dims(val: torch.Tensor, batch: Any) -> list[tuple[int, int]]:
    """(dim, multiple of the batch) of each dim that depends on the batch; -1: not a multiple."""
    found = []
    for d, size in enumerate(val.shape):
        expr = batch_symbol(size)
        if expr is None or batch not in expr.free_symbols:
            continue
        ratio = expr / batch
        found.append((d, int(ratio) if ratio.is_Integer else -1))
    return found


def batch_folds(graph: Graph, batch: Any, size: int = 0) -> dict[Node, Fold]:
    """The position of the batch in each tensor of ``graph``.

    ``batch`` is its symbol. With None (one fixed batch ``size``) the first dim is taken wherever
    it has that size.
    """
    folds: dict[Node, Fold] = {}
    for node in graph.nodes:
        fold = fold_of(node, batch, size, folds)
        if fold is not None:
            folds[node] = fold
    return folds


def fold_of(node: Node, batch: Any, size: int, folds: dict[Node, Fold]) -> Fold | None:
    """The position of the batch in one value, given those of the values before it."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return None
    if batch is None:
        return Fold(0) if val.ndim and val.shape[0] == size else None
    dims = _symbolic_dims(val, batch)
    if len(dims) != 1 or dims[0][1] < 1:
        return None
    dim, multiple = dims[0]
    if multiple == 1:
        return Fold(dim)
    fold = _through_view(node, val, dim, multiple, folds) or _inherited(node, multiple, folds)
    return None if fold is None else Fold(dim, fold.outer, fold.inner)


def _through_view(
    node: Node, val: torch.Tensor, dim: int, multiple: int, folds: dict[Node, Fold]
) -> Fold | None:
    if node.op != "call_function" or op_name(node) not in _VIEWS:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or source not in folds:
        return None
    before = folds[source]
    shape = source.meta["val"].shape
    stride = before.inner * math.prod(_expression(s) for s in shape[before.dim + 1 :])
    after = math.prod(_expression(s) for s in val.shape[dim + 1 :])
    if after == 0:
        return None
    ratio = sympy.Rational(1, after) * stride if isinstance(after, int) else stride / after
    if not ratio.is_Integer:
        return None
    inner = int(ratio)
    return Fold(dim, multiple // inner, inner) if inner and multiple % inner == 0 else None


def _expression(size: Any) -> Any:
    """A size without asking for its value, which would fix a symbol."""
    expr = batch_symbol(size)
    return int(size) if expr is None else expr


def _inherited(node: Node, multiple: int, folds: dict[Node, Fold]) -> Fold | None:
    for a in node.all_input_nodes:
        fold = folds.get(a)
        if fold is not None and fold.outer * fold.inner == multiple:
            return fold
        if fold is None and isinstance(a.meta.get("val"), (tuple, list)):
            for b in a.all_input_nodes:
                fold = folds.get(b)
                if fold is not None and fold.outer * fold.inner == multiple:
                    return fold
    return None
