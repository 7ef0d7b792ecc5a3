"""Exact rows: n samples of a batch get their true gradient, by a chain of their own.

A projected cotangent c_l knows only what a stale linear map tells of the true gradient delta_l.
Backpropagating n of the N samples costs n / N of a backward chain, and on these samples

    c_i += w (delta_i - c_i)

takes back the map's error (w = 1), or also some of that of the other samples, whose error points
the same way in the mean (w = 2; w = N / n would make the gradient's mean unbiased, at a variance
that grows with w). They are the first n, which a shuffled loader draws at random, or those of the
largest error. The papers have nothing like it.

In: a joint graph. The backward nodes between the error taps and the cuts are emitted a second time
with every operand cut down to these samples. Batch norm in training mode couples samples: its
derivative takes its means over these samples, with all samples' statistics. The nodes of the chain
have the phase "exact_rows"; the verifier knows that they wait for each other.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import GrapefxError, OptionError
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.folds import Fold
from grapefx.passes.graph.mixing import mixes
from grapefx.passes.graph.operators import op_name
from grapefx.passes.graph.order import ancestors, descendants
from grapefx.passes.graph.rows import RowEmitter, samples_apart
from grapefx.torch_compat import batch_symbol

aten = torch.ops.aten

# Backward operators of a layer: their gradients of parameters are left out
_MASKS = {
    "convolution_backward", "native_layer_norm_backward", "native_group_norm_backward",
    "native_batch_norm_backward",
}  # fmt: skip
_SAVED_MEAN = 5  # of the following, by position
# batch norm's backward -> (gradient, input, weight, saved 1 / sigma, training) by position
_BATCH_NORMS = {
    "native_batch_norm_backward": (0, 1, 2, 6, 7),
    "cudnn_batch_norm_backward": (1, 0, 2, 6, None),
    "miopen_batch_norm_backward": (1, 0, 2, 6, None),
    "batch_norm_backward": (0, 1, 2, 6, 7),
}
VIEWS = {"view", "reshape", "_unsafe_view"}


@dataclass(frozen=True)
class ExactRows:
    """Which part of each batch is backpropagated, and how strongly it corrects the cotangents.

    ``pick``: "first" or "largest". ``batch``: the symbol of the batch size, None where the graph
    holds the one size ``size``. ``late``: not the cotangents, but the next step's gradients
    (``late_rows.py``).
    """

    fraction: float
    weight: float
    pick: str
    batch: Any
    size: int
    late: bool = False

    def count(self, batch: int) -> int:
        """n: the least whole number that is not below ``fraction`` of the batch, 1 at least."""
        part = self._part
        return -(-batch * part.numerator // part.denominator)

    @property
    def _part(self) -> Fraction:
        return Fraction(self.fraction).limit_denominator(1 << 16)

    def emit(self, em: RowEmitter, batch: Node) -> Node:
        """n as a node of the graph."""
        part = self._part
        top = em.call(operator.mul, batch, part.numerator)
        return em.call(
            operator.floordiv, em.call(operator.add, top, part.denominator - 1), part.denominator
        )


class Chain(RowEmitter):
    """The backward chain of n samples; ``deltas``: their true gradient at each cut.

    Raises ``OptionError`` naming the operator and the line where samples cannot be told apart.
    """

    remedy = "exact_rows=0, or a method with maps alone"
    error = OptionError

    def __init__(self, edit: Edit, exact: ExactRows) -> None:
        self.option = f"exact_rows={exact.fraction!r}"
        self.exact = exact
        first = None if self._everything(exact) else edit.last_input
        super().__init__(edit.graph, exact.batch, exact.size, first, [], phase="exact_rows")
        if first is not None:
            with self.after(first):
                self.rows = exact.emit(self, self._batch())
        self.end = edit.output
        if exact.pick == "largest" and self.rows is not None:
            self.index = self._largest()
        self.deltas = self._deltas()

    def _everything(self, exact: ExactRows) -> bool:
        """Whether all samples are exact, in a graph that holds one batch size (of 1, mostly)."""
        if exact.batch is not None:
            return False
        if exact.count(exact.size) == exact.size:
            return True
        raise OptionError(
            f"{self.option} needs a batch size that may change, but this model's graph holds for "
            f"{exact.size} samples alone\n  remedy: {self.remedy}"
        )

    def corrected(self, index: int, c: Node, fold: tuple[int, int, int]) -> Node:
        """The cotangent ``c`` of a cut, with these samples corrected."""
        where, layer = Fold(*fold), meta.layer(c)
        with self.before(self.end, phase="projection", layer=layer):
            own = c if self.rows is None else self.take(c, where)
            moved = self.call(aten.lerp.Scalar, own, self.delta(index, own), self.exact.weight)
            return moved if self.rows is None else self.put(c, where, moved)

    def delta(self, index: int, like: Node) -> Node:
        """The true gradient at a cut, in the precision of ``like``."""
        delta, dtype = self.deltas[index], like.meta["val"].dtype
        if delta.meta["val"].dtype == dtype:
            return delta
        return self.call(aten._to_copy.default, delta, dtype=dtype)

    def _slice(self, node: Node, val: Tensor) -> Node:
        """These samples, contiguous where all of them are: kernels (layer norm's backward)
        read saved statistics as if they were.
        """
        made = super()._slice(node, val)
        if made is node or not val.is_contiguous() or self.folds[node].dim == 0:
            return made
        with self.after(made):
            return self.call(aten.clone.default, made, memory_format=torch.contiguous_format)

    def _largest(self) -> Node:
        """The numbers of the n samples whose errors, over all taps, have the largest norm."""
        errors = [n.args[0] for n in markers.find(self.graph, markers.TAP_BACKWARD).values()]
        folds = []
        for e in errors:
            assert isinstance(e, Node)
            if e not in self.folds:
                raise self.refused(e, f"cannot follow the batch through the error {e.name!r}")
            folds.append(self.folds[e])

        def squares(es: list[Tensor]) -> Tensor:
            total = None
            for e, fold in zip(es, folds, strict=True):
                apart = samples_apart(e, fold).float().square()
                own = apart.sum([d for d in range(apart.ndim) if d != fold.dim + 1])
                total = own if total is None else total + own
            assert total is not None
            return total

        with self.before(self.end):
            norms = self.trace(squares, errors)
            return self.get(self.call(aten.topk.default, norms, self.rows), 1)

    def _batch(self) -> Node:
        """The batch size, read from an input."""
        node, dim = next(
            (node, dim)
            for node in self.graph.nodes
            if node.op == "placeholder" and meta.role(node) == "input"
            for dim, size in enumerate(node.meta["val"].shape)
            if batch_symbol(size) == self.batch
        )
        return self.call(aten.sym_size.int, node, dim)

    def _deltas(self) -> dict[int, Node]:
        errors = markers.find(self.graph, markers.TAP_BACKWARD).values()
        cuts = markers.find(self.graph, markers.CUT_BACKWARD)
        ends = {i: n.args[0] for i, n in cuts.items()}
        wanted = ancestors([n for n in ends.values() if isinstance(n, Node)])
        behind = descendants(errors)
        nodes = [n for n in self.graph.nodes if n in wanted and n in behind]
        own: dict[Node, Any] = {}
        for node in nodes:
            with self.before(self.end, layer=meta.layer(node)):
                if node.target is markers.TAP_BACKWARD:
                    own[node] = self.p(node.args[0])  # type: ignore[arg-type]
                elif node.target is markers.CUT_BACKWARD:
                    own[node] = own[node.args[0]]  # type: ignore[index]
                else:
                    own[node] = self._again(node, own)
        return {
            i: own[n] if n in own else self.p(n) for i, n in ends.items() if isinstance(n, Node)
        }

    def _again(self, node: Node, own: dict[Node, Any]) -> Any:
        """A backward operator with the first n samples of its operands."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and self.batch is not None:
            expr = batch_symbol(val)
            if expr is not None and (expr / self.batch).is_Integer:
                return self.count(int(expr / self.batch))
        if node.target is operator.getitem and isinstance(own.get(node.args[0]), tuple):  # type: ignore[arg-type]
            return own[node.args[0]][node.args[1]]  # type: ignore[index]
        if self.rows is not None:
            self._check(node, own)
            if self.couples(node):
                return self._coupled_norm(self._operands(node, own)[0], op_name(node))
        return self.repeat(node, own, inputs_only=True)

    def _operands(self, node: Node, own: dict[Node, Any]) -> Any:
        return torch.fx.node.map_arg(
            (node.args, dict(node.kwargs)), lambda a: own[a] if a in own else self.p(a)
        )

    def repeat(self, node: Node, own: dict[Node, Any], inputs_only: bool = False) -> Any:
        """A node's call on these samples; ``own``: what stands for some of its operands.

        ``inputs_only``: without the gradients of parameters, where one operator makes them too.
        """
        args, kwargs = self._operands(node, own)
        if inputs_only and op_name(node) in _MASKS:
            args = _input_only(node, args)
        if op_name(node) in VIEWS:
            return self._view(node.target, *args)
        try:
            return self.call(node.target, *args, **kwargs)
        except GrapefxError:
            raise
        except Exception as e:
            said = str(e).strip().splitlines()
            raise self.refused(
                node,
                f"cannot run {node.target} (node {node.name!r}) on a part of the batch: "
                f"{type(e).__name__}: {said[0] if said else ''}",
            ) from e

    def _view(self, target: Any, x: Node, size: Any) -> Node:
        """A view; of a copy where the first samples do not lie as all of them do."""
        try:
            return self.call(target, x, size)
        except (RuntimeError, ValueError):
            solid = self.call(aten.clone.default, x, memory_format=torch.contiguous_format)
            return self.call(aten.view.default, solid, size)

    def _check(self, node: Node, own: dict[Node, Any]) -> None:
        """Raise ``OptionError`` unless each sample of the result is made of that sample alone."""
        if isinstance(node.meta.get("val"), Tensor) and node not in self.folds:
            raise self.refused(
                node,
                f"needs samples that do not mix, but {node.target} (node {node.name!r}) joins "
                "them, or moves the batch to where it cannot be followed",
            )
        sources = [a for a in node.all_input_nodes if a in own and a in self.folds]
        known = node.target is operator.getitem or op_name(node) in _BATCH_NORMS
        if not known and any(mixes(node, a, self.folds) for a in sources):
            raise self.refused(
                node, f"cannot tell whether {node.target} (node {node.name!r}) mixes samples"
            )

    def couples(self, node: Node) -> bool:
        """Whether it is a batch norm whose statistics are over samples (an instance norm's not)."""
        if op_name(node) not in _BATCH_NORMS:
            return False
        grad, _, _, _, training = _BATCH_NORMS[op_name(node)]
        fold = self.folds.get(node.args[grad])  # type: ignore[arg-type]
        along_channels = fold is not None and fold.dim == 1
        return not along_channels and (training is None or bool(node.args[training]))

    def _coupled_norm(self, args: Any, name: str) -> tuple[Any, None, None]:
        """The whole derivative, with the saved statistics, and its means over these samples.

        Written out, since some kernels also want what their forward left for all samples.
        """
        grad, value, weight, spread, _ = _BATCH_NORMS[name]

        def coupled(
            g: Tensor, x: Tensor, gamma: Tensor | None, mean: Tensor, invstd: Tensor
        ) -> Tensor:
            wide, over = [1, -1, *[1] * (g.ndim - 2)], [0, *range(2, g.ndim)]
            e = g.to(mean.dtype)
            normed = (x.to(mean.dtype) - mean.view(wide)) * invstd.view(wide)
            scale = invstd if gamma is None else gamma * invstd
            means = [t.mean(over, keepdim=True) for t in (e, e * normed)]
            return (scale.view(wide) * (e - means[0] - normed * means[1])).to(g.dtype)

        operands = (args[i] for i in (grad, value, weight, _SAVED_MEAN, spread))
        return self.trace(coupled, *operands), None, None


def _input_only(node: Node, args: Any) -> Any:
    """The arguments of a backward operator, asked for the gradient of its input alone."""
    schema = node.target._schema  # type: ignore[union-attr]
    at = next(i for i, a in enumerate(schema.arguments) if a.name == "output_mask")
    return (*args[:at], [True, False, False], *args[at + 1 :])


__all__ = ["VIEWS", "Chain", "ExactRows"]
