"""FLOPs, work and span of an L-layer MLP against polynomials derived by hand."""

from __future__ import annotations

import pytest
import sympy

from grapefx.analysis import build_dag, graph_cost, size_symbols
from grapefx.errors import InputError
from tests.analysis.step_graphs import Mlp

DEPTH, WIDTH, CLASSES, BATCH = 5, 32, 10, 8


def phase(node):
    return node.meta.get("grapefx_phase", "other")


def hand(depth, n, c, N):
    """FLOPs of each phase: a multiply-add is 2, a bias, a mask and a relu 1 an element."""
    hidden = depth - 1
    forward = hidden * (2 * N * n * n + N * n + N * n) + 2 * N * n * c + N * c
    return {
        "forward": forward,
        "weight_grad": hidden * (2 * N * n * n + N * n) + 2 * N * n * c + N * c,
        "bp_input_grad": (hidden - 1) * 2 * N * n * n + 2 * N * n * c + hidden * N * n,
        "feedback_input_grad": hidden * N * n,
        "tangent": (hidden - 1) * (2 * N * n * n + 2 * N * n) + 2 * N * n * c,
        "projection": hidden * 2 * N * c * n,
        "alignment": hidden * (2 * N * c * n + c * n),
        "error": N * c,
    }


@pytest.mark.parametrize("depth", [2, 3, 7])
@pytest.mark.parametrize("batch", [1, 8])
def test_phases(depth, batch):
    mlp = Mlp(depth, WIDTH, CLASSES, batch)
    want = hand(depth, WIDTH, CLASSES, batch)
    bp = graph_cost(mlp.bp()).by(phase)
    assert bp == {
        "forward": want["forward"],
        "weight_grad": want["weight_grad"],
        "input_grad": want["bp_input_grad"],
        "error": want["error"],
    }
    shared = {k: want[k] for k in ("forward", "weight_grad", "projection", "error")}
    shared["input_grad"] = want["feedback_input_grad"]
    assert graph_cost(mlp.feedback()).by(phase) == shared
    shared |= {k: want[k] for k in ("tangent", "alignment")}
    assert graph_cost(mlp.feedback(align=True)).by(phase) == shared


def test_symbolic_in_the_batch():
    graph = Mlp(DEPTH, WIDTH, CLASSES, BATCH).feedback(align=True)
    (name,) = size_symbols(graph.graph)
    N = sympy.Symbol("N")
    found = graph_cost(graph).symbolic(key=phase)
    want = hand(DEPTH, WIDTH, CLASSES, N)
    for key in ("forward", "tangent", "weight_grad", "projection", "alignment"):
        expr = found[key].xreplace({s: N for s in found[key].free_symbols if s.name == name})
        assert sympy.expand(expr - want[key]) == 0
    total = graph_cost(graph).symbolic()
    (symbol,) = total.free_symbols
    for batch in (1, 8, 100):
        assert graph_cost(graph, batch=batch).total() == total.xreplace({symbol: batch})
    nbytes = graph_cost(graph).symbolic("bytes")
    assert graph_cost(graph, batch=100).total("bytes") == nbytes.xreplace({symbol: 100})


def test_batch_needs_a_symbol():
    graph = Mlp(3, 8, 4, 2, dynamic=False).bp()
    with pytest.raises(InputError, match="one batch size only"):
        graph_cost(graph, batch=16)


def test_span_of_bp_and_feedback():
    n, c, N = WIDTH, CLASSES, BATCH
    fwd, bwd = 2 * N * n * n + 2 * N * n, 2 * N * n * n + N * n
    spans = {}
    for depth in (4, 5, 6):
        mlp = Mlp(depth, n, c, N)
        spans[depth] = [
            build_dag(g).span() for g in (mlp.bp(), mlp.feedback(), mlp.feedback(align=True))
        ]
    for a, b in ((4, 5), (5, 6)):
        bp, dfa, grape = (y - x for x, y in zip(spans[a], spans[b], strict=True))
        # one layer more on BP's chain: its forward and its input gradient
        assert bp == fwd + bwd
        # feedback: its forward only, or what the tangent takes, whichever path is longer
        assert dfa == fwd
        assert fwd <= grape <= fwd + 2 * N * n


def test_span_with_a_layer_as_the_unit():
    """BP grows by 3 products a layer, DFA by 1, GrAPE by 2 (GrAPE 2026 appendix D plus weight
    grads).
    """
    n, c, N = WIDTH, CLASSES, BATCH
    product = 2 * N * n * n
    spans = {
        depth: [
            build_dag(g).by_stage().span("matmul_flops")
            for g in (
                Mlp(depth, n, c, N).bp(),
                Mlp(depth, n, c, N).feedback(),
                Mlp(depth, n, c, N).feedback(align=True),
            )
        ]
        for depth in (4, 5)
    }
    growth = [b - a for a, b in zip(spans[4], spans[5], strict=True)]
    assert growth == [3 * product, product, 2 * product]
    hidden = 3
    head_forward, update = 2 * N * n * c, product + 2 * N * n * c
    assert spans[4][1] == hidden * product + head_forward + update


def test_work_and_parallelism():
    mlp = Mlp(DEPTH, WIDTH, CLASSES, BATCH)
    want = hand(DEPTH, WIDTH, CLASSES, BATCH)
    dag = build_dag(mlp.bp())
    assert dag.work() == sum(want[k] for k in ("forward", "weight_grad", "bp_input_grad", "error"))
    assert dag.parallelism() == dag.work() / dag.span()


def test_leak_changes_the_report():
    mlp = Mlp(DEPTH, WIDTH, CLASSES, BATCH)

    def crossings(graph):
        stages = build_dag(graph).by_stage()
        return [
            (stages.tasks[p].layer, t.layer)
            for i, t in enumerate(stages.tasks)
            for p in stages.preds[i]
            if t.stage == stages.tasks[p].stage == "update"
        ]

    assert crossings(mlp.feedback(align=True)) == []
    assert ("fc4", "fc3") in crossings(mlp.feedback(align=True, leak=True))
    assert len(crossings(mlp.bp())) == DEPTH - 1
    assert build_dag(mlp.feedback(leak=True)).span() > build_dag(mlp.feedback()).span()
