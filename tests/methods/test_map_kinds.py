"""Kinds of feedback maps: each equals the dense map that it stands for, without forming it."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import BudgetError, OptionError
from grapefx.ir import Layer
from grapefx.maps import ErrorRows, FeedbackMap, choose_maps, from_samples, plain_maps, to_samples
from grapefx.maps.seeded import signs, uniform
from grapefx.methods import get_method
from grapefx.methods.base import Rows
from grapefx.passes.divide.partition import split
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan import build_plan
from tests.zoo import assert_same_gradients

CPU, F64 = torch.device("cpu"), torch.float64
N, C = 6, 12


def layer(shape: tuple[int, ...], index: int = 1, channel: int | None = 0) -> Layer:
    return Layer(index, f"l{index}", "n", shape, (0, 1, 1), (), channel=channel)


def small(feedback: str, shape: tuple[int, ...] = (3, 4, 6)) -> tuple[FeedbackMap, ErrorRows]:
    maps, rows = plain_maps((layer(shape),), [(C,)], [(0, 1, 1)])
    maps, rows, _ = choose_maps(
        maps, rows, feedback=feedback, budget=1, method=get_method("fdfa", {}), seed=0, refits=True
    )
    return maps[0], rows["dense"]


def dense_of(m: FeedbackMap, rows: ErrorRows, b: Tensor) -> Tensor:
    """The dense map (C, prod(shape)) that ``m`` with the matrix ``b`` stands for, by its action."""
    eye = torch.eye(C, dtype=F64)
    like = from_samples(torch.zeros(C, *m.layer.sample_shape, dtype=F64), m.layer.fold)
    e = rows([eye])
    made = m.cotangent(lambda r: r.error @ r.state["B"], Rows({"B": b}, error=e))  # type: ignore[operator]
    return to_samples(m.from_rows(made, like), m.layer.fold).flatten(1)


@pytest.mark.parametrize("feedback", ["dense", "pooled", "pooled:2", "low-rank:5", "sparse:3"])
def test_estimate_is_the_projection_of_the_dense_one(feedback: str) -> None:
    """<J^ of the map, B> is <dense J^, dense map of B> up to the size of a block, for every B."""
    torch.manual_seed(0)
    m, rows = small(feedback)
    d, v = torch.randn(N, C, dtype=F64), torch.randn(N, *m.layer.sample_shape, dtype=F64)
    estimate = m.outer(rows([d]), m.value_rows(v))
    assert estimate.shape == m.shape
    block = v[0].numel() // m.value_dim
    dense = d.t() @ v.flatten(1)
    for _ in range(3):
        b = torch.randn(m.shape, dtype=F64)
        want = (dense * dense_of(m, rows, b)).sum()
        assert torch.allclose((estimate * b).sum() * block, want)


def test_pooled_columns_are_equal_inside_a_block_and_only_there() -> None:
    m, rows = small("pooled:2")
    assert m.kind == "pooled 3x2x2" and m.shape == (C, 12)
    b = torch.randn(m.shape, dtype=F64)
    full = dense_of(m, rows, b).view(C, 3, 4, 6)
    assert torch.equal(full[:, :, :2, :3], full[:, :, :1, :1].expand(C, 3, 2, 3))
    assert not torch.equal(full[:, :, 0, 0], full[:, :, 2, 0])


class Frames(nn.Module):
    """Frames share the batch's dim in front of the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.out = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x.flatten(0, 1)))
        h = torch.tanh(self.b(h)).mean((2, 3)).unflatten(0, x.shape[:2])
        return self.out(h.mean(1))


def test_a_pooled_map_of_frames_keeps_their_channels() -> None:
    torch.manual_seed(0)
    models = [Frames().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(N, 2, 3, 4, 6, dtype=F64)
    options = {"method": "dfa", "calib_every": None, "backend": "eager"}
    pooled = grapefx.compile(models[0], feedback="pooled", **options)
    dense = grapefx.compile(models[1], feedback="dense", **options)
    for net in (pooled, dense):
        net(x)
    assert pooled.plan is not None
    (first, *_) = pooled.plan.maps
    assert first.layer.name == "a" and first.kind == "pooled 1x4x1x1"
    state = dense.feedback_state_dict()
    for m in pooled.plan.maps:
        state["tensors"][f"{m.layer.name}/B"] = dense_of(
            m, pooled.plan.error_rows["dense"], pooled.feedback[f"{m.layer.name}/B"]
        )
    dense.load_feedback_state_dict(state)
    for net in (pooled, dense):
        F.cross_entropy(net(x), torch.arange(N)).backward()
    assert_same_gradients(pooled, dense)


def test_sparse_reads_a_part_of_the_error() -> None:
    m, rows = small("sparse:3")
    full = dense_of(m, rows, torch.ones(m.shape, dtype=F64))
    assert (full.sum(0) == C / 3).all()  # each column reads C / G entries,
    assert (full.sum(1) > 0).all()  # and every entry is read by somebody


def test_low_rank_is_a_fixed_random_projection() -> None:
    m, rows = small("low-rank:5")
    b = torch.randn(m.shape, dtype=F64)
    p = signs((C, 5), rows.seed, CPU, F64) * 5**-0.5
    assert torch.allclose(dense_of(m, rows, b), p @ b)
    wide = signs((64, 4096), 3, CPU, F64) * 4096**-0.5
    assert torch.allclose(wide @ wide.t(), torch.eye(64, dtype=F64), atol=0.09)


def test_seeded_numbers() -> None:
    u = uniform((400, 1000), 7, CPU, F64)
    assert abs(u.mean()) < 4e-3 and abs(u.var() - 1 / 3) < 4e-3 and u.min() >= -1 and u.max() < 1
    assert torch.equal(u, uniform((400, 1000), 7, CPU, F64))
    other = uniform((400, 1000), 8, CPU, F64)
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u, other)):
        assert abs((a * b).mean()) < 3e-3  # neighbours and seeds are uncorrelated
    assert not torch.equal(u[1:], other[:-1])  # a seed is no shift of another


def cnn(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 64, 32), nn.ReLU(), nn.Linear(32, classes),
    )  # fmt: skip


def steps(net: nn.Module, count: int, lr: float = 0.05) -> list[float]:
    torch.manual_seed(1)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,))
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(count):
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("feedback", ["pooled:2", "low-rank:6", "sparse:2"])
@pytest.mark.parametrize("method", ["dfa", "fdfa", "grape", "dkp", "grape-2024"])
def test_every_method_learns_with_every_kind(method: str, feedback: str) -> None:
    net = grapefx.compile(
        cnn(), method=method, feedback=feedback, backend="eager", steps_per_epoch=5
    )
    losses = steps(net, 8, lr=0.2)
    assert losses[-1] < 0.9 * losses[0]


def test_seeded_maps_are_not_stored_and_survive_a_restart() -> None:
    options = {"method": "dfa", "calib_every": None, "backend": "eager"}
    net = grapefx.compile(cnn(), feedback="seeded", **options)
    losses = steps(net, 10)
    assert not net.feedback_state_dict()["tensors"]
    assert {m.kind for m in net.plan.maps} == {"seeded"}
    again = grapefx.compile(cnn(), feedback="seeded", **options)
    assert steps(again, 10) == losses
    other = grapefx.compile(cnn(), feedback="seeded", seed=1, **options)
    assert steps(other, 10) != losses


@pytest.mark.slow
def test_a_compiled_step_with_seeded_maps_is_the_plain_one() -> None:
    options = {"feedback": "seeded", "method": "dfa", "calib_every": None}
    net = grapefx.compile(cnn(), **options)
    eager = grapefx.compile(cnn(), **options, backend="eager")
    assert steps(net, 3) == pytest.approx(steps(eager, 3), rel=1e-4)


def test_a_compiled_step_saves_no_seeded_map() -> None:
    plan = plan_with("seeded", method="dfa", calib_every=None)
    parts = split(prepare(plan.graph("update"), "update", "inductor", LowerContext()))
    output = next(n for n in parts.forward.graph.nodes if n.op == "output")
    saved = output.args[0][len(parts.forward_outputs) :]
    shapes = {str(tuple(m.shape)) for m in plan.maps}
    kept = [n.meta["val"] for n in saved if isinstance(n.meta["val"], Tensor)]
    assert kept and not shapes & {str(tuple(v.shape)) for v in kept}


def plan_with(feedback: str = "auto", budget: int | None = None, **options: object) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_plan(
            cnn(), (torch.randn(8, 1, 8, 8),), feedback=feedback, feedback_budget=budget, **options
        )


def test_auto_keeps_full_maps_under_the_budget_and_says_when_it_does_not() -> None:
    plan = plan_with()
    assert {m.kind for m in plan.maps} == {"dense"} and not plan.notes
    plan = plan_with(budget=20_000)
    assert sum(m.bytes for m in plan.maps) <= 20_000
    assert any("pooled" in m.kind for m in plan.maps)
    assert any("pooled over positions; feedback_budget=" in n for n in plan.notes)
    plan = plan_with(budget=8000, method="dfa", calib_every=None)
    assert {m.kind for m in plan.maps} == {"seeded"}
    with pytest.raises(BudgetError, match="feedback_budget"):
        plan_with(feedback="dense", budget=8000)
    with pytest.raises(BudgetError):  # ten classes are too few for a lower rank
        plan_with(budget=100)


def test_auto_lowers_the_rank_of_a_wide_error() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 512))
    plan = build_plan(model, (torch.randn(4, 8),), feedback_budget=20_000)
    assert [m.kind for m in plan.maps] == ["low-rank 64"]
    assert any("64 random directions" in n for n in plan.notes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"feedback": "pooles"}, "pooled"),
        ({"feedback": "pooled:x"}, "positive number"),
        ({"feedback": "dense:3"}, "positive number"),
        ({"feedback": "seeded", "method": "grape"}, "fixed method"),
        ({"feedback": "seeded", "method": "dfa", "calib_every": 1}, "calib_refit='weights'"),
    ],
)
def test_bad_choices(options: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        net = grapefx.compile(cnn(), backend="eager", **options)  # type: ignore[arg-type]
        net(torch.randn(4, 1, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "gpt2-small"])
def test_large_networks_plan_under_the_default_budget(name: str) -> None:
    """25 % of the parameters' bytes, or 256 MiB if that is more."""
    if name == "resnet50":
        models = pytest.importorskip("torchvision").models
        model, x = models.resnet50(weights=None), torch.randn(2, 3, 224, 224)
    else:
        from tools.inspect_models import gpt

        model = gpt(12, 768, heads=12, vocabulary=50257)
        x = torch.randint(0, 50257, (2, 64))
    plan = build_plan(model, (x,), method="grape")
    limit = max(sum(4 * p.numel() for p in model.parameters()) / 4, 256 * 2**20)
    assert len(plan.maps) > 12
    assert 0 < sum(m.bytes for m in plan.maps) <= limit
    assert plan.over_budget() == ""
