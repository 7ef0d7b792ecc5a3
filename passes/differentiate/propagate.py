"""Emits forward-mode derivatives, one node at a time, for every pass that needs tangents.

``TangentEmitter`` is what an operator's rule sees; ``propagate`` emits the tangent of each node of
a graph in order.

Tangents can be taken on the first n of the N samples (``rows``): primal operands are then sliced
where the batch sits, which ``passes/graph/folds.py`` tells.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch.fx import Node

from grapefx.errors import TangentError
from grapefx.ir import StepGraph
from grapefx.passes.differentiate.rules import derive, lookup
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.folds import Fold, batch_folds
from grapefx.passes.graph.order import descendants
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import batch_symbol

aten = torch.ops.aten
T = TypeVar("T")


class TangentEmitter(Emitter):
    """What a rule sees (``rules.context.RuleContext``), and what ``propagate`` keeps for it."""

    def __init__(
        self,
        step: StepGraph,
        batch: Any,
        size: int,
        rows: Node | None,
        batch_stats: str = "frozen",
    ) -> None:
        super().__init__(step.gm.graph, phase="tangent")
        self.batch = batch
        self.batch_size = size
        self.batch_stats = batch_stats
        self.rows = rows
        self.folds = batch_folds(self.graph, batch, size) if rows is not None else {}
        self.data: set[Node] = set()
        if batch is None:  # a size alone tells a batch only where the value comes from an input
            inputs = [n for n in self.graph.nodes if meta.role(n) == "input"]
            self.data = descendants(inputs)
            self.folds = {n: f for n, f in self.folds.items() if n in self.data}
        self.counts: dict[int, Node] = {}
        self.tangents: dict[Node, Any] = {}
        self.sliced: dict[Node, Node] = {}

    def t(self, arg: Any) -> Any:
        """The tangent of an argument; None is a symbolic zero (a tuple's: see ``rules.Result``)."""
        return self.tangents.get(arg) if isinstance(arg, Node) else None

    def p(self, tree: T) -> T:
        """Primal operands: nodes cut down to the samples that carry tangents, the rest as it is."""
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

    def _depends(self, node: Node, val: torch.Tensor) -> bool:
        if self.batch is None:
            return node in self.data
        exprs = [batch_symbol(s) for s in val.shape]
        return any(e is not None and self.batch in e.free_symbols for e in exprs)

    def _slice(self, node: Node, val: torch.Tensor) -> Node:
        fold = self.folds.get(node)
        if fold is None:
            if self._depends(node, val):
                raise TangentError(
                    f"tangent_fraction < 1 cannot follow the batch through {node.name!r} "
                    f"({node.target}), whose shape is {tuple(val.shape)}{quoted(node)}\n"
                    "  remedy: tangent_fraction=1"
                )
            return node
        # a slice is cheap; placing it beside its source keeps it in front of every use
        assert self.rows is not None
        with self.after(self.rows if node.op == "placeholder" else node):
            return take_rows(self, node, fold, self.rows)

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
        raise TangentError(
            f"tangent_fraction < 1 cannot follow the size {node.name!r} ({expr}){quoted(node)}\n"
            "  remedy: tangent_fraction=1"
        )

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


def scaled(em: Emitter, rows: Any, factor: int) -> Any:
    """``rows * factor`` as a node (or the node itself)."""
    return rows if factor == 1 else em.call(operator.mul, rows, factor)


def take_rows(em: Emitter, node: Node, fold: Fold, rows: Any) -> Node:
    """The first ``rows`` samples of a value."""
    end = scaled(em, rows, fold.inner)
    if fold.outer == 1:
        return em.call(aten.slice.Tensor, node, fold.dim, 0, end)
    shape = [int(s) if not isinstance(s, torch.SymInt) else -1 for s in node.meta["val"].shape]
    apart = [*shape[: fold.dim], fold.outer, -1, *shape[fold.dim + 1 :]]
    wide = em.call(aten.view.default, node, apart)
    part = em.call(aten.slice.Tensor, wide, fold.dim + 1, 0, end)
    solid = em.call(aten.clone.default, part, memory_format=torch.contiguous_format)
    return em.call(aten.view.default, solid, shape)


def propagate(
    em: TangentEmitter,
    nodes: list[Node],
    noise: dict[int, Node],
    derived: dict[str, None],
    added: Mapping[Node, Callable[[], Node]] = MappingProxyType({}),
) -> None:
    """Emit the tangent of each node in order; ``em.tangents`` may be seeded, and takes them.

    ``noise`` joins the tangent at each cut, by its index; ``added`` that of any other node.
    """
    for node in nodes:
        with em.after(_hoist_items(node), layer=meta.layer(node)):
            made = _tangent(em, node, noise, derived)
            if node in added:
                own = added[node]()
                made = own if made is None else em.call(aten.add.Tensor, made, own)
        if made is not None:
            _check_batch(em, node)
        em.tangents[node] = made


def _tangent(
    em: TangentEmitter, node: Node, noise: dict[int, Node], derived: dict[str, None]
) -> Any:
    if node.op != "call_function":
        return None
    if node.target is markers.CUT:
        incoming = em.t(node.args[0])
        own = noise.get(node.args[1])  # type: ignore[arg-type]
        if own is None or incoming is None:
            return own if own is not None else incoming
        return em.call(aten.add.Tensor, incoming, own)
    if node.target is markers.TAP:
        return em.t(node.args[0])
    if node.target is markers.STOP:
        return None
    if node.target is operator.getitem:
        source = em.t(node.args[0])
        if isinstance(source, dict):
            return source.get(node.args[1])
        return source[node.args[1]] if isinstance(source, (tuple, list)) else None  # type: ignore[index]
    if all(em.t(a) is None for a in node.all_input_nodes):
        return None
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex()):
        return None
    if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return None
    rule = lookup(node)
    try:
        if rule is not None:
            return rule(em, node)
        derived[str(node.target)] = None
        return derive(em, node)
    except TangentError:
        raise
    except Exception as e:
        raise TangentError(
            f"{node.target} (node {node.name!r}) has no forward derivative: {type(e).__name__}: "
            f"{str(e).strip().splitlines()[0] if str(e).strip() else ''}{quoted(node)}\n"
            "  remedy: choose a method without tangents (dfa), or add a rule in "
            "passes/differentiate/rules"
        ) from e


def _hoist_items(node: Node) -> Node:
    """Move the items of a tuple right behind it, where rules may use them; returns the last."""
    last = node
    if isinstance(node.meta.get("val"), (tuple, list)):
        for user in list(node.users):
            if user.target is operator.getitem:
                last.append(user)
                last = user
    return last


def _check_batch(em: TangentEmitter, node: Node) -> None:
    """On a sub-batch, a value that has lost the batch mixes samples that have no tangent."""
    if em.rows is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    if node in em.folds or not any(a in em.folds and em.t(a) for a in node.all_input_nodes):
        return
    raise TangentError(
        f"tangent_fraction < 1 needs samples that do not mix, but {node.target} (node "
        f"{node.name!r}) joins them{quoted(node)}\n  remedy: tangent_fraction=1"
    )


__all__ = ["TangentEmitter", "propagate", "take_rows"]
