"""When a step calibrates, and what a calibration does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import grapefx
from grapefx.errors import GrapefxWarning, OptionError
from grapefx.runtime.module import FeedbackModule
from grapefx.runtime.schedule import CalibrationSchedule
from tests.zoo import MLP, compiled, eager_twin, gradients, loss_of, make, train_step


def due(epochs: int, per_epoch: int, announce: bool = True, **options: Any) -> list[int]:
    """The steps that calibrate, by the schedule alone."""
    given: dict[str, Any] = {"every": 1, "unit": "epoch", "at_start": True, "steps_per_epoch": None}
    schedule = CalibrationSchedule(**{**given, **options})
    found = []
    for step in range(epochs * per_epoch):
        if announce and step % per_epoch == 0:
            schedule.set_epoch(step // per_epoch)
        if schedule.due():
            found.append(step)
        schedule.done(schedule.due())
    return found


def test_schedules() -> None:
    assert due(4, 3) == [0, 3, 6, 9]
    assert due(4, 3, every=2) == [0, 6]
    assert due(4, 3, at_start=False) == [3, 6, 9]
    assert due(4, 3, every=None, at_start=False) == []
    assert due(4, 3, every=None, at_start=True) == [0]
    assert due(4, 3, announce=False, steps_per_epoch=3) == [0, 3, 6, 9]
    assert due(4, 3, announce=False, steps_per_epoch=3, every=3) == [0, 9]
    assert due(4, 3, announce=False, unit="step", every=5) == [0, 5, 10]
    assert due(2, 3, announce=False, unit="step", every=1) == [0, 1, 2, 3, 4, 5]
    assert due(4, 3, announce=False) == [0]


def exact_steps(net: FeedbackModule, model: Any, args: Any, count: int) -> list[int]:
    """The steps whose gradients were exact, seen from outside."""
    twin = eager_twin(model)
    found = []
    for k in range(count):
        net.set_epoch(k // 3)
        train_step(net, args)
        train_step(twin, args)
        a, b = gradients(net), gradients(twin)
        if all(torch.allclose(a[n], b[n], rtol=1e-6) for n in a):  # type: ignore[arg-type]
            found.append(k)
    return found


def test_the_first_step_of_each_epoch_is_exact() -> None:
    model, args = make("mlp")
    # with calib_refit="weights" the maps stay random: only calibration steps are exact
    net = compiled(model, "dfa", calib_every=1, calib_refit="weights")
    assert exact_steps(net, model, args, 7) == [0, 3, 6]


def test_context_manager_and_never() -> None:
    model, args = make("mlp")
    net = compiled(model, "dfa", calib_every=None, calib_refit="weights")
    assert exact_steps(net, model, args, 4) == []
    with net.calibration():
        assert exact_steps(net, model, args, 2) == [0, 1]
    assert exact_steps(net, model, args, 2) == []


@pytest.mark.parametrize("feedback", ["auto", "seeded", "pooled:2", "sparse:2", "low-rank:4"])
@pytest.mark.parametrize("method", ["dfa", "fdfa"])
def test_a_calibration_without_a_schedule_is_exact(method: str, feedback: str) -> None:
    """With every kind of map: also where there is none to refit, because maps are not kept."""
    model, args = make("cnn")
    if method == "fdfa" and feedback == "seeded":
        pytest.skip("learned maps are kept")
    net = compiled(model, method, calib_every=None, feedback=feedback)
    assert exact_steps(net, model, args, 1) == []
    with net.calibration():
        assert exact_steps(net, model, args, 1) == [0]
    assert net.calibrations == 1


def test_maps_that_calibrations_refit_are_kept() -> None:
    """``net.calibration()`` with ``calib_refit="feedback"`` does nothing else than refit."""
    model, _ = make("cnn")
    options: dict[str, Any] = {"calib_every": None, "calib_refit": "feedback"}
    with pytest.raises(OptionError, match="seeded"):
        train_step(compiled(model, "dfa", feedback="seeded", **options), make("cnn")[1])


@pytest.mark.parametrize("options", [{}, {"exact_rows": 0.5, "exact_late": True}])
def test_a_refit_alone_fits_to_the_true_gradient(options: dict[str, Any]) -> None:
    """Maps and cosines are those of a calibration, the update is the method's with these maps."""
    nets = {}
    for refit in ("feedback", "both"):
        model, args = make("cnn")
        nets[refit] = compiled(model, "dfa", calib_refit=refit, seed=3, **options)
        train_step(nets[refit], args)
    a, b = (n.feedback_state_dict()["tensors"] for n in nets.values())
    assert len(a) == len(b) > 2
    for name in a:
        if not name.endswith("/late"):
            torch.testing.assert_close(a[name], b[name])
    ours, theirs = (n.alignment() for n in nets.values())
    assert {k: pytest.approx(v) for k, v in ours.items()} == theirs
    train_step(nets["both"], args)  # a step with the new maps, at the same weights
    ours, theirs = (gradients(n) for n in nets.values())
    for name, g in ours.items():
        torch.testing.assert_close(g, theirs[name])


def test_refit_variants() -> None:
    """ "weights" leaves the maps, "feedback" leaves the update to the method, "both" does both."""
    args = make("mlp")[1]
    twin, _ = make("mlp")
    train_step(twin, args)
    true = gradients(twin)
    for refit, exact, moves in (
        ("weights", True, False),
        ("feedback", False, True),
        ("both", True, True),
    ):
        model, _ = make("mlp")
        net = compiled(model, "dfa", calib_refit=refit)
        net(*args)
        before = net.feedback
        train_step(net, args)
        after = net.feedback
        assert any(not torch.equal(before[k], after[k]) for k in after) is moves, refit
        found = gradients(net)
        same = all(torch.allclose(found[k], true[k], rtol=1e-6) for k in true)  # type: ignore[arg-type]
        assert same is exact, refit
        if refit == "feedback":  # the refitted maps already made this step's update
            again = compiled(make("mlp")[0], "dfa", calib_every=None)
            again(*args)
            again._state.feedback.tensors = after
            train_step(again, args)
            for k, v in gradients(again).items():
                torch.testing.assert_close(v, found[k])


def test_calibration_by_its_own_sgd() -> None:
    """GrAPE 2026 appendix E: SGD(0.01, momentum 0.9) inside backward; the user's optimizer sees
    None.
    """
    model, args = make("mlp")
    twin = eager_twin(model)
    net = compiled(model, "dfa", calib_every=1, calib_unit="step", calib_update="sgd")
    optimizer = torch.optim.SGD(net.parameters(), 123.0)
    theirs = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        train_step(net, args)
        assert all(p.grad is None for p in net.parameters())
        optimizer.step()
        train_step(twin, args)
        theirs.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_epochs_that_are_never_announced_are_mentioned_once() -> None:
    def told(**options: Any) -> list[str]:
        model, args = make("mlp")
        net = grapefx.compile(model, method="bp", backend="eager", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                train_step(net, args)
        return [str(w.message) for w in caught if issubclass(w.category, GrapefxWarning)]

    (message,) = told()
    assert "set_epoch" in message and "steps_per_epoch" in message and "step 0" in message
    assert told(calib_every=None) == []
    assert told(steps_per_epoch=3) == []
    assert told(calib_unit="step", calib_every=5) == []


@pytest.mark.parametrize("method", ["dfa", "fdfa", "grape"])
def test_a_forward_without_a_backward_changes_nothing(method: str) -> None:
    model, args = make("mlp")
    net = compiled(model, method)
    net(*args)
    for _ in range(2):
        before = net.feedback_state_dict()
        alignment = net.alignment()
        net(*args)
        loss_of(net(*args))
        with torch.no_grad():
            net(*args)
        after = net.feedback_state_dict()
        assert before["schedule"] == after["schedule"]
        assert all(torch.equal(before["tensors"][k], v) for k, v in after["tensors"].items())
        assert net.alignment() == alignment
        train_step(net, args)
    assert net.feedback_state_dict()["schedule"]["step"] == 2


def test_align_every() -> None:
    """Maps learn on every k-th step only; the steps between carry no tangents."""
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=None, align_every=3)
    changed = []
    for k in range(7):
        net(*args)
        before = net.feedback
        train_step(net, args)
        if any(not torch.equal(before[n], v) for n, v in net.feedback.items()):
            changed.append(k)
    assert changed == [0, 3, 6]
    assert {k for k in net.plan._graphs} == {"align", "update"}  # type: ignore[union-attr]


def test_graphs_are_built_when_first_needed() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=None)
    assert net.plan is None and net.alignment() == {} and net.feedback == {}
    net(*args)
    assert list(net.plan._graphs) == ["align"]  # type: ignore[union-attr]
    with net.calibration():
        net(*args)
    assert list(net.plan._graphs) == ["align", "calibration"]  # type: ignore[union-attr]


def test_dead_units_keep_a_defined_alignment() -> None:
    """DESIGN 3.5: a column of J^ that is zero has cosine 0 and does not move or poison B."""
    model = MLP(6, 2).double()
    with torch.no_grad():
        model.layers[1].bias[2] = -1e9  # type: ignore[index]
        model.out.weight[:, 3] = 0
    net = compiled(model, "grape")
    args = (torch.randn(5, 8).double(),)
    for _ in range(4):
        train_step(net, args)
    assert all(v.isfinite().all() for v in net.feedback.values())
    assert all(v == v for d in net.alignment().values() for v in d.values())


def test_auto_halves_and_doubles_its_gap() -> None:
    """A low cosine brings the next calibration nearer, never nearer than the budget allows."""
    schedule = CalibrationSchedule("auto", "epoch", True, None, threshold=0.6, budget=0.1)
    cosines = iter([float("nan"), 0.9, 0.9, 0.5, 0.1, 0.1, 0.9, 0.9])
    found = []
    for step in range(150):
        calibrated = schedule.due()
        if calibrated:
            found.append(step)
        schedule.done(calibrated, next(cosines) if calibrated else float("nan"))
    # gaps: 10 (first), 20, 40 (two good ones), 20, 10, 10 (bad ones, then the floor), 20
    assert found == [0, 10, 30, 70, 90, 100, 110, 130]


def test_auto_reads_the_cosine_and_resumes() -> None:
    """The gap is moved by the measured cosine, and is part of the state."""
    for threshold, gap in ((1.0, 2), (-1.0, 4)):
        model, args = make("mlp")
        net = compiled(
            model, "dfa", calib_every="auto", calib_budget=0.5, calib_threshold=threshold
        )
        for _ in range(3):  # calibrates at steps 0 and 2
            train_step(net, args)
        assert net._state.schedule.calibrations == 2
        assert net._state.schedule.gap == gap
        again = compiled(make("mlp")[0], "dfa", calib_every="auto", calib_budget=0.5)
        again.load_feedback_state_dict(net.feedback_state_dict())
        assert again._state.schedule.gap == gap


def test_warmup_moves_only_the_maps() -> None:
    """In the first steps the weights stay, bit for bit, while the feedback maps learn."""
    model, args = make("mlp")
    net = compiled(model, "fdfa", calib_every=None, align_warmup=2, align_every=4)
    opt = torch.optim.Adam(net.parameters())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train_step(net, args)  # makes the maps
    for step in range(1, 3):
        maps = {k: v.clone() for k, v in net.feedback.items()}
        train_step(net, args)
        opt.step()
        moved = any(not torch.equal(v, before[k]) for k, v in net.state_dict().items())
        learned = any(not torch.equal(v, maps[k]) for k, v in net.feedback.items())
        assert (moved, learned) == ((False, True) if step < 2 else (True, False))


def test_warmup_with_calibrations() -> None:
    """One that only refits leaves the weights, too; exact gradients train them."""
    model, args = make("mlp")
    for refit, moves in (("feedback", False), ("both", True)):
        net = compiled(model, "grape", align_warmup=3, calib_refit=refit)
        net.zero_grad()
        train_step(net, args)
        assert any(g is not None and bool(g.any()) for g in gradients(net).values()) is moves


@pytest.mark.parametrize(
    "options",
    [
        {"method": "dfa", "align_warmup": 3},
        {"calib_every": "often"},
        {"calib_every": "auto", "calib_budget": 0.0},
        {"calib_threshold": 2.0},
    ],
)
def test_refused_schedules(options: dict[str, Any]) -> None:
    with pytest.raises(grapefx.errors.OptionError):
        grapefx.compile(torch.nn.Linear(2, 2), **options)
