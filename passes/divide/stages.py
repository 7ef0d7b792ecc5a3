"""Stages: one step graph of any kind becomes one step graph for each stage of a pipeline.

In: a step graph with fixed sizes (``lowering.prepare``), in front of ``split``. Out: graphs that,
run in order, compute what the one does, bit for bit, and the values that travel between them.

Which stage computes a node says ``owners``; here the graphs are cut. Views, and what depends on
neither the batch nor the error (transposed weights, masks, tables), are made where they are read.
Forward values may go to any later stage: skips, masks and tables need nothing special where no
gradient runs through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

from grapefx.errors import PlacementError, VerifyError
from grapefx.ir import Layer, OutputRole, Slot, StepGraph
from grapefx.passes.divide.owners import LATE_ROLES, Owners, legal_ends, stage_numbers
from grapefx.passes.graph import meta
from grapefx.passes.graph.annotate import HEAD
from grapefx.passes.graph.order import dead_code
from grapefx.torch_compat import graph_module

aten = torch.ops.aten

# "recv": a forward value for a later stage. "late": the error or a tangent, from the last stage to
# any. "chain": a gradient that runs back through the stages (exact steps only).
Kind = Literal["recv", "late", "chain"]

SEND = "send:"
# What moves no data: made where it is read, from what travels anyway.
_VIEWS = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.t.default,
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default, aten.detach.default, aten.alias.default,
}  # fmt: skip


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
