"""Dropout and other random operators in compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from tests.zoo import train_step

P = 0.5


class Dropped(nn.Module):
    """Dropout behind two layers, other random numbers in front of the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x), P, self.training) + 0.1 * torch.randn_like(x[:, :1])
        return F.dropout(self.b(torch.tanh(h)), P, self.training)


def compiled(method: str, **options: Any) -> grapefx.FeedbackModule:
    torch.manual_seed(0)
    net = grapefx.compile(Dropped(), method=method, calib_every=None, **options)
    net.set_epoch(0)
    return net


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_forward_and_update_share_a_mask(method: str, dynamic: bool | None) -> None:
    net = compiled(method, dynamic=dynamic)
    masks = []
    for n in (6, 6, 9):
        net.zero_grad()
        out = net(torch.randn(n, 8))
        mask = (out != 0).float()
        assert 0.3 < mask.mean() < 0.7
        out.sum().backward()
        torch.testing.assert_close(net.b.bias.grad, mask.sum(0) / (1 - P))
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1])  # every step draws


def test_a_seed_draws_one_mask() -> None:
    net = compiled("dfa")
    x = torch.randn(5, 8)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(net(x).detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_torchs_own_random_numbers() -> None:
    """``fallback_random``: the masks are eager's, so a step can be compared with one."""
    net = compiled("bp", backend_options={"fallback_random": True})
    twin = Dropped()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(5, 8)
    losses = [train_step(model, (x,)) for model in (net, twin)]
    torch.testing.assert_close(losses[0], losses[1])
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_inference_draws_where_the_model_does() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.lin(x), P, True)

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 64)

    net = grapefx.compile(Always(), method="dfa", calib_every=None)
    with torch.no_grad():
        a, b = net(torch.ones(4, 8)), net(torch.ones(4, 8))
    assert (a == 0).any() and not torch.equal(a, b)
