"""Exact rows one step late: what their true gradients correct is added in the next step.

With ``exact_rows`` each update waits for the chain of n samples, which corrects its cotangent c.
A segment's backward is linear in its cotangent, so that the correction of a parameter's gradient is
a gradient itself,

    P = the segment's backward of w (delta_i - c_i) on the n samples,

and g(c) + P is what the corrected cotangents give. Late, a step's gradient is g(c) + P of the step
before: P is a part of the learning state, and in a step nobody waits for the chain. (A custom
autograd function whose backward is not linear gets this P all the same.)

In: a joint graph, its chain, and the cotangents of its cuts. The backward nodes between the cuts
and the parameters' gradients are emitted a second time, on the n samples as long as an operator
keeps samples apart or adds them up; from one that couples them on (batch norm in training), on the
whole batch with zeros for the other samples, so that P is exact. These nodes have the phase
"late_rows"; the verifier checks that no gradient reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import GrapefxError
from grapefx.ir import Layer, Slot, StepGraph
from grapefx.passes.feedback.backward_section import fills
from grapefx.passes.feedback.exact_rows import VIEWS, Chain
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.folds import Fold
from grapefx.passes.graph.mixing import mixes
from grapefx.passes.graph.operators import op_name
from grapefx.passes.graph.order import descendants

aten = torch.ops.aten

NAME = "late"  # of the state, behind the parameter's name

# Operators whose result without a batch is a sum over samples. Others (a mean) see all of them.
_SUMS = {
    "mm", "bmm", "sum", "convolution_backward", "native_layer_norm_backward",
    "native_group_norm_backward", "native_batch_norm_backward", "batch_norm_backward",
    "embedding_dense_backward",
}  # fmt: skip


def key(parameter: str) -> str:
    """The name of a parameter's pending correction in the learning state."""
    return f"{parameter}/{NAME}"


def is_late(name: str) -> bool:
    """Whether an entry of the learning state is a pending correction."""
    return name.endswith(f"/{NAME}")


def pending(step: StepGraph) -> dict[str, Tensor]:
    """The corrections that a joint graph's steps keep: fake tensors, by name."""
    return {key(parameter): like for parameter, like in _pending(step).items()}


def _pending(step: StepGraph) -> dict[str, Tensor]:
    own = set(_section(step))
    return {p: node.meta["val"] for p, node in _gradients(step).items() if node in own}


def correct_later(
    edit: Edit,
    chain: Chain,
    layers: Sequence[Layer],
    cotangents: Mapping[int, Node],
    finite: Node,
) -> Node:
    """Add the last step's corrections to the gradients, and make those of this step.

    ``cotangents``: the method's own, before they take the places of the cuts. ``finite``: whether
    the error is. Returns whether the corrections are too; if not, the old ones stay.
    """
    step = edit.step
    made = LateRows(step, chain, {layer.index: layer for layer in layers}, cotangents).made
    if not made:
        return finite
    old = _inputs(edit, layers)
    results = edit.results
    for i, slot in enumerate(edit.outputs):
        if slot.role == "gradient" and slot.name in made:
            before, g = old[slot.name], results[i]
            with edit.emitter.before(edit.output, phase="weight_grad", layer=meta.layer(before)):
                results[i] = edit.emitter.call(aten.add.Tensor, g, before)
    edit.set_results(results)
    with edit.emitter.before(edit.output, phase="late_rows"):
        flag: Node = edit.emitter.trace(_all_finite, finite, list(made.values()))
    flag.meta[meta.REDUCE] = "all"
    for name, new in made.items():
        with edit.emitter.before(edit.output, phase="late_rows", layer=meta.layer(new)):
            kept = edit.emitter.call(aten.where.self, flag, new, old[name])
        edit.add_output(Slot("feedback", key(name)), kept)
    return flag


def forget(edit: Edit, layers: Sequence[Layer], finite: Node | None) -> None:
    """A step of exact gradients: what was pending is dropped, as no map is wrong in this step.

    ``finite``: whether the error is; if not, all stays as it was.
    """
    for name, old in _inputs(edit, layers).items():
        with edit.emitter.before(edit.output, phase="late_rows", layer=meta.layer(old)):
            new = edit.emitter.call(aten.zeros_like.default, old)
            if finite is not None:
                new = edit.emitter.call(aten.where.self, finite, new, old)
        edit.add_output(Slot("feedback", key(name)), new)


def _inputs(edit: Edit, layers: Sequence[Layer]) -> dict[str, Node]:
    """The pending corrections, by parameter."""
    layer_of = {p: layer.name for layer in layers for p in layer.parameters}
    return {
        parameter: edit.add_input(
            f"late_{k}", Slot("feedback", key(parameter)), like, layer=layer_of.get(parameter)
        )
        for k, (parameter, like) in enumerate(_pending(edit.step).items())
    }


def _all_finite(before: Tensor, made: list[Tensor]) -> Tensor:
    size: Any = sum(x.abs().float().sum() for x in made)
    return before & torch.isfinite(size)


def _section(step: StepGraph) -> list[Node]:
    """The backward nodes between the cuts and the parameters' gradients, the cuts with them."""
    live: set[Node] = set()
    stack = list(_gradients(step).values())
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            if node.target is not markers.CUT_BACKWARD:
                stack.extend(node.all_input_nodes)
    own: dict[Node, None] = {}
    for node in step.gm.graph.nodes:
        if node not in live or node.op != "call_function":
            continue
        starts = node.target is markers.CUT_BACKWARD
        if starts or (any(a in own for a in node.all_input_nodes) and _carries(node)):
            own[node] = None
    return list(own)


def _gradients(step: StepGraph) -> dict[str, Node]:
    """The gradients by parameter, also of a graph that has more results than it began with."""
    pairs = zip(step.outputs, step.results(), strict=False)
    return {s.name: n for s, n in pairs if s.role == "gradient" and isinstance(n, Node)}


def _carries(node: Node) -> bool:
    """Whether a node's value may depend on the values that it reads, not on their sizes alone."""
    return not isinstance(node.meta.get("val"), torch.SymInt) and not fills(node)


class LateRows:
    """A second copy of the segments' backward, for the error of the cotangents of n samples.

    ``made``: what it gives for each parameter behind a cut, by name.
    """

    def __init__(
        self,
        step: StepGraph,
        chain: Chain,
        layers: Mapping[int, Layer],
        cotangents: Mapping[int, Node],
    ) -> None:
        self.chain = chain
        self.error = descendants(n for n in step.gm.graph.nodes if meta.role(n) == "cotangent")
        # what stands for a node: with the n samples alone, or as large as the node itself
        self.rows: dict[Node, Any] = {}
        self.whole: dict[Node, Any] = {}
        owner: dict[Node, str] = {}
        for node in _section(step):
            if node.target is markers.CUT_BACKWARD:
                index: Any = node.args[1]
                owner[node] = layers[index].name
                with chain.before(chain.end, phase="late_rows", layer=owner[node]):
                    self._start(node, cotangents[index], layers[index])
            else:
                owner[node] = next(owner[a] for a in node.all_input_nodes if a in owner)
                with chain.before(chain.end, phase="late_rows", layer=owner[node]):
                    self._again(node)
        self.made: dict[str, Node] = {}
        for parameter, node in _gradients(step).items():
            if node in owner:
                with chain.before(chain.end, phase="late_rows", layer=owner[node]):
                    self.made[parameter] = self._all(node)

    def _start(self, cut: Node, c: Node, layer: Layer) -> None:
        """w (delta - c) of the n samples."""
        chain, fold = self.chain, Fold(*layer.fold)
        own = c if chain.rows is None else chain.take(c, fold)
        delta, weight = chain.delta(layer.index, own), chain.exact.weight
        error = chain.trace(lambda d, c: (d - c) * weight, delta, own)
        (self.whole if chain.rows is None else self.rows)[cut] = error
        chain.folds[cut] = fold

    def _again(self, node: Node) -> None:
        """An operator on the n samples, or on all where it cannot tell them apart."""
        linear = [a for a in node.all_input_nodes if a in self.rows or a in self.whole]
        if all(a in self.rows for a in linear):
            try:
                found = self._on_rows(node, linear)
            except GrapefxError:
                found = None
            if found is not None:
                batched = node in self.chain.folds or _several(node)
                (self.rows if batched else self.whole)[node] = found
                return
        self.whole[node] = self._on_all(node)

    def _on_rows(self, node: Node, linear: list[Node]) -> Any:
        """The operator's part of the n samples, or its sum over them; None where it mixes them."""
        chain, name = self.chain, op_name(node)
        if node.target is operator.getitem:
            return chain.repeat(node, self._operands(node))
        if node in chain.folds:
            known = all(a in chain.folds for a in linear)
            apart = known and not any(mixes(node, a, chain.folds) for a in linear)
            return chain.repeat(node, self._operands(node)) if apart else None
        if name not in _SUMS or chain.couples(node) or not self._followed(node, linear):
            return None
        if name == "embedding_dense_backward" and node.args[4]:  # divides by how often in the batch
            return None
        return chain.repeat(node, self._operands(node))

    def _followed(self, node: Node, linear: list[Node]) -> bool:
        """Whether what an operator leaves of the batch can be followed; of several results each."""
        chain, several = self.chain, _several(node)
        results = node.users if several else [node]
        vals = [(n, n.meta.get("val")) for n in results]
        if any(
            isinstance(v, Tensor) and chain.depends(n, v) and n not in chain.folds for n, v in vals
        ):
            return False
        norm = "batch_norm" in op_name(node)  # an instance norm: channels of all samples in one dim
        return not several or norm or not any(mixes(node, a, chain.folds) for a in linear)

    def _operands(self, node: Node) -> dict[Node, Any]:
        """What stands for the operands that depend on the error."""
        return {a: self.rows.get(a) or self._none(self.chain.p(a)) for a in self._linear(node)}

    def _linear(self, node: Node) -> list[Node]:
        """The operands that are linear in the error: the corrections', and those of no cut."""
        return [
            a
            for a in node.all_input_nodes
            if a in self.rows or a in self.whole or (a in self.error and _number(a))
        ]

    def _none(self, node: Node) -> Node:
        """Zeros: what comes from the error past all cuts is right already."""
        return self.chain.call(aten.zeros_like.default, node)

    def _on_all(self, node: Node) -> Any:
        chain, linear = self.chain, set(self._linear(node))

        def operand(a: Node) -> Any:
            return self._all(a) if a in linear else a

        args: Any = torch.fx.node.map_arg(node.args, operand)
        kwargs = torch.fx.node.map_arg(dict(node.kwargs), operand)
        try:
            return chain.call(node.target, *args, **kwargs)
        except (RuntimeError, ValueError):
            if op_name(node) not in VIEWS:  # zeros need not lie in memory as values do
                raise
            return chain.call(aten.reshape.default, *args)

    def _all(self, node: Node) -> Any:
        """What stands for a node, with zeros for the other samples."""
        if node not in self.whole:
            zeros = self._none(node)
            part = self.rows.get(node)
            self.whole[node] = (
                zeros if part is None else self.chain.put(zeros, self.chain.folds[node], part)
            )
        return self.whole[node]


def _number(node: Node) -> bool:
    """Whether a node is a tensor of numbers that its operands decide."""
    val = node.meta.get("val")
    real = isinstance(val, Tensor) and (val.is_floating_point() or val.is_complex())
    return real and not fills(node)


def _several(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


__all__ = ["NAME", "LateRows", "correct_later", "forget", "is_late", "key", "pending"]
