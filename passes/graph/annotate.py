"""Phase and layer of every node of a step graph, for reports, schedules and the verifier.

Passes name the phase of what they emit; this fills in the rest. Forward nodes belong to the first
feedback point that they lead to; backward nodes to the last layer whose gradient they lead to.
"""

from __future__ import annotations

from torch.fx import Node

from grapefx.ir import Layer, StepGraph
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.order import ancestors, descendants
from grapefx.passes.graph.source import module_path

HEAD = "head"


def mark_forward(step: StepGraph, layers: tuple[Layer, ...]) -> None:
    """Before cuts are erased: the layer of each forward node."""
    names = [layer.name for layer in layers]
    first: dict[Node, int] = {}
    useful = ancestors([n for _, n in step.produced("output") if isinstance(n, Node)])
    for node in reversed(list(step.gm.graph.nodes)):
        if node.op == "output":
            continue
        index = min((first[u] for u in node.users if u in first), default=len(names))
        if node.op == "call_function" and node.target is markers.CUT:
            index = min(index, node.args[1])  # type: ignore[type-var,assignment]
        first[node] = index
        if node.op == "call_function":
            layer = names[index] if index < len(names) else HEAD
            if layer == HEAD and node not in useful:
                layer = _by_module(node, layers) or HEAD
            node.meta.setdefault(meta.LAYER, layer)


def annotate(step: StepGraph, layers: tuple[Layer, ...]) -> None:
    """Fill in the phase and the layer of every node, in place."""
    layer_of = {p: layer.index for layer in layers for p in layer.parameters}
    names = [layer.name for layer in layers] + [HEAD]
    backward = descendants([n for _, n in step.select("cotangent")])
    # what leads to the error (through a wide head, or a loss inside the model) is nobody's update
    error = ancestors([n for n in step.gm.graph.nodes if meta.phase(n) == "error"])
    reach: dict[Node, set[int]] = {}
    deepest: dict[Node, int] = {}
    for k, (slot, node) in enumerate(step.produced("gradient")):
        if isinstance(node, Node):
            reach.setdefault(node, set()).add(k)
            deepest[node] = max(deepest.get(node, -1), layer_of.get(slot.name, len(layers)))
    for _, node in step.produced("buffer"):
        if isinstance(node, Node) and node.op == "call_function":
            node.meta.setdefault(meta.PHASE, "buffer")
    for node in reversed(list(step.gm.graph.nodes)):
        if node.op != "call_function":
            continue
        own = reach.setdefault(node, set())
        for user in node.users:
            if user.op == "call_function":
                own |= reach.get(user, set())
                if user in deepest:
                    deepest[node] = max(deepest.get(node, -1), deepest[user])
        if node in backward and node in error:
            node.meta[meta.PHASE] = meta.phase(node) or "error"
        elif node in backward:
            phase = "weight_grad" if len(own) == 1 else "input_grad"
            node.meta[meta.PHASE] = meta.phase(node) or phase
            if node.meta[meta.PHASE] in ("weight_grad", "input_grad") and node in deepest:
                node.meta[meta.LAYER] = names[deepest[node]]
        else:
            node.meta[meta.PHASE] = meta.phase(node) or "forward"


def _by_module(node: Node, layers: tuple[Layer, ...]) -> str | None:
    """The layer that holds the node's module: for counters, which lead to no feedback point."""
    stack = [path for path, _ in module_path(node)]
    for path in reversed(stack):
        for layer in layers:
            if any(p.startswith(path + ".") for p in layer.parameters):
                return layer.name
    return None
