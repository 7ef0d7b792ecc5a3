"""``.data`` and ``set_`` in a forward: eager's values, or refused with the line and a remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import CaptureError


def _set(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.set_(value)  # type: ignore[call-overload]


def buffer_data(m: Any, h: Tensor) -> None:
    m.mean.data = m.mean + h.detach().mean(0)


def buffer_set(m: Any, h: Tensor) -> None:
    _set(m.mean, m.mean + 1)


def attribute_data(m: Any, h: Tensor) -> None:
    m.held.data = m.held + 1


def parameter_data(m: Any, h: Tensor) -> None:
    m.last.weight.data = m.last.weight.data.clamp(-0.2, 0.2)


def parameter_set(m: Any, h: Tensor) -> None:
    _set(m.last.weight, m.last.weight * 0.9)


def activation_data(m: Any, h: Tensor) -> None:
    h.data = h.data * 2


def written_through_data(m: Any, h: Tensor) -> None:
    m.mean.data.mul_(0.9).add_(h.detach().mean(0))


OTHER_MEMORY = [
    buffer_data, buffer_set, attribute_data, parameter_data, parameter_set, activation_data,
]  # fmt: skip


class Writes(nn.Module):
    """``write`` between two layers, which read what it writes."""

    def __init__(self, write: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.first, self.last, self.write = nn.Linear(4, 8), nn.Linear(8, 2), write
        self.register_buffer("mean", torch.zeros(8))
        self.held = torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.write(self, h)
        return self.last(h + self.mean + self.held)


def _compiled(model: nn.Module, **options: Any) -> Any:
    return grapefx.compile(model, method="bp", backend="eager", calib_every=None, **options)


@pytest.mark.parametrize("inplace", [False, True], ids=["wrapped", "in-place"])
@pytest.mark.parametrize("capture", ["dynamo", "export"])
@pytest.mark.parametrize("write", OTHER_MEMORY)
def test_other_memory_is_refused_with_its_line(write: Any, capture: str, inplace: bool) -> None:
    """In training and, where the graph is used for it, without gradients; nothing is changed."""
    model = Writes(write)
    before = copy.deepcopy(model.state_dict())
    net = _compiled(model, capture=capture, inplace=inplace)
    x = torch.randn(5, 4)
    line = r"test_data_writes\.py(.|\n)*remedy"
    with pytest.raises(CaptureError, match=line):
        net(x)
    if not inplace:
        with torch.no_grad(), pytest.raises(CaptureError, match=line):
            net(x)
    torch.testing.assert_close(model.state_dict(), before)
    torch.testing.assert_close(model.held, torch.zeros(8))


@pytest.mark.parametrize("write", OTHER_MEMORY)
def test_in_place_without_gradients_is_the_model_itself(write: Any) -> None:
    model = Writes(write)
    twin = Writes(write)
    twin.load_state_dict(model.state_dict())
    net, x = _compiled(model, inplace=True), torch.randn(5, 4)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(net(x), twin(x))
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("inplace", [False, True], ids=["wrapped", "in-place"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "no-grad"])
def test_memory_written_through_data_is_as_in_eager_mode(train: bool, inplace: bool) -> None:
    model = Writes(written_through_data)
    twin = copy.deepcopy(model)
    net, x = _compiled(model, inplace=inplace), torch.randn(5, 4)
    for _ in range(3):
        with torch.set_grad_enabled(train):
            found, wanted = net(x), twin(x)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(model.mean, twin.mean)
        if train:
            found.square().sum().backward()
            wanted.square().sum().backward()
    if train:
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
