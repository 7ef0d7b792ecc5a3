"""What a forward does beside computing is done in every call."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import grapefx
from grapefx import CaptureError
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
        ("aux", lambda m, h: h.mean().detach()),
        ("count", lambda m, h: m.count + 1),
        ("mean", lambda m, h: 0.9 * m.mean + h.mean(0).detach()),
        ("new", lambda m, h: h.detach()),
    ],
)
def test_written_attributes_are_as_in_eager_mode(name: str, value: Any) -> None:
    model = Does(_assign(name, value))
    twin = copy.deepcopy(model)
    net = grapefx.compile(model, method="bp", backend="eager", calib_every=None)
    for _ in range(4):
        x = torch.randn(5, 4)
        net(x).sum().backward()
        twin(x).sum().backward()
        torch.testing.assert_close(getattr(model, name), getattr(twin, name))
    assert len(net._captures.programs) <= 2


def test_draws_from_pythons_random_are_those_of_eager_mode() -> None:
    model = Does(lambda m, h: setattr(m, "aux", random.random()))
    net = grapefx.compile(model, method="bp", backend="eager", calib_every=None)
    random.seed(3)
    drawn = []
    if torch.__version__ < "2.12":  # which follows few of random's
        with pytest.raises(CaptureError, match=r"random\.random"):
            net(torch.randn(5, 4))
        return
    for _ in range(3):
        net(torch.randn(5, 4))
        drawn.append(model.aux)
    random.seed(3)
    assert drawn == [random.random() for _ in range(3)]


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
