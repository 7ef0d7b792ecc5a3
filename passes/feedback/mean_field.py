"""Mean-field maps: the Jacobian from a feedback point to the error, at the mean of its derivatives.

The true cotangent at a point is delta_i = e_i J_i: a chain of products of weights and of derivatives
that differ from sample to sample (which ReLU is open, gamma / sigma, attention's weights). With each
of these derivatives replaced by its mean over the batch the chain is the same for all samples, a
feedback map B = J(means). It is the backward's own graph run on the rows of the identity instead of
the error, so it reads no error, no sample and no layer's update: weights, and means that earlier
steps have left. Its C rows cost C / N of a backward chain, beside the forward. It is the true
Jacobian where the derivatives are constant. The papers have nothing like it.

In: a joint graph. Out: ``rows``, the map's full rows at each cut, and the means' new values. What
is averaged is the derivative, not the value: where a cotangent meets a saved value entry by entry
the operator's coefficient, elsewhere (products of two values, attention) the value. Terms in which
the samples of a batch meet are left out: batch norm is gamma / sigma.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from grapefx.errors import GrapefxError, OptionError
from grapefx.ir import Slot
from grapefx.maps import ErrorRows, FeedbackMap, from_samples, to_samples
from grapefx.passes.feedback.backward_section import backward_section
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.folds import Fold, batch_folds, fold_of
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import batch_symbol

aten = torch.ops.aten

RATE = 0.2  # of the running means, in a step
KEY = "mean_field/"  # of their slots

# operators that read of a tensor only its shape -> where the value is that they fill in, or it
_FILLS: dict[Any, tuple[int | None, int]] = {
    aten.zeros_like: (None, 0), aten.ones_like: (None, 1), aten.empty_like: (None, 0),
    aten.new_zeros: (None, 0), aten.new_ones: (None, 1), aten.new_empty: (None, 0),
    aten.full_like: (1, 0), aten.new_full: (2, 0), aten.empty: (None, 0),
}  # fmt: skip
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass(frozen=True)
class MeanField:
    """How often maps are computed (0: once, at the start), and the symbol of the batch size."""

    every: int
    batch: Any

    @property
    def rate(self) -> float:
        """How far the means go towards a batch's: as far as in ``every`` steps at ``RATE``."""
        return 1 - float((1 - RATE) ** max(self.every, 1))


class MeanChain:
    """The backward chain at the means.

    ``rows``: what arrives at each cut, a row for each row of the maps, None where nothing does.
    With ``start`` the means are this batch's, else those of ``slot``, an input. ``new``: the means
    that the next steps read, all in one vector.
    """

    def __init__(
        self, edit: Edit, mean_field: MeanField, error: ErrorRows, start: bool, dtype: torch.dtype
    ) -> None:
        self.edit, self.em, self.graph = edit, edit.emitter, edit.graph
        self.batch, self.dtype = mean_field.batch, dtype
        self.folds = batch_folds(self.graph, self.batch)
        self.whole: dict[Node, Any] = {}  # a node of the section -> with all samples of the batch
        self.own: dict[Node, Any] = {}  # a node of the section -> with a row for each of the map's
        self.batch_node: Node | None = None
        self.means: dict[Node, tuple[Node, Node]] = {}  # a value -> its mean; what stands for it
        fixed = _fixed(self.graph)
        section = backward_section(self.graph, self.batch, fixed)
        self.nodes = list(section.graph.nodes)
        inputs = dict(zip((n for n in self.nodes if n.op == "placeholder"), section.sources))
        with self.em.before(edit.output, phase="mean_field"):
            taps = self._identity(error)
            self.count = int(next(iter(taps.values())).meta["val"].shape[self._dims[0].dim])
            self._classify(inputs, taps, fixed)
            ends = self.nodes[-1].args[0]
            self._emit(ends)
            self.rows = {
                i: None if n in self.zero else self.own[n]
                for i, n in zip(section.cuts, ends, strict=True)  # type: ignore[arg-type]
            }
            self.slot = self._close(mean_field.rate, start)
        if mean_field.every:
            edit.add_output(self.slot, self.new)

    # the section

    def _identity(self, error: ErrorRows) -> dict[Node, Node]:
        """The rows of the identity at each tap; of its random sums where the maps have some."""
        taps, forward = (
            markers.find(self.graph, m) for m in (markers.TAP_BACKWARD, markers.TAP)
        )
        folds = [Fold(*f) for f in error.folds]
        shapes, found = [], {}
        for i, fold in zip(sorted(forward), error.folds, strict=True):
            with self.em.mode:
                shapes.append(tuple(int(s) for s in to_samples(forward[i].meta["val"], fold).shape[1:]))
        val = forward[min(forward)].meta["val"]
        total = sum(map(math.prod, shapes))
        eye = self.em.call(aten.eye.default, total, dtype=val.dtype, device=val.device)

        def parts(x: Tensor) -> list[Tensor]:
            pieces = x.split([math.prod(s) for s in shapes], 1)
            return [
                from_samples(p.reshape(-1, *s), f)
                for p, s, f in zip(pieces, shapes, error.folds, strict=True)
            ]

        if error.rank is not None:
            eye = self.em.trace(lambda x: error(parts(x)).t(), eye)
        made = self.em.trace(parts, eye)
        self._dims = folds
        for i, x in zip(sorted(forward), made, strict=True):
            if i in taps:
                found[taps[i]] = x
        return found

    def _classify(self, inputs: dict[Node, Node], taps: dict[Node, Node], fixed: set[Node]) -> None:
        """Which nodes depend on the cotangent (``linear``), which on data, which are zero."""
        self.linear: set[Node] = set()
        self.data: set[Node] = set()
        self.zero: set[Node] = set()
        for node in self.nodes:
            if node.op == "placeholder":
                source = inputs[node]
                if source in taps:
                    self.linear.add(node)
                    self.own[node] = taps[source]
                    continue
                self.whole[node] = source
                if source not in fixed:
                    self.data.add(node)
            elif node.op == "call_function" and not _is_size(node) and not _fills(node):
                reads = node.all_input_nodes
                if any(a in self.linear for a in reads):
                    self.linear.add(node)
                    nothing = all(a in self.zero for a in reads if a in self.linear)
                    if nothing or not any(map(self._batched, _tensors(node))):
                        self.zero.add(node)
                elif any(a in self.data for a in reads) or _random(node):
                    self.data.add(node)

    def _emit(self, ends: Any) -> None:
        """The linear nodes that lead to the ends."""
        live = {n for n in ends if n not in self.zero}
        for node in reversed(self.nodes):
            if node in live and node in self.linear:
                live.update(a for a in node.all_input_nodes if a not in self.zero)
        for node in self.nodes:
            if node in live and node in self.linear and node not in self.own:
                self.own[node] = self._again(node)
        for node in ends:
            if node not in self.zero:
                self.own[node] = self._row(node)

    def _again(self, node: Node) -> Any:
        """A linear node on the map's rows."""
        data = [a for a in node.all_input_nodes if a in self.data and not _is_size(a)]
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if data and pointwise:
            made = self._scaled(node)
        else:
            bad = [a for a in data if not all(t.is_floating_point() for t in _tensors(a))]
            if bad or node.target is aten.as_strided.default:
                raise self._refused(node, "reads positions that differ from sample to sample")
            args = torch.fx.node.map_arg(node.args, self._row)
            kwargs = torch.fx.node.map_arg(dict(node.kwargs), self._row)
            made = self._call(node, args, kwargs)
        want = [self._sized(t) for t in _tensors(node)]
        if want != [[int(s) for s in t.shape] for t in _tensors(made)]:
            raise self._refused(node, "does not keep the batch apart")
        return made

    def _call(self, node: Node, args: Any, kwargs: Any) -> Node:
        try:
            return self.em.call(node.target, *args, **kwargs)
        except Exception as e:
            if node.target in _VIEWS:  # rows need not lie in memory as samples do
                return self.em.call(aten.reshape.default, *args)
            said = str(e).strip().splitlines()
            raise self._refused(node, f"fails on a map's rows: {said[0] if said else e}") from e

    def _scaled(self, node: Node) -> Node:
        """An operator on entries: the sum of its linear operands, each times a mean coefficient."""
        total: Node | None = None
        val = node.meta["val"]
        operands = [a for a in node.all_input_nodes if a in self.linear and a not in self.zero]
        for a in operands:
            mean = self._mean(node, self._coefficient(node, a))
            if mean.meta["val"].dtype != val.dtype:
                mean = self.em.call(aten._to_copy.default, mean, dtype=val.dtype)
            part = self.em.call(aten.mul.Tensor, self.own[a], mean)
            total = part if total is None else self.em.call(aten.add.Tensor, total, part)
        assert total is not None
        want = self._sized(val)
        if list(total.meta["val"].shape) != want:
            total = self.em.call(aten.expand.default, total, want)
        return total

    def _coefficient(self, node: Node, operand: Node) -> Node:
        """What an operator multiplies one of its operands by, for all samples of the batch."""
        if node.target is aten.mul.Tensor:
            return self._all(next(a for a in node.args if a is not operand))  # type: ignore[arg-type]

        def stand_in(a: Node) -> Any:
            if a not in self.linear:
                return self._all(a)
            val = a.meta["val"]
            return self._full([], float(a is operand), val)

        args = torch.fx.node.map_arg(node.args, stand_in)
        kwargs = torch.fx.node.map_arg(dict(node.kwargs), stand_in)
        return self.em.call(node.target, *args, **kwargs)

    # a node with all samples, with the map's rows, and its mean

    def _all(self, node: Node) -> Any:
        """A node that is not linear, with all samples."""
        if node not in self.whole:
            if _is_size(node):
                self.whole[node] = self._batch_size(node)
            elif _fills(node):
                val = node.meta["val"]
                shape = [] if self._batched(val) else self._sized(val)
                self.whole[node] = self._full(shape, _fill(node), val)
            else:
                args = torch.fx.node.map_arg(node.args, self._all)
                kwargs = torch.fx.node.map_arg(dict(node.kwargs), self._all)
                self.whole[node] = self.em.call(node.target, *args, **kwargs)
        return self.whole[node]

    def _row(self, node: Node) -> Any:
        """A node as an operand of the chain."""
        if _is_size(node):
            return self._size(node.meta["val"])
        if node in self.data:
            made = self._mean(node, self._all(node))
            dtype = node.meta["val"].dtype
            same = made.meta["val"].dtype == dtype
            return made if same else self.em.call(aten._to_copy.default, made, dtype=dtype)
        if node not in self.own:
            val = node.meta["val"]
            if node in self.zero or _fills(node):
                self.own[node] = self._full(self._sized(val), _fill(node), val)
            elif node.op == "placeholder":
                self.own[node] = self.whole[node]
            else:
                args = torch.fx.node.map_arg(node.args, self._row)
                kwargs = torch.fx.node.map_arg(dict(node.kwargs), self._row)
                self.own[node] = self._call(node, args, kwargs)
        return self.own[node]

    def _mean(self, node: Node, value: Node) -> Node:
        """The running mean of a value over the batch, with the map's rows."""
        val = value.meta["val"]
        batched = self._batched(val)
        fold = fold_of(value, self.batch, 0, self.folds) if batched else None
        if fold is not None:
            self.folds[value] = fold
        elif batched:
            raise self._refused(node, "moves the batch to where it cannot be followed")
        if value not in self.means:
            mean = self.em.trace(lambda x: _averaged(x.to(self.dtype), fold), value)
            self.means[value] = (mean, self.em.call(aten.clone.default, mean))
        stands = self.means[value][1]
        return stands if fold is None else self.em.trace(lambda m: _spread(m, fold, self.count), stands)

    def _full(self, shape: list[int], fill: Any, like: Tensor) -> Node:
        return self.em.call(aten.full.default, shape, fill, dtype=like.dtype, device=like.device)

    # the means

    def _close(self, rate: float, start: bool) -> Slot:
        """The new means as one vector; the old ones come as one."""
        means = [m for m, _ in self.means.values()]
        sizes = [math.prod(m.meta["val"].shape) for m in means]
        shapes = [tuple(m.meta["val"].shape) for m in means]
        slot = Slot("feedback", f"{KEY}{zlib.crc32(repr(shapes).encode()):08x}")
        like = means[0].meta["val"] if means else None
        if like is None:
            like = next(iter(self.own.values())).meta["val"]
        now = self.em.trace(lambda ms: _vector(ms, like.device, self.dtype), means)
        if start or not means:
            self.new = now
            return slot
        old = self.edit.add_input("mean_field", slot, like, shape=[sum(sizes)], dtype=self.dtype)
        parts = self.em.trace(
            lambda v: [p.view(s) for p, s in zip(v.split(sizes), shapes, strict=True)], old
        )
        for (_, stands), part in zip(self.means.values(), parts, strict=True):
            stands.replace_all_uses_with(part)
            self.graph.erase_node(stands)
        # an activation that overflows leaves its mean as it is
        self.new = self.em.trace(lambda v, m: torch.where(m.isfinite(), v.lerp(m, rate), v), old, now)
        return slot

    # sizes

    def _batched(self, val: Tensor) -> bool:
        return any(self.batch in e.free_symbols for e in map(batch_symbol, val.shape) if e is not None)

    def _size(self, size: Any) -> int:
        """A size with as many samples as the map has rows."""
        expr = batch_symbol(size)
        return int(size) if expr is None else int(expr.subs(self.batch, self.count))

    def _batch_size(self, node: Node) -> Any:
        """A size with all samples, as a node that reads an input."""
        expr = batch_symbol(node.meta["val"])
        if expr is None:
            return int(node.meta["val"])
        many = expr / self.batch
        if not many.is_Integer:
            raise self._refused(node, "has a size that is no multiple of the batch's")
        if self.batch_node is None:
            source, dim = next(
                (n, d)
                for n in self.edit.step.placeholders()
                if isinstance(n.meta["val"], Tensor)
                for d, s in enumerate(n.meta["val"].shape)
                if batch_symbol(s) == self.batch and n.meta[meta.ROLE] == "input"
            )
            self.batch_node = self.em.call(aten.sym_size.int, source, dim)
        factor = int(many)
        return self.batch_node if factor == 1 else self.em.call(operator.mul, self.batch_node, factor)

    def _sized(self, val: Tensor) -> list[int]:
        return [self._size(s) for s in val.shape]

    def _refused(self, node: Node, why: str) -> GrapefxError:
        lines = filter(None, map(quoted, [node, *node.all_input_nodes]))
        return OptionError(
            f"mean_field= averages derivatives over the batch, but {node.target} (node "
            f"{node.name!r}) {why}{next(lines, '')}\n  remedy: leave mean_field out, or place "
            "points= or error_at= so that this operator lies outside"
        )


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def _tensors(node: Node) -> Sequence[Tensor]:
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, Tensor)]


def _fills(node: Node) -> bool:
    return getattr(node.target, "overloadpacket", None) in _FILLS


def _fill(node: Node) -> Any:
    """What a node that is constant holds."""
    where, value = _FILLS.get(getattr(node.target, "overloadpacket", None), (None, 0))
    return value if where is None else node.args[where]


def _random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _fixed(graph: Graph) -> set[Node]:
    """Values that no data reaches: parameters, buffers, constants, and what is computed of them."""
    fixed = set()
    for node in graph.nodes:
        if meta.role(node) in ("parameter", "buffer", "constant"):
            fixed.add(node)
        if node.op == "call_function" and not _random(node):
            tensors = [a for a in node.all_input_nodes if not _is_size(a)]
            if _fills(node) or all(a in fixed for a in tensors):
                fixed.add(node)
    return fixed


def _averaged(x: Tensor, fold: Fold | None) -> Tensor:
    """The mean over the batch, whose dim keeps what it shares it with (or the size 1)."""
    if fold is None:
        return x
    x = x.unflatten(fold.dim, (fold.outer, -1, fold.inner))
    return x.mean(fold.dim + 1).flatten(fold.dim, fold.dim + 1)


def _spread(mean: Tensor, fold: Fold, count: int) -> Tensor:
    """A mean as the value of ``count`` samples."""
    sizes = [-1] * (mean.ndim + 2)
    sizes[fold.dim + 1] = count
    x = mean.unflatten(fold.dim, (fold.outer, 1, fold.inner)).expand(sizes)
    return x.flatten(fold.dim, fold.dim + 2)


def _vector(means: list[Tensor], device: Any, dtype: torch.dtype) -> Tensor:
    if not means:
        return torch.zeros(0, device=device, dtype=dtype)
    return torch.cat([m.reshape(-1) for m in means])


def map_of(m: FeedbackMap, cotangent: Tensor | None, like: Tensor) -> Tensor:
    """B (C, n) as a map keeps it, from the chain's rows at its cut; zeros where none arrives."""
    if cotangent is None:
        return torch.zeros_like(like)
    rows = m.value_rows(cotangent).to(like.dtype)
    if m.groups == 1:
        return rows
    return torch.cat([m.pick(rows[:, m.columns(g)].t(), g).t() for g in range(m.groups)], 1)


__all__ = ["KEY", "MeanChain", "MeanField", "map_of"]
