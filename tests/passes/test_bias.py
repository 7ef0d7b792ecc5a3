"""Biases behind products: the same numbers; apart where something reads the sum, with Inductor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grapefx.passes.divide.partition import split
from grapefx.passes.peephole.late_bias import add_bias_late
from grapefx.plan import build_plan
from grapefx.torch_compat import inductor_counts
from tests.zoo import compiled, make, plan_of, step_inputs

aten = torch.ops.aten


def only_returned(node: torch.fx.Node) -> bool:
    return all(
        u.op == "output" or (u.target is aten.view.default and only_returned(u)) for u in node.users
    )


@pytest.mark.parametrize(("name", "found"), [("mlp", 3), ("encoder", None)])
def test_the_same_numbers(name: str, found: int | None) -> None:
    plan = plan_of(name, "dfa")
    model, args = make(name)
    parts = split(plan.graph("update"))
    inputs = [step_inputs(plan, plan.graph("update"), model, args)[i] for i in parts.forward_inputs]
    torch.manual_seed(0)
    before = parts.forward(*[x.clone() if isinstance(x, torch.Tensor) else x for x in inputs])
    gone = add_bias_late(parts.forward)
    assert gone == found if found is not None else gone > 0
    parts.forward.graph.lint()
    left = [n for n in parts.forward.graph.nodes if n.target is aten.addmm.default]
    assert all(only_returned(n) for n in left) and len(left) <= 1
    torch.manual_seed(0)
    for a, b in zip(before, parts.forward(*inputs), strict=True):
        torch.testing.assert_close(b, a)


def test_half_precision_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(torch.bfloat16)
    plan = build_plan(model, (torch.randn(3, 4).to(torch.bfloat16),), method="bp")
    assert add_bias_late(split(plan.graph("calibration")).forward) == 0


@pytest.mark.parametrize("train", [True, False])
def test_no_compiled_call_has_a_bias(train: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    net = compiled(model, "dfa", backend="inductor", calib_every=None)
    x = torch.randn(4, 8)
    with inductor_counts(), torch.set_grad_enabled(train):
        net(x)
        with torch.profiler.profile() as profile:
            net(x)
    calls = [e.name for e in profile.events()]
    assert calls.count("aten::mm") >= 2 and calls.count("aten::addmm") == 1
