"""Poolings whose windows tile the plane lose their scatter; gradients and tangents stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grapefx.passes.peephole.pooling import tile_pools
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan import build_plan
from tests.zoo import compiled, eager_twin

aten = torch.ops.aten


class Pooled(nn.Module):
    """Products around poolings, with ties behind the ReLU."""

    def __init__(self, pool: nn.Module, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.a, self.b = conv(2, 3, 3, padding=1), conv(3, 2, 3, padding=1)
        self.pool, self.dims = pool, dims
        self.out = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.pool(F.relu(self.a(x))))
        return self.out(x.mean(list(range(2, 2 + self.dims))))


CASES = {
    "2x2": (nn.MaxPool2d(2), 2, True),
    "2x3": (nn.MaxPool2d((2, 3)), 2, True),
    "3d": (nn.MaxPool3d(2), 3, True),
    "ceil": (nn.MaxPool2d(2, ceil_mode=True), 2, True),
    "overlap": (nn.MaxPool2d(3, 2), 2, False),
    "gap": (nn.MaxPool2d(2, 3), 2, False),
    "padded": (nn.MaxPool2d(2, padding=1), 2, False),
    "rest": (nn.MaxPool2d(5), 2, False),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("method", ["bp", "grape"])
def test_tiled_pools(case: str, method: str) -> None:
    pool, dims, tiled = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(3, 2, *([12] * dims))
    plan = build_plan(Pooled(pool, dims), (x,), method=method, calib_every=None)
    step = plan.graph(plan.kinds()[0]).copy()
    assert tile_pools(step) == int(tiled)
    left = {n.target for n in step.gm.graph.nodes}
    poolings = {aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default}
    assert bool(left & poolings) != tiled


@pytest.mark.parametrize(
    ("case", "dynamic"), [("2x2", True), ("2x3", False), ("3d", False), ("overlap", False)]
)
def test_gradients_of_compiled_pools(case: str, dynamic: bool) -> None:
    pool, dims, _ = CASES[case]
    torch.manual_seed(0)
    model = Pooled(pool, dims).double()
    twin = eager_twin(model)
    x = torch.randn(3, 2, *([12] * dims), dtype=torch.float64)
    y = torch.randint(3, (3,))
    F.cross_entropy(twin(x), y).backward()
    F.cross_entropy(compiled(model, "bp", backend="inductor", dynamic=dynamic)(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_tangents_of_compiled_pools(fraction: float) -> None:
    """J^ under Inductor (places) is that of the graph as it is (indices)."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, 12, 12), torch.randint(3, (4,))
    maps = []
    for backend in ("eager", "inductor"):
        torch.manual_seed(1)
        net = compiled(
            Pooled(nn.MaxPool2d(2), 2), "fdfa", backend=backend, alpha=1.0, calib_every=None,
            tangent_fraction=fraction,
        )  # fmt: skip
        F.cross_entropy(net(x), y).backward()
        maps.append(net.feedback)
    for key, found in maps[0].items():
        assert found.abs().sum() > 0
        torch.testing.assert_close(maps[1][key], found, rtol=1e-4, atol=1e-5)


def test_nothing_is_saved_but_a_byte_a_window() -> None:
    from grapefx.passes.divide.partition import split

    model = Pooled(nn.MaxPool2d(2), 2)
    plan = build_plan(model, (torch.randn(3, 2, 12, 12),), method="dfa", calib_every=None)
    parts = split(prepare(plan.graph("update"), "update", "inductor", LowerContext()))
    inputs = [n.meta["val"] for n in parts.update.graph.nodes if n.op == "placeholder"]
    saved = [v for v in inputs[: parts.saved] if isinstance(v, Tensor)]
    assert not any(v.dtype == torch.int64 for v in saved)
    places = [v for v in saved if v.dtype == torch.int8]
    assert [tuple(v.shape[1:]) for v in places] == [(3, 6, 6)]
    assert not [v for v in saved if tuple(v.shape[1:]) == (3, 12, 12)]  # nor the ReLU's mask


@pytest.mark.parametrize("act", [torch.relu, torch.tanh, torch.sigmoid])
def test_the_gradient_passes_the_activation_before_it_spreads(act: Any) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), _Act(act), nn.MaxPool2d(2), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(32, 3)).double()
    twin = eager_twin(model)
    x, y = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randint(3, (5,))
    x[0] = 0.0  # ties
    step = build_plan(model, (x,), method="bp").graph("calibration").copy()
    name = {torch.relu: "threshold_backward"}.get(act, f"{act.__name__}_backward")

    def sizes() -> list[int]:
        found = [n for n in step.gm.graph.nodes if n.target is getattr(aten, name).default]
        return [int(n.meta["val"].shape[-1]) for n in found]

    assert sizes() == [8]
    assert tile_pools(step) == 1 and sizes() == [4]
    F.cross_entropy(twin(x), y).backward()
    F.cross_entropy(compiled(model, "bp", backend="inductor")(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_batch_norm_reads_the_gradient_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(18, 3))
    step = build_plan(model, (torch.randn(5, 1, 8, 8),), method="bp").graph("calibration").copy()
    assert tile_pools(step) == 1
    acts = [n for n in step.gm.graph.nodes if n.target is aten.threshold_backward.default]
    assert [n.meta["val"].shape[-1] for n in acts] == [6]


class _Act(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)
