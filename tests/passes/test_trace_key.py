"""The trace cache of the emitter: the same graphs with and without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grapefx.passes import emit
from grapefx.plan import build_plan


def model():
    widths = [12, 16, 16, 16, 8, 16, 3]
    pairs = zip(widths, widths[1:], strict=False)
    return nn.Sequential(*(m for a, b in pairs for m in (nn.Linear(a, b), nn.Tanh())))


def listing(plan):
    return {
        kind: [(n.name, str(n.target), str(n.args), str(n.meta.get("val"))) for n in gm.graph.nodes]
        for kind, gm in plan.graphs.items()
    }


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
