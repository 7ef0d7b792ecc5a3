"""Size inputs: every size symbol of a graph is an input of its own, as AOTAutograd gives Inductor.

In: a flat graph whose inputs hold symbols in their sizes, perhaps only in multiples. Out: the same
with one plain size more for each. Inductor's generated code, and the guards of its cache, know a
symbol by such an input alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from grapefx.ir import copied
from grapefx.torch_compat import batch_symbol, graph_module


@dataclass(frozen=True)
class Place:
    """Where a size is read: an input's (of a tensor: at a dim) over a divisor."""

    input: int
    dim: int | None
    divisor: int

    def read(self, inputs: Sequence[Any]) -> Any:
        """The size, from the values of the graph's inputs."""
        value = inputs[self.input]
        return (value if self.dim is None else value.shape[self.dim]) // self.divisor


def size_inputs(gm: GraphModule, example: Sequence[Any]) -> tuple[GraphModule, tuple[Place, ...]]:
    """The graph with size inputs behind the others, and where each value is read; a copy if any."""
    known = {batch_symbol(v) for v in example if not isinstance(v, torch.Tensor)}
    places: dict[Any, Place] = {}
    for i, value in enumerate(example):
        sizes = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            expr = batch_symbol(size)
            if expr is None:
                continue
            factor, symbol = expr.as_coeff_Mul()
            if symbol.is_Symbol and factor.is_Integer and symbol not in known:
                places.setdefault(symbol, Place(i, dim, int(factor)))
    if not places:
        return gm, ()
    graph = copied(gm.graph)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for k, place in enumerate(places.values()):
        with graph.inserting_after(last):
            last = graph.placeholder(f"size_{k}")
        last.meta["val"] = place.read(example)
    return graph_module(gm, graph), tuple(places.values())
