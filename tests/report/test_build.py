"""The report's numbers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from grapefx.errors import InputError, OptionError
from grapefx.plan import build_plan
from grapefx.report import LayerInfo, MethodGraphs, build_report
from grapefx.report.from_plan import method_graphs, parameter_count


def test_ratios_and_shapes(mlp_report):
    bp, dfa, grape = mlp_report.methods
    assert [m.method for m in mlp_report.methods] == ["bp", "dfa", "grape"]
    assert bp.work_ratio == bp.span_ratio == 1 and bp.arithmetic_ratio is None
    assert dfa.span_ratio == pytest.approx(bp.span_flops / dfa.span_flops)
    assert dfa.alpha == 0 and grape.alpha > 0.5
    assert grape.arithmetic_ratio == pytest.approx((1 + bp.beta) / (1 + grape.alpha))
    # the honest ratio counts the weight gradients that the paper's formula leaves out
    assert grape.work_ratio < grape.arithmetic_ratio
    for m in mlp_report.methods:
        s = m.shown
        assert s.work_flops == sum(p.flops for p in s.phases)
        assert s.span_flops <= s.layer_span_flops <= s.work_flops
        assert s.span_seconds == pytest.approx(sum(p.seconds for p in s.critical_path))
        for row in s.schedules:
            assert s.span_seconds - 1e-12 <= row.seconds <= s.work_seconds + 1e-12
            assert row.lower_bound - 1e-12 <= row.seconds <= row.brent_bound + 1e-12
            assert row.used <= (row.workers or row.used)


def test_chain_and_fan(mlp_report):
    bp, dfa, grape = (m.shown for m in mlp_report.methods)
    assert (bp.update_depth, dfa.update_depth, grape.update_depth) == (5, 1, 1)
    assert len(bp.update_waits) == 4 and not dfa.update_waits and not grape.update_waits
    assert mlp_report.method("grape").independent and not mlp_report.method("bp").independent
    fan = [b for a, b in dfa.graph.edges if dfa.graph.nodes[a].stage == "error"]
    assert {dfa.graph.nodes[b].layer for b in fan} == {"fc1", "fc2", "fc3", "fc4", "head"}


def test_a_leak_changes_the_report(mlp_methods):
    report = build_report([mlp_methods["bp"], mlp_methods["leaky"]])
    leaky = report.method("leaky")
    assert not leaky.independent and leaky.shown.update_depth == 2
    assert set(leaky.shown.update_waits) == {("fc4", f"fc{i}") for i in (1, 2, 3)}
    assert any("fc3 for fc4" in w for w in report.warnings)


def test_align_every_averages_the_steps(mlp_methods):
    every = build_report([mlp_methods["bp"], mlp_methods["grape"]]).method("grape")
    fourth = build_report([mlp_methods["bp"], mlp_methods["grape"]], align_every=4).method("grape")
    dfa = build_report([mlp_methods["bp"], mlp_methods["dfa"]]).method("dfa")
    assert [(s.kind, s.share) for s in fourth.steps] == [("align", 0.25), ("update", 0.75)]
    assert fourth.work_flops == pytest.approx(0.25 * every.work_flops + 0.75 * dfa.work_flops)
    assert fourth.alpha == pytest.approx(every.alpha / 4)
    assert fourth.shown.kind == "update"


def test_calibration(mlp_report, mlp_methods):
    c = mlp_report.method("dfa").calibration
    bp, dfa = mlp_report.methods[:2]
    assert c.overhead == pytest.approx(bp.work_flops / (50 * dfa.work_flops))
    later = build_report([mlp_methods["bp"], mlp_methods["dfa"]], calib_every=10)
    assert later.method("dfa").calibration.overhead is None
    assert mlp_report.method("bp").calibration is None


def test_feedback_memory(mlp_report):
    assert mlp_report.method("grape").feedback_bytes == 4 * 2560
    assert mlp_report.method("bp").feedback == ()


def test_batch(mlp_methods):
    small, large = (
        build_report([mlp_methods["bp"]], batch=b).method("bp").work_flops for b in (1, 64)
    )
    assert 60 < large / small <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align_every": 0}, "align_every"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"calib_every": 0}, "calib_every"),
        ({"workers": [0]}, "workers"),
        ({"device": "tpu"}, "no device model"),
    ],
)
def test_bad_options(mlp_methods, options, message):
    with pytest.raises(OptionError, match=message):
        build_report([mlp_methods["bp"]], **options)


def test_needs_bp(mlp_methods):
    with pytest.raises(OptionError, match="compares with BP"):
        build_report([mlp_methods["dfa"]])


def test_json(mlp_report):
    data = json.loads(mlp_report.json())
    assert data["schema"] == 1 and data["methods"][2]["method"] == "grape"
    assert data["methods"][0]["seconds"].keys() == {"1", "2", "4", "8", "inf"}


def test_unmarked_graphs_are_reported(mlp_methods):
    graph = mlp_methods["dfa"].graphs["update"]
    copy = torch.fx.GraphModule(graph, torch.fx.Graph())
    copy.graph.output(copy.graph.graph_copy(graph.graph, {}))
    for node in copy.graph.nodes:
        node.meta.pop("grapefx_phase", None)
    bare = MethodGraphs("dfa", {"update": copy}, [LayerInfo("fc1")])
    report = build_report([mlp_methods["bp"], bare])
    assert any("carry no phase" in w for w in report.warnings)


def test_from_plans():
    """The compiler's own graphs give what the hand-written ones give."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    x = torch.randn(32, 64)
    plans = [build_plan(model, (x,), method=m) for m in ("bp", "dfa", "grape")]
    report = build_report(
        [method_graphs(p) for p in plans], parameters=parameter_count(plans[0]), batch=128
    )
    bp, dfa, grape = report.methods
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.warnings == ()
    product, head = 2 * 128 * 64 * 64, 2 * 128 * 64 * 10
    assert sum(p.flops for p in bp.shown.phases if p.phase == "weight_grad") == (
        2 * product + head + 128 * (64 + 64 + 10)
    )
    assert bp.shown.update_depth > 1 and not bp.independent
    assert dfa.independent and grape.independent and grape.shown.update_depth == 1
    # the update waits for the loss, and the loss for the outputs
    assert dfa.shown.span_flops > 2 * product
    assert [f.shape for f in grape.feedback] == [(10, 64), (10, 64)]


def test_from_plans_rejects_a_fixed_batch(mlp_methods):
    from tests.analysis.step_graphs import Mlp

    fixed = MethodGraphs("bp", {"calibration": Mlp(3, 8, 4, 2, dynamic=False).bp()})
    with pytest.raises(InputError, match="one batch size"):
        build_report([fixed], batch=4)
