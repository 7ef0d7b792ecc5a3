"""The runner of passes: contracts are checked, passes are timed, logged and switched by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from grapefx.errors import OptionError, VerifyError
from grapefx.ir import StepGraph
from grapefx.passes import pipeline, runner
from grapefx.passes.graph.text import as_text
from grapefx.passes.runner import Pass, PassRun, run, without
from grapefx.plan import build_plan
from tests.zoo import compiled, make, plan_of, train_step

LISTS = {
    f"{name}/{key}": passes
    for name in ("STEPS", "DIVIDE", "FORWARD", "INFERENCE", "UPDATE")
    for key, passes in getattr(pipeline, name).items()
}


def test_every_kind_of_step_is_a_list_that_ends_verified() -> None:
    """Each list starts with what needs the markers and ends with labelled graphs."""
    for name, passes in pipeline.STEPS.items():
        assert name == "calibration" or "markers" in passes[0].needs, name
        assert "labelled" in passes[-1].gives, name
        promised = {p for one in passes for p in one.gives}
        assert {"no markers", "no dead code"} <= promised, name


def test_names_are_unique() -> None:
    """One name, one pass: it can be switched off and found in the log."""
    by_name: dict[str, Pass[Any]] = {}
    for passes in LISTS.values():
        for p in passes:
            assert by_name.setdefault(p.name, p) is p


@pytest.mark.parametrize("kind", ["update", "align", "calibration"])
def test_the_plan_runs_the_list(kind: str) -> None:
    """What a plan notes is the list of its kind, and the joint graph is as before."""
    method = "grape" if kind == "align" else "dfa"
    plan = plan_of("mlp", method)
    before = as_text(plan.joint)
    plan.graph(kind)
    assert [r.name for r in plan.passes[kind]] == [p.name for p in pipeline.STEPS[kind]]
    assert all(r.seconds > 0 for r in plan.passes[kind])
    assert as_text(plan.joint) == before


def _step() -> StepGraph:
    return plan_of("mlp", "dfa").graph("update")


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    def breaks(step: StepGraph, _: Any) -> StepGraph:
        new = step.copy()
        del new.gm.graph.find_nodes(op="placeholder")[0].meta["val"]
        return new

    with pytest.raises(VerifyError, match="vandal"):
        run([Pass("vandal", breaks)], _step(), None, "update")


def test_a_pass_that_does_not_keep_its_promise_is_named() -> None:
    lazy = Pass[Any]("lazy", lambda step, _: step, gives=("markers",))
    with pytest.raises(VerifyError, match=r"after lazy.*no error tap"):
        run([lazy], _step(), None, "update")
    early = Pass[Any]("early", lambda step, _: step, needs=("markers",))
    with pytest.raises(VerifyError, match=r"before early.*no error tap"):
        run([early], _step(), None, "update")


def test_a_pass_in_place_does_not_touch_what_it_was_given() -> None:
    step = _step()
    before = as_text(step)

    def writes(step: StepGraph, _: Any) -> None:
        step.output_node().args = (tuple(None for _ in step.outputs),)

    runs: list[PassRun] = []
    made = run([Pass("writes", writes, in_place=True)], step, None, "update", runs)
    assert as_text(step) == before != as_text(made)
    assert [r.name for r in runs] == ["writes"]


def test_left_out_by_name() -> None:
    """Without an optional pass the gradients are the same; it does not run."""
    model, args = make("mlp")
    found = {}
    for off in ((), ("late_bias", "join_products")):
        torch.manual_seed(0)
        net = compiled(make("mlp")[0], "dfa", backend="inductor", calib_every=None)
        net.load_state_dict(model.state_dict())
        with without(*off):
            train_step(net, args)
        found[off] = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        ran = [run.name for runs in net._captures.lowered().values() for run in runs]
        assert ("late_bias" in ran) == (not off)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_only_known_optional_passes_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="late_bias"), without("late_bais"):
        pass
    with pytest.raises(OptionError, match="results would be wrong"), without("feedback"):
        pass
    monkeypatch.setenv("GRAPEFX_DISABLE", "prune_mask")
    with pytest.raises(OptionError, match=r"GRAPEFX_DISABLE.*prune_masks"):
        runner.left_out()
    monkeypatch.setenv("GRAPEFX_DISABLE", "prune_masks, late_bias")
    assert runner.left_out() == {"prune_masks", "late_bias"}


def _silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.log, "handlers", [])
    monkeypatch.setattr(runner.log, "level", logging.NOTSET)
    monkeypatch.setattr(runner.log, "propagate", True)


def test_the_log_names_passes_and_shows_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _silent(monkeypatch)
    runner.log.manager._clear_cache()  # type: ignore[attr-defined]
    monkeypatch.setenv("GRAPEFX_LOGS", "graphs")
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    build_plan(model, (torch.randn(4, 3),), method="dfa").graph("update")
    said = capsys.readouterr().err
    assert "update" in said and "feedback" in said and "nodes" in said
    assert "-%" in said and "+%" in said  # the difference
    _silent(monkeypatch)
    monkeypatch.setenv("GRAPEFX_LOGS", "pases")
    with pytest.raises(OptionError, match="passes"):
        build_plan(model, (torch.randn(4, 3),), method="dfa").graph("update")


def test_explain_lists_passes() -> None:
    model, args = make("mlp")
    net = compiled(model, "dfa", backend="inductor", calib_every=None)
    train_step(net, args)
    text = str(net.explain(passes=True))
    for name in ("update feedback", "update annotate", "update decompose", "update late_bias"):
        assert name in text
    assert "Compiler passes" not in str(net.explain())
