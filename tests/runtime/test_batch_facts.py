"""Models that ask for their batch size: every size gets what the model does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import CaptureError


class Asks(nn.Module):
    """What ``body`` does between two linear layers."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.body(self, self.first(x))))


def _guarded(m: Any, h: Tensor) -> Tensor:
    return m.norm(h) if h.shape[0] > 1 else h


def _even(m: Any, h: Tensor) -> Tensor:
    return 3 * h if h.shape[0] % 2 == 0 else h


def _half(m: Any, h: Tensor) -> Tensor:
    return h[h.sum(1).topk(max(1, int(h.shape[0] * 0.5))).indices]


def _large(m: Any, h: Tensor) -> Tensor:
    return -h if h.shape[0] >= 16 else h


BODIES = {"guarded": _guarded, "even": _even, "half": _half, "large": _large}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("sizes", [(6, 8, 5, 1, 20, 6), (1, 7, 1, 2)])
def test_each_batch_size_takes_its_own_branch(body: str, sizes: tuple[int, ...]) -> None:
    model = Asks(BODIES[body])
    twin = Asks(BODIES[body])
    net = grapefx.compile(twin, method="bp", backend="eager")
    for size in sizes:
        x = torch.randn(size, 4)
        for m in (model, net):
            m.zero_grad()
        expected, found = model(x), net(x)
        torch.testing.assert_close(found, expected)
        expected.pow(2).sum().backward()
        found.pow(2).sum().backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(q.grad, p.grad)
        with torch.no_grad():
            torch.testing.assert_close(net(x), model(x))


def test_sizes_that_change_nothing_share_a_program() -> None:
    """But for a single sample, whose sizes 1 broadcast."""
    net = grapefx.compile(Asks(lambda m, h: h.view(h.shape[0], -1)), method="dfa", backend="eager")
    for size in (6, 1, 9, 1):
        net(torch.randn(size, 4)).sum().backward()
    assert len(net._captures.programs) == 2


def test_batch_norm_refuses_one_sample_as_in_eager_mode() -> None:
    """And its running statistics stay what they were."""
    model = Asks(lambda m, h: m.norm(h))
    net = grapefx.compile(model, method="grape", backend="eager")
    net(torch.randn(5, 4)).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CaptureError, match="Expected more than 1 value per channel"):
        net(torch.randn(1, 4))
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, before[k])
    net(torch.randn(3, 4)).sum().backward()


def test_numbers_of_the_output_follow_the_batch() -> None:
    class Counts(Asks):
        def forward(self, x: Tensor) -> Any:
            n = x.shape[0]
            return {"y": super().forward(x), "n": n, "half": n / 2, "next": (n + 1, "text")}

    net = grapefx.compile(Counts(lambda m, h: h), method="bp", backend="eager")
    for size in (5, 7, 1):
        out = net(torch.randn(size, 4))
        rest = {k: v for k, v in out.items() if k != "y"}
        assert rest == {"n": size, "half": size / 2, "next": (size + 1, "text")}
        assert type(out["n"]) is int and type(out["half"]) is float
    with torch.no_grad():
        assert net(torch.randn(4, 4))["n"] == 4
