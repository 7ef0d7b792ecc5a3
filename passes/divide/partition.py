"""Split: the step graph becomes a forward graph and an update graph with saved values between.

In: a whole step as one graph. Out: two graphs that, run one after the other, compute what the one
does, bit for bit. What to save and what to recompute is the min-cut of functorch's partitioner;
tangents are pinned to the forward graph, so that only d and the noise cross over, never the tangent
of an inner layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from grapefx.ir import Slot, StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.order import dead_code
from grapefx.torch_compat import graph_module, min_cut_partition

aten = torch.ops.aten


# Inputs of the update graph that the forward graph never sees. Feedback maps are read when the
# update runs, so that two forwards followed by two backwards both learn.
LATE = ("cotangent", "feedback", "target")


@dataclass(frozen=True)
class Split:
    """Two graphs and how values travel.

    ``forward`` returns outputs, then saved values; new buffer values are written in place.
    ``update`` takes saved values, then the late inputs that it uses.
    ``forward_inputs`` and ``late_inputs`` index into the step's inputs.
    """

    forward: GraphModule
    update: GraphModule
    inputs: tuple[Slot, ...]
    forward_inputs: tuple[int, ...]
    forward_outputs: tuple[Slot, ...]
    update_outputs: tuple[Slot, ...]
    saved: int
    late_inputs: tuple[int, ...]

    def halves(self) -> tuple[StepGraph, StepGraph]:
        """The two graphs as step graphs, for passes; saved values have slots of role "saved"."""
        between = tuple(Slot("saved", str(k)) for k in range(self.saved))
        forward = StepGraph(
            self.forward,
            tuple(self.inputs[i] for i in self.forward_inputs),
            (*self.forward_outputs, *between),
        )
        late = tuple(self.inputs[i] for i in self.late_inputs)
        return forward, StepGraph(self.update, (*between, *late), self.update_outputs)


def split(step: StepGraph) -> Split:
    """Partition ``step``; the step itself is not changed."""
    work = step.copy()
    graph = work.gm.graph
    placeholders = work.placeholders()
    cotangent = [s.role in LATE for s in work.inputs]
    for i, (node, late) in enumerate(zip(placeholders, cotangent, strict=True)):
        # functorch tells inputs of the two halves apart by these names
        name = f"tangents_{i}" if late else f"primals_{i}"
        node.name = node.target = name
    results = work.results()
    early = [i for i, s in enumerate(work.outputs) if s.role in ("output", "buffer")]
    # a parameter that the loss cannot reach has no gradient node at all
    late_out = [
        i
        for i, s in enumerate(work.outputs)
        if s.role not in ("output", "buffer") and results[i] is not None
    ]
    pinned = _pinned_tangents(work)
    order = [results[i] for i in early] + pinned + [results[i] for i in late_out]
    work.output_node().args = (tuple(order),)
    # functorch wants the inputs of the first half in front
    first = [n for n, late in zip(placeholders, cotangent, strict=True) if not late]
    last = [n for n, late in zip(placeholders, cotangent, strict=True) if late]
    _reorder(graph, first + last)
    joint = graph_module(work.gm, graph)
    forward, update = min_cut_partition(
        joint, [n.meta["val"] for n in first + last], len(early) + len(pinned)
    )

    outputs = list(_output(forward).args[0])  # type: ignore[arg-type]
    fixed = len(early) + len(pinned)
    saved = outputs[fixed:]
    kept = [o for o in outputs[: len(early)]]
    _write_buffers(forward.graph, work, early, kept)
    user = [o for o, i in zip(kept, early, strict=True) if work.outputs[i].role == "output"]
    _output(forward).args = (tuple(user + saved),)
    used = _drop_unused_inputs(forward.graph)
    dead_code(forward.graph)
    back_inputs = [n for n in update.graph.nodes if n.op == "placeholder"]
    names = {f"tangents_{i}": i for i, c in enumerate(cotangent) if c}
    late_inputs = [n for n in back_inputs if n.name in names]
    assert len(back_inputs) == len(saved) + len(late_inputs)
    # functorch puts sizes first on one side and last on the other: match the two by name
    by_name = {n.name: n for n in back_inputs}
    saved_inputs = [by_name[o.name] for o in saved]
    _reorder(update.graph, saved_inputs + late_inputs)
    step_index = {n.target: i for i, n in enumerate(placeholders)}
    return Split(
        forward=graph_module(forward, forward.graph),
        update=graph_module(update, update.graph),
        inputs=step.inputs,
        forward_inputs=tuple(step_index[name] for name in used),
        forward_outputs=tuple(work.outputs[i] for i in early if work.outputs[i].role == "output"),
        update_outputs=tuple(work.outputs[i] for i in late_out),
        saved=len(saved),
        late_inputs=tuple(names[n.name] for n in late_inputs),
    )


def forward_only(step: StepGraph) -> tuple[StepGraph, tuple[int, ...]]:
    """A graph without a backward (inference) and the inputs that it uses; buffers in place."""
    work = step.copy()
    graph = work.gm.graph
    placeholders = work.placeholders()
    for i, node in enumerate(placeholders):
        node.name = node.target = f"primals_{i}"
    results = work.results()
    early = list(range(len(results)))
    _write_buffers(graph, work, early, results)
    outs = [r for r, s in zip(results, work.outputs, strict=True) if s.role == "output"]
    work.output_node().args = (tuple(outs),)
    dead_code(graph)
    index = {n.target: i for i, n in enumerate(placeholders)}
    used = _drop_unused_inputs(graph)
    inputs = tuple(index[name] for name in used)
    slots = tuple(step.inputs[i] for i in inputs)
    outputs = tuple(s for s in work.outputs if s.role == "output")
    return StepGraph(graph_module(work.gm, graph), slots, outputs), inputs


def _output(gm: GraphModule) -> Node:
    node: Node = gm.graph.output_node()
    return node


def _pinned_tangents(step: StepGraph) -> list[Node]:
    """Tangent values that something outside the tangent phase reads: they end the forward graph."""
    pinned = []
    for node in step.gm.graph.nodes:
        if node.op != "call_function" or meta.phase(node) != "tangent":
            continue
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if any(u.op == "output" or meta.phase(u) != "tangent" for u in node.users):
            pinned.append(node)
    return pinned


def _reorder(graph: Graph, placeholders: list[Node]) -> None:
    cursor = graph._root
    for node in placeholders:
        if cursor.next is not node:
            cursor.append(node)
        cursor = node


def _write_buffers(graph: Graph, step: StepGraph, early: list[int], kept: list[Node]) -> None:
    """New buffer values are copied into the buffers at the end of the forward graph."""
    output = graph.output_node()
    by_name = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    where = {s.name: f"primals_{i}" for i, s in enumerate(step.inputs) if s.role == "buffer"}
    for value, i in zip(kept, early, strict=True):
        slot = step.outputs[i]
        if slot.role != "buffer":
            continue
        target = by_name[where[slot.name]]
        if value is target:
            continue
        with graph.inserting_before(output):
            node = graph.call_function(aten.copy_.default, (target, value))
        node.meta["val"] = target.meta["val"]


def _drop_unused_inputs(graph: Graph) -> list[str]:
    used = []
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if node.users:
            used.append(node.target)
        else:
            graph.erase_node(node)
    return used
