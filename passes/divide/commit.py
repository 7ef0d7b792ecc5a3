"""Commit: what a step does once, whatever the number of microbatches, is cut off behind the rest.

In: a step graph. Out: the step of one microbatch, which ends in what it contributes, and a graph
that takes the contributions of all microbatches, reduced, and the feedback states, and gives new
states and metrics. Learning is not linear, so states never learn from one microbatch alone.

The passes that build a step mark where the two meet (``meta.REDUCE``): "mean" (estimates of a
Jacobian), "cat" (rows of samples), "sum" (gradients), "all" (flags).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from grapefx.errors import MethodError
from grapefx.ir import Slot, StepGraph, copied
from grapefx.passes.divide.tail import keep_only
from grapefx.passes.graph import meta
from grapefx.passes.graph.order import ancestors, dead_code
from grapefx.torch_compat import graph_module

Reduction = Literal["mean", "cat", "sum", "all"]

aten = torch.ops.aten

_ROLES = ("feedback", "metric")


@dataclass(frozen=True)
class Commit:
    """The graph that runs once a step. ``reads``: "saved" slots of the step of one microbatch.

    ``states``: slots of the feedback tensors that it reads. Its arguments are both, in this order.
    ``first``: whether it runs before the updates, which then use what it learned.
    """

    gm: GraphModule
    reads: tuple[Slot, ...]
    states: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    first: bool

    def readers(self) -> dict[Slot, tuple[str, ...]]:
        """For each of ``reads``, the layers whose part reads it; "" where it belongs to none."""
        held = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        output: Any = self.gm.graph.output_node()
        found: dict[Slot, dict[str, None]] = {s: {} for s in self.reads}
        for slot, node in zip(self.outputs, output.args[0], strict=True):
            leading = ancestors([node])
            for n, read in zip(held, self.reads, strict=False):
                if n in leading:
                    found[read][owner_of(slot)] = None
        return {s: tuple(names) for s, names in found.items()}

    def only(self, layers: Sequence[str]) -> Commit:
        """The part of it that belongs to some layers, and what belongs to none."""
        keep = [k for k, s in enumerate(self.outputs) if owner_of(s) in (*layers, "")]
        graph = copied(self.gm.graph)
        output = graph.output_node()
        output.args = (tuple(output.args[0][k] for k in keep),)  # type: ignore[index]
        dead_code(graph)
        both = [*self.reads, *self.states]
        held = [n for n in graph.nodes if n.op == "placeholder"]
        used = [s for n, s in zip(held, both, strict=True) if n.users]
        for n in held:
            if not n.users:
                graph.erase_node(n)
        return Commit(
            graph_module(self.gm, graph),
            tuple(s for s in self.reads if s in used),
            tuple(s for s in self.states if s in used),
            tuple(self.outputs[k] for k in keep),
            self.first,
        )


def reduction_of(slot: Slot) -> Reduction:
    """How a contribution joins those of other microbatches."""
    found: Any = slot.name.partition(":")[0]
    return found  # type: ignore[no-any-return]


def owner_of(slot: Slot) -> str:
    """The layer of a state ("layer/B") or of a metric's entry ("name/layer"); "" for none."""
    if slot.role == "feedback":
        return slot.name.rpartition("/")[0]
    return slot.name.partition("/")[2]


def reduced(how: Reduction, values: Sequence[Tensor]) -> Tensor:
    """The contributions of all microbatches as one."""
    if how == "cat":
        return torch.cat(list(values))
    if how == "all":
        return torch.stack(list(values)).all()
    total = values[0]
    for v in values[1:]:
        total = total + v
    return total / len(values) if how == "mean" else total


def cut_commit(step: StepGraph, names: Sequence[str], method: str) -> tuple[StepGraph, Commit]:
    """Divide ``step``, which is not changed. ``names``: of the layers, in the order of the entries
    of a metric. The states that the step of a microbatch projects with are its inputs, also where
    the method projects with what it has just learned.

    Raises:
        MethodError: the method learns from more than contributions that can be reduced.
    """
    work = step.copy()
    slots = dict(zip(work.placeholders(), work.inputs, strict=True))
    pairs = list(zip(work.outputs, work.results(), strict=True))
    moved = _entries([(s, n) for s, n in pairs if s.role in _ROLES], names)
    graph = Graph()
    twin: dict[Node, Node] = {}
    kept: dict[Node, Slot] = {}
    states: dict[Node, Slot] = {}

    def fetch(node: Node) -> Node:
        if node in twin:
            return twin[node]
        if meta.REDUCE in node.meta:
            kept[node] = Slot("saved", f"{node.meta[meta.REDUCE]}:{node.name}")
            new = graph.placeholder(node.name)
        elif node.op == "placeholder":
            if slots[node].role != "feedback":
                raise MethodError(
                    f"method {method!r} learns from {slots[node].role} {slots[node].name!r} of "
                    "each sample, which cannot be put together from microbatches\n  remedy: train "
                    "it without pipeline="
                )
            states[node] = slots[node]
            new = graph.placeholder(node.name)
        else:
            new = graph.node_copy(node, fetch)
        new.meta = dict(node.meta)
        twin[node] = new
        return new

    graph.output(tuple([fetch(n) for _, n in moved]))
    _inputs_first(graph, [twin[n] for n in (*kept, *states)])
    first = _project_with_inputs(pairs, slots, set(twin))
    rest = [(s, n) for s, n in pairs if s.role not in _ROLES]
    rest += [(s, n) for n, s in kept.items()]
    commit = Commit(
        graph_module(work.gm, graph),
        tuple(kept.values()),
        tuple(states.values()),
        tuple(s for s, _ in moved),
        first,
    )
    return keep_only(work, rest), commit


def _entries(moved: list[tuple[Slot, Any]], names: Sequence[str]) -> list[tuple[Slot, Node]]:
    """States and metrics; a metric with an entry a layer becomes one metric an entry."""
    found: list[tuple[Slot, Node]] = []
    for slot, node in moved:
        if slot.role == "metric" and node.target is aten.stack.default:
            for name, entry in zip(names, node.args[0], strict=True):
                if entry.target is not aten.new_full.default:  # the filling where there is none
                    found.append((Slot("metric", f"{slot.name}/{name}"), entry))
        else:
            found.append((slot, node))
    return found


def _inputs_first(graph: Graph, placeholders: list[Node]) -> None:
    cursor = graph._root
    for node in placeholders:
        cursor.append(node)
        cursor = node


def _project_with_inputs(
    pairs: list[tuple[Slot, Any]], slots: dict[Node, Slot], learning: set[Node]
) -> bool:
    """Whatever reads a new state beside the learning reads the input of that name instead.

    Returns whether anything did: then the step learns before it projects.
    """
    inputs = {s.name: n for n, s in slots.items() if s.role == "feedback"}
    found = False
    for slot, node in pairs:
        if slot.role != "feedback" or node.op == "placeholder":
            continue
        for user in list(node.users):
            if user.op != "output" and user not in learning:
                user.replace_input_with(node, inputs[slot.name])
                found = True
    return found
