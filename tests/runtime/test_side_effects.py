"""What a forward does beside computing is reported, and the model's attributes stay its own."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import grapefx
from grapefx.errors import GrapefxWarning


class Does(nn.Module):
    """``deed`` between two layers."""

    def __init__(self, deed: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.aux, self.count, self.deed = torch.zeros(()), 0, deed
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        self.deed(self, h)
        return self.last(h)


def reports(model: nn.Module) -> list[str]:
    """The warnings of one step about what the model does."""
    net = grapefx.compile(model, method="bp", backend="eager", calib_every=None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        net(torch.randn(5, 4)).sum().backward()
    return [str(w.message) for w in seen if issubclass(w.category, GrapefxWarning)]


def _assign(name: str, value: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], None]:
    return lambda m, h: setattr(m, name, value(m, h))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("aux", lambda m, h: h.mean()),
        ("count", lambda m, h: m.count + 1),
        ("mean", lambda m, h: 0.9 * m.mean + h.mean(0).detach()),
        ("new", lambda m, h: h),
    ],
)
def test_written_attributes(name: str, value: Callable[[Any, Tensor], Any]) -> None:
    model = Does(_assign(name, value))
    before = dict(model.__dict__), dict(model._buffers)
    (report,) = reports(model)
    assert f"the model assigns {name} in its forward" in report
    now = {k: v for k, v in model.__dict__.items() if k != "grapefx"}
    assert now.keys() == before[0].keys() and all(now[k] is v for k, v in before[0].items())
    assert all(model._buffers[k] is v for k, v in before[1].items())


@pytest.mark.parametrize(
    ("source", "draw"),
    [("Python's random", random.random), ("numpy.random", np.random.rand)],
)
def test_draws_outside_torch(source: str, draw: Callable[[], Any]) -> None:
    (report,) = reports(Does(lambda m, h: draw()))
    assert f"the model draws from {source} in its forward" in report


def _in_place(m: Any, h: Tensor) -> None:
    m.mean.mul_(0.9).add_(h.mean(0).detach())


def test_what_a_capture_carries_out_is_not_reported() -> None:
    assert reports(Does(_in_place)) == []
    assert reports(Does(lambda m, h: torch.rand(3))) == []
    assert reports(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))) == []


def _pruned(layer: nn.Module) -> None:
    prune.identity(layer, "weight")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", [weight_norm, spectral_norm, _pruned])
def test_weights_computed_by_hooks_are_not_reported(how: Callable[..., Any]) -> None:
    layer = nn.Linear(4, 8)
    how(layer)
    assert reports(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 2))) == []
