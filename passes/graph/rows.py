"""The first n of a batch's N samples, or n that an index names: values and sizes cut down to them.

``RowEmitter`` adds nodes that compute with those samples alone. ``passes/graph/folds.py`` tells
where the batch sits in a value.
"""

from __future__ import annotations

import operator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from grapefx.errors import GrapefxError
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.folds import Fold, batch_folds
from grapefx.passes.graph.order import descendants
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import batch_symbol

aten = torch.ops.aten
T = TypeVar("T")


class RowEmitter(Emitter):
    """Emits nodes whose operands are the first ``rows`` samples; all samples where it is None.

    ``index``: the numbers of the samples in place of the first ones, once the graph has them.

    ``data``: with one fixed batch size (``batch`` is None), the inputs that carry the batch.
    """

    option = "a part of the batch"  # in messages: what asks for it, and how to go without
    remedy = "the whole batch"
    error: type[GrapefxError] = GrapefxError

    def __init__(
        self,
        graph: Graph,
        batch: Any,
        size: int,
        rows: Node | None,
        data: list[Node],
        **labels: Any,
    ) -> None:
        super().__init__(graph, **labels)
        self.batch = batch
        self.batch_size = size
        self.rows = rows
        self.index: Node | None = None
        self.folds = batch_folds(graph, batch, size) if rows is not None else {}
        self.data: set[Node] = set()
        if batch is None:  # a size alone tells a batch only where the value comes from an input
            self.data = descendants(data)
            self.folds = {n: f for n, f in self.folds.items() if n in self.data}
        self.counts: dict[int, Node] = {}
        self.sliced: dict[Node, Node] = {}

    def p(self, tree: T) -> T:
        """Primal operands: nodes cut down to the samples in question, the rest as it is."""
        if self.rows is None:
            return tree
        return cast(T, torch.fx.node.map_arg(cast(Any, tree), self._primal))

    def _primal(self, node: Node) -> Any:
        if node in self.sliced:
            return self.sliced[node]
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            out = self._slice(node, val)
        elif isinstance(val, torch.SymInt):
            out = self._size(node, val)
        else:
            out = node
        self.sliced[node] = out
        return out

    def depends(self, node: Node, val: torch.Tensor) -> bool:
        """Whether the size of a value depends on the batch's."""
        if self.batch is None:
            return node in self.data
        exprs = [batch_symbol(s) for s in val.shape]
        return any(e is not None and self.batch in e.free_symbols for e in exprs)

    def refused(self, node: Node, what: str) -> GrapefxError:
        """The error to raise at a node that cannot be followed.

        A backward node may have no line of its own: then that of what it reads.
        """
        lines = filter(None, map(quoted, [node, *node.all_input_nodes]))
        return self.error(f"{self.option} {what}{next(lines, '')}\n  remedy: {self.remedy}")

    def _slice(self, node: Node, val: torch.Tensor) -> Node:
        fold = self.folds.get(node)
        if fold is None:
            if self.depends(node, val):
                raise self.refused(
                    node,
                    f"cannot follow the batch through {node.name!r} ({node.target}), whose shape "
                    f"is {tuple(val.shape)}",
                )
            return node
        if self.index is not None:
            return self.take(node, fold)
        # a slice is cheap; placing it beside its source keeps it in front of every use
        assert self.rows is not None
        with self.after(self.rows if node.op == "placeholder" else node):
            return self.take(node, fold)

    def take(self, node: Node, fold: Fold) -> Node:
        """The samples in question of a value."""
        assert self.rows is not None
        if self.index is None:
            return _take_first(self, node, fold, self.rows)
        part: Node = self.trace(lambda x, i: _taken(x, i, fold), node, self.index)
        return part

    def put(self, node: Node, fold: Fold, part: Node) -> Node:
        """A value in which the samples in question are those of ``part``."""
        assert self.rows is not None
        if self.index is None:
            return _put_first(self, node, fold, self.rows, part)
        whole: Node = self.trace(lambda x, i, p: _put(x, i, p, fold), node, self.index, part)
        return whole

    def _size(self, node: Node, val: torch.SymInt) -> Any:
        expr = batch_symbol(val)
        if self.batch is None or expr is None or self.batch not in expr.free_symbols:
            return node
        multiple = expr / self.batch
        if multiple.is_Integer:
            return self.count(int(multiple))
        if not isinstance(node.target, torch._ops.OpOverload) and node.op == "call_function":
            args = tuple(self._primal(a) if isinstance(a, Node) else a for a in node.args)
            with self.after(node):
                return self.call(node.target, *args, **node.kwargs)
        raise self.refused(node, f"cannot follow the size {node.name!r} ({expr})")

    def count(self, multiple: int) -> Node:
        """``multiple`` times the size of the sub-batch."""
        assert self.rows is not None
        if multiple == 1:
            return self.rows
        if multiple not in self.counts:
            with self.after(self.rows):
                self.counts[multiple] = self.call(operator.mul, self.rows, multiple)
        return self.counts[multiple]

    def operand(self, tree: Any) -> Any:
        """Primal operands, for ``trace``."""
        return self.p(tree)


def _scaled(em: Emitter, rows: Any, factor: int) -> Any:
    """``rows * factor`` as a node (or the node itself)."""
    return rows if factor == 1 else em.call(operator.mul, rows, factor)


def _take_first(em: Emitter, node: Node, fold: Fold, rows: Any) -> Node:
    """The first ``rows`` samples of a value."""
    end = _scaled(em, rows, fold.inner)
    if fold.outer == 1:
        return em.call(aten.slice.Tensor, node, fold.dim, 0, end)
    wide, shape = _apart(em, node, fold)
    part = em.call(aten.slice.Tensor, wide, fold.dim + 1, 0, end)
    solid = em.call(aten.clone.default, part, memory_format=torch.contiguous_format)
    return em.call(aten.view.default, solid, shape)


def _put_first(em: Emitter, node: Node, fold: Fold, rows: Any, first: Node) -> Node:
    """A value whose first ``rows`` samples are ``first``, the others its own."""
    end = _scaled(em, rows, fold.inner)
    if fold.outer == 1:
        return em.call(aten.slice_scatter.default, node, first, fold.dim, 0, end)
    solid = em.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    wide, shape = _apart(em, solid, fold)
    part, _ = _apart(em, first, fold)
    made = em.call(aten.slice_scatter.default, wide, part, fold.dim + 1, 0, end)
    return em.call(aten.view.default, made, shape)


def _apart(em: Emitter, node: Node, fold: Fold) -> tuple[Node, list[int]]:
    """A value whose batch dim is two dims, ``outer`` in front; and the shape to go back to."""
    shape = [int(s) if not isinstance(s, torch.SymInt) else -1 for s in node.meta["val"].shape]
    apart = [*shape[: fold.dim], fold.outer, -1, *shape[fold.dim + 1 :]]
    return em.call(aten.view.default, node, apart), shape


def samples_apart(x: Tensor, fold: Fold) -> Tensor:
    """A value with the batch as a dim of its own, ``fold.dim + 1``: ``outer``, N, ``inner``."""
    d = fold.dim
    return x.reshape(*x.shape[:d], fold.outer, -1, fold.inner, *x.shape[d + 1 :])


def _taken(x: Tensor, index: Tensor, fold: Fold) -> Tensor:
    if fold.plain:
        return x.index_select(fold.dim, index)
    part = samples_apart(x, fold).index_select(fold.dim + 1, index)
    return part.reshape(*x.shape[: fold.dim], -1, *x.shape[fold.dim + 1 :])


def _put(x: Tensor, index: Tensor, part: Tensor, fold: Fold) -> Tensor:
    if fold.plain:
        return x.index_copy(fold.dim, index, part)
    apart = samples_apart(x, fold).index_copy(fold.dim + 1, index, samples_apart(part, fold))
    return apart.reshape(x.shape)
