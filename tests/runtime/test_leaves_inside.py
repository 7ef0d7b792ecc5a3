"""``requires_grad = True`` on an activation, as transformers' speech models set it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grapefx
from tests.zoo import assert_same_gradients, compiled, eager_twin, train_step


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None]
        if self.training:
            h.requires_grad = True
        return self.last(torch.relu(self.first(h)))


@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_an_activation_in_front_of_all_layers(method: str) -> None:
    model = Speech()
    twin = eager_twin(model)
    x = torch.randn(5, 6)
    if method == "bp":
        net = compiled(model, "bp")
        train_step(net, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin, 1e-5)
    else:
        train_step(compiled(model, "dfa"), (x,))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_callers_tensor_is_not_forgotten() -> None:
    class Asks(Speech):
        def forward(self, x: Tensor) -> Tensor:
            x.requires_grad = True
            return self.last(torch.relu(self.first(x)))

    net = grapefx.compile(Asks(), method="bp", backend="eager")
    with pytest.raises(grapefx.CaptureError, match="requires_grad"):
        net(torch.randn(5, 6))
