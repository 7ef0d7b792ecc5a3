"""Stages: one step graph of any kind becomes one step graph for each stage of a pipeline.

In: a step graph with fixed sizes (``lowering.prepare``), in front of ``split``. Out: graphs that,
run in order, compute what the one does, bit for bit, and the values that travel between them.

Ownership is by data dependence, not by labels alone: a forward value belongs to the latest stage
that anything it reads belongs to; what depends on a layer's own cotangent belongs to that layer's
stage; the error belongs to the last stage. Views, and what depends on neither the batch nor the
error (transposed weights, masks, tables), are made where they are read. Forward values may go to
any later stage: skips, masks and tables need nothing special where no gradient runs through them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from grapefx.errors import PlacementError, VerifyError
from grapefx.ir import Layer, OutputRole, Slot, StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.annotate import HEAD
from grapefx.passes.graph.order import ancestors, dead_code, descendants
from grapefx.torch_compat import graph_module

aten = torch.ops.aten

# "recv": a forward value for a later stage. "late": the error or a tangent, from the last stage to
# any. "chain": a gradient that runs back through the stages (exact steps only).
Kind = Literal["recv", "late", "chain"]

LATE_ROLES = ("cotangent", "feedback", "target")
SEND = "send:"
# What moves no data: made where it is read, from what travels anyway.
_VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default, aten.detach.default, aten.alias.default,
}  # fmt: skip
_OWN_LAYER = ("projection", "alignment", "refit", "metric")


@dataclass(frozen=True)
class Channel:
    """One value that travels: ``name`` is the node's, ``val`` its fake value."""

    name: str
    kind: Kind
    source: int
    targets: tuple[int, ...]
    val: torch.Tensor

    @property
    def slot(self) -> str:
        """The name of the input slot that receives it."""
        return f"{self.kind}:{self.name}"

    @property
    def bytes(self) -> int:
        """Bytes of one transfer to one stage."""
        return self.val.numel() * self.val.element_size()


@dataclass(frozen=True)
class Stage:
    """One stage's part of a step: inputs that arrive have names ``recv:``, ``late:``, ``chain:``
    and a node's name; outputs that leave have ``send:`` and the node's name.
    """

    index: int
    step: StepGraph


@dataclass(frozen=True)
class Stages:
    """A step in stages. ``shared``: the stages that read a parameter, where there are several; its
    gradient is the sum of what these stages return for it.
    """

    stages: tuple[Stage, ...]
    channels: tuple[Channel, ...]
    shared: dict[str, tuple[int, ...]]


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


def split_stages(
    step: StepGraph,
    layers: Sequence[Layer],
    ends: Sequence[int],
    *,
    exact: bool = False,
    readers: Mapping[Slot, Sequence[str]] | None = None,
) -> Stages:
    """Divide ``step``, which is not changed, behind the layers ``ends``.

    ``exact``: the step holds a true backward pass (kind "calibration"), which runs through the
    stages; in any other a gradient between stages is refused. ``readers``: for each output of the
    role "saved", the layers whose stages return it; the name "" stands for all stages.

    Raises:
        PlacementError: a stage cannot end there; the message names the parameter.
        VerifyError: a gradient would travel between the stages of a step that has no chain.
    """
    stage_numbers(layers, ends)
    illegal = sorted(set(ends) - set(legal_ends(layers)))
    if illegal:
        k = illegal[0]
        both = {p for a in layers[: k + 1] for p in a.parameters}
        both &= {p for a in layers[k + 1 :] for p in a.parameters}
        raise PlacementError(
            f"a stage cannot end behind layer {layers[k].name!r}: {sorted(both)[0]!r} is used on "
            "both sides and learns from both\n  remedy: end it elsewhere, or stages='auto'"
        )
    owners = Owners(step, layers, ends, exact)
    found = _Cutter(step, owners, readers or {}).run()
    _alone(found.channels, exact)
    return found


def _alone(channels: Iterable[Channel], exact: bool) -> None:
    """No gradient may travel in a step whose updates need none."""
    chains = [c for c in channels if c.kind == "chain"]
    if chains and not exact:
        c = chains[0]
        raise VerifyError(
            f"the update of stage {c.targets[0]} waits for value {c.name!r} of the update of stage "
            f"{c.source}: only exact steps may chain stages\n  remedy: please report this model"
        )


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
        drawn = [n for n in self.nodes if is_random(n)]
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


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers."""
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def _addends(node: Node) -> list[Node]:
    """The terms of a sum, in order; views of a sum and other nodes are one term."""
    if node.op == "call_function" and node.target is aten.add.Tensor and not node.kwargs:
        a, b = node.args
        if isinstance(a, Node) and isinstance(b, Node):
            return [*_addends(a), *_addends(b)]
    return [node]


class _Cutter:
    """The graphs of the stages in the making."""

    def __init__(
        self, step: StepGraph, owners: Owners, readers: Mapping[Slot, Sequence[str]]
    ) -> None:
        self.step, self.o, self.readers = step, owners, readers
        self.count = owners.last + 1
        self.outputs: list[list[tuple[Slot, list[Node]]]] = [[] for _ in range(self.count)]
        self.shared: dict[str, tuple[int, ...]] = {}
        self.need: list[set[Node]] = [set() for _ in range(self.count)]
        self.recv: list[dict[Node, int]] = [{} for _ in range(self.count)]

    def run(self) -> Stages:
        self._homes()
        wanted: list[set[Node]] = [
            {n for _, nodes in found for n in nodes} for found in self.outputs
        ]
        while any([self._pull(s, wanted) for s in range(self.count)]):
            pass
        channels = self._channels()
        stages = tuple(Stage(s, self._graph(s, channels)) for s in range(self.count))
        return Stages(stages, channels, self.shared)

    def _homes(self) -> None:
        """Which stage returns each output."""
        for slot, node in zip(self.step.outputs, self.step.results(), strict=True):
            if not isinstance(node, Node):
                continue
            if slot.role == "metric" and node.target is aten.stack.default:
                self._stacked(slot, node)
            elif slot.role == "gradient" and node in self.o.parts:
                self._gradient(slot, node)
            elif slot in self.readers:
                names = self.readers[slot]
                at = range(self.count) if "" in names else {self.o.label[n] for n in names}
                for s in at:
                    self.outputs[s].append((slot, [node]))
            else:
                self.outputs[self._home(slot, node)].append((slot, [node]))

    def _home(self, slot: Slot, node: Node) -> int:
        o = self.o
        if slot.role == "output":
            return o.last
        if slot.role == "feedback":
            return o.label.get(slot.name.rpartition("/")[0], o.last)
        if slot.role == "gradient" and slot.name in o.holders:
            return o.holders[slot.name][0]
        if node in o.of:
            return o.of[node]
        return o.label.get(meta.layer(node) or "", 0 if slot.role == "buffer" else o.last)

    def _gradient(self, slot: Slot, node: Node) -> None:
        """Each stage returns the sum of its own terms."""
        held = self.o.holders[slot.name]
        self.shared[slot.name] = held
        if any(u.op != "output" for u in node.users):  # a metric reads the whole sum
            self.outputs[self.o.of[node]].append((slot, [node]))
            return
        own: dict[int, list[Node]] = {}
        for n in self.o.parts[node]:
            at = self.o.of.get(n, held[0])
            # a term computed where the parameter is not goes to the nearest stage that has it
            at = max((h for h in held if h <= at), default=held[0])
            own.setdefault(at, []).append(n)
        for at, nodes in own.items():
            self.outputs[at].append((slot, nodes))

    def _stacked(self, slot: Slot, node: Node) -> None:
        """A metric has an entry a layer: each stage returns its own, named after the layer."""
        names = [name for name in self.o.label if name != HEAD]
        for name, value in zip(names, node.args[0], strict=True):  # type: ignore[arg-type]
            assert isinstance(value, Node)
            if value.target is not aten.new_full.default:  # the filling where there is no entry
                found = Slot("metric", f"{slot.name}/{name}")
                self.outputs[self.o.label[name]].append((found, [value]))

    def _pull(self, s: int, wanted: list[set[Node]]) -> bool:
        """Everything that stage ``s`` computes or receives for what is wanted of it."""
        todo = [n for n in wanted[s] if n not in self.need[s] and n not in self.recv[s]]
        changed = bool(todo)
        while todo:
            n = todo.pop()
            if n in self.need[s] or n in self.recv[s]:
                continue
            at = self.o.of.get(n, s)
            view = n.op == "call_function" and n.target in _VIEWS
            if at != s and not view:
                self.recv[s][n] = at
                wanted[at].add(n)
                continue
            self.need[s].add(n)
            todo += n.all_input_nodes
        return changed

    def _channels(self) -> tuple[Channel, ...]:
        found = []
        for n in self.o.nodes:
            targets = [t for t in range(self.count) if n in self.recv[t]]
            for kind in ("recv", "late", "chain"):
                at = tuple(t for t in targets if self._kind(n, t) == kind)
                if at:
                    val = n.meta.get("val")
                    if not isinstance(val, torch.Tensor):
                        raise VerifyError(
                            f"value {n.name!r} would travel between stages, but it is no tensor"
                        )
                    found.append(Channel(n.name, kind, self.o.of[n], at, val))
        return tuple(found)

    def _kind(self, n: Node, target: int) -> Kind:
        if n not in self.o.late:
            return "recv" if target > self.o.of[n] else "late"
        return "late" if n in self.o.error else "chain"

    def _graph(self, s: int, channels: tuple[Channel, ...]) -> StepGraph:
        new = Graph()
        env: dict[Node, Node] = {}
        inputs: list[Slot] = []
        named = {n.name: n for n in self.o.nodes}
        arriving = {
            named[c.name]: Slot("input" if c.kind == "recv" else "cotangent", c.slot)
            for c in channels
            if s in c.targets
        }
        own = {n: slot for n, slot in self.o.slots.items() if n in self.need[s]}
        both = [(n, {**own, **arriving}[n]) for n in self.o.nodes if n in own or n in arriving]
        for n, slot in sorted(both, key=lambda pair: pair[1].role in LATE_ROLES):
            env[n] = new.placeholder(n.name)
            env[n].meta = dict(n.meta)
            inputs.append(slot)
        for n in self.o.nodes:
            if n in self.need[s] and n.op == "call_function":
                env[n] = new.node_copy(n, lambda a: env[a])
                env[n].meta = dict(n.meta)
                if self.o.of.get(n, s) > s:  # a view of a later stage's tangent: here it comes late
                    env[n].meta[meta.PHASE] = "error"
        results: list[Any] = []
        slots: list[Slot] = []
        for name in dict.fromkeys(c.name for c in channels if c.source == s):
            role: OutputRole = "saved" if named[name] in self.o.late else "output"
            results.append(env[named[name]])
            slots.append(Slot(role, SEND + name))
        for slot, nodes in self.outputs[s]:
            results.append(_sum(new, [env[n] for n in nodes]))
            slots.append(slot)
        new.output(tuple(results))
        dead_code(new)
        new.lint()
        return StepGraph(graph_module(self.step.gm, new), tuple(inputs), tuple(slots))


def _sum(graph: Graph, nodes: list[Node]) -> Node:
    total = nodes[0]
    for n in nodes[1:]:
        made = graph.call_function(aten.add.Tensor, (total, n))
        made.meta = dict(n.meta)
        total = made
    return total


__all__ = [
    "LATE_ROLES",
    "SEND",
    "Channel",
    "Owners",
    "Stage",
    "Stages",
    "is_random",
    "legal_ends",
    "split_stages",
    "stage_numbers",
]
