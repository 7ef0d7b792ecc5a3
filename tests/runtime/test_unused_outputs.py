"""Outputs that the loss does not use or that are detached; frozen models; nothing to fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import InputError
from tests.zoo import (
    MLP,
    assert_same_gradients,
    compiled,
    eager_twin,
    loss_of,
    make,
    train_step,
)


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
    net = grapefx.compile(twin, method=method, backend="eager", calib_every=1)
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
        assert net._state.schedule.calibrations == done
    fitted = net.feedback_state_dict()["tensors"]
    assert start and any(not torch.equal(v, fitted[k]) for k, v in start.items())


def test_captured_in_anomaly_mode() -> None:
    for method in ("bp", "grape"):
        with torch.autograd.set_detect_anomaly(True):
            net = grapefx.compile(Heads(), method=method, backend="eager", calib_every=1)
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


@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_the_gradient_passes_a_frozen_model_exactly(method: str) -> None:
    """A generator learns through a discriminator; the discriminator's schedule does not move."""
    model, (x,) = make("mlp")
    twin = eager_twin(model)
    net = compiled(model, method)
    train_step(net, (x,))
    calls, plan = net._state.schedule.step, net.plan
    for m in (model, twin):
        m.requires_grad_(False)
    given = [x.clone().requires_grad_() for _ in range(2)]
    for m, z in zip((net, twin), given, strict=True):
        loss_of(m(z)).backward()
    torch.testing.assert_close(given[0].grad, given[1].grad)
    assert (net._state.schedule.step, net.plan) == (calls, plan)
    assert not net(x).requires_grad
    model.requires_grad_()
    train_step(net, (x,))
    assert net._state.schedule.step == calls + 1


@pytest.mark.parametrize("method", ["bp", "dfa", "grape", "fg-a"])
@pytest.mark.parametrize("form", ["twin", "view", "scaled", "softmax"])
def test_a_detached_twin_of_an_output(form: str, method: str) -> None:
    class Twins(MLP):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = super().forward(x)
            still = h.detach()
            more = {"twin": still, "view": still.view(-1), "scaled": still * 2}
            return h, more.get(form, still.softmax(-1))

    torch.manual_seed(0)
    model = Twins().double()
    twin = eager_twin(model)
    plain = MLP().double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(4, 8, dtype=torch.float64)
    options = {"calib_every": None, "seed": 1}
    net, other = compiled(model, method, **options), compiled(plain, method, **options)
    for _ in range(2):
        out, still = net(x)
        assert out.requires_grad and not still.requires_grad
        torch.testing.assert_close(still, twin(x)[1])
        net.zero_grad()
        other.zero_grad()
        loss_of(out).backward()
        loss_of(other(x)).backward()
        assert_same_gradients(net, other)
    if method == "bp":
        loss_of(twin(x)[0]).backward()
        assert_same_gradients(net, twin)


@pytest.mark.parametrize("method", ["dfa", "grape", "grape-2024", "fdfa", "dkp"])
def test_an_output_layer_that_starts_at_zero(method: str) -> None:
    """The first calibration has nothing to fit: maps keep their values, and the next one tries."""
    torch.manual_seed(0)
    model = MLP(act=nn.Tanh)
    nn.init.zeros_(model.out.weight)
    net = compiled(model, method)
    x, y = torch.randn(32, 8), torch.randint(5, (32,))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert net._state.schedule.calibrations == min(step, 1)
        sizes = [t.norm(dim=0).min() for k, t in net.feedback.items() if k.endswith("/B")]
        assert min(sizes) > 1e-6 or method in ("dkp", "fdfa")  # which start at 0
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())  # type: ignore[union-attr]
