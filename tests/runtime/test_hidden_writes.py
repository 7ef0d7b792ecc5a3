"""Writes into an activation that autograd does not see: the new values, and the old gradient.

Generated: how the memory is reached, what writes, and what is read afterwards; the oracle is eager.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grapefx
from grapefx import CaptureError

Write = Callable[[Tensor], object]


def _set(t: Tensor) -> None:
    t[..., :1] = 0.5


def _times(t: Tensor) -> None:
    t *= 2


WRITES: dict[str, Write] = {
    "setitem": _set,
    "imul": _times,
    "copy_": lambda t: t.copy_(t * 3 - 1),
    "out": lambda t: torch.mul(t.detach().clone(), 2.0, out=t),
    "inplace": lambda t: F.relu(t, inplace=True),
    "twice": lambda t: t.mul_(2.0).clamp_(max=0.1),
}
# how the memory is reached -> (is it under no_grad, the tensor that is written)
REACHES: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "no_grad": (True, lambda h: h),
    "no_grad view": (True, lambda h: h[:, 2:5]),
    "detach": (False, lambda h: h.detach()),
    "data": (False, lambda h: h.data),
    "data view": (False, lambda h: h.data.view(-1)),
    "detached rows": (False, lambda h: h[1:].detach()),
    "half of a split": (True, lambda h: h.split(4, -1)[1]),
}
READS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "h": lambda h, view, plain: h,
    "an earlier view": lambda h, view, plain: torch.cat([view, h[:, 3:]], -1),
    "a detached alias": lambda h, view, plain: h * plain,
    "the view alone": lambda h, view, plain: F.pad(view, (0, 5)),
}


class Writer(nn.Module):
    def __init__(self, write: Write, reach: str, read: str, recomputed: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.write, self.read, self.recomputed = write, READS[read], recomputed
        self.off, self.reach = REACHES[reach]

    def inner(self, x: Tensor) -> Tensor:
        h = self.first(x)
        view, plain = h[:, :3], h.detach()
        with torch.no_grad() if self.off else nullcontext():
            self.write(self.reach(h))
        return self.read(h, view, plain)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.inner, x, use_reentrant=False) if self.recomputed else self.inner(x)
        return self.last(torch.tanh(h))


def _same(model: nn.Module) -> None:
    model = model.double()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    true = [p.grad for p in model.parameters()]
    model.zero_grad()
    net = grapefx.compile(model, method="bp", backend="eager")
    found = net(x)
    torch.testing.assert_close(found, y)
    found.square().sum().backward()
    for p, t in zip(model.parameters(), true, strict=True):
        torch.testing.assert_close(p.grad, t)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("write", WRITES)
def test_new_values_and_the_old_gradient(write: str, reach: str) -> None:
    if write == "out" and reach in ("no_grad view", "half of a split"):
        pytest.skip("Dynamo refuses out= of a tensor that is not contiguous")
    # what is read changes from pair to pair
    read = (list(READS)[1:] * 9)[list(WRITES).index(write) + list(REACHES).index(reach)]
    torch.manual_seed(0)
    _same(Writer(WRITES[write], reach, read))


def test_several_writes_and_a_recomputed_part() -> None:
    def both(t: Tensor) -> None:
        t.detach().mul_(2)
        t[:, :2].detach().add_(1)
        t.data[:, 1] = t.data[:, 0]

    for read, recomputed in zip(READS, itertools.cycle((False, True))):
        torch.manual_seed(0)
        _same(Writer(both, "no_grad", read, recomputed))
    torch.manual_seed(0)
    model = Writer(both, "detach", "h")
    model.reach = lambda h: h
    _same(model)


def test_a_write_that_autograd_sees_keeps_its_derivative() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h.mul_(2.0)
            h[:, :2] = 0
            out = torch.zeros_like(h)
            with torch.no_grad():
                out[:, 0] = 1
            out[:, 1:] = h[:, 1:]
            return self.last(torch.tanh(out))

    _same(Plain())


def test_detached_in_place() -> None:
    class Stops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            view = h[:, :3] * 2
            h.detach_()
            return self.last(torch.tanh(torch.cat([view, h[:, 3:]], -1)))

    _same(Stops())


@pytest.mark.parametrize("reach", REACHES)
def test_export_refuses_them(reach: str) -> None:
    net = grapefx.compile(
        Writer(WRITES["copy_"], reach, "h"), method="bp", backend="eager", capture="export"
    )
    with pytest.raises(CaptureError, match=r"out of autograd's sight\n  at .*test_hidden_writes"):
        net(torch.randn(5, 6))


def test_a_parameter_is_no_activation() -> None:
    class Clips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.first.weight[0].clamp_(-0.1, 0.1)
            return self.first(x)

    net = grapefx.compile(Clips(), method="bp", backend="eager")
    with pytest.raises(CaptureError, match=r"writes into its parameter 'first\.weight'"):
        net(torch.randn(5, 6))


def test_several_tensors_in_one_call_are_refused() -> None:
    model = Writer(lambda t: torch._foreach_mul_([t, t.clone()], 2.0), "detach", "h")
    net = grapefx.compile(model, method="bp", backend="eager")
    with pytest.raises(CaptureError, match="out of autograd's sight, several in one call"):
        net(torch.randn(5, 6))
