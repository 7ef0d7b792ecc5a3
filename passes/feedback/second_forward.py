"""Second forward: gradients from the difference of two passes, without a backward pass.

In: a joint graph whose model is one stack of linear layers and convolutions. Out: the whole step as
one graph, markers erased: the forward runs again on an input that the method changes by the output
error, with the same random masks. With a_l the input of layer l, h_l its value (the last one of its
shape before the next layer) and ' for the second pass, the gradient of W_l is that of
<(h_l - h'_l) / N, layer_l(a'_l)>, for the last layer that of <eps / N, layer_L(a'_L)>. Biases get
none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import MethodError
from grapefx.ir import Slot, StepGraph
from grapefx.methods.base import Method
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.operators import LAYER_PRODUCTS, draws
from grapefx.passes.graph.order import ancestors

aten = torch.ops.aten

_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


@dataclass
class Stage:
    """One layer of the stack: its product, the parameter W behind it, and where its value ends."""

    product: Node
    weight: Node
    end: Node = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.product


def input_size(step: StepGraph, method: str) -> int:
    """n_0, the size of one sample of the input; raises ``MethodError`` where there is no stack."""
    x, tap = _ends_of(step, method)
    _stack(step, x, tap, method)
    val = x.meta["val"]
    size = 1
    for s in val.shape[1:]:
        size *= int(s)
    return size


def build_two_forwards(step: StepGraph, method: Method, state: dict[str, Any]) -> StepGraph:
    """A training step of differences between two forward passes; see the module's docstring.

    ``state`` holds fake tensors of the method's state at the input. Raises ``MethodError`` naming
    the node where the model is no plain stack.
    """
    edit = Edit(step)
    step, em, output = edit.step, edit.emitter, edit.output
    x, tap = _ends_of(step, method.name)
    parameters = step.select("parameter")
    stages, data = _stack(step, x, tap, method.name)
    inputs: dict[str, Node] = {}
    wanted = [("target", Slot("target", "0"), tap.meta["val"])]
    wanted += [(k, Slot("feedback", f"input/{k}"), t) for k, t in state.items()]
    for name, slot, like in wanted:
        inputs[name] = edit.add_input(f"{slot.role}_{name}", slot, like)
    target = inputs.pop("target")

    def change(state: Any, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        rows, eps = method.second_input(state, x.flatten(1), y, t)
        return rows.reshape(x.shape).to(x.dtype), eps

    with em.before(output, phase="error"):
        changed, eps = em.trace(change, inputs, x, tap, target)
    twin = _again(em, output, data, x, changed)
    gradients: dict[Node, Node] = {}
    for k, stage in enumerate(stages):
        where = LAYER_PRODUCTS[stage.product.target][0]
        below = stage.product.args[where]
        layer = meta.layer(stage.product)
        with em.before(output, phase="weight_grad", layer=layer):
            if k == len(stages) - 1:
                delta = em.trace(lambda e: e / e.shape[0], eps)
            else:
                delta = em.trace(lambda h, g: (h - g) / h.shape[0], stage.end, twin[stage.end])
            g = _weight_gradient(em, stage, delta, twin.get(below, below))  # type: ignore[arg-type]
            have = gradients.get(stage.weight)
            gradients[stage.weight] = g if have is None else em.call(aten.add.Tensor, have, g)
    by_name = {s.name: gradients.get(n) for s, n in parameters}
    edit.set_results(
        [
            by_name.get(slot.name) if slot.role == "gradient" else r
            for slot, r in zip(step.outputs, edit.results, strict=True)
        ]
    )
    return edit.finish()


def _undefined(method: str, reason: str, node: Node | None = None) -> MethodError:
    where = f" (node {node.name!r}, {node.target})" if node is not None else ""
    return MethodError(
        f"method {method!r} is defined on plain stacks of Linear and Conv layers, but this model "
        f"is none: {reason}{where}\n"
        "  remedy: use a method that follows any graph (dfa, fdfa, grape)"
    )


def _ends_of(step: StepGraph, method: str) -> tuple[Node, Node]:
    """The input and the error tap."""
    inputs = [n for _, n in step.select("input")]
    if len(inputs) != 1 or not inputs[0].meta["val"].is_floating_point():
        raise _undefined(method, "it must have one floating-point input tensor")
    for slot, found in step.produced("input_gradient"):
        if found is not None:
            raise _undefined(method, f"input {slot.name} requires a gradient, which it cannot get")
    taps = markers.find(step.gm.graph, markers.TAP)
    if len(taps) != 1:
        raise _undefined(method, f"it has {len(taps)} outputs with a gradient")
    if taps[0].meta["val"].ndim != 2:
        raise _undefined(method, "its output is not (N, C)", taps[0])
    return inputs[0], taps[0]


def _stack(step: StepGraph, x: Node, tap: Node, method: str) -> tuple[list[Stage], list[Node]]:
    """The layers from input to output, and the forward nodes whose value depends on the input."""
    weights = _weights(step)
    parameters = {n: s.name for s, n in step.select("parameter")}
    earlier = ancestors([tap])
    stage: dict[Node, int] = {x: -1}
    stages: list[Stage] = []
    data: list[Node] = []
    for node in step.gm.graph.nodes:
        if node.op != "call_function" or node not in earlier or _random(node):
            continue
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            continue  # sizes
        sources = [a for a in node.all_input_nodes if a in stage]
        if not sources:
            continue
        data.append(node)
        levels = {stage[a] for a in sources}
        if len(levels) > 1 or (stages and levels != {len(stages) - 1}):
            raise _undefined(method, "branches of different depth meet", node)
        stage[node] = levels.pop()
        used = [a for a in node.all_input_nodes if a in parameters or a in weights]
        if node.target in LAYER_PRODUCTS:
            where, weight = LAYER_PRODUCTS[node.target]
            w = node.args[weight]
            if node.args[where] not in stage or w not in weights:
                raise _undefined(method, "a product that is not data times weight", node)
            stages.append(Stage(node, weights[w]))  # type: ignore[index]
            stage[node] = len(stages) - 1
        elif used:
            own = parameters.get(used[0], used[0].name)
            raise _undefined(method, f"parameter {own!r} belongs to no Linear or Conv", node)
    if not stages:
        raise _undefined(method, "no Linear or Conv leads to the output")
    _ends(stages, stage, tap, data)
    return stages, data


def _ends(stages: list[Stage], stage: dict[Node, int], tap: Node, data: list[Node]) -> None:
    """Where each layer's value ends: the last node of its shape in front of the next layer."""
    follower = {s.product: k for k, s in enumerate(stages)}
    for k, s in enumerate(stages[:-1]):
        following = stages[k + 1].product
        node: Node = following.args[LAYER_PRODUCTS[following.target][0]]  # type: ignore[assignment]
        shape = s.product.meta["val"].shape
        while node not in follower:
            val = node.meta["val"]
            if isinstance(val, Tensor) and val.shape == shape:
                break
            node = next(a for a in node.all_input_nodes if stage.get(a) == k)
        s.end = node


def _weights(step: StepGraph) -> dict[Node, Node]:
    """Parameters and their transposes -> the parameter."""
    found = {n: n for _, n in step.select("parameter")}
    for node in step.gm.graph.nodes:
        if node.target in _TRANSPOSES and node.args[0] in found and node.meta["val"].ndim == 2:
            found[node] = found[node.args[0]]
    return found


def _random(node: Node) -> bool:
    """Whether a node draws numbers (its input gives the shape alone); dropout is not meant."""
    return draws(node) and node.target is not aten.native_dropout.default


def _again(em: Emitter, output: Node, data: list[Node], x: Node, changed: Node) -> dict[Node, Node]:
    """The forward nodes once more, on the changed input; random masks are shared."""
    twin: dict[Node, Node] = {x: changed}
    for node in data:
        layer = meta.layer(node)
        with em.before(output, phase="forward", layer=layer):
            if node.target is aten.native_dropout.default:
                below, p, train = node.args
                assert isinstance(below, Node)
                mask = em.get(node, 1)
                scale = 1.0 / (1.0 - p) if train and p < 1 else 1.0  # type: ignore[operator]
                twin[node] = em.trace(
                    lambda v, m, scale=scale: v * m * scale,
                    twin[below],
                    mask,
                )
                continue
            source = node.args[0] if node.args else None
            if isinstance(source, Node) and source.target is aten.native_dropout.default:
                twin[node] = twin[source]  # item 0; the mask is not data
                continue
            args = torch.fx.node.map_arg(node.args, lambda n: twin.get(n, n))
            kwargs = torch.fx.node.map_arg(dict(node.kwargs), lambda n: twin.get(n, n))
            twin[node] = em.call(node.target, *args, **kwargs)
    return twin


def _weight_gradient(em: Emitter, stage: Stage, delta: Node, below: Node) -> Node:
    """The gradient of <delta, layer(below)> with respect to the layer's weight."""
    node, w = stage.product, stage.weight
    if node.target is aten.convolution.default:
        made = em.call(
            aten.convolution_backward.default,
            delta, below, w, [0], *node.args[3:], [False, True, False],
        )  # fmt: skip
        return em.get(made, 1)
    direct = node.args[LAYER_PRODUCTS[node.target][1]] is w
    g: Node = em.trace(lambda d, a: (a.t() @ d) if direct else (d.t() @ a), delta, below)
    return g
