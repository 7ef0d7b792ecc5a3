"""How feedback maps learn within a step: from tangents, or from the mean of the derivatives.

A method's ``learn`` gives the new state of each map; with tangents it reads J^_l, the batch's mean
of d_i v_i^T (d_i the output's tangent, v_i the noise at the point), which estimates the Jacobian
of the output with respect to h_l. A batch with an infinite error or tangent changes no map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.maps import FeedbackMap
from grapefx.methods.base import Method, State
from grapefx.passes.feedback.builder import Builder
from grapefx.passes.feedback.mean_field import MeanChain, map_of
from grapefx.passes.feedback.method_calls import authored, refitted, rows_of
from grapefx.passes.feedback.normal_equations import MEMORY, without_memory
from grapefx.passes.graph import meta


def learn(b: Builder) -> None:
    """New states, kept where everything is finite."""
    method, maps = b.feedback.method, b.feedback.maps
    estimates = _estimates(b) if method.aligns() else [None] * len(maps)
    finite = b.finite = all_finite(b)
    for m, state, j in zip(maps, b.state_nodes, estimates, strict=True):
        pairs = b.inputs.pairs(m) if method.per_sample else []
        samples = [(v, d) for v, d in pairs if d is not None]
        new = b.edit.emit(
            lambda *a, m=m: _learned(method, m, *a),
            state, j, b.inputs.read(m, method.learns_from), samples, finite,
            phase="alignment", layer=m.layer.name,
        )  # fmt: skip
        b.new_states.append(new)
        if j is not None and "B" in state:
            b.metric("cos_jacobian", m, cosine, state["B"], j)


def average(b: Builder, start: bool) -> None:
    """Maps from the mean field; ``start``: from the means of this batch."""
    method, mean_field = b.feedback.method, b.feedback.mean_field
    rows = b.feedback.error_rows[b.feedback.maps[0].rows]
    assert mean_field is not None
    dtype = next(iter(b.feedback.states[0].values())).dtype
    chain = MeanChain(b.edit, mean_field, rows, start, dtype)
    for m, state in zip(b.feedback.maps, b.state_nodes, strict=True):

        def made(state: State, found: Any, m: FeedbackMap = m) -> State:
            whole = map_of(m, found, state["B"])
            parts = [whole[:, m.columns(g)] for g in range(m.groups)]
            return {**state, **refitted(method, m, parts, without_memory(state))}

        found = chain.rows.get(m.layer.index)
        new = b.edit.emit(made, state, found, phase="mean_field", layer=m.layer.name)
        b.new_states.append(new)


def all_finite(b: Builder) -> Node:
    """Whether all errors and tangents that maps learn from are finite."""
    made: Node = b.edit.emit(_finite, b.inputs.of_all_points(b.feedback.maps), phase="error")
    made.meta[meta.REDUCE] = "all"
    return made


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius cosine (GrAPE 2026 eq. 3); 0 where one of the two is 0."""
    a, b = a.float(), b.float()
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt().clamp_min(1e-30)


def _estimates(b: Builder) -> list[Node | None]:
    """J^ at each point; None where no stream reaches it."""
    out: list[Node | None] = []
    for m in b.feedback.maps:
        pairs = [(d, v) for v, d in b.inputs.pairs(m) if d is not None]
        if not pairs:
            out.append(None)
            continue
        made: Node = b.edit.emit(
            lambda ds, vs, m=m: _estimate(m, ds, vs),
            [d for d, _ in pairs], [v for _, v in pairs],
            phase="alignment", layer=m.layer.name,
        )  # fmt: skip
        made.meta[meta.REDUCE] = "mean"
        out.append(made)
    return out


def _estimate(m: FeedbackMap, ds: list[Tensor], vs: list[Tensor]) -> Tensor:
    """J^ from the tangents and the noise of each stream."""
    total: Any = None
    for d, v in zip(ds, vs, strict=True):
        rows = m.value_rows(v)
        j = m.outer(d.to(rows.dtype), rows)
        total = j if total is None else total + j
    dtype = torch.promote_types(total.dtype, torch.float32)
    mean: Tensor = total.to(dtype) / (ds[0].shape[0] * len(ds))
    return mean


def _learned(
    method: Method,
    m: FeedbackMap,
    state: State,
    j: Tensor | None,
    found: dict[str, Tensor],
    samples: list[tuple[Tensor, Tensor]],
    ok: Tensor,
) -> State:
    """What the method makes of its state; ``samples``: noise and tangents, where it reads each."""
    kept = {k: t for k, t in state.items() if k in MEMORY}
    state = without_memory(state)
    rows = rows_of(m, state, found)
    if j is not None:
        rows = replace(rows, estimate=j.to(next(iter(state.values())).dtype))
    if samples:
        vs, ds = [m.value_rows(v) for v, _ in samples], [d for _, d in samples]
        rows = replace(rows, noise=torch.cat(vs), tangent=torch.cat(ds))
    with authored(method, "learn", m):
        new = m.learned(method.learn, rows)
        shapes = {k: tuple(t.shape) for k, t in state.items()}
        if {k: tuple(t.shape) for k, t in new.items()} != shapes:
            raise TypeError(f"it has to return a state of {shapes}")
    return {**{k: torch.where(ok, new[k], state[k]) for k in state}, **kept}


def _finite(xs: list[Tensor]) -> Tensor:
    # a sum is finite only if every term is; overflow of a finite sum skips a step, no more
    total = sum(x.float().abs().sum() for x in xs)
    return torch.isfinite(total)  # type: ignore[arg-type]
