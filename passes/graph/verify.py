"""What must hold of a step graph: the contract of every pass, and the independence of updates."""

from __future__ import annotations

from torch.fx import Node

from grapefx.errors import VerifyError
from grapefx.ir import INPUT_ROLES, OUTPUT_ROLES, Layer, StepGraph
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.order import writes


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
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise VerifyError(f"{after}: node {node.name!r} is a {node.op}")
        mutable = node.op == "call_function" and writes(node)
        if mutable and not node.users:  # its effect, a gradient perhaps, would be lost
            raise VerifyError(
                f"{after}: node {node.name!r} ({node.target}) writes into a view, which the graph "
                "cannot follow\n  remedy: please report this model"
            )
        if node.op != "output" and "val" not in node.meta:
            raise VerifyError(f"{after}: node {node.name!r} has no fake value")
    return step


def independence(step: StepGraph, layers: tuple[Layer, ...]) -> dict[str, tuple[str, ...]]:
    """Prove that no update subgraph depends on another layer's.

    Follows every projected cotangent through the graph. Returns, for each parameter gradient, the
    layers whose cotangent reaches it. Raises ``VerifyError`` naming a path when a cotangent reaches
    another layer's cotangent, or the gradient of a parameter outside its segment.
    """
    index = {layer.name: layer.index for layer in layers}
    reach: dict[Node, int] = {}
    for node in step.gm.graph.nodes:
        if node.op == "output":
            continue
        bits = 0
        for a in node.all_input_nodes:
            bits |= reach.get(a, 0)
        if node.op == "call_function" and node.target is markers.CUT_BACKWARD:
            raise VerifyError(f"node {node.name!r}: a cut still carries the chain's gradient")
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
