"""From the output error to the cotangent at each cut, and from there to the parameters' gradients.

A method's ``cotangent`` turns e into what stands for the gradient at h_l; corrections that the
options ask for come after it. ``replace_cuts`` puts it where the backward chain would have arrived:
the local derivatives behind each cut, which the joint graph holds, then give the gradients of that
layer's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from grapefx.maps import FeedbackMap
from grapefx.methods.base import Method, State
from grapefx.passes.feedback.builder import Builder
from grapefx.passes.feedback.late_rows import correct_later
from grapefx.passes.feedback.learning import all_finite
from grapefx.passes.feedback.method_calls import authored, rows_of
from grapefx.passes.feedback.normal_equations import without_memory
from grapefx.passes.feedback.radial import corrected
from grapefx.passes.graph import markers


def project(b: Builder, states: Sequence[dict[str, Node]]) -> dict[int, Node]:
    """What the method puts at each cut, by index, with the corrections that were asked for."""
    backward = markers.find(b.graph, markers.CUT_BACKWARD)
    out = {}
    for m, state in zip(b.feedback.maps, states, strict=True):
        index, fold = m.layer.index, m.layer.fold
        if index not in backward:
            continue
        made = _projection(b, m, state, backward[index])
        if index in b.feedback.radial:
            made = b.edit.emit(
                corrected, made, b.inputs.value(m), b.inputs.radial, fold,
                phase="projection", layer=m.layer.name,
            )  # fmt: skip
        if b.chain is not None and not b.chain.exact.late:
            made = b.chain.corrected(index, made, fold)
        out[index] = made
    return out


def put_cotangents(b: Builder, states: Sequence[dict[str, Node]]) -> None:
    """The method's cotangents at the cuts, and what exact rows correct one step late."""
    cotangents = project(b, states)
    if b.chain is not None and b.chain.exact.late:
        finite = b.finite if b.finite is not None else all_finite(b)
        layers = [m.layer for m in b.feedback.maps]
        b.finite = correct_later(b.edit, b.chain, layers, cotangents, finite)
    replace_cuts(b, cotangents)


def replace_cuts(b: Builder, cotangents: dict[int, Node]) -> None:
    """Put the cotangents in place of the ``cut_backward`` nodes."""
    for index, node in markers.find(b.graph, markers.CUT_BACKWARD).items():
        b.edit.put(cotangents[index], node)


def open_cuts(b: Builder) -> None:
    """Let the true gradient pass every cut: the backward chain stays."""
    backward = markers.find(b.graph, markers.CUT_BACKWARD)
    replace_cuts(b, {i: n.args[0] for i, n in backward.items()})  # type: ignore[misc]


def decay_weights(b: Builder) -> None:
    """Add the method's weight decay to the gradients of the weights behind feedback points."""
    decay = b.feedback.method.weight_decay
    if not decay:
        return
    layer_of = {p: m.layer.name for m in b.feedback.maps for p in m.layer.parameters}
    results = b.edit.results
    for i, slot in enumerate(b.step.outputs):
        own, w = layer_of.get(slot.name), b.parameters.get(slot.name)
        g = results[i]
        if slot.role != "gradient" or own is None or w is None or not isinstance(g, Node):
            continue
        if w.meta["val"].ndim >= 2:
            results[i] = b.edit.emit(
                lambda g, w: g + decay * w, g, w, phase="weight_grad", layer=own
            )
    b.edit.set_results(results)


def _projection(b: Builder, m: FeedbackMap, state: dict[str, Node], cut: Node) -> Node:
    """The node of what the method gives at one cut."""
    method = b.feedback.method
    made: Node = b.edit.emit(
        lambda *a, m=m: _projected(method, m, *a),
        state,
        cut.args[0] if "next_delta" in method.reads else None,
        b.inputs.read(m, method.reads),
        b.inputs.pairs(m) if {"tangent", "noise"} & method.reads else [],
        b.inputs.value(m),
        phase="projection",
        layer=m.layer.name,
    )
    return made


def _projected(
    method: Method,
    m: FeedbackMap,
    state: State,
    incoming: Tensor | None,
    found: dict[str, Tensor],
    pairs: list[tuple[Tensor, Any]],
    like: Tensor,
) -> Tensor:
    """The cotangent; its mean where the layer is in several streams of noise (``pairs``)."""
    state = without_memory(state)
    dtype = next(iter(state.values())).dtype if state else like.dtype
    rows = rows_of(m, state, found, dtype)
    if incoming is not None:
        rows = replace(rows, incoming=m.value_rows(incoming))
    with authored(method, "cotangent", m):
        made = [
            m.cotangent(
                method.cotangent,
                replace(
                    rows,
                    noise=m.value_rows(v).to(dtype),
                    tangent=None if d is None else d.to(dtype),
                ),
            )
            for v, d in pairs
        ] or [m.cotangent(method.cotangent, rows)]
    total = made[0]
    for more in made[1:]:
        total = total + more
    return m.from_rows(total / len(made) if len(made) > 1 else total, like)
