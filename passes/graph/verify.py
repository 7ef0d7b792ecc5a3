"""What must hold of a step graph: the contract of every pass, and the independence of updates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch.fx import Node

from grapefx.errors import VerifyError
from grapefx.ir import INPUT_ROLES, OUTPUT_ROLES, Layer, StepGraph
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.order import descendants, writes


def check(step: StepGraph, after: str) -> StepGraph:
    """The contract: a valid graph, fake values everywhere, slots that match the signature.

    Raises ``VerifyError`` naming the pass (``after``) that broke it.
    """
    graph = step.gm.graph
    try:
        graph.lint()
    except Exception as e:
        raise VerifyError(f"{after}: invalid graph: {str(e).splitlines()[0]}") from e
    placeholders = step.placeholders()
    if len(placeholders) != len(step.inputs) or len(step.results()) != len(step.outputs):
        raise VerifyError(f"{after}: the graph's signature and its slots differ")
    for slot in step.inputs:
        if slot.role not in INPUT_ROLES:
            raise VerifyError(f"{after}: unknown input role {slot.role!r}")
    for slot in step.outputs:
        if slot.role not in OUTPUT_ROLES:
            raise VerifyError(f"{after}: unknown output role {slot.role!r}")
    buffers = {n for _, n in step.select("buffer")}
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise VerifyError(f"{after}: node {node.name!r} is a {node.op}")
        mutable = node.op == "call_function" and writes(node)
        # its effect, a gradient perhaps, would be lost; a forward graph ends by writing buffers
        if mutable and not node.users and node.args[0] not in buffers:
            raise VerifyError(
                f"{after}: node {node.name!r} ({node.target}) writes into a view, which the graph "
                "cannot follow\n  remedy: please report this model"
            )
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError(f"{after}: node {node.name!r} has no fake value")
    return step


def _has_markers(step: StepGraph) -> str:
    taps = markers.find(step.gm.graph, markers.TAP)
    return "" if taps else "it has no error tap"


def _no_markers(step: StepGraph) -> str:
    left = [n for n in step.gm.graph.nodes if n.op == "call_function" and n.target in markers.ALL]
    return f"the marker {left[0].name!r} is left" if left else ""


def _no_dead_code(step: StepGraph) -> str:
    dead = [
        n for n in step.gm.graph.nodes if n.op == "call_function" and not n.users and not writes(n)
    ]
    return f"nothing reads node {dead[0].name!r}" if dead else ""


def _labelled(step: StepGraph) -> str:
    bare = [n for n in step.gm.graph.nodes if n.op == "call_function" and meta.phase(n) is None]
    return f"node {bare[0].name!r} has no phase" if bare else ""


# What a pass may ask of a graph, or promise: each returns what is wrong, "" where it holds.
PROPERTIES: dict[str, Callable[[StepGraph], str]] = {
    "markers": _has_markers,
    "no markers": _no_markers,
    "no dead code": _no_dead_code,
    "labelled": _labelled,
}


def require(step: StepGraph, names: Sequence[str], when: str) -> StepGraph:
    """Raise ``VerifyError`` unless the named ``PROPERTIES`` hold; ``when`` names the pass."""
    for name in names:
        wrong = PROPERTIES[name](step)
        if wrong:
            raise VerifyError(f"{when}: the graph must have the property {name!r}, but {wrong}")
    return step


def _check_late(step: StepGraph, late: Collection[str]) -> None:
    """Raise ``VerifyError`` where this step's update, or a result, waits for exact rows."""
    phases = ("exact_rows", "late_rows")
    waits = descendants(n for n in step.gm.graph.nodes if meta.phase(n) in phases)
    for node in step.gm.graph.nodes:
        if meta.phase(node) == "projection" and node in waits:
            raise VerifyError(
                f"the update of layer {meta.layer(node)!r} waits for the chain of exact rows (at "
                f"node {node.name!r}, {node.target}), which is for the next step"
            )
    for slot, node in zip(step.outputs, step.results(), strict=True):
        own = slot.role == "metric" or (slot.role == "feedback" and slot.name in late)
        if node in waits and not own:
            raise VerifyError(
                f"the {slot.role.replace('_', ' ')} {slot.name!r} waits for the chain of exact "
                f"rows (node {node.name!r}), which is for the next step"
            )


def independence(
    step: StepGraph,
    layers: tuple[Layer, ...],
    exact_rows: bool = False,
    late: Collection[str] | None = None,
) -> dict[str, tuple[str, ...]]:
    """Prove that no update subgraph depends on another layer's.

    With ``exact_rows`` all may read a chain of true gradients of a part of the batch (the phase of
    that name), which must itself depend on no update. Without it no node may be of that phase.
    ``late``: the names of the states that may, in place of the updates; beside metrics no other
    result may wait for the chain then.

    Maps from mean derivatives (phase "mean_field") must depend on no update and on no error.

    Follows every projected cotangent through the graph. Returns, for each parameter gradient, the
    layers whose cotangent reaches it. Raises ``VerifyError`` naming a path when a cotangent reaches
    another layer's cotangent, or the gradient of a parameter outside its segment.
    """
    index = {layer.name: layer.index for layer in layers}
    reach: dict[Node, int] = {}
    error = descendants(n for _, n in step.select("cotangent"))
    if late is not None:
        _check_late(step, late)
    for node in step.gm.graph.nodes:
        if node.op == "output":
            continue
        bits = 0
        for a in node.all_input_nodes:
            bits |= reach.get(a, 0)
        if node.op == "call_function" and node.target is markers.CUT_BACKWARD:
            raise VerifyError(f"node {node.name!r}: a cut still carries the chain's gradient")
        if meta.phase(node) == "exact_rows":
            if not exact_rows:
                raise VerifyError(f"node {node.name!r} is part of a chain, which nobody asked for")
            if bits:
                raise VerifyError(
                    f"the chain of exact rows reads the update of layer "
                    f"{layers[bits.bit_length() - 1].name!r} (at node {node.name!r}, {node.target})"
                )
        if meta.phase(node) == "mean_field" and (bits or node in error):
            raise VerifyError(
                f"the maps from mean derivatives wait for "
                f"{'an update' if bits else 'the error'} (at node {node.name!r}, {node.target})"
            )
        if meta.phase(node) == "projection":
            own = 1 << index[node.meta[meta.LAYER]]
            if bits & ~own:
                other = layers[(bits & ~own).bit_length() - 1].name
                raise VerifyError(
                    f"the update of layer {node.meta[meta.LAYER]!r} waits for layer {other!r} "
                    f"(at node {node.name!r}, {node.target})"
                )
            bits |= own
        reach[node] = bits
    found: dict[str, tuple[str, ...]] = {}
    for slot, node in step.produced("gradient"):
        if not isinstance(node, Node):
            continue
        hit = [layer for layer in layers if reach.get(node, 0) >> layer.index & 1]
        for layer in hit:
            if slot.name not in layer.parameters:
                raise VerifyError(
                    f"the gradient of {slot.name!r} depends on the cotangent of layer "
                    f"{layer.name!r}, whose segment does not hold it"
                )
        found[slot.name] = tuple(layer.name for layer in hit)
    return found
