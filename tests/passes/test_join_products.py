"""Joined products compute what they did apart, and only those are joined that may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from grapefx.passes.divide.partition import Split, split
from grapefx.passes.peephole.join_products import join_products
from grapefx.plan import Plan, build_plan
from grapefx.torch_compat import pytree
from tests.zoo import make, plan_of, step_inputs

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default)


def count(gm: GraphModule) -> int:
    return sum(n.target in PRODUCTS for n in gm.graph.nodes)


def check(plan: Plan, parts: Split, model: nn.Module, args: tuple[object, ...]) -> int:
    """How many products went; the forward graph returns what it did."""
    inputs = step_inputs(plan, plan.graph("align"), model, args)

    def run() -> list[Tensor]:
        own = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
        torch.manual_seed(0)
        return list(parts.forward(*[own[i] for i in parts.forward_inputs]))

    before, have = run(), count(parts.forward)
    gone = join_products(parts.forward)
    parts.forward.graph.lint()
    assert count(parts.forward) == have - gone
    for a, b in zip(before, run(), strict=True):
        torch.testing.assert_close(b, a)
    return gone


@pytest.mark.parametrize(
    ("name", "options", "gone"),
    [
        ("mlp", {}, 3),
        ("mlp", {"tangent_fraction": 0.5}, 3),
        ("mlp", {"directions": 2}, 6),
        ("encoder", {}, None),
        ("lstm", {}, None),  # one weight in many products: each is joined to its own tangent
    ],
)
def test_joined_products(name: str, options: dict[str, object], gone: int | None) -> None:
    plan = plan_of(name, "grape", **options)
    model, args = make(name)
    found = check(plan, split(plan.graph("align")), model, args)
    assert found == gone if gone is not None else found > 0


def test_an_output_does_not_share_memory_with_a_tangent() -> None:
    """Without a bias the halves are the results themselves: the output layer's stay apart."""
    model = nn.Sequential(
        nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 7, bias=False), nn.Tanh(),
        nn.Linear(7, 3, bias=False),
    )  # fmt: skip
    x = torch.randn(4, 5)
    plan = build_plan(model, (x,), method="grape", calib_every=None)
    assert check(plan, split(plan.graph("align")), model, (x,)) == 1


def test_nothing_to_join_without_tangents() -> None:
    plan = plan_of("mlp", "dfa")
    assert join_products(split(plan.graph("update")).forward) == 0
