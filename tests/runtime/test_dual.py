"""Forward-mode dual numbers: refused wherever their tangent would be lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import grapefx
from grapefx.errors import BackwardError


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(4, 5), nn.Linear(5, 3), nn.BatchNorm1d(5)

    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        h = torch.tanh(self.n(self.a(x)))
        return self.b(h if scale is None else h * scale["s"])


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inplace"])
@pytest.mark.parametrize("where", ["input", "nested", "parameter", "buffer"])
def test_duals_are_refused(mode: str, where: str) -> None:
    model, x = Normed(), torch.randn(6, 4)
    net = grapefx.compile(
        model, method="dfa", backend="eager", calib_every=None, inplace=mode == "inplace"
    )
    model.train(mode != "eval")
    scale = {"s": torch.ones(5)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.set_grad_enabled(mode != "no_grad"), forward_ad.dual_level():
        if where == "input":
            x = forward_ad.make_dual(x, torch.ones_like(x))
        elif where == "nested":
            scale = {"s": forward_ad.make_dual(scale["s"], torch.ones(5))}
        elif where == "parameter":
            w = model.a.weight.detach()
            del model.a.weight
            model.a.weight = nn.Parameter(w)
            model.a._parameters["weight"] = forward_ad.make_dual(model.a.weight, torch.ones(5, 4))
        else:
            mean = model.n._buffers["running_mean"]
            model.n._buffers["running_mean"] = forward_ad.make_dual(mean, torch.ones(5))
        with pytest.raises(BackwardError, match="forward-mode"):
            net(x, scale)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_dual_cotangent_is_refused() -> None:
    net = grapefx.compile(Normed(), method="dfa", backend="eager", calib_every=None)
    y = net(torch.randn(6, 4))
    with forward_ad.dual_level():
        g = forward_ad.make_dual(torch.ones(6, 3), torch.ones(6, 3))
        with pytest.raises(BackwardError, match="forward-mode"):
            y.backward(g)
    y.backward(torch.ones(6, 3))  # nothing was used up


def test_plain_tensors_inside_a_dual_level_train() -> None:
    model = Normed()
    net = grapefx.compile(model, method="dfa", backend="eager", calib_every=None)
    with forward_ad.dual_level():
        net(torch.randn(6, 4)).sum().backward()
    assert model.a.weight.grad is not None
