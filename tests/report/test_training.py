"""``net.report()``: what was measured in training, and how it is shown."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch

from grapefx.errors import InputError, OptionError
from grapefx.report.render import chart, training
from grapefx.runtime.module import FeedbackModule
from tests.zoo import compiled, make, train_step


def trained(record: bool, method: str = "grape", epochs: int = 3) -> FeedbackModule:
    model, args = make("mlp")
    net = compiled(model, method, calib_every=1)
    if record:
        net.record()
    for epoch in range(epochs):
        net.set_epoch(epoch)
        for _ in range(3):
            train_step(net, args)
    return net


def test_without_recording_calibrations_are_known() -> None:
    net = trained(record=False)
    assert [(r.step, r.epoch, r.kind) for r in net.history] == [
        (0, 0, "calibration"), (3, 1, "calibration"), (6, 2, "calibration"),
    ]  # fmt: skip
    report = net.report()
    assert (report.steps, report.epoch, report.recorded) == (9, 2, 0)
    assert report.calibration_count == 3 and not report.seconds
    now = {layer: c["cos_gradient"] for layer, c in net.alignment().items()}
    assert report.calibrations[-1].cosines == now
    lowest = report.calibrations[-1].lowest
    assert lowest and lowest[1] == min(now.values())
    assert "call <code>net.record()</code>" in report.html()


def test_recorded_steps_hold_every_alignment_and_times() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=1)
    net.record()
    seen: dict[str, dict[int, float]] = {}
    for step in range(6):
        net.set_epoch(step // 3)
        train_step(net, args)
        for layer, cosines in net.alignment().items():
            if step % 3:  # calibrations measure no Jacobian
                seen.setdefault(layer, {})[step] = cosines["cos_jacobian"]
    report = net.report()
    found = {c.layer: dict(c.points) for c in report.curves["cos_jacobian"]}
    assert found == seen
    assert [c.layer for c in report.curves["cos_jacobian"]] == [ly.name for ly in net.plan.layers]  # type: ignore[union-attr]
    assert [r.kind for r in net.history] == ["calibration", "align", "align"] * 2
    assert all(set(r.seconds) == {"forward", "update"} for r in net.history)
    assert set(report.seconds) >= {"forward", "update", "calibration forward", "else"}
    assert {m.name for m in report.memory} == set(net.feedback)
    assert report.memory_bytes == sum(t.nbytes for t in net.feedback.values())


def test_recording_keeps_the_latest_and_can_stop() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=None, calib_init=False)
    net.record(steps=2)
    for _ in range(4):
        train_step(net, args)
    assert [r.step for r in net.history] == [2, 3]
    net.record(None)
    train_step(net, args)
    assert [r.step for r in net.history] == [2, 3]
    for wrong in (0, True, "all"):
        with pytest.raises(OptionError, match="positive integer"):
            net.record(wrong)  # type: ignore[arg-type]


def test_recording_changes_no_number() -> None:
    on, off = trained(record=True), trained(record=False)
    for k, v in off.feedback.items():
        assert torch.equal(v, on.feedback[k])
    for k, v in off.state_dict().items():
        assert torch.equal(v, on.state_dict()[k])


def test_steps_that_are_not_finite_are_counted() -> None:
    model, args = make("mlp")
    net = compiled(model, "grape", calib_every=None, calib_init=False)
    net.record()
    with pytest.warns(UserWarning, match="not finite"):
        out = net(*args)
        (out.sum() * float("nan")).backward()
    (record,) = net.history
    assert not record.finite and net.report().skipped == 1


def test_copies_begin_anew() -> None:
    net = trained(record=True)
    assert copy.deepcopy(net).history == ()
    with pytest.raises(InputError, match="no training step"):
        compiled(make("mlp")[0], "grape").report()


@pytest.mark.parametrize("method", ["bp", "dfa", "grape"])
def test_every_form_says_the_same(method: str) -> None:
    report = trained(record=True, method=method).report()
    text, page, data = str(report), report.html(), json.loads(report.json())
    assert all(len(line) <= 100 for line in text.splitlines())
    assert f"trained by {method}: 9 steps (epoch 2)" in text
    assert data["steps"] == 9 and data["curves"].keys() == report.curves.keys()
    assert "explain" not in data
    for curves in report.curves.values():
        for curve in curves:
            assert f"{curve.layer} {curve.points[-1][1]:.2f}" in page
            assert f"{curve.points[-1][1]:.2f}" in text
    assert page.count('<svg class="chart"') == len(report.curves)
    assert "<iframe" in report._repr_html_()
    assert "http" not in page.replace("http://www.w3.org", "")


def test_charts_fit_their_frame() -> None:
    points: Any = [(i, (-1) ** i * 0.9) for i in range(1000)]
    drawn = chart.chart([("a", points), ("b", [(500, 0.5)])])
    for line in drawn.lines:
        for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", line.path):
            assert 0 <= float(x) <= drawn.width and 0 <= float(y) <= drawn.height
    assert len(chart.thinned(points)) <= chart.MOST
    assert training.sparkline([0.0, 1.0]) == " █" and len(training.sparkline([0.5] * 999)) <= 24
