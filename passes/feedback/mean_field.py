"""Mean-field maps: the Jacobian from a feedback point to the error, at the mean of its derivatives.

The true cotangent at a point is delta_i = e_i J_i, a chain of products of weights and of
derivatives that differ from sample to sample (which ReLU is open, gamma / sigma, attention's
weights). With each derivative replaced by its mean over the batch the chain is one for all samples,
a feedback map B = J(means). It is the backward's own graph, run on the rows of the identity instead
of the error, so it reads no error, no sample and no layer's update: only weights, and means that
earlier steps left. It costs C / N of a backward chain, beside the forward, and is the true Jacobian
where the derivatives are constant. The papers have nothing like it.

In: a joint graph. Out: ``MeanChain``, the rows at each cut. Where cotangents meet saved values
entry by entry, what they are multiplied by is averaged; elsewhere (a product of two values) the
value. Terms in which the samples of a batch meet are left out: batch norm is gamma / sigma.
"""

from __future__ import annotations

import functools
import math
import operator
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import GrapefxError, OptionError
from grapefx.ir import Slot
from grapefx.maps import ErrorRows, FeedbackMap, from_samples, to_samples
from grapefx.maps.seeded import signs
from grapefx.passes.feedback.backward_section import (
    backward_section,
    depends,
    filled,
    fills,
    fixed_values,
    is_size,
)
from grapefx.passes.graph import markers
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.folds import Fold, batch_folds, fold_of
from grapefx.passes.graph.mixing import mixes
from grapefx.passes.graph.operators import draws
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import batch_symbol

aten = torch.ops.aten

RATE = 0.2  # of the running means, in a step
KEY = "mean_field/"  # of their slot

_VIEWS = (aten.view.default, aten._unsafe_view.default)


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
    """The backward chain at the means of its derivatives.

    ``rows``: what arrives at each cut, a row for each row of the maps, None where nothing does.
    With ``start`` the means are this batch's, else those of an input. The means that the next steps
    read are an output; the same slot names both.
    """

    def __init__(
        self, edit: Edit, mean_field: MeanField, error: ErrorRows, start: bool, dtype: torch.dtype
    ) -> None:
        self.edit, self.em, self.dtype = edit, edit.emitter, dtype
        self.batch = mean_field.batch
        self.folds = batch_folds(edit.graph, self.batch)
        # a node of the section -> what stands for it with all samples, and with the map's rows
        self.whole: dict[Node, Any] = {}
        self.own: dict[Node, Any] = {}
        self.factors: dict[
            Node, tuple[Node, Node]
        ] = {}  # linear in one node: that, its coefficient
        self.means: dict[Node, tuple[Node, Node]] = {}  # a value -> its mean; what stands for that
        fixed = fixed_values(edit.graph)
        section = backward_section(edit.graph, self.batch, fixed)
        self.nodes = list(section.graph.nodes)
        with self.em.before(edit.output, phase="mean_field"):
            taps = self._identity(error)
            self.count = int(next(iter(taps.values())).meta["val"].shape[error.folds[0][0]])
            placeholders = (n for n in self.nodes if n.op == "placeholder")
            self._classify(dict(zip(placeholders, section.sources, strict=True)), taps, fixed)
            ends: Any = self.nodes[-1].args[0]
            self._emit([n for n in ends if n not in self.zero])
            found = [None if n in self.zero else self._row(n) for n in ends]
            self.rows: dict[int, Node | None] = dict(zip(section.cuts, found, strict=True))
            self._close(mean_field, start)

    # the section

    def _identity(self, error: ErrorRows) -> dict[Node, Node]:
        """The rows of the identity at each tap; of its random sums where the maps have some."""
        graph = self.edit.graph
        forward, backward = (markers.find(graph, m) for m in (markers.TAP, markers.TAP_BACKWARD))
        values = [forward[i].meta["val"] for i in sorted(forward)]
        with self.em.mode:
            shapes = [
                tuple(int(s) for s in to_samples(v, f).shape[1:])
                for v, f in zip(values, error.folds, strict=True)
            ]

        token = error.kind == "token"

        def parts(x: Tensor) -> list[Tensor]:
            if token:  # the row at each token, with a sign
                made = x.unsqueeze(1) * _signs(x, shapes[0][0]).unsqueeze(2)
                return [from_samples(made, error.folds[0])]
            pieces = x.split([math.prod(s) for s in shapes], 1)
            return [
                from_samples(p.reshape(-1, *s), f)
                for p, s, f in zip(pieces, shapes, error.folds, strict=True)
            ]

        def sums(x: Tensor) -> Tensor:
            return error([x.unsqueeze(1)] if token else parts(x)).t()

        total = shapes[0][1] if token else sum(map(math.prod, shapes))
        rows = self.em.call(aten.eye.default, total, dtype=values[0].dtype, device=values[0].device)
        if error.rank is not None:
            rows = self.em.trace(sums, rows)
        at = dict(zip(sorted(forward), self.em.trace(parts, rows), strict=True))
        self.shaped = {backward[i]: forward[i] for i in backward}
        return {node: at[i] for i, node in backward.items()}

    def _classify(
        self, sources: dict[Node, Node], taps: dict[Node, Node], fixed: set[Node]
    ) -> None:
        """Which nodes are linear in the cotangent, which of these are zero, which hold data."""
        self.linear: set[Node] = set()
        self.zero: set[Node] = set()
        self.places: dict[Node, Fold] = {}  # where the batch is
        self.data: set[Node] = set()
        for node in self.nodes:
            reads = node.all_input_nodes
            source = sources.get(node)
            fold = self.folds.get(source) if source else fold_of(node, self.batch, 0, self.places)
            if fold is not None:
                self.places[node] = fold
            if source is not None:
                self.whole[node] = self.shaped.get(source, source)
                if source in taps:
                    self.linear.add(node)
                    self.own[node] = taps[source]
                elif source not in fixed:
                    self.data.add(node)
            elif node.op != "call_function" or is_size(node) or fills(node):
                continue
            elif linear := [a for a in reads if a in self.linear]:
                self.linear.add(node)
                if self.zero.issuperset(linear) or not any(map(self._batched, _tensors(node))):
                    self.zero.add(node)
            elif any(a in self.data for a in reads) or draws(node):
                self.data.add(node)

    def _emit(self, ends: list[Node]) -> None:
        """The linear nodes that lead to the ends."""
        live = set(ends)
        for node in reversed(self.nodes):
            if node in live and node in self.linear:
                live.update(a for a in node.all_input_nodes if a not in self.zero)
        for node in self.nodes:
            if node in live and node in self.linear and node not in self.own:
                self._linear(node)

    def _linear(self, node: Node) -> None:
        """A linear node on the map's rows, or what it multiplies one such node by."""
        operands = [a for a in node.all_input_nodes if a in self.linear and a not in self.zero]
        data = [a for a in node.all_input_nodes if a in self.data]
        entries = torch.Tag.pointwise in getattr(node.target, "tags", ())
        bases = {self.factors[a][0] if a in self.factors else a for a in operands}
        if entries and (data or (len(bases) == 1 and any(a in self.factors for a in operands))):
            found = self._coefficients(node, operands)
            if len(found) == 1:
                ((base, value),) = found.items()
                self.factors[node] = (base, value)
                return
            parts = [self._times(node, base, value) for base, value in found.items()]
            made = functools.reduce(lambda x, y: self.em.call(aten.add.Tensor, x, y), parts)
        else:
            made = self._repeated(node, data)
        shapes = [[self._size(s) for s in t.shape] for t in _tensors(node)]
        if shapes != [list(t.shape) for t in _tensors(made)]:
            raise self._refused(node, "does not keep the batch apart")
        self.own[node] = made

    def _repeated(self, node: Node, data: list[Node]) -> Node:
        numbers = all(t.is_floating_point() for a in data for t in _tensors(a))
        if not numbers or node.target is aten.as_strided.default:
            raise self._refused(node, "reads positions that differ from sample to sample")
        linear = [a for a in node.all_input_nodes if a in self.linear and a not in self.zero]
        apart = node.target is operator.getitem or (
            all(a in self.places and not mixes(node, a, self.places) for a in linear)
        )
        if not apart:
            raise self._refused(node, "may mix the samples of a batch")
        try:
            return self._call(node, self._row)
        except (RuntimeError, ValueError) as e:
            if node.target in _VIEWS:  # rows need not lie in memory as samples do
                args = torch.fx.node.map_arg(node.args, self._row)
                return self.em.call(aten.reshape.default, *args)  # type: ignore[misc]
            raise self._refused(node, f"fails on a map's rows ({str(e).splitlines()[0]})") from e

    def _coefficients(self, node: Node, operands: list[Node]) -> dict[Node, Node]:
        """An operator on entries, as a sum: nodes, and what each is multiplied by in each sample.

        What several operators in a row multiply by is one derivative: its mean is that of the
        product. A coefficient is the operator's result where one node is 1 and the others are 0.
        """
        whole = {a: self.factors.get(a, (a, None)) for a in operands}
        found = {}
        for base, _ in whole.values():

            def one(a: Node, base: Node = base) -> Any:
                if a not in self.linear:
                    return self._all(a)
                own, value = whole.get(a, (None, None))
                if own is base and value is not None:
                    return value
                return self._full([], float(own is base), a.meta["val"])

            if base not in found:
                found[base] = self._placed(self._call(node, one))
        return found

    def _times(self, node: Node, base: Node, value: Node) -> Node:
        """A node's rows, from those of ``base`` and the mean of the coefficient ``value``."""
        val = node.meta["val"]
        made = self.em.call(aten.mul.Tensor, self._row(base), self._mean(node, value))
        shape = [self._size(s) for s in val.shape]
        same = list(made.meta["val"].shape) == shape
        return self._cast(
            made if same else self.em.call(aten.expand.default, made, shape), val.dtype
        )

    # a node with all samples, with the map's rows, and its mean

    def _all(self, node: Node) -> Any:
        """A node that is not linear, with all samples."""
        if node not in self.whole:
            if fills(node):
                val = node.meta["val"]
                shape = [] if self._batched(val) else list(val.shape)
                self.whole[node] = self._full(shape, filled(node), val)
            else:
                self.whole[node] = self._placed(self._call(node, self._all))
        return self.whole[node]

    def _row(self, node: Node) -> Any:
        """A node with the map's rows in the place of samples."""
        val = node.meta["val"]
        if is_size(node):
            return self._size(val)
        if node in self.data:
            return self._cast(self._mean(node, self._all(node)), val.dtype)
        if node not in self.own:
            if node in self.factors:
                self.own[node] = self._times(node, *self.factors[node])
            elif node in self.zero or fills(node):
                fill = 0 if node in self.zero else filled(node)
                self.own[node] = self._full([self._size(s) for s in val.shape], fill, val)
            else:
                placeholder = node.op == "placeholder"
                self.own[node] = self.whole[node] if placeholder else self._call(node, self._row)
        return self.own[node]

    def _mean(self, node: Node, value: Node) -> Node:
        """The running mean of a value over the batch, with the map's rows."""
        fold = self.folds.get(value)
        if fold is None and self._batched(value.meta["val"]):
            raise self._refused(node, "moves the batch to where it cannot be followed")
        where = (fold.dim, fold.outer, fold.inner) if fold is not None else ()
        if value not in self.means:
            mean = self.em.trace(_averaged, value, self.dtype, *where)
            self.means[value] = (mean, self.em.call(aten.clone.default, mean))
        stands = self.means[value][1]
        return self.em.trace(_spread, stands, self.count, *where) if where else stands

    def _call(self, node: Node, operand: Callable[[Node], Any]) -> Node:
        args = torch.fx.node.map_arg(node.args, operand)
        kwargs = torch.fx.node.map_arg(dict(node.kwargs), operand)
        return self.em.call(node.target, *args, **kwargs)  # type: ignore[misc]

    def _placed(self, value: Node) -> Node:
        """A new value, with note of where its batch is."""
        fold = fold_of(value, self.batch, 0, self.folds)
        if fold is not None:
            self.folds[value] = fold
        return value

    def _full(self, shape: list[int], fill: Any, like: Tensor) -> Node:
        return self.em.call(aten.full.default, shape, fill, dtype=like.dtype, device=like.device)

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        same = node.meta["val"].dtype == dtype
        return node if same else self.em.call(aten._to_copy.default, node, dtype=dtype)

    def _batched(self, val: Tensor) -> bool:
        return depends(val, self.batch)

    def _size(self, size: Any) -> int:
        """A size with as many samples as the map has rows."""
        expr = batch_symbol(size)
        return int(size) if expr is None else int(expr.subs(self.batch, self.count))

    # the means

    def _close(self, mean_field: MeanField, start: bool) -> None:
        """The means of later steps come in as one vector, and go out as one."""
        means = [m for m, _ in self.means.values()]
        shapes = [tuple(m.meta["val"].shape) for m in means]
        slot = Slot("feedback", f"{KEY}{zlib.crc32(repr(shapes).encode()):08x}")
        like = next(iter(self.own.values())).meta["val"]
        now = (
            self.em.trace(
                lambda ms: torch.cat([m.reshape(-1) for m in ms]).nan_to_num(0, 0, 0), means
            )
            if means
            else self._full([0], 0, like.to(self.dtype))
        )
        if means and not start:
            sizes = [math.prod(s) for s in shapes]
            old = self.edit.add_input("means", slot, like, shape=[sum(sizes)], dtype=self.dtype)
            parts = self.em.trace(
                lambda v: [p.view(s) for p, s in zip(v.split(sizes), shapes, strict=True)], old
            )
            for (_, stands), part in zip(self.means.values(), parts, strict=True):
                stands.replace_all_uses_with(part)
                self.edit.graph.erase_node(stands)
            now = self.em.trace(lambda v, m: v.lerp(m, mean_field.rate), old, now)
        if mean_field.every:
            self.edit.add_output(slot, now)

    def _refused(self, node: Node, why: str) -> GrapefxError:
        lines = filter(None, map(quoted, [node, *node.all_input_nodes]))
        return OptionError(
            f"mean_field= averages derivatives over the batch, but {node.target} (node "
            f"{node.name!r}) {why}{next(lines, '')}\n  remedy: leave mean_field out, or place "
            "points= or error_at= so that this operator lies outside"
        )


def map_of(m: FeedbackMap, rows: Tensor | None, like: Tensor) -> Tensor:
    """B (C, n) as a map keeps it, from the chain's rows at its cut; zeros where none arrives.

    The map of a token is the mean over tokens of what their own error does to them: signs that
    belong to tokens take out what goes from one to another, but for a rest like their mean.
    """
    if rows is None:
        return torch.zeros_like(like)
    wide = m.value_rows(rows).to(like.dtype)
    if m.tokens is not None:
        wide = wide.unflatten(0, (-1, m.tokens))
        wide = (wide * _signs(wide, m.tokens).unsqueeze(2)).mean(1)
    if m.groups == 1:
        return wide
    return torch.cat([m.pick(wide[:, m.columns(g)].t(), g).t() for g in range(m.groups)], 1)


def _signs(rows: Tensor, tokens: int) -> Tensor:
    return signs((rows.shape[0], tokens), 0, rows.device, rows.dtype)


def _averaged(x: Tensor, dtype: torch.dtype, dim: int = -1, outer: int = 1, inner: int = 1) -> Any:
    """The mean over the batch, whose dim keeps what it shares it with (or the size 1)."""
    x = x.to(dtype)
    if dim < 0:
        return x
    if outer * inner == 1:
        return x.mean(dim, keepdim=True)
    return x.unflatten(dim, (outer, -1, inner)).mean(dim + 1).flatten(dim, dim + 1)


def _spread(mean: Tensor, count: int, dim: int, outer: int, inner: int) -> Any:
    """A mean as the value of ``count`` samples."""
    if outer * inner == 1:
        return mean.expand(*mean.shape[:dim], count, *mean.shape[dim + 1 :])
    x: Any = mean.unflatten(dim, (outer, 1, inner))
    return x.expand(*x.shape[: dim + 1], count, *x.shape[dim + 2 :]).flatten(dim, dim + 2)


def _tensors(node: Node) -> Sequence[Tensor]:
    val = node.meta.get("val")
    return [v for v in (val if isinstance(val, (tuple, list)) else [val]) if isinstance(v, Tensor)]
