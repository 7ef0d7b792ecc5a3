"""Outputs that the loss does not use; losses that are not finite; anomaly mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import InputError


class Heads(nn.Module):
    """Two outputs behind one layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        return self.a(h), self.b(h)


@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_a_head_that_the_loss_leaves_out_has_no_gradient(method: str, used: Any) -> None:
    model, twin = Heads(), Heads()
    net = grapefx.compile(twin, method=method, backend="eager")
    x = torch.randn(5, 4)
    for _ in range(2):  # a calibration step, then one of the method's
        for m in (model, net):
            m.zero_grad()
            out = m(x)
            sum(out[i].pow(2).sum() for i in used).backward()
        for name, p in model.named_parameters():
            q = twin.get_parameter(name)
            if not name.startswith("body"):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None:
                    torch.testing.assert_close(q.grad, p.grad)
    assert twin.body.weight.grad is not None or method != "bp"


def test_alternating_heads_train_as_in_eager_mode() -> None:
    """AdamW would decay a head whose gradient is zero instead of None."""
    model, twin = Heads(), Heads()
    x = torch.randn(5, 4)
    for m in (model, grapefx.compile(twin, method="bp", backend="eager")):
        opt = torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(6):
            opt.zero_grad()
            m(x)[step % 2].pow(2).sum().backward()
            opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p)


def test_a_calibration_that_is_not_finite_is_done_again() -> None:
    """As when a GradScaler's first scale is too large."""
    net = grapefx.compile(Heads(), method="dfa", backend="eager", calib_every=1)
    net.set_epoch(0)
    x = torch.randn(5, 4)
    net(x)
    start = {k: v.clone() for k, v in net.feedback_state_dict()["tensors"].items()}
    for factor, done in ((float("inf"), 0), (float("inf"), 0), (1.0, 1), (1.0, 1)):
        a, b = net(x)
        ((a.sum() + b.sum()) * factor).backward()
        assert net._schedule.calibrations == done
    fitted = net.feedback_state_dict()["tensors"]
    assert start and any(not torch.equal(v, fitted[k]) for k, v in start.items())


def test_captured_in_anomaly_mode() -> None:
    for method in ("bp", "grape"):
        with torch.autograd.set_detect_anomaly(True):
            net = grapefx.compile(Heads(), method=method, backend="eager")
            sum(o.sum() for o in net(torch.randn(5, 4))).backward()


@pytest.mark.parametrize("rows", [1, 3])
def test_targets_of_another_batch_size(rows: int) -> None:
    net = grapefx.compile(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), method="drtp", backend="eager"
    )
    out = net(torch.randn(5, 4))
    net.targets(torch.zeros(rows, dtype=torch.long))
    with pytest.raises(InputError, match=rf"\({rows}, 3\) do not fit the output \(5, 3\)"):
        out.sum().backward()
