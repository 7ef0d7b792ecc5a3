"""Tangent pass: forward-mode derivatives spliced beside the forward nodes.

In: a joint graph with ``cut`` and ``tap`` markers. Out: the same graph with noise placeholders, a
tangent node beside each forward node that lies behind a cut, and the tangents ``d`` at the taps.
Tangents of parameters and inputs are symbolic zeros: nothing is emitted for them, so a product
costs one product more (2F for forward and tangent together, not 3F).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from grapefx.errors import TangentError
from grapefx.ir import Layer, Slot, StepGraph
from grapefx.passes.differentiate.propagate import TangentEmitter, propagate
from grapefx.passes.differentiate.weight_noise import induced, weight_sources
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.folds import Fold
from grapefx.passes.graph.order import ancestors, descendants
from grapefx.torch_compat import new_size

aten = torch.ops.aten


@dataclass(frozen=True)
class Stream:
    """One tangent pass: the noise added at each of its layers, and the tangents at the taps."""

    noise: dict[int, Node]
    taps: dict[int, Node]


def streams_of(step: StepGraph) -> list[Stream]:
    """The tangent passes of a step graph, in order; none in a graph without tangents."""
    found: dict[int, Stream] = {}
    for node in step.gm.graph.nodes:
        for stream, index in node.meta.get(meta.NOISE_OF, ()):
            found.setdefault(stream, Stream({}, {})).noise[index] = node
        for stream, index in node.meta.get(meta.TANGENT_OF, ()):
            found.setdefault(stream, Stream({}, {})).taps[index] = node
    return [found[k] for k in sorted(found)]


def add_tangents(
    step: StepGraph,
    layers: tuple[Layer, ...],
    *,
    batch: Any,
    batch_size: int,
    streams: tuple[tuple[int, ...], ...],
    rows_hint: int | None = None,
    batch_stats: str = "frozen",
    signs: bool = False,
    quiet: tuple[int, ...] = (),
    perturb: str = "activation",
) -> StepGraph:
    """Splice tangents into (a copy of) ``step``.

    ``streams`` lists the layers whose noise runs together; the paper's default is one stream for
    all. ``rows_hint`` gives tangents to a sub-batch of that (symbolic) size, None to all samples.
    ``batch_stats`` says whether the statistics of a training batch norm are constants
    (``"frozen"``: each sample has a tangent of its own) or differentiated (``"full"``). With
    ``signs`` the noise arrives as bytes, 0 for -1 and 1 for +1. Layers in
    ``quiet`` get noise that no tangent follows: one more stream, without taps. ``perturb`` says
    where noise is added (``weight_noise.py``).
    """
    edit = Edit(step)
    step, graph = edit.step, edit.graph
    cuts = markers.find(graph, markers.CUT)
    taps = markers.find(graph, markers.TAP)
    if not taps:
        raise TangentError("the graph has no error tap")
    inside = descendants(cuts.values()) & ancestors(taps.values())
    forward = [n for n in graph.nodes if n in inside]
    at_weights = weight_sources(step, layers, perturb, batch, batch_size)
    inputs = _Inputs(edit, rows_hint, signs)
    drawn: list[dict[int, tuple[Node, ...]]] = []
    for s, members in enumerate((*streams, quiet) if quiet else streams):
        drawn.append({})
        for index in members:
            if index not in cuts:
                continue
            name, own = f"{s}/{layers[index].name}", at_weights.get(index)
            if own is None:
                like, fold = cuts[index].meta["val"], Fold(*layers[index].fold)
                drawn[s][index] = (inputs.add(f"noise_{s}_{index}", name, like, fold),)
            else:
                drawn[s][index] = tuple(
                    inputs.add(f"noise_{s}_{index}_{k}", f"{name}/{k}", w.like, w.fold)
                    for k, w in enumerate(own)
                )
    rows = inputs.rows()
    derived: dict[str, None] = {}
    sliced: dict[Node, Node] = {}  # every stream reads the same primal operands
    for s, found in enumerate(drawn):
        em = TangentEmitter(step, batch, batch_size, rows, batch_stats)
        em.sliced = sliced
        noise = {}
        for index, nodes in found.items():
            sources = at_weights.get(index, ())
            at = [w.product for w in sources] or [cuts[index]]
            nodes = tuple(inputs.ready(n, a) for n, a in zip(nodes, at, strict=True))
            noise[index] = nodes[0]
            if sources:
                keep = layers[index].fold[0]
                noise[index] = induced(em, sources, nodes, cuts[index], keep, derived)
            _note(noise[index], meta.NOISE_OF, (s, index))
        if s == len(streams):
            break
        propagate(em, forward, noise, derived)
        ends = {i: em.tangents[n] for i, n in taps.items() if em.tangents.get(n) is not None}
        if not ends:
            raise TangentError("no feedback point reaches the error tap through differentiable ops")
        for i, tangent in ends.items():
            _note(tangent, meta.TANGENT_OF, (s, i))
    # a later tangent pass over the same nodes may read what an earlier one put behind: in order
    return edit.finish(erase_markers=False, keep_unused=True, derived=tuple(derived))


def _note(node: Node, key: str, value: tuple[int, int]) -> None:
    """One value may be the noise of several points, or the tangent at several taps."""
    node.meta[key] = (*node.meta.get(key, ()), value)


class _Inputs:
    """The noise placeholders of a step, on all samples or on a sub-batch of ``rows_hint``."""

    def __init__(self, edit: Edit, rows_hint: int | None, signs: bool) -> None:
        self.edit = edit
        self.em = Emitter(edit.graph, phase="tangent")
        self.signs = signs
        self.nodes: list[Node] = []
        self.dtypes: dict[Node, torch.dtype] = {}
        self.size: Any = None
        if rows_hint is not None:
            self.size = new_size(self.em.mode, rows_hint)

    def add(self, name: str, slot: str, like: torch.Tensor, fold: Fold) -> Node:
        """Noise of the shape of ``like``, cut down to the sub-batch."""
        shape = list(like.shape)
        if self.size is not None:
            shape[fold.dim] = self.size * (fold.outer * fold.inner)
        dtype = torch.int8 if self.signs else like.dtype
        node = self.edit.add_input(
            name, Slot("noise", slot), like, shape=shape, dtype=dtype, phase="tangent"
        )
        node.meta[meta.FOLD] = (fold.dim, fold.outer, fold.inner)
        self.dtypes[node] = like.dtype
        self.nodes.append(node)
        return node

    def rows(self) -> Node | None:
        """The size of the sub-batch, from the first noise; None if all samples have tangents."""
        if self.size is None:
            return None
        dim, outer, inner = self.nodes[0].meta[meta.FOLD]
        with self.em.after(self.edit.last_input):
            size = self.em.call(aten.sym_size.int, self.nodes[0], dim)
            k = outer * inner
            return size if k == 1 else self.em.call(operator.floordiv, size, k)

    def ready(self, node: Node, at: Node) -> Node:
        """The noise as numbers: bytes 0 and 1 become -1 and +1 in front of what they perturb."""
        if not self.signs:
            return node
        dtype = self.dtypes[node]

        def sign(b: torch.Tensor, dtype: torch.dtype = dtype) -> torch.Tensor:
            return b.to(dtype) * 2 - 1

        with self.em.before(at, layer=meta.layer(at)):
            made: Node = self.em.trace(sign, node)
            return made
