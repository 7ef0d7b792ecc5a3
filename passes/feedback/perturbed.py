"""Perturbed parameters: the directional derivative of the loss is every gradient's only scale.

In: a joint graph. Out: the whole step as one graph, markers erased. Each trainable parameter gets a
random direction V (an input of role "random"), the tangents start at the parameters, and the
gradient of a parameter is (e . d) V with d the tangent at the error tap. The backward pass is dead
code, but for what lies behind the tap, which keeps its exact gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import MethodError, TangentError
from grapefx.ir import Slot, StepGraph
from grapefx.passes.differentiate.propagate import TangentEmitter, propagate
from grapefx.passes.graph import markers
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.order import ancestors, descendants


def build_perturbed(step: StepGraph, *, batch: Any, batch_size: int, name: str) -> StepGraph:
    """A training step of forward gradients in parameter space.

    The statistics of a training batch norm are differentiated: V is one direction for the whole
    batch, so nothing needs samples that do not mix. Raises ``MethodError`` (naming the method,
    ``name``) where an input wants a gradient, ``TangentError`` as the tangent pass.
    """
    edit = Edit(step)
    step, graph = edit.step, edit.graph
    for slot, found in step.produced("input_gradient"):
        if found is not None:
            raise MethodError(
                f"method {name!r} has gradients for parameters alone, but input {slot.name} "
                "requires one\n  remedy: detach the input, or use method='fg-a' or 'bp'"
            )
    taps = markers.find(graph, markers.TAP)
    errors = markers.find(graph, markers.TAP_BACKWARD)
    earlier = ancestors([n for i, n in taps.items() if i in errors])
    wanted = {s.name for s, n in step.produced("gradient") if isinstance(n, Node)}
    sources = [(s, n) for s, n in step.select("parameter") if s.name in wanted and n in earlier]
    em = TangentEmitter(step, batch, batch_size, None, batch_stats="full")
    directions = {}
    for k, (slot, p) in enumerate(sources):
        drawn = edit.add_input(
            f"random_{k}", Slot("random", slot.name), p.meta["val"], phase="tangent"
        )
        em.tangents[p] = directions[slot.name] = drawn
    derived: dict[str, None] = {}
    propagate(em, _between([n for _, n in sources], earlier), {}, derived)
    pairs = [(errors[i], em.tangents[n]) for i, n in taps.items() if i in errors and em.t(n)]
    if not pairs:
        raise TangentError("no parameter reaches the error tap through differentiable ops")
    with em.before(edit.output, phase="error"):

        def derivative(es: list[Tensor], ds: list[Tensor]) -> Tensor:
            parts = [(e * d).sum() for e, d in zip(es, ds, strict=True)]
            return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

        s = em.trace(derivative, [e for e, _ in pairs], [d for _, d in pairs])
    results = edit.results
    for i, slot in enumerate(step.outputs):
        v = directions.get(slot.name) if slot.role == "gradient" else None
        if v is not None:
            with em.before(edit.output, phase="weight_grad"):
                results[i] = em.trace(lambda s, v: (s * v).to(v.dtype), s, v)
    edit.set_results(results)
    return edit.finish(derived=tuple(derived))


def _between(starts: list[Node], before: set[Node]) -> list[Node]:
    """Nodes of ``before`` that depend on one of ``starts``, in order."""
    wanted = (descendants(starts) & before) - set(starts)
    return [n for n in starts[0].graph.nodes if n in wanted] if starts else []
