"""Analyses one step graph: costs by phase and layer, critical path, schedules, layer graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import networkx as nx

from grapefx.analysis.cost import GraphCost
from grapefx.analysis.dag import NO_LAYER, OTHER, Dag, Loss, Task, build_dag, longest_path
from grapefx.analysis.device import DeviceModel
from grapefx.analysis.schedule import Schedule, list_schedule
from grapefx.report.records import (
    Bar,
    LayerGraph,
    LayerNode,
    LayerRow,
    PathStep,
    PhaseRow,
    ScheduleRow,
    StepReport,
)

# With more bars than this neighbours are joined, and the shortest are left out.
MAX_BARS = 900


class HasParameters(Protocol):
    """A layer's name and how many parameters it has."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> int: ...


def build_step(
    kind: str,
    share: float,
    costs: GraphCost,
    device: DeviceModel,
    workers: Sequence[int | None],
    layers: Sequence[HasParameters],
    loss: Loss | None = None,
) -> StepReport:
    """Analyse one step graph; ``share`` is the fraction of steps that are of this kind."""
    dag = build_dag(costs, device=device, loss=loss)
    stages = dag.by_stage()
    path = dag.critical_path("seconds")
    critical = set(path.tasks)
    work, span = dag.work("seconds"), path.length
    return StepReport(
        kind=kind,
        share=share,
        nodes=len(costs.nodes),
        work_flops=int(dag.work("flops")),
        work_bytes=int(dag.work("bytes")),
        work_seconds=work,
        span_flops=int(dag.span("flops")),
        layer_span_flops=int(stages.span("flops")),
        span_seconds=span,
        parallelism=work / span if span else 1.0,
        phases=_phases(dag),
        layers=_layers(dag, critical, layers),
        critical_path=_runs([dag.tasks[i] for i in path.tasks]),
        schedules=tuple(_schedule(dag, list_schedule(dag, p), critical) for p in workers),
        graph=_layer_graph(stages, [dag.tasks[i].name for i in path.tasks]),
        update_waits=update_waits(stages),
        update_depth=int(longest_path(_is_update(stages), stages.preds).length),
        unknown_ops=costs.unknown_ops(),
        unmarked_nodes=sum(t.phase == OTHER for t in dag.tasks),
    )


def update_waits(stages: Dag) -> tuple[tuple[str, str], ...]:
    """Pairs (a, b): the update of layer b reads something that the update of layer a computes."""
    found: dict[tuple[str, str], None] = {}
    for i, t in enumerate(stages.tasks):
        for p in stages.preds[i]:
            a = stages.tasks[p]
            # what belongs to no layer (collecting all layers' metrics) is nobody's update
            if a.stage == t.stage == "update" and len({a.layer, t.layer, NO_LAYER}) == 3:
                found.setdefault((a.layer, t.layer))
    return tuple(found)


def _is_update(stages: Dag) -> list[float]:
    return [float(t.stage == "update" and t.layer != NO_LAYER) for t in stages.tasks]


def _phases(dag: Dag) -> tuple[PhaseRow, ...]:
    rows: dict[str, list[Task]] = {}
    flops: dict[str, int] = {}
    for t in dag.tasks:
        rows.setdefault(t.phase, []).append(t)
        for phase, n in t.flops_by_phase().items():
            rows.setdefault(phase, [])
            flops[phase] = flops.get(phase, 0) + n
    return tuple(
        PhaseRow(
            phase,
            len(ts),
            flops[phase],
            sum(t.bytes for t in ts),
            sum(t.moved for t in ts),
            sum(t.seconds for t in ts),
        )
        for phase, ts in rows.items()
    )


def _layers(dag: Dag, critical: set[int], infos: Sequence[HasParameters]) -> tuple[LayerRow, ...]:
    parameters = {i.name: i.parameters for i in infos}
    # in the order of the plan, which is the network's; layers it does not know come last
    place = {name: n for n, name in enumerate(parameters)}
    rows: dict[str, dict[str, Any]] = {}
    for i, t in enumerate(dag.tasks):
        if t.layer == NO_LAYER:
            continue
        row = rows.setdefault(
            t.layer, {"flops": {}, "bytes": 0, "forward": 0.0, "update": 0.0, "critical": False}
        )
        for phase, n in t.flops_by_phase().items():
            row["flops"][phase] = row["flops"].get(phase, 0) + n
        row["bytes"] += t.bytes
        row["forward" if t.stage == "forward" else "update"] += t.seconds
        # the forward chain is always on the path: what tells layers apart is the rest
        row["critical"] |= i in critical and t.stage != "forward" and t.seconds > 0
    return tuple(
        LayerRow(
            name,
            r["flops"],
            r["bytes"],
            r["forward"],
            r["update"],
            parameters.get(name, 0),
            r["critical"],
        )
        for name, r in sorted(rows.items(), key=lambda r: place.get(r[0], len(place)))
    )


def _runs(tasks: Sequence[Task]) -> tuple[PathStep, ...]:
    out: list[PathStep] = []
    for t in tasks:
        if out and (out[-1].layer, out[-1].phase) == (t.layer, t.phase):
            last = out[-1]
            out[-1] = PathStep(
                last.layer,
                last.phase,
                (*last.nodes, t.name),
                last.flops + t.flops,
                last.seconds + t.seconds,
            )
        else:
            out.append(PathStep(t.layer, t.phase, (t.name,), t.flops, t.seconds))
    return tuple(out)


def _schedule(dag: Dag, s: Schedule, critical: set[int]) -> ScheduleRow:
    bars = _bars(dag, s, critical, gap=s.makespan / 2000)
    if len(bars) > MAX_BARS:
        bars = _bars(dag, s, critical, gap=s.makespan / 100)
    if len(bars) > MAX_BARS:
        longest = sorted(bars, key=lambda b: b.start - b.end)[:MAX_BARS]
        bars = sorted(longest, key=lambda b: b.start)
    return ScheduleRow(s.workers, s.used, s.makespan, s.lower_bound, s.brent_bound, tuple(bars))


def _bars(dag: Dag, s: Schedule, critical: set[int], gap: float) -> list[Bar]:
    """Bars by worker and time; neighbours of one layer and phase closer than ``gap`` are one."""
    last: dict[int, int] = {}
    out: list[Bar] = []
    for i in sorted(range(len(dag.tasks)), key=lambda i: s.start[i]):
        t, start, end = dag.tasks[i], s.start[i], s.start[i] + s.duration[i]
        if end <= start:
            continue
        w = s.worker[i]
        bar = Bar(w, start, end, t.layer, t.phase, 1, i in critical)
        before = out[last[w]] if w in last else None
        if (
            before
            and (before.layer, before.phase, before.critical)
            == (bar.layer, bar.phase, bar.critical)
            and start - before.end <= gap
        ):
            out[last[w]] = Bar(
                w, before.start, end, t.layer, t.phase, before.nodes + 1, bar.critical
            )
        else:
            last[w] = len(out)
            out.append(bar)
    return out


def _layer_graph(stages: Dag, path: Sequence[str]) -> LayerGraph:
    owner = {node: i for i, t in enumerate(stages.tasks) for node in t.nodes}
    route = [owner[name] for name in path]
    on_path = set(route)
    nodes = tuple(
        LayerNode(t.name, t.layer, t.stage, t.flops, t.seconds, i in on_path)
        for i, t in enumerate(stages.tasks)
    )
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(nodes)))
    graph.add_edges_from((p, i) for i, ps in enumerate(stages.preds) for p in ps)
    edges = tuple(sorted(nx.transitive_reduction(graph).edges))
    return LayerGraph(nodes, edges, tuple((a, b) for a, b in pairwise(route) if a != b))
