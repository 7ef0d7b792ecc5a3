"""Random stacks and DAGs: exact steps equal eager, updates are independent, feedback steps run."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grapefx.passes.graph.verify import independence
from tests.zoo import assert_same_gradients, compiled, train_step

ACTIVATIONS = ("relu", "tanh", "sigmoid", "gelu", "silu", "identity", "inplace")
JOINS = ("add", "cat", "mul", "sub", "where")


class Dag(nn.Module):
    """Nodes of width 4, each with a layer, an activation and one or two inputs before it."""

    def __init__(self, nodes: list[tuple[str, str, int, int, bool]], shared: bool) -> None:
        super().__init__()
        self.nodes = tuple(tuple(n) for n in nodes)
        self.first = nn.Linear(5, 4)
        made = []
        for _, join, _, other, norm in nodes:
            wide = 8 if other >= 0 and join == "cat" else 4
            layer: nn.Module = nn.Linear(wide, 4)
            if norm:
                layer = nn.Sequential(nn.LayerNorm(wide), layer)
            made.append(layer)
        if shared and len(made) > 1 and type(made[0]) is type(made[-1]):
            wide = [next(m for m in x.modules() if isinstance(m, nn.Linear)) for x in made]
            if wide[0].in_features == wide[-1].in_features:
                made[-1] = made[0]
        self.layers = nn.ModuleList(made)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.first(x)]
        for (act, join, one, other, _), layer in zip(self.nodes, self.layers, strict=True):
            h = values[one % len(values)]
            if other >= 0:
                g = values[other % len(values)]
                h = {
                    "add": lambda a, b: a + b,
                    "cat": lambda a, b: torch.cat([a, b], 1),
                    "mul": lambda a, b: a * b,
                    "sub": lambda a, b: a - 0.5 * b,
                    "where": lambda a, b: torch.where(a > 0, a, b),
                }[join](h, g)
            h = layer(h)
            if act == "inplace":
                h[:, :2] *= 2
                h = torch.tanh(h)
            elif act != "identity":
                h = getattr(F, act)(h) if act in ("gelu", "silu") else getattr(torch, act)(h)
            values.append(h)
        return self.out(values[-1])


node = st.tuples(
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(JOINS),
    st.integers(0, 3),
    st.integers(-3, 3),
    st.booleans(),
)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(node, min_size=1, max_size=3), st.booleans(), st.sampled_from(["dfa", "grape"]))
def test_random_dags(nodes: list[Any], shared: bool, method: str) -> None:
    torch.manual_seed(0)
    model = Dag(nodes, shared).double()
    twin = copy.deepcopy(model)
    net = compiled(model, method)
    x = torch.randn(3, 5).double()
    train_step(net, (x,))  # step 0 calibrates
    train_step(twin, (x,))
    assert_same_gradients(net, twin)
    train_step(net, (torch.randn(6, 5).double(),))
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    plan = net.plan
    assert plan is not None
    kind = "align" if method == "grape" else "update"
    found = independence(plan.graph(kind), plan.layers)
    # a parameter whose layer is cut learns from the error, never from the layer above
    assert {x for names in found.values() for x in names} == {x.name for x in plan.layers}
