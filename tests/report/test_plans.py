"""The compiler's own graphs, inspected: closed forms, FLOPs of real runs, leaks, explain()."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import grapefx
from grapefx.analysis import graph_cost
from grapefx.passes.graph import markers
from grapefx.report.from_plan import method_graphs
from grapefx.report.inspect import build_plans, report_plans


def mlp(depth, n, c):
    layers = [nn.Linear(n, n) if i < depth - 1 else nn.Linear(n, c) for i in range(depth)]
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1]


def products(plan, kind):
    """FLOPs on matrix units by phase."""
    cost = graph_cost(plan.graph(kind).gm, values={str(plan.batch): plan.batch_size})
    by = cost.by(lambda n: n.meta["grapefx_phase"], "matmul_flops")
    return {k: v for k, v in by.items() if v}


@pytest.mark.parametrize("depth", [3, 6])
def test_closed_forms_of_compiled_graphs(depth):
    """Products of each phase equal the polynomials (a multiply-add is 2)."""
    n, c, N = 24, 10, 8
    plans = build_plans(mlp(depth, n, c), torch.zeros(N, n))
    square, head, hidden = 2 * N * n * n, 2 * N * n * c, depth - 1
    forward = hidden * square + head
    bp, dfa, grape = plans
    assert products(bp, "calibration") == {
        "forward": forward,
        "input_grad": (hidden - 1) * square + head,
        "weight_grad": forward,
    }
    update = {"forward": forward, "weight_grad": forward, "projection": hidden * head}
    assert products(dfa, "update") == update
    assert products(grape, "align") == update | {
        "tangent": (hidden - 1) * square + head,
        "alignment": hidden * head,
    }


def test_span_grows_with_the_layers():
    """A layer more: BP's span by 3 products (a layer as the unit), dfa's by one forward."""
    n, c, N = 64, 10, 32
    square = 2 * N * n * n

    def spans(depth):
        report = grapefx.inspect(mlp(depth, n, c), torch.zeros(N, n))
        return {m.method: (m.span_flops, m.layer_span_flops) for m in report.methods}

    small, large = spans(4), spans(7)
    slope = {
        m: [(b - a) / (3 * square) for a, b in zip(small[m], large[m], strict=True)] for m in small
    }
    assert slope["bp"] == pytest.approx([2, 3], rel=0.05)
    assert slope["dfa"] == pytest.approx([1, 1], rel=0.05)
    # the tangent runs beside the forward; as one task with it, it counts
    assert slope["grape"] == pytest.approx([1, 2], rel=0.05)


def test_a_leak_across_a_cut_is_seen():
    """Edges are the graph's: one gradient that crosses a cut shows in the report."""
    bp, dfa = build_plans(mlp(4, 16, 4), torch.zeros(8, 16), "dfa")
    honest = report_plans([bp, dfa]).method("dfa")
    assert honest.independent and honest.shown.update_depth == 1

    step = dfa.graph("update").copy()
    phase = "grapefx_phase"
    projections = [n for n in step.gm.graph.nodes if n.meta.get(phase) == "projection"]
    wgrads = [n for n in step.gm.graph.nodes if n.meta.get(phase) == "weight_grad"]
    source = next(n for n in projections if n.meta["val"].shape[-1] == 16)
    other = next(
        n
        for n in projections
        if n.meta["grapefx_layer"] != source.meta["grapefx_layer"]
        and n.meta["val"].shape == source.meta["val"].shape
    )
    assert wgrads
    with step.gm.graph.inserting_after(max(source, other)):
        leak = step.gm.graph.call_function(torch.ops.aten.add.Tensor, (other, source))
    leak.meta = dict(other.meta)
    other.replace_all_uses_with(leak, delete_user_cb=lambda u: u is not leak)
    leaky = method_graphs(dfa)
    report = report_plans([bp, dfa])
    from grapefx.report import build_report

    graphs = replace(leaky, graphs={"update": step}, plan=None)
    report = build_report([method_graphs(bp), graphs], batch=8)
    found = report.method("dfa")
    a, b = source.meta["grapefx_layer"], other.meta["grapefx_layer"]
    assert not found.independent and (a, b) in found.shown.update_waits
    assert found.shown.update_depth == 2 and any(f"{b} for {a}" in w for w in report.warnings)


def gpt(layers=3, width=64):
    from tools.inspect_models import gpt

    return gpt(layers, width, heads=4, vocabulary=200)


def vision(name, size):
    models = pytest.importorskip("torchvision").models
    return models.get_model(name, weights=None), torch.randn(2, 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "gpt"])
def test_agrees_with_flop_counter_mode_on_a_real_run(name):
    """BP's products equal what torch counts while the model really runs."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if name != "resnet50" and attention not in flop_registry:
        pytest.skip("this torch counts no attention on a CPU")
    if name == "gpt":
        model, x = gpt(), torch.randint(0, 200, (2, 64))
    else:
        model, x = vision(name, 64 if name == "resnet50" else 224)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    (bp,) = build_plans(model, x, "bp")
    found = products(bp, "calibration")
    assert sum(found.values()) == counter.get_total_flops()


def test_explain_is_the_same_report():
    model, x = mlp(4, 16, 4), torch.randn(8, 16)
    net = grapefx.compile(model, method="grape", backend="eager", calib_every=1, steps_per_epoch=50)
    with pytest.raises(grapefx.InputError, match="first training call"):
        net.explain()
    net(x).sum().backward()
    said, asked = net.explain(), grapefx.inspect(model, x, "grape")
    assert said.method("grape").work_flops == asked.method("grape").work_flops
    assert said.method("grape").calibration.overhead > 0
    for piece in ("plan", "dense", "proved on the graph", "calibration", "at step 0"):
        assert piece in str(said)
    assert said._repr_html_().startswith("<iframe") and said.to_dict()["schema"] == 1


def test_explain_of_bp():
    net = grapefx.compile(mlp(3, 16, 4), method="bp", backend="eager")
    net(torch.randn(8, 16)).sum().backward()
    assert "every step: exact gradients" in str(net.explain())


def test_the_plan_in_numbers():
    report = grapefx.inspect(mlp(4, 16, 4), torch.zeros(8, 16), ["dfa", "grape"])
    plan = report.method("grape").plan
    assert [r.map_shape for r in plan.rows] == [(4, 16)] * 3 + [()]
    assert (plan.proved, plan.exact, plan.derived) == (6, 2, ())
    assert plan.rows[-1].layer == "head" and plan.rows[-1].parameter_count == 16 * 4 + 4
    assert dict(plan.runs).keys() == {"align", "calibration"}
    assert "feedback points and maps as dfa's" in str(report)


def test_derived_tangents_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c(torch.special.i0e(self.b(self.a(x).relu()).cumprod(1)).relu())

    report = grapefx.inspect(Odd(), torch.zeros(4, 8), "grape")
    assert any("cumprod" in op for op in report.method("grape").plan.derived)
    assert "cumprod" in str(report)


def test_sub_batch_tangents_have_rows_of_their_own():
    model, x = mlp(4, 32, 4), torch.zeros(8, 32)
    whole, part = (
        grapefx.inspect(model, x, "grape", tangent_fraction=f, batch=64).method("grape")
        for f in (1.0, 0.25)
    )
    assert part.alpha == pytest.approx(whole.alpha / 4, rel=0.02)
    assert part.work_flops < whole.work_flops


def test_maps_over_budget_are_shown_with_a_warning():
    report = grapefx.inspect(
        mlp(4, 16, 4), torch.zeros(8, 16), "dfa", feedback_budget=10, feedback="dense"
    )
    assert any("the feedback maps need" in w for w in report.warnings)
    assert report.method("dfa").feedback_bytes == 3 * 4 * 16 * 4


def test_nothing_is_allocated_and_nothing_is_left():
    with torch.device("meta"):
        model = mlp(3, 20_000, 10)  # 3 GiB of weights
        x = torch.zeros(4, 20_000)
    report = grapefx.inspect(model, x, "dfa")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert not any(
        n.target in markers.ALL
        for p in build_plans(model, x, "dfa")
        for g in p.graphs.values()
        for n in g.graph.nodes
    )


def test_bad_arguments():
    model, x = mlp(3, 8, 2), torch.zeros(4, 8)
    with pytest.raises(grapefx.OptionError, match="takes an nn"):
        grapefx.inspect(len, x)
    with pytest.raises(grapefx.OptionError, match="Did you mean 'eta'"):
        grapefx.inspect(model, x, "grape", etta=1)
    with pytest.raises(grapefx.OptionError, match="unknown method"):
        grapefx.inspect(model, x, "grappe")
    with pytest.raises(grapefx.InputError, match=r"layer '0' \(Linear\) fails on \(4, 9\)"):
        grapefx.inspect(model, torch.zeros(4, 9))
    with pytest.raises(grapefx.InputError, match="holds for 1 only"):
        grapefx.inspect(model, torch.zeros(1, 8), batch=4)
    for batch in (-3, 2.5, 0):
        with pytest.raises(grapefx.InputError, match="positive integer"):
            grapefx.inspect(model, x, batch=batch)
    for workers in (2, ("inf",)):
        with pytest.raises(grapefx.InputError, match="list of integers"):
            grapefx.inspect(model, x, workers=workers)
    with pytest.raises(grapefx.OptionError, match="compiled by grapefx already"):
        grapefx.inspect(grapefx.compile(model), x)


@pytest.mark.parametrize(
    "options",
    [
        {"perturb": "auto"},
        {"align_warmup": 3},
        {"calib_every": "auto"},
    ],
)
def test_options_that_train_are_explained(options):
    """BP, the baseline, takes none of what is for tangents alone."""
    model, x = mlp(3, 8, 2), torch.randn(4, 8)
    net = grapefx.compile(model, method="grape", backend="eager", **options)
    net(x).sum().backward()
    for report in (net.explain(), grapefx.inspect(model, x, "grape", **options)):
        assert report.method("grape").work_flops > 0


def test_calibrations_by_steps_are_not_called_epochs():
    model, x = mlp(3, 8, 2), torch.randn(4, 8)
    options = {"calib_unit": "step", "calib_every": 4, "steps_per_epoch": 100}
    text = str(grapefx.inspect(model, x, "grape", **options))
    assert "once every 4 steps" in text and "calibration: one BP step" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet152", "vit_l_16", "gpt"])
def test_big_models_in_a_minute(name):
    """CPU seconds of the process, so that other work on the machine does not count."""
    start = time.process_time()
    with torch.device("meta"):
        if name == "gpt":
            from tools.inspect_models import gpt

            model = gpt()
            x = model.example_inputs
        else:
            model, x = vision(name, 224)
    report = grapefx.inspect(model, x)
    report.html()
    assert report.method("grape").independent
    assert time.process_time() - start < 120  # 25 to 60 measured; twice that under load
