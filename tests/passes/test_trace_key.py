"""The trace cache of the emitter: the same graphs with and without it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from grapefx.passes.graph import emit
from grapefx.plan import build_plan


def model():
    widths = [12, 16, 16, 16, 8, 16, 3]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers)


def described(node, place):
    """What a node computes and from which nodes; its name does not matter."""
    arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda a: place[a])
    shape = getattr(node.meta.get("val"), "shape", ())
    return str(node.target), str(arguments), str(tuple(shape))


def listing(plan):
    """Every node of every graph."""
    out = {}
    for kind, gm in plan.graphs.items():
        place = {n: i for i, n in enumerate(gm.graph.nodes)}
        out[kind] = [described(n, place) for n in gm.graph.nodes if n.op == "call_function"]
    return out


@pytest.mark.parametrize("method", ["dfa", "fdfa", "grape"])
def test_cached_traces_give_the_same_graphs(method, monkeypatch):
    traced = []
    original = emit.Emitter._trace
    monkeypatch.setattr(
        emit.Emitter, "_trace", lambda self, *a: traced.append(1) or original(self, *a)
    )
    x = torch.randn(8, 12)
    cached = listing(build_plan(model(), (x,), method=method))
    with_cache = len(traced)
    monkeypatch.setattr(emit, "trace_key", lambda *a: None)
    assert listing(build_plan(model(), (x,), method=method)) == cached
    assert with_cache < len(traced) - with_cache
