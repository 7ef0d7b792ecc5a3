"""The MLP step graphs of the analysis' tests, as a report."""

import pytest


@pytest.fixture(scope="session")
def mlp_methods():
    """BP, DFA and GrAPE steps of a small MLP, by hand."""
    from grapefx.report import LayerInfo, MethodGraphs
    from tests.analysis.step_graphs import Mlp

    mlp = Mlp(depth=5, n=64, c=10, batch=32)
    maps = [LayerInfo(mlp.name(i), 64 * 65, "dense", (10, 64), 2560) for i in range(1, 5)]
    layers = [*maps, LayerInfo("head", 650)]
    plain = [LayerInfo(x.name, x.parameters) for x in layers]
    bp = mlp.bp()
    return {
        "bp": MethodGraphs("bp", {"calibration": bp}, plain),
        "dfa": MethodGraphs("dfa", {"update": mlp.feedback(), "calibration": bp}, layers),
        "grape": MethodGraphs(
            "grape",
            {"align": mlp.feedback(align=True), "update": mlp.feedback(), "calibration": bp},
            layers,
        ),
        "leaky": MethodGraphs(
            "leaky", {"align": mlp.feedback(align=True, leak=True), "calibration": bp}, layers
        ),
    }


@pytest.fixture(scope="session")
def mlp_report(mlp_methods):
    """The report of BP, DFA and GrAPE."""
    from grapefx.report import build_report

    chosen = [mlp_methods[m] for m in ("bp", "dfa", "grape")]
    return build_report(
        chosen, model="MLP", parameters=17290, batch=32, calib_every=1, steps_per_epoch=50
    )
