"""Noise at weights: what arrives at each feedback point and at the error, against forward AD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import MethodError, OptionError
from grapefx.ir import StepGraph
from grapefx.passes.differentiate.tangent import add_tangents, streams_of
from grapefx.plan import build_plan
from tests.passes.tangent_oracle import Case, make_case


class Net(nn.Module):
    """A strided, grouped convolution and a linear layer, each with an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.mid = nn.Linear(6 * 16, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.tanh(self.conv(x)), 2)
        return self.out(torch.sigmoid(self.mid(x.flatten(1))))


def tangents(case: Case, perturb: str, rows: int | None = None) -> StepGraph:
    layers = tuple(c.layer for c in case.placed.cuts)
    return add_tangents(
        case.joint,
        layers,
        batch=case._batch(),
        batch_size=case.size,
        streams=(tuple(range(len(layers))),),
        rows_hint=rows,
        perturb=perturb,
    )


def run(case: Case, made: StepGraph, drawn: list[Tensor]) -> tuple[dict[int, Tensor], Tensor]:
    """The noise at each feedback point, and ``d``."""
    step, stream = made, streams_of(made)[0]
    points = sorted(stream.noise)
    step.output_node().args = ((*(stream.noise[i] for i in points), stream.taps[0]),)
    step.gm.graph.eliminate_dead_code()
    step.gm.recompile()
    data, noise = iter(case.args), iter(drawn)
    values: list[Any] = []
    for slot in step.inputs:
        if slot.role == "input":
            values.append(next(data))
        elif slot.role == "noise":
            values.append(next(noise))
        else:
            values.append(case.values.get(slot.name, torch.zeros(())))
    with torch.no_grad():
        *found, d = step.gm(*values)
    return dict(zip(points, found, strict=True)), d


def unit(v: Tensor) -> Tensor:
    return v / v.square().mean(list(range(1, v.ndim)), keepdim=True).sqrt()


@pytest.mark.parametrize("rows", [None, 2])
def test_noise_at_weights_is_forward_ad_through_the_weights(rows: int | None) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 4, 16, 16)
    case = make_case(model, x)
    n = rows or 5
    v = torch.randn(n, 6, 2, 3, 3, dtype=torch.float64)
    u = torch.randn(n, 5, dtype=torch.float64)
    found, d = run(case, tangents(case, "weight", rows), [v, u])

    x = case.args[0][:n]
    w = model.conv.weight
    slopes = []
    for i in range(n):  # each sample with a kernel of its own
        z = F.conv2d(x[i : i + 1], v[i], None, 2, 1, 1, 2)
        z = z / z.square().mean().sqrt()

        def rest(a: Tensor) -> Tensor:
            return F.avg_pool2d(torch.tanh(a), 2)

        a = F.conv2d(x[i : i + 1], w, model.conv.bias, 2, 1, 1, 2)
        slopes.append(torch.func.jvp(rest, (a,), (z,))[1])
    first = unit(torch.cat(slopes))
    torch.testing.assert_close(found[0].reshape(first.shape), first)
    h = torch.sigmoid(model.mid(F.avg_pool2d(torch.tanh(model.conv(x)), 2).flatten(1)))
    second = unit(h * (1 - h) * u)
    torch.testing.assert_close(found[1], second)

    def output(noise: tuple[Tensor, Tensor]) -> Tensor:
        y = F.avg_pool2d(torch.tanh(model.conv(x)), 2) + noise[0]
        return model.out(torch.sigmoid(model.mid(y.flatten(1))) + noise[1])

    zero = (torch.zeros_like(first), torch.zeros_like(second))
    want = torch.func.jvp(output, (zero,), ((first, second),))[1]
    torch.testing.assert_close(d, want)


def test_auto_takes_whichever_is_smaller() -> None:
    """The convolution has 108 weights and 96 values, or at 32 x 32 pixels 384; rows never."""
    for side, at_weights in ((16, set()), (32, {0})):
        model = Net()
        model.mid = nn.Linear(6 * (side // 4) ** 2, 5)
        case = make_case(model, torch.randn(3, 4, side, side))
        made = tangents(case, "auto")
        kernels = {
            int(s.name.split("/")[1] != "conv")
            for s in made.inputs
            if s.role == "noise" and s.name.count("/") == 2
        }
        assert kernels == at_weights


def test_the_estimate_is_unbiased_behind_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    case = make_case(model, torch.randn(20_000, 4))
    u = torch.randn(20_000, 6, dtype=torch.float64)
    found, d = run(case, tangents(case, "weight"), [u])
    estimate = d.T @ found[0] / 20_000
    torch.testing.assert_close(estimate, model[1].weight.detach(), atol=0.05, rtol=0)


def test_training_with_noise_at_weights() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 4, 1, 1) + 0.3 * torch.randn(64, 4, 16, 16)
    y = x[:, :3].mean((2, 3)).argmax(1)
    for method in ("grape", "fdfa"):
        model = Net()
        net = grapefx.compile(
            model, method=method, perturb="weight", calib_every=None, backend="eager"
        )
        opt = torch.optim.Adam(net.parameters(), 1e-2)
        losses = []
        for _ in range(40):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(float(loss))
        assert losses[-1] < 0.7 * losses[0]


def test_bad_choices() -> None:
    with pytest.raises(OptionError, match="perturb"):
        grapefx.compile(Net(), method="grape", perturb="weights")
    with pytest.raises(OptionError, match="estimate Jacobians"):
        grapefx.compile(Net(), method="fg-a", perturb="weight")
    words = nn.Sequential(
        nn.Embedding(7, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    plan = build_plan(words, (torch.randint(7, (6, 2)),), method="grape", perturb="weight")
    with pytest.raises(MethodError, match=r"layer '0' has weights in .*embedding"):
        plan.graph("align")
