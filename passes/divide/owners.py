"""Which stage of a pipeline computes each node of a step graph.

Ownership is by data dependence, not by labels alone: a forward value belongs to the latest stage
that anything it reads belongs to; what depends on a layer's own cotangent belongs to that layer's
stage; the error belongs to the last stage.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from grapefx.errors import PlacementError
from grapefx.ir import Layer, StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.annotate import HEAD
from grapefx.passes.graph.operators import draws
from grapefx.passes.graph.order import ancestors, descendants

aten = torch.ops.aten

LATE_ROLES = ("cotangent", "feedback", "target")
_OWN_LAYER = ("projection", "alignment", "refit", "metric")


def stage_numbers(layers: Sequence[Layer], ends: Sequence[int]) -> dict[str, int]:
    """The stage of each layer by name, and of what lies behind the last; a stage ends behind each
    of ``ends`` (indices of layers), the last one behind the output.

    Raises:
        PlacementError: ``ends`` are not ascending indices of layers.
    """
    if list(ends) != sorted(set(ends)) or any(not 0 <= k < len(layers) for k in ends):
        raise PlacementError(
            f"stages end behind layers {list(ends)}, which must be ascending numbers under "
            f"{len(layers)}, the number of feedback points"
        )
    found = {layer.name: sum(k < layer.index for k in ends) for layer in layers}
    return {**found, HEAD: len(ends)}


def legal_ends(layers: Sequence[Layer]) -> tuple[int, ...]:
    """The layers behind which a stage may end: no parameter learns from layers on both sides."""
    spans: dict[str, list[int]] = {}
    for layer in layers:
        for p in layer.parameters:
            spans.setdefault(p, []).append(layer.index)
    bad = {k for found in spans.values() for k in range(min(found), max(found))}
    return tuple(k for k in range(len(layers)) if k not in bad)


class Owners:
    """Which stage computes each node; ``of`` has no entry for what is made where it is read.

    ``error``: late values that belong to no layer. ``holders``: the stages whose forward reads a
    parameter. ``parts``: the addends of a gradient to which several stages contribute, by its node.
    """

    def __init__(
        self, step: StepGraph, layers: Sequence[Layer], ends: Sequence[int], exact: bool
    ) -> None:
        self.label = stage_numbers(layers, ends)
        self.last = len(ends)
        self.slots = dict(zip(step.placeholders(), step.inputs, strict=True))
        self.nodes = [n for n in step.gm.graph.nodes if n.op != "output"]
        self.of: dict[Node, int] = {}
        self.parts: dict[Node, list[Node]] = {}
        # of a node that leads to one gradient alone: the stages that hold the parameter
        self.home: dict[Node, tuple[int, ...]] = {}
        self.late = descendants(n for n, s in self.slots.items() if s.role in LATE_ROLES)
        self.late &= set(self.nodes)
        self._forward(step)
        self.holders = self._holders()
        self._sums(step)
        if exact:
            self._weight_gradients(step)
        projected = self._projected()
        # the error: of an exact step what is called so, of any other all that no layer changed
        self.error = {
            n
            for n in self.late - set(projected)
            if n.op == "placeholder" or not exact or meta.phase(n) == "error"
        }
        for node in self.nodes:
            if node not in self.late:
                continue
            if node.op == "placeholder":
                self._late_input(node)
            elif node in projected:
                self.of[node] = projected[node]
            elif meta.phase(node) == "refit":
                continue  # the ridge system of all layers is small: each stage solves it
            elif exact:
                self._chained(node)
            else:
                self.of[node] = self.last

    def _forward(self, step: StepGraph) -> None:
        """Forward values and tangents: the latest stage of what they read, or of their layer."""
        drawn = [n for n in self.nodes if draws(n)]
        data = descendants(
            [n for n, s in self.slots.items() if s.role in ("input", "noise", "random")] + drawn
        )
        ends = [n for r in ("output", "buffer") for _, n in step.produced(r) if isinstance(n, Node)]
        ends += [n for n in self.nodes if meta.phase(n) == "tangent"]
        useful = ancestors(ends + drawn)
        for node in self.nodes:
            if node.op == "placeholder":
                if self.slots[node].role == "input":
                    self.of[node] = 0
            elif node in data and node not in self.late:
                own = [self.of[a] for a in node.all_input_nodes if a in self.of]
                if node.target is operator.getitem:
                    if own:
                        self.of[node] = own[0]
                elif node in useful:
                    mark = self.label.get(meta.layer(node) or "", 0)
                    self.of[node] = max([mark, *own])

    def _holders(self) -> dict[str, tuple[int, ...]]:
        """The stages that read each parameter, through views of it too."""
        reads: dict[Node, set[str]] = {
            n: {s.name} for n, s in self.slots.items() if s.role == "parameter"
        }
        found: dict[str, set[int]] = {}
        for node in self.nodes:
            if node.op == "placeholder" or node in self.late:
                continue
            names = {p for a in node.all_input_nodes for p in reads.get(a, ())}
            if node in self.of:
                for p in names:
                    found.setdefault(p, set()).add(self.of[node])
            else:
                reads[node] = names
        return {p: tuple(sorted(s)) for p, s in found.items()}

    def _sums(self, step: StepGraph) -> None:
        """Gradients of parameters that several stages hold, as lists of addends."""
        for slot, node in step.produced("gradient"):
            if isinstance(node, Node) and len(self.holders.get(slot.name, ())) > 1:
                self.parts[node] = _addends(node)

    def _weight_gradients(self, step: StepGraph) -> None:
        """What leads to one parameter's gradient alone is computed where the parameter is."""
        for slot, node in step.produced("gradient"):
            held = self.holders.get(slot.name, ())
            todo = [node] if isinstance(node, Node) and held else []
            while todo:
                n = todo.pop()
                if (
                    n.op == "call_function"
                    and meta.phase(n) == "weight_grad"
                    and n not in self.home
                ):
                    self.home[n] = held
                    todo += n.all_input_nodes

    def _projected(self) -> dict[Node, int]:
        """What depends on a layer's own cotangent, or on its state: the stage of that layer."""
        found: dict[Node, set[int]] = {}
        out: dict[Node, int] = {}
        sums = {n for parts in self.parts.values() for n in parts} | set(self.parts)
        for node in self.nodes:
            name = meta.layer(node)
            own = meta.phase(node) in _OWN_LAYER and name != HEAD and name in self.label
            if own and node in self.late:
                found[node] = {self.label[name or ""]}
            else:
                found[node] = {s for a in node.all_input_nodes for s in found.get(a, ())}
            if len(found[node]) > 1 and node not in sums:
                found[node] = {min(found[node])}
            if found[node]:
                out[node] = min(found[node])
        return out

    def _late_input(self, node: Node) -> None:
        slot = self.slots[node]
        if slot.role == "feedback":
            self.of[node] = self.label.get(slot.name.rpartition("/")[0], self.last)
        else:
            self.of[node] = self.last

    def _chained(self, node: Node) -> None:
        """A backward node of an exact step: where its forward operands and weights are, but never
        above the stage that its gradient comes from.
        """
        above = [self.of[a] for a in node.all_input_nodes if a in self.late and a in self.of]
        top = min(above, default=self.last)
        if node in self.home:
            self.of[node] = max((s for s in self.home[node] if s <= top), default=top)
            return
        if node.target is operator.getitem or meta.phase(node) == "error":
            self.of[node] = top
            return
        here: list[int] = []
        for a in node.all_input_nodes:
            if a not in self.late:
                here += self._places(a)
        here = [s for s in here if s <= top]
        self.of[node] = max(here) if here else top

    def _places(self, node: Node) -> tuple[int, ...]:
        if node in self.of:
            return (self.of[node],)
        if node in self.slots:
            slot = self.slots[node]
            return self.holders.get(slot.name, ()) if slot.role == "parameter" else ()
        return tuple(s for a in node.all_input_nodes for s in self._places(a))


def _addends(node: Node) -> list[Node]:
    """The terms of a sum, in order; views of a sum and other nodes are one term."""
    if node.op == "call_function" and node.target is aten.add.Tensor and not node.kwargs:
        a, b = node.args
        if isinstance(a, Node) and isinstance(b, Node):
            return [*_addends(a), *_addends(b)]
    return [node]
