"""Calibrations that remember: their schedule, and the fit against one written by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grapefx
from grapefx.errors import OptionError
from grapefx.runtime.schedule import CalibrationSchedule
from tests.zoo import compiled, loss_of, make

KEEP, RIDGE = 0.7, 1e-2


def steps(count: int, **options: Any) -> list[int]:
    """The steps at which a geometric schedule calibrates."""
    schedule = CalibrationSchedule("geometric", "epoch", True, None, **options)
    found = []
    for step in range(count):
        if schedule.due():
            found.append(step)
        schedule.done(schedule.due())
    return found


def test_the_gaps_grow() -> None:
    """Steps floor(sum of growth^j), as many as LEARNING's runs had: 44 of 624."""
    sums = itertools.accumulate((1.1**j for j in range(100)), initial=0.0)
    expected = sorted({int(s) for s in sums if s < 624})
    assert steps(624) == expected and len(expected) in (43, 44)
    gaps = [b - a for a, b in itertools.pairwise(steps(4000, longest=50))]
    assert max(gaps) <= 50 and gaps[-5:] == [50] * 5


def test_a_failed_calibration_comes_again_and_checkpoints_go_on() -> None:
    schedule = CalibrationSchedule("geometric", "epoch", True, None)
    schedule.done(False)
    assert schedule.due()
    for _ in range(30):
        schedule.done(schedule.due())
    other = CalibrationSchedule("geometric", "epoch", True, None)
    other.load(schedule.state())
    for _ in range(30):
        assert schedule.due() == other.due()
        schedule.done(schedule.due())
        other.done(other.due())


def fitted(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """B after calibrations on batches of (e, delta), by hand."""
    a, r = torch.zeros(()), torch.zeros(())
    for e, delta in batches:
        a, r = KEEP * a + e.T @ e, KEEP * r + e.T @ delta
    c = a.shape[0]
    return torch.linalg.solve(a + RIDGE * a.trace() / c * torch.eye(c, dtype=a.dtype), r)


def test_the_fit_is_that_of_all_calibrations() -> None:
    """B_l from the kept normal equations, float64, over several calibrations with new weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    model.double()
    net = compiled(model, "dfa", calib_every=1, calib_unit="step", calib_forget=KEEP)
    opt = torch.optim.SGD(net.parameters(), 0.3)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"0": [], "2": []}
    for k in range(4):
        x = torch.randn(9 + k, 6, dtype=torch.float64)
        twin = copy.deepcopy(net.original)
        h1 = torch.tanh(twin[0](x))  # type: ignore[operator, index]
        h2 = torch.tanh(twin[2](h1))  # type: ignore[operator, index]
        y = twin[4](h2)  # type: ignore[operator, index]
        e, d1, d2 = torch.autograd.grad(y.pow(2).mean(), [y, h1, h2])
        seen["0"].append((e, d1))
        seen["2"].append((e, d2))
        opt.zero_grad()
        net(x).pow(2).mean().backward()
        for key, batches in seen.items():
            torch.testing.assert_close(
                net.feedback[f"{key}/B"], fitted(batches), rtol=1e-8, atol=1e-10
            )
        opt.step()


@pytest.mark.parametrize(
    ("method", "feedback", "name"),
    [
        ("dfa", "dense", "cnn"),
        ("dfa", "pooled:1", "cnn"),
        ("dfa", "low-rank:2", "cnn"),
        ("grape", "sparse:2", "cnn"),
        ("fdfa", "dense", "encoder"),
        ("dkp", "dense", "mlp"),
    ],
)
def test_with_nothing_kept_it_is_the_fit_of_one_batch(
    method: str, feedback: str, name: str
) -> None:
    """``calib_forget=0`` fits as without a memory, for every kind of map and for tokens."""
    model, args = make(name)
    nets = [
        compiled(copy.deepcopy(model), method, feedback=feedback, calib_forget=forget)
        for forget in (None, 0.0)
    ]
    for net in nets:
        torch.manual_seed(0)
        loss_of(net(*args)).backward()
    for key, t in nets[0].feedback.items():
        torch.testing.assert_close(nets[1].feedback[key], t, rtol=1e-4, atol=1e-7)


def test_state_is_saved_copied_and_restored() -> None:
    model, args = make("mlp")
    options: dict[str, Any] = {"calib_every": "geometric", "calib_forget": KEEP}
    net = compiled(model, "dfa", **options)

    def train(net: Any, count: int) -> None:
        for _ in range(count):
            loss_of(net(*args)).backward()

    train(net, 5)
    twin = copy.deepcopy(net)
    other = compiled(copy.deepcopy(net.original), "dfa", **options)
    other.load_feedback_state_dict(net.feedback_state_dict())
    for n in (net, twin, other):
        n.zero_grad()
        train(n, 6)
    for n in (twin, other):
        assert n.feedback.keys() == net.feedback.keys()
        assert any(k.endswith("/gram") for k in n.feedback)
        for k, t in net.feedback.items():
            torch.testing.assert_close(n.feedback[k], t, rtol=0, atol=0)


def test_options_that_say_nothing_are_refused() -> None:
    model, _ = make("mlp")
    for more in ({"calib_every": None}, {"calib_refit": "weights"}, {"method": "bp"}):
        with pytest.raises(OptionError, match="calib_forget"):
            grapefx.compile(model, **{"method": "dfa", "calib_forget": 0.5, **more})
    with pytest.raises(OptionError, match="calib_growth"):
        grapefx.compile(model, calib_growth=0.9)


def test_explain_says_when() -> None:
    model, args = make("mlp")
    net = compiled(model, "dfa", calib_every="geometric", calib_gap=100)
    loss_of(net(*args)).backward()
    assert "gaps grow by 1.1" in str(net.explain())


def test_compiled_steps_take_the_fitted_maps() -> None:
    """Compiled by Inductor, steps before and after a calibration run, and learn the same maps."""
    found = []
    for backend in ("eager", "inductor"):
        model, args = make("mlp")
        options: dict[str, Any] = {"calib_every": "geometric", "calib_forget": KEEP, "radial": True}
        net = compiled(model, "dfa", backend=backend, **options)
        for _ in range(8):
            loss_of(net(*args)).backward()
        found.append(net.feedback)
    for key, t in found[0].items():
        torch.testing.assert_close(found[1][key], t, rtol=1e-8, atol=1e-10)
