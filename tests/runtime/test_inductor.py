"""The same through Inductor: few models, since each graph takes seconds to compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.zoo import MLP, assert_same_gradients, compiled, eager_twin, train_step

pytestmark = pytest.mark.slow


def test_inductor_equals_the_uncompiled_graphs() -> None:
    """A calibration step, an aligned one, inference, an expanded cotangent."""
    x = torch.randn(6, 8)
    torch.manual_seed(0)
    model = MLP(depth=1)
    eager, twin = compiled(eager_twin(model), "grape"), eager_twin(model)
    net = compiled(model, "grape", backend="inductor")
    for step in range(2):
        train_step(net, (x,))
        train_step(eager, (x,))
        if step == 0:
            train_step(twin, (x,))
            assert_same_gradients(net, twin, 1e-4)
        assert_same_gradients(net, eager, 1e-3)
        for k, v in net.feedback.items():
            torch.testing.assert_close(v, eager.feedback[k], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x))
    net(x).sum().backward()


def test_inductor_batch_sizes_and_buffers() -> None:
    """Any batch size through two captures, of one sample and of more; batch norm written once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    twin = eager_twin(model)
    net = compiled(model, "bp", backend="inductor")
    for n in (1, 4, 2, 1, 9, 64, 4):
        x = torch.randn(n, 2, 6, 6)
        train_step(net, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin, 1e-4)
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    programs = net._captures.programs.values()
    assert len(programs) <= 2
    assert sum(len(program.steps) for program in programs) <= 3


def test_inductor_autocast_and_channels_last() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    twin = eager_twin(model)
    net = compiled(model, "dfa", backend="inductor")
    x = torch.randn(5, 3, 6, 6).to(memory_format=torch.channels_last)
    for m in (net, twin):
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(x).float().pow(2).mean()
        loss.backward()
    assert_same_gradients(net, twin, 0.1)
