"""From a compiler plan to what the report needs of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from grapefx.ir import StepGraph
from grapefx.passes.annotate import HEAD
from grapefx.plan import Plan
from grapefx.report.build import LayerInfo, MethodGraphs


class PlanGraphs(Mapping[str, StepGraph]):
    """A plan's step graphs by kind, each built when it is first read."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __getitem__(self, kind: str) -> StepGraph:
        if kind not in self._plan.kinds():
            raise KeyError(kind)
        return self._plan.graph(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.kinds())

    def __len__(self) -> int:
        return len(self._plan.kinds())


def method_graphs(plan: Plan) -> MethodGraphs:
    """What the report shows of a plan. Parameters behind no cut belong to the head."""
    sizes = {s.name: int(n.meta["val"].numel()) for s, n in plan.joint.select("parameter")}
    maps = {m.layer.name: m for m in plan.maps} if plan.method.feedback else {}
    rows = []
    for layer in plan.layers:
        m = maps.get(layer.name)
        count = sum(sizes.pop(p, 0) for p in layer.parameters)
        rows.append(
            LayerInfo(layer.name, count, m.kind, m.shape, m.bytes)
            if m
            else LayerInfo(layer.name, count)
        )
    rows.append(LayerInfo(HEAD, sum(sizes.values())))
    return MethodGraphs(plan.method.name, PlanGraphs(plan), rows, tuple(plan.notes))


def parameter_count(plan: Plan) -> int:
    """The number of parameters that the plan's graph reads, shared ones once."""
    return sum(int(n.meta["val"].numel()) for _, n in plan.joint.select("parameter"))
