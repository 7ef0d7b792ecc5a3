"""Training steps of an MLP as FX graphs, written op by op: the analysis' own ground truth.

Nothing here uses the compiler, so a mistake there cannot hide one in the analysis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from grapefx.torch_compat import FakeTensorMode, fake_tensor, new_fake_mode

aten = torch.ops.aten


class Builder:
    """Adds op calls to a graph, running each on fake tensors for its ``meta["val"]``."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.mode: FakeTensorMode = new_fake_mode()
        self.phase: str | None = None
        self.layer: str | None = None

    @contextmanager
    def at(self, phase: str | None, layer: str | None) -> Iterator[None]:
        """Mark every op added inside."""
        old = self.phase, self.layer
        self.phase, self.layer = phase, layer
        yield
        self.phase, self.layer = old

    def input(self, name: str, *shape: int, role: str = "parameter", dynamic: bool = False) -> Node:
        node = self.graph.placeholder(name)
        with torch.device("cpu"):
            real = torch.empty(shape)
        node.meta["val"] = fake_tensor(self.mode, real, (0,) if dynamic else ())
        node.meta["grapefx_role"] = role
        return node

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(op, args, kwargs)

        def value(a: Any) -> Any:
            return a.meta["val"] if isinstance(a, Node) else a

        with self.mode:
            node.meta["val"] = op(*torch.fx.node.map_arg(args, value), **kwargs)
        if self.phase is not None:
            node.meta["grapefx_phase"], node.meta["grapefx_layer"] = self.phase, self.layer
        return node

    def done(self, outputs: list[Node]) -> GraphModule:
        self.graph.output(tuple(outputs))
        return GraphModule(torch.nn.Module(), self.graph)


@dataclass
class Mlp:
    """``depth`` linear layers, width ``n`` everywhere (input too), ``c`` classes, ReLU between."""

    depth: int
    n: int
    c: int
    batch: int
    dynamic: bool = True

    def name(self, layer: int) -> str:
        return f"fc{layer}" if layer < self.depth else "head"

    def sizes(self, layer: int) -> tuple[int, int]:
        return (self.n, self.n if layer < self.depth else self.c)

    def forward(self, b: Builder, *, noise: bool = False) -> dict[str, Any]:
        """The forward pass; with ``noise``, tangents from a v at every hidden activation."""
        x = b.input("x", self.batch, self.n, role="input", dynamic=self.dynamic)
        layers = range(1, self.depth + 1)
        w = {i: b.input(f"w{i}", *reversed(self.sizes(i))) for i in layers}
        bias = {i: b.input(f"b{i}", self.sizes(i)[1]) for i in layers}
        v = {}
        if noise:
            for i in range(1, self.depth):
                v[i] = b.input(f"v{i}", self.batch, self.n, role="noise", dynamic=self.dynamic)
        h, tangent = {0: x}, None
        for i in layers:
            with b.at("forward", self.name(i)):
                wt = b(aten.t.default, w[i])
                a = b(aten.addmm.default, bias[i], h[i - 1], wt)
                h[i] = b(aten.relu.default, a) if i < self.depth else a
            if not noise:
                continue
            with b.at("tangent", self.name(i)):
                if tangent is not None:
                    tangent = b(aten.mm.default, tangent, wt)
                    if i < self.depth:
                        tangent = b(aten.threshold_backward.default, tangent, h[i], 0)
                        tangent = b(aten.add.Tensor, tangent, v[i])
                else:
                    tangent = v[1]
        e = b.input("e", self.batch, self.c, role="cotangent", dynamic=self.dynamic)
        return {"x": x, "w": w, "h": h, "v": v, "d": tangent, "e": self._error(b, e, h)}

    def _error(self, b: Builder, e: Node, h: dict[int, Node]) -> Node:
        # a loss inside the step, so that the error waits for the whole forward pass
        with b.at("error", None):
            return b(aten.sub.Tensor, h[self.depth], e)

    def weight_grads(self, b: Builder, i: int, delta: Node, h: dict[int, Node]) -> list[Node]:
        with b.at("weight_grad", self.name(i)):
            dt = b(aten.t.default, delta)
            return [b(aten.mm.default, dt, h[i - 1]), b(aten.sum.dim_IntList, delta, [0])]

    def bp(self) -> GraphModule:
        """Backpropagation as one graph."""
        b = Builder()
        f = self.forward(b)
        delta, grads = f["e"], []
        for i in range(self.depth, 0, -1):
            grads += self.weight_grads(b, i, delta, f["h"])
            if i > 1:
                with b.at("input_grad", self.name(i)):
                    delta = b(aten.mm.default, delta, f["w"][i])
                with b.at("input_grad", self.name(i - 1)):
                    delta = b(aten.threshold_backward.default, delta, f["h"][i - 1], 0)
        return b.done([f["h"][self.depth], *grads])

    def feedback(self, *, align: bool = False, leak: bool = False) -> GraphModule:
        """A DFA step; with ``align`` a GrAPE step. ``leak`` lets one gradient cross a cut."""
        b = Builder()
        f = self.forward(b, noise=align)
        grads, maps = self.weight_grads(b, self.depth, f["e"], f["h"]), []
        crossing = None
        for i in range(self.depth - 1, 0, -1):
            m = b.input(f"B{i}", self.c, self.n, role="feedback")
            if align:
                with b.at("alignment", self.name(i)):
                    dt = b(aten.t.default, f["d"])
                    j = b(aten.mm.default, dt, f["v"][i])
                    m = b(aten.add.Tensor, m, j)
                    maps.append(m)
            with b.at("projection", self.name(i)):
                delta = b(aten.mm.default, f["e"], m)
            if leak and crossing is not None:
                with b.at("input_grad", self.name(i)):
                    delta = b(aten.add.Tensor, delta, crossing)
            with b.at("input_grad", self.name(i)):
                delta = b(aten.threshold_backward.default, delta, f["h"][i], 0)
            if leak and crossing is None:
                with b.at("input_grad", self.name(i)):
                    crossing = b(aten.mm.default, delta, f["w"][i])
            grads += self.weight_grads(b, i, delta, f["h"])
        return b.done([f["h"][self.depth], *grads, *maps])
