"""Noise at the weights of a layer instead of its activation (GrAPE 2026 section 3.2).

A weight perturbation V counts through what it adds to the value at the feedback point. Each sample
has a V of its own, for one V for all would be one direction, not N. Behind a matrix product that is
V h, whose entries are independent and normal with variance |h|^2: it is drawn as such, scaled by
1 / |h|. Behind a convolution V is drawn, and the product taken: its covariance is a Gram matrix of
the sample's patches, so J^ is biased there. Both then pass what lies between the product and the
point (an activation scales them by its slope) and are rescaled to mean square 1 in each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.errors import MethodError
from grapefx.ir import Layer, StepGraph
from grapefx.passes.differentiate.propagate import TangentEmitter, propagate
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.folds import Fold, batch_folds
from grapefx.passes.graph.operators import LAYER_PRODUCTS
from grapefx.passes.graph.order import without_data

aten = torch.ops.aten

PERTURB = ("activation", "weight", "auto")


@dataclass(frozen=True)
class Source:
    """A product with a weight. ``like`` and ``fold``: its noise, for all samples."""

    product: Node
    data: Node
    like: Tensor
    fold: Fold

    @property
    def kernel(self) -> bool:
        """Whether V itself is drawn, and not what it makes of the data."""
        return self.product.target is aten.convolution.default


def weight_sources(
    step: StepGraph, layers: tuple[Layer, ...], perturb: str, batch: Any, batch_size: int
) -> dict[int, tuple[Source, ...]]:
    """The products whose weights are perturbed, by layer; no entry: its activation is.

    "auto" takes the weights where a sample has fewer of them than of activations.

    Raises:
        MethodError: "weight", and a layer's weights are not those of products alone.
    """
    if perturb == "activation":
        return {}
    graph = step.gm.graph
    folds = batch_folds(graph, batch, batch_size)
    fixed = without_data(step)
    parameters = {n for _, n in step.select("parameter") if n.meta["val"].ndim >= 2}
    found: dict[int, tuple[Source, ...]] = {}
    for index, cut in markers.find(graph, markers.CUT).items():
        sources, reason = _sources(cut, fixed, parameters, folds)
        if perturb == "weight" and reason:
            raise MethodError(
                f"perturb='weight': layer {layers[index].name!r} {reason}\n  remedy: perturb='auto'"
            )
        own = sum(math.prod(s.like.shape[1:]) for s in sources if s.kernel)
        rows = any(not s.kernel for s in sources)  # a row has more weights than activations
        values = cut.meta["val"]
        size = math.prod(int(n) for d, n in enumerate(values.shape) if d != layers[index].fold[0])
        if not reason and (perturb == "weight" or (not rows and own < size)):
            found[index] = sources
    return found


def _sources(
    cut: Node, fixed: set[Node], parameters: set[Node], folds: dict[Node, Fold]
) -> tuple[tuple[Source, ...], str]:
    """The products of a segment, or why there is none."""
    found: list[Source] = []
    used: set[Node] = set()
    segment = _segment(cut)
    for node in segment:
        wide = {r for a in node.all_input_nodes for r in _roots(a, fixed) if r in parameters}
        if not wide or node in fixed:
            continue
        data, weight = (node.args[i] for i in LAYER_PRODUCTS.get(node.target, (0, 0)))
        fold = folds.get(node)
        if (
            node.target not in LAYER_PRODUCTS
            or weight not in fixed
            or data in fixed
            or fold is None
        ):
            return (), f"has weights in {node.target} ({node.name}), which is no product with data"
        if wide & used:
            return (), f"uses the weights of {node.name} more than once"
        used |= wide
        like = node.meta["val"]
        if node.target is aten.convolution.default:
            if node.args[6] or not fold.plain or fold.dim:
                return (), f"has a transposed convolution or no batch dimension at {node.name}"
            like = like.new_empty((like.shape[0], *weight.meta["val"].shape))  # type: ignore[union-attr]
        found.append(Source(node, data, like, fold))  # type: ignore[arg-type]
    return tuple(found), "" if found else "has no product with a weight"


def _segment(cut: Node) -> list[Node]:
    """The nodes in front of a cut and behind those before it, in order."""
    seen: set[Node] = set()
    stack = [a for a in cut.all_input_nodes]
    while stack:
        n = stack.pop()
        if n not in seen and n.op == "call_function" and n.target is not markers.CUT:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return [n for n in cut.graph.nodes if n in seen]


def _roots(node: Node, fixed: set[Node]) -> set[Node]:
    """The placeholders that a value is computed from, if it is computed from weights alone."""
    if node not in fixed:
        return set()
    if node.op == "placeholder":
        return {node}
    return set().union(*(_roots(a, fixed) for a in node.all_input_nodes))


def induced(
    em: TangentEmitter,
    sources: tuple[Source, ...],
    noises: tuple[Node, ...],
    cut: Node,
    keep: int,
    derived: dict[str, None],
) -> Node:
    """What the noise at the weights adds to the value at ``cut``: mean square 1 in each sample.

    ``keep`` is the dim that holds the samples there.
    """
    added = {s.product: _product(em, s, noise) for s, noise in zip(sources, noises, strict=True)}
    inside = [n for n in _segment(cut) if n.target is not markers.CUT]
    behind = set(added)
    for n in inside:
        if any(a in behind for a in n.all_input_nodes):
            behind.add(n)
    outside, em.tangents = em.tangents, {}
    propagate(em, [n for n in inside if n in behind], {}, derived, added)
    made = em.t(cut.args[0])
    em.tangents = outside
    if made is None:
        raise MethodError(
            f"perturb: no gradient of {sources[0].product.name} reaches its feedback "
            "point\n  remedy: perturb='activation'"
        )

    def unit(v: Tensor) -> Tensor:
        dims = [d for d in range(v.ndim) if d != keep]
        return v * (v * v).mean(dims, keepdim=True).clamp_min(1e-12).rsqrt()

    with em.before(cut, layer=meta.layer(cut)):
        node: Node = em.trace(unit, made)
        return node


def _product(em: TangentEmitter, source: Source, noise: Node) -> Callable[[], Node]:
    if not source.kernel:
        return lambda: noise
    stride, padding, dilation, groups = (source.product.args[i] for i in (3, 4, 5, 8))

    def convolve(x: Tensor, v: Tensor) -> Tensor:
        """Every sample with a kernel of its own: samples become groups."""
        n, out = v.shape[0], v.shape[1]
        y = aten.convolution(
            x.reshape(1, n * x.shape[1], *x.shape[2:]),
            v.reshape(n * out, *v.shape[2:]),
            None, stride, padding, dilation, False, [0] * len(stride), n * groups,  # type: ignore[arg-type, operator]
        )  # fmt: skip
        y = y.reshape(n, out, *y.shape[2:])
        mean = (y * y).mean(list(range(1, y.ndim)), keepdim=True)
        return y * mean.clamp_min(1e-12).rsqrt()  # type: ignore[no-any-return]

    return lambda: em.trace(convolve, em.p(source.data), noise)
