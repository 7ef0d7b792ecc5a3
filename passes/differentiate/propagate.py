"""Emits forward-mode derivatives, one node at a time, for every pass that needs tangents.

``TangentEmitter`` is what an operator's rule sees; ``propagate`` emits the tangent of each node of
a graph in order.

Tangents can be taken on the first n of the N samples (``rows``): primal operands are then sliced
where the batch sits (``passes/graph/rows.py``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import TangentError
from grapefx.ir import StepGraph
from grapefx.passes.differentiate.rules import derive, lookup
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.rows import RowEmitter
from grapefx.passes.graph.source import quoted

aten = torch.ops.aten


class TangentEmitter(RowEmitter):
    """What a rule sees (``rules.context.RuleContext``), and what ``propagate`` keeps for it."""

    option = "tangent_fraction < 1"
    remedy = "tangent_fraction=1"
    error = TangentError

    def __init__(
        self,
        step: StepGraph,
        batch: Any,
        size: int,
        rows: Node | None,
        batch_stats: str = "frozen",
    ) -> None:
        inputs = [n for n in step.gm.graph.nodes if meta.role(n) == "input"]
        super().__init__(step.gm.graph, batch, size, rows, inputs, phase="tangent")
        self.batch_stats = batch_stats
        self.tangents: dict[Node, Any] = {}

    def t(self, arg: Any) -> Any:
        """The tangent of an argument; None is a symbolic zero (a tuple's: see ``rules.Result``)."""
        return self.tangents.get(arg) if isinstance(arg, Node) else None


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
