"""``torch.cond`` in a model: eager's values and gradients on both sides of the question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import CaptureError

BRANCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "plain": lambda h, q: torch.cond(q, lambda h: h.sin(), lambda h: h.cos() * 2, (h,)),
    "two results": lambda h, q: sum(
        torch.cond(q, lambda h: (h.sin(), h * 3), lambda h: (h.cos(), h.exp()), (h,))
    ),
    "two operands": lambda h, q: torch.cond(
        q, lambda a, b: a * b.sum(-1, keepdim=True), lambda a, b: a - b, (h, h.tanh())
    ),
    "nested": lambda h, q: torch.cond(
        q,
        lambda h: torch.cond(h.max() > 2, lambda h: h * 5, lambda h: h.exp(), (h,)),
        lambda h: h.cos(),
        (h,),
    ),
    # the other branch's derivative is infinite where this one is taken
    "infinite": lambda h, q: torch.cond(
        q, lambda h: h * 2, lambda h: (h - h.detach()).abs().sqrt() + h, (h,)
    ),
    "one entry": lambda h, q: torch.cond(
        q.reshape(1), lambda h: h.sigmoid(), lambda h: h.clone(), (h,)
    ),
}


class Branching(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(BRANCHES[self.name](h, x.sum() > 0))


def gradients(model: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    run(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def eager(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Python's own branch: torch.cond in eager mode differentiates through a compiled graph."""
    cond = torch.cond
    torch.cond = lambda q, yes, no, operands: (yes if bool(q) else no)(*operands)
    try:
        return [*gradients(model, model, x), model(x)]
    finally:
        torch.cond = cond


@pytest.mark.parametrize("method", ["bp", "grape", "dfa"])
@pytest.mark.parametrize("name", BRANCHES)
def test_both_sides(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = Branching(name).double()
    net = grapefx.compile(model, method=method, calib_every=None, backend="eager")
    for sign, size in ((1, 6), (-1, 6), (1, 4)):
        x = sign * torch.rand(size, 4, dtype=torch.float64)
        *true, value = eager(model, x)
        found = gradients(model, net, x)
        exact = slice(None) if method == "bp" else slice(2, None)
        if not (name == "infinite" and sign < 0):  # eager's own gradient is NaN there
            torch.testing.assert_close(found[exact], true[exact])
            assert all(g.isfinite().all() for g in found)
        with torch.no_grad():
            torch.testing.assert_close(net(x), value)
            torch.testing.assert_close(net.eval()(x), value)
        net.train()


def test_inductor() -> None:
    torch.manual_seed(0)
    model = Branching("plain")
    net = grapefx.compile(model, method="bp")
    for sign in (1, -1):
        x = sign * torch.rand(6, 4)
        *true, _ = eager(model, x)
        torch.testing.assert_close(gradients(model, net, x), true)


def test_a_loop_is_refused_by_name() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    class Loop(Branching):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            n = torch.zeros((), dtype=torch.long)
            _, h = while_loop(lambda n, h: n < 3, lambda n, h: (n + 1, h.sin()), (n, h))
            return self.b(h)

    net = grapefx.compile(Loop("plain"), method="bp", backend="eager")
    with torch.no_grad(), pytest.raises(CaptureError, match=r"(?s)while_loop.*remedy"):
        net(torch.randn(6, 4))
