"""Weights pass: a stand-in takes the place of each weight in the backward products.

In: a joint graph. Out: the same graph in which the gradient to a layer's *input* goes through the
method's ``weight(state, W, noise)`` instead of W; the weight's own gradient keeps its formula,
which does not read W. What counts as a weight is an operand of a backward matrix product or
convolution that is computed from one parameter of two or more dims and from no data: the parameter
itself or a chain of views, casts and slices of it. Embeddings, 1-D parameters and cuts stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import MethodError
from grapefx.ir import Slot, StepGraph
from grapefx.methods.base import Method
from grapefx.passes.graph import meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.operators import BACKWARD_PRODUCTS

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    """One weight of a backward product: ``value``, computed from ``parameter``."""

    product: Node
    position: int
    value: Node
    parameter: Node


def operands(step: StepGraph) -> list[Operand]:
    """The weights of the backward products, in graph order.

    Raises ``MethodError`` for one that is computed from several parameters (a reparametrisation).
    """
    names = {n: s.name for s, n in step.select("parameter")}
    fixed = set(names) | {n for role in ("buffer", "constant") for _, n in step.select(role)}
    roots: dict[Node, frozenset[Node]] = {}
    behind = {n for _, n in step.select("cotangent")}
    found = []
    for node in step.gm.graph.nodes:
        if node.op == "placeholder":
            if node in fixed:
                wide = node in names and node.meta["val"].ndim >= 2
                roots[node] = frozenset([node] if wide else [])
            continue
        inputs = node.all_input_nodes
        if node.op == "call_function" and inputs and all(a in roots for a in inputs):
            roots[node] = frozenset().union(*(roots[a] for a in inputs))
        if not any(a in behind for a in inputs):
            continue
        behind.add(node)
        for position in BACKWARD_PRODUCTS.get(node.target, ()):
            value = node.args[position]
            if not isinstance(value, Node) or value in behind or not roots.get(value):
                continue
            if node.target is aten.convolution_backward.default and not _input_gradient(node):
                continue
            if len(roots[value]) > 1:
                own = ", ".join(sorted(repr(names[r]) for r in roots[value]))
                raise MethodError(
                    f"the weight {value.name!r} is computed from several parameters ({own}): a "
                    "stand-in for it is not defined\n  remedy: remove the reparametrisation, or "
                    "use a method that keeps the weights (bp, dfa)"
                )
            found.append(Operand(node, position, value, next(iter(roots[value]))))
    return found


def _input_gradient(node: Node) -> bool:
    """Whether the first result of a backward operator is used."""
    return any(u.target is operator.getitem and u.args[1] == 0 for u in node.users)


def weight_shapes(step: StepGraph) -> dict[str, tuple[int, ...]]:
    """The parameters that get a stand-in, with their shapes."""
    used = {o.parameter for o in operands(step)}
    return {s.name: tuple(n.meta["val"].shape) for s, n in step.select("parameter") if n in used}


def stand_in(step: StepGraph, method: Method, states: dict[str, dict[str, Any]]) -> StepGraph:
    """``step`` (a copy) with the method's stand-ins; ``states`` are fake tensors by parameter.

    Adds an input of role "feedback" for each state tensor and one of role "random" (N(0, 1), shaped
    like the weight) for each weight if the method reads noise.
    """
    edit = Edit(step)
    step, em = edit.step, edit.emitter
    names = {n: s.name for s, n in step.select("parameter")}
    found = operands(step)
    inputs: dict[Node, tuple[dict[str, Node], Node | None]] = {}
    for k, w in enumerate(dict.fromkeys(o.parameter for o in found)):
        own, like = names[w], w.meta["val"]
        state = {
            name: edit.add_input(f"feedback_w{k}_{name}", Slot("feedback", f"{own}/{name}"), t)
            for name, t in states[own].items()
        }
        noise = None
        if "noise" in method.reads:
            noise = edit.add_input(f"random_w{k}", Slot("random", own), like)
        inputs[w] = (state, noise)
    made: dict[Node, Node] = {}
    for o in found:
        if o.value not in made:
            with em.before(edit.output, phase="projection", layer=meta.layer(o.product)):
                if o.parameter not in made:
                    state, noise = inputs[o.parameter]
                    made[o.parameter] = em.trace(_cast(method), state, o.parameter, noise)
                _chain(em, o.value, made)
        new = made[o.value]
        edit.took_place(new, o.value)
        o.product.update_arg(o.position, new)
    return edit.finish(erase_markers=False)


def _cast(method: Method) -> Callable[..., torch.Tensor]:
    """The stand-in in the weight's own dtype."""

    def weight(state: Any, w: torch.Tensor, noise: Any) -> torch.Tensor:
        return method.weight(state, w, noise).to(w.dtype)

    return weight


def _chain(em: Emitter, value: Node, made: dict[Node, Node]) -> Node:
    """The views and casts between a parameter and ``value``, repeated on its stand-in."""
    if value not in made:
        inside = {a: _chain(em, a, made) if _from(a, made) else a for a in value.all_input_nodes}
        args = torch.fx.node.map_arg(value.args, lambda n: inside[n])
        kwargs = torch.fx.node.map_arg(dict(value.kwargs), lambda n: inside[n])
        made[value] = em.call(value.target, *args, **kwargs)
    return made[value]


def _from(node: Node, made: dict[Node, Node]) -> bool:
    """Whether a node is computed from a parameter that has a stand-in."""
    return node in made or any(_from(a, made) for a in node.all_input_nodes)
