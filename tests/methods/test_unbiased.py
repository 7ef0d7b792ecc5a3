"""Forward gradients are unbiased: the mean of many draws is the true gradient (FDFA 2024 theorem
3).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import MLP, compiled, eager_twin

STEPS = 400


def draws(model: nn.Module, method: str, x: Tensor, y: Tensor, **options: Any) -> dict[str, Tensor]:
    """The gradients of many steps at the same weights."""
    net = compiled(model, method, calib_every=None, **options)
    kept: dict[str, list[Tensor]] = {}
    for _ in range(STEPS):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for name, p in net.named_parameters():
            assert p.grad is not None
            kept.setdefault(name, []).append(p.grad.clone())
    return {name: torch.stack(g) for name, g in kept.items()}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fg-w", {}),
        ("fg-a", {"noise": "gaussian"}),
        ("fg-a", {"noise": "rademacher"}),
        ("fg-a", {"derivative": "batch"}),
        ("fg-a", {"streams": "per_layer", "directions": 2}),
    ],
)
def test_forward_gradients_are_unbiased(method: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = MLP(6, 2, nn.Tanh, 3).double()
    x, y = torch.randn(8, 8).double(), torch.randint(3, (8,))
    twin = eager_twin(model)
    F.cross_entropy(twin(x), y).backward()
    found = draws(model, method, x, y, **options)
    scores = []
    for name, p in twin.named_parameters():
        assert p.grad is not None
        g = found[name]
        if method == "fg-a" and name.startswith("out"):
            torch.testing.assert_close(g[0], p.grad)  # the output layer is exact
            continue
        z = (g.mean(0) - p.grad) / (g.std(0) / math.sqrt(STEPS))
        assert z.abs().max() < 4.5, name
        scores.append(z.flatten())
    assert 0.5 < torch.cat(scores).pow(2).mean() < 1.6


def test_weight_perturbation_is_unbiased_through_batch_norm() -> None:
    """V is one direction for the batch, so the batch's own statistics are differentiated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    twin = eager_twin(model)
    F.cross_entropy(twin(x), y).backward()
    true = twin[0].weight.grad  # type: ignore[union-attr,index]
    g = draws(model, "fg-w", x, y)["0.weight"]
    z = (g.mean(0) - true) / (g.std(0) / math.sqrt(STEPS))
    assert z.abs().max() < 4.5


def test_more_directions_have_less_variance() -> None:
    torch.manual_seed(0)
    model = MLP(6, 2, nn.Tanh, 3).double()
    x, y = torch.randn(8, 8).double(), torch.randint(3, (8,))
    name = "layers.0.weight"
    one, four = (draws(model, "fg-a", x, y, directions=k)[name].var(0).mean() for k in (1, 4))
    assert 3 < one / four < 5.5
