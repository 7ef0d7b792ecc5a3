"""Schedules and longest paths on random DAGs: bounds, edges, an independent dynamic programme."""

from __future__ import annotations

from itertools import pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grapefx.analysis import Dag, Task, list_schedule
from grapefx.analysis.dag import longest_path

EPS = 1e-9


def task(i, seconds, layer="a", phase="forward"):
    return Task(f"n{i}", "op", phase, layer, seconds, 0, 0, float(seconds), True, (f"n{i}",))


@st.composite
def dags(draw, most=24):
    n = draw(st.integers(1, most))
    tasks = tuple(
        task(
            i,
            draw(st.integers(0, 9)),
            draw(st.sampled_from("abc")),
            draw(st.sampled_from(["forward", "weight_grad", "tangent"])),
        )
        for i in range(n)
    )
    preds = tuple(
        tuple(sorted(draw(st.sets(st.integers(0, i - 1), max_size=3)))) if i else ()
        for i in range(n)
    )
    return Dag(tasks, preds)


@given(dags(), st.sampled_from([1, 2, 3, 7, None]))
@settings(max_examples=200, deadline=None)
def test_bounds_and_edges(dag, workers):
    s = list_schedule(dag, workers)
    assert s.span - EPS <= s.makespan <= s.work + EPS
    assert s.lower_bound - EPS <= s.makespan <= s.brent_bound + EPS
    assert (s.span, s.work) == (dag.span("seconds"), dag.work("seconds"))
    if workers == 1:
        assert s.makespan == pytest.approx(s.work)
    if workers is None:
        assert s.makespan == pytest.approx(s.span)
    else:
        assert s.used <= workers
    for i, preds in enumerate(dag.preds):
        for p in preds:
            assert s.start[i] >= s.start[p] + s.duration[p] - EPS
    busy: dict[int, list[tuple[float, float]]] = {}
    for start, duration, worker in zip(s.start, s.duration, s.worker, strict=True):
        if duration:
            busy.setdefault(worker, []).append((start, start + duration))
    for spans in busy.values():
        spans.sort()
        assert all(a[1] <= b[0] + EPS for a, b in pairwise(spans))


@given(dags())
@settings(max_examples=200, deadline=None)
def test_longest_path_three_ways(dag):
    found = longest_path(dag.weights("seconds"), dag.preds)
    best: dict[int, float] = {}

    def ends_at(i):  # top-down and memoised; the library's is bottom-up
        if i not in best:
            best[i] = dag.tasks[i].seconds + max((ends_at(p) for p in dag.preds[i]), default=0)
        return best[i]

    assert found.length == max(ends_at(i) for i in range(len(dag.tasks)))
    assert found.length == sum(dag.tasks[i].seconds for i in found.tasks)
    for a, b in pairwise(found.tasks):
        assert a in dag.preds[b]
    graph = dag.to_networkx()
    weighted = nx.DiGraph()
    weighted.add_nodes_from(["start", *graph])
    for name in graph:
        weighted.add_edge("start", name, weight=graph.nodes[name]["seconds"])
    for a, b in graph.edges:
        weighted.add_edge(a, b, weight=graph.nodes[b]["seconds"])
    assert nx.dag_longest_path_length(weighted) == found.length


@given(dags())
@settings(max_examples=200, deadline=None)
def test_groups_are_acyclic_and_keep_the_work(dag):
    for grouped in (dag.by_layer(), dag.by_stage()):
        graph = grouped.to_networkx()
        assert nx.is_directed_acyclic_graph(graph)
        assert all(p < i for i, preds in enumerate(grouped.preds) for p in preds)
        assert grouped.work("seconds") == pytest.approx(dag.work("seconds"))
        # a group is one unit, so waiting for it can only take longer
        assert grouped.span("seconds") >= dag.span("seconds") - EPS
        owner = {n: t.name for t in grouped.tasks for n in t.nodes}
        for i, preds in enumerate(dag.preds):
            for p in preds:
                a, b = owner[f"n{p}"], owner[f"n{i}"]
                assert a == b or graph.has_edge(a, b)


def test_a_layer_entered_twice_is_split():
    tasks = (task(0, 1, "a"), task(1, 1, "b"), task(2, 1, "a"))
    grouped = Dag(tasks, ((), (0,), (1,))).by_layer()
    assert [t.name for t in grouped.tasks] == ["a/forward", "b/forward", "a/forward#2"]


def test_empty_and_bad_input():
    empty = Dag((), ())
    assert list_schedule(empty, 2).makespan == 0 and empty.span() == 0
    with pytest.raises(ValueError, match="at least 1"):
        list_schedule(empty, 0)


def test_workers_share_independent_tasks():
    dag = Dag(tuple(task(i, 2) for i in range(4)), ((),) * 4)
    assert [list_schedule(dag, p).makespan for p in (1, 2, 4, None)] == [8, 4, 2, 2]
