"""Calibration pass: a step with true gradients, from which the feedback maps are refitted.

In: a joint graph. Out: the whole step as one graph, markers erased. The true gradient passes every
cut; feedback maps are refitted by ridge regression from the pairs (e, delta_l), and the feedback
gradient is computed beside the true one for its cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.ir import StepGraph
from grapefx.maps import FeedbackMap
from grapefx.methods.base import Method, State
from grapefx.passes.feedback.builder import Builder, Feedback
from grapefx.passes.feedback.late_rows import forget
from grapefx.passes.feedback.learning import all_finite
from grapefx.passes.feedback.method_calls import refitted
from grapefx.passes.feedback.normal_equations import (
    CROSS,
    GRAM,
    products,
    solve,
    without_memory,
)
from grapefx.passes.feedback.projection import open_cuts, project, put_cotangents
from grapefx.passes.graph import markers, meta


def build_calibration(step: StepGraph, feedback: Feedback) -> StepGraph:
    """True gradients, refitted maps, and the cosine of what the method would give."""
    b = Builder(step, feedback)
    method = feedback.method
    fitted = method.feedback and method.refits and feedback.refit
    compare = method.feedback and not method.needs_tangents() and not method.sequential
    own = not feedback.true_gradients and compare
    # where the method's cotangents take the places of the cuts, the true chain needs its own nodes
    true = _opened(b) if own else {}
    if method.feedback and (fitted or compare or not feedback.true_gradients):
        b.add_states()
        if fitted:
            refit(b, true)
    if compare and b.state_nodes:
        old = _feedback_gradients(b, project(b, b.state_nodes))
        _compare(b, old, true)
    if own:
        # this batch only re-fits the maps: its update is the method's own, with the new maps
        put_cotangents(b, b.new_states or b.state_nodes)
    else:
        if feedback.exact is not None and feedback.exact.late:
            forget(b.edit, [m.layer for m in feedback.maps], b.finite)
        open_cuts(b)
    return b.finish()


def _opened(b: Builder) -> dict[Node, Node]:
    """A copy of what lies behind the cuts, by what it copies: the true gradient passes them."""
    copies: dict[Node, Node] = {}
    for node in list(b.graph.nodes):
        if node.target is markers.CUT_BACKWARD:
            source = node.args[0]
            assert isinstance(source, Node)
            copies[node] = copies.get(source, source)
        elif node.op == "call_function" and any(a in copies for a in node.all_input_nodes):
            with b.graph.inserting_before(b.edit.output):
                copies[node] = b.graph.node_copy(node, lambda a: copies.get(a, a))
            copies[node].meta = dict(node.meta)
    return copies


def refit(b: Builder, true: dict[Node, Node]) -> None:
    """B_l = (e^T e + ridge)^-1 e^T delta_l, from the true gradient (docs/method.md).

    ``true``: what has the true gradient's value where another node's will change. A map whose fit
    is not finite, or zero, stays as it is.
    """
    backward = markers.find(b.graph, markers.CUT_BACKWARD)
    inverse: dict[str, list[Node]] = {}
    ridge, keep, method = b.feedback.ridge, b.feedback.keep, b.feedback.method
    for m, state in zip(b.feedback.maps, b.state_nodes, strict=True):
        node = backward.get(m.layer.index)
        if node is None:
            b.new_states.append(state)
            continue
        e = b.inputs.error(m.rows)
        # with the gradients, not in the tail: rows may be far smaller than delta
        delta = node.args[0]
        assert isinstance(delta, Node)
        delta = true.get(delta, delta)
        rows = b.edit.emit(m.value_rows, delta, phase="input_grad", layer=m.layer.name)
        e.meta[meta.REDUCE] = rows.meta[meta.REDUCE] = "cat"
        if GRAM in state:
            new = b.edit.emit(
                lambda e, r, st, m=m: _fit_with_memory(method, m, e, r, st, ridge, keep),
                e, rows, state,
                phase="refit", layer=m.layer.name,
            )  # fmt: skip
            b.new_states.append(new)
            continue
        # groups pick by the layer's index: only full maps share a solve
        key = m.rows if m.groups == 1 else m.layer.name
        if key not in inverse:
            inverse[key] = b.edit.emit(
                lambda e, m=m: [_solved(m.pick(e, g), ridge) for g in range(m.groups)],
                e,
                phase="refit",
            )
        new = b.edit.emit(
            lambda s, e, r, st, m=m: _fit(method, m, s, e, r, st),
            inverse[key], e, rows, state,
            phase="refit", layer=m.layer.name,
        )  # fmt: skip
        b.new_states.append(new)
    b.finite = all_finite(b) if b.feedback.maps else None


def _solved(e: Tensor, ridge: float) -> Tensor:
    """(e^T e + ridge)^-1 e^T, (C, R), of errors that are scaled to 1 at most."""
    e = e.to(torch.promote_types(e.dtype, torch.float32))
    # rows are scaled by 1/N and by any loss scale: normalise before the solve
    e = e / e.abs().amax().clamp_min(1e-30)
    g = e.t() @ e
    c = g.shape[0]
    g = g + torch.eye(c, dtype=g.dtype, device=g.device) * (ridge * g.trace() / c + 1e-30)
    solved: Tensor = torch.linalg.solve(g, e.t())
    return solved


def _fit(
    method: Method, m: FeedbackMap, solved: list[Tensor], e: Tensor, rows: Tensor, state: State
) -> State:
    """The state after a fit to one batch; ``solved``: of each group's errors."""
    dtype = solved[0].dtype
    rows = rows.to(dtype)
    parts = []
    for g, part in enumerate(solved):
        top = m.pick(e, g).to(dtype).abs().amax().clamp_min(1e-30)
        own = rows if m.groups == 1 else rows[:, m.columns(g)]
        parts.append(part @ (own / top))
    return _accepted(parts, refitted(method, m, parts, state), state)


def _fit_with_memory(
    method: Method,
    m: FeedbackMap,
    e: Tensor,
    rows: Tensor,
    state: State,
    ridge: float,
    keep: float,
) -> State:
    """The state after a fit to this batch and to the part ``keep`` of those before."""
    gram, cross = products(m, e, rows)
    gram = keep * state[GRAM] + gram.to(state[GRAM].dtype)
    cross = keep * state[CROSS] + cross.to(state[CROSS].dtype)
    parts = solve(gram, cross, ridge)
    new = refitted(method, m, parts, without_memory(state))
    return _accepted(parts, {**new, GRAM: gram, CROSS: cross}, state)


def _accepted(parts: list[Tensor], new: State, old: State) -> State:
    """The new state where its fit is finite, and not zero.

    Zeros where the true gradient is (an output layer that starts at zero) would stay zeros.
    """
    fitted = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    size = fitted.abs().sum()
    ok = torch.isfinite(size) & (size > 0)
    return {k: torch.where(ok, new[k], old[k]) for k in old}


def _feedback_gradients(b: Builder, cotangents: dict[int, Node]) -> dict[str, Node]:
    """A second copy of what lies behind the cuts, fed with the method's cotangents."""
    twin: dict[Node, Node] = {}
    for index, node in markers.find(b.graph, markers.CUT_BACKWARD).items():
        twin[node] = cotangents[index]
        b.edit.took_place(twin[node], node)
    for node in list(b.graph.nodes):
        if node.op != "call_function" or node in twin:
            continue
        if node.target is markers.CUT_BACKWARD or not any(a in twin for a in node.all_input_nodes):
            continue
        if meta.phase(node) in ("refit", "metric"):
            continue
        with b.graph.inserting_before(b.edit.output):
            new = b.graph.node_copy(node, lambda a: twin.get(a, a))
        new.meta = {**node.meta, meta.PHASE: "metric"}
        twin[node] = new
    return {s.name: twin.get(n, n) for s, n in b.step.produced("gradient") if isinstance(n, Node)}


def _compare(b: Builder, twins: dict[str, Node], opened: dict[Node, Node]) -> None:
    """The cosine of each layer's ``twins``, by parameter, with the true gradients."""
    nodes = {s.name: n for s, n in b.step.produced("gradient") if isinstance(n, Node)}
    true = {name: opened.get(n, n) for name, n in nodes.items()}
    for m in b.feedback.maps:
        names = [p for p in m.layer.parameters if p in true and p in twins]
        if not names:
            continue
        for node in (*(true[p] for p in names), *(twins[p] for p in names)):
            node.meta[meta.REDUCE] = "sum"

        def cos(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
            xs, ys = [_real(x) for x in xs], [_real(y) for y in ys]
            dot = sum((x * y).sum() for x, y in zip(xs, ys, strict=True))
            size = sum((x * x).sum() for x in xs) * sum((y * y).sum() for y in ys)
            return dot / size.sqrt().clamp_min(1e-30)  # type: ignore[union-attr]

        b.metric("cos_gradient", m, cos, [true[p] for p in names], [twins[p] for p in names])


def _real(x: Tensor) -> Tensor:
    """In single precision; the parts of a complex gradient as two numbers."""
    return torch.view_as_real(x.to(torch.complex64)) if x.is_complex() else x.float()
