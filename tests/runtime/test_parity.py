"""Oracle: ``bp`` and calibration steps are eager autograd, on any model and any loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import (
    MLP,
    ZOO,
    assert_same_buffers,
    assert_same_gradients,
    compiled,
    eager_twin,
    make,
    train_step,
)


@pytest.mark.parametrize("method", ["bp", "grape"])
@pytest.mark.parametrize("name", list(ZOO))
def test_exact_steps_equal_eager(name: str, method: str) -> None:
    """Gradients, loss and buffers, dropout included (one seed draws one mask)."""
    model, args = make(name)
    twin = eager_twin(model)
    net = compiled(model, method)
    for step in range(2 if method == "bp" else 1):
        ours, theirs = train_step(net, args, seed=step), train_step(twin, args, seed=step)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert_same_gradients(net, twin)
        assert_same_buffers(net, twin)
    if method == "bp":
        return
    # a feedback step: the same forward, the head's gradient exact, the others not
    ours, theirs = train_step(net, args, seed=9), train_step(twin, args, seed=9)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert_same_buffers(net, twin)
    plan = net.plan
    assert plan is not None
    heads = plan.placement.head
    for p, q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        if p[0] in heads and q[1].grad is not None:
            torch.testing.assert_close(p[1].grad, q[1].grad, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        net.eval()
        twin.eval()
        ours_out, theirs_out = net(*args), twin(*args)
    if isinstance(ours_out, dict):
        assert ours_out.keys() == theirs_out.keys()
        ours_out, theirs_out = ours_out["logits"], theirs_out["logits"]
    torch.testing.assert_close(ours_out, theirs_out)


def _nll(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, label_smoothing=0.1)


def _own(out: Tensor, y: Tensor) -> Tensor:
    return (out.logsumexp(1) * out[:, 0].sigmoid()).sum() + F.mse_loss(out, torch.ones_like(out))


def _margin(out: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(out, y)


def _partial(out: Tensor, y: Tensor) -> Tensor:
    return out[: len(y) // 2, 1].pow(3).mean()  # half of the batch, one class


@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_any_loss(method: str) -> None:
    torch.manual_seed(0)
    model = MLP().double()
    x, y = torch.randn(7, 8).double(), torch.randint(0, 5, (7,))
    twin = eager_twin(model)
    net = compiled(model, method, calib_unit="step", calib_every=1)
    for loss_fn in (_nll, _own, _margin, _partial):
        for m in (net, twin):
            m.zero_grad()
            loss_fn(m(x), y).backward()
        assert_same_gradients(net, twin)


def test_training_by_calibration_alone_is_backpropagation() -> None:
    """Ten Adam steps with ``calib_every=1`` step end at the weights of plain training."""
    model, args = make("cnn")
    twin = eager_twin(model)
    net = compiled(model, "fdfa", calib_unit="step", calib_every=1)
    for m in (net, twin):
        optimizer = torch.optim.Adam(m.parameters(), 1e-2)
        for step in range(10):
            train_step(m, args, seed=step)
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
