"""Reads off a compiler plan what the report says of it: step graphs, layers, maps, decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.fx import Graph

from grapefx.analysis import size_symbols
from grapefx.ir import StepGraph
from grapefx.options import Options
from grapefx.passes.graph.annotate import HEAD
from grapefx.plan import Plan
from grapefx.report.build import LayerInfo, MethodGraphs
from grapefx.report.records import PlanReport, SegmentRow

MEAN_FIELD = "the feedback maps are computed from the weights and from mean derivatives"


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
    sizes = _parameter_sizes(plan)
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
    notes = list(plan.notes)
    excess = plan.over_budget()
    if excess:
        notes.append(" ".join(excess.replace("\n  remedy:", "; remedy:").split()))
    return MethodGraphs(
        plan.method.name,
        PlanGraphs(plan),
        rows,
        tuple(notes),
        plan=lambda: plan_report(plan),
        sizes=lambda graph, batch: _sizes(plan, graph, batch),
        every=plan.mean_field.every if plan.mean_field is not None else 1,
    )


def plan_report(plan: Plan) -> PlanReport:
    """The plan in words and rows; complete for the kinds of step whose graphs were built."""
    sizes = _parameter_sizes(plan)
    maps = {m.layer.name: m for m in plan.maps} if plan.method.feedback else {}
    held = {p for layer in plan.layers for p in layer.parameters}
    rows = []
    for layer in plan.layers:
        m = maps.get(layer.name)
        rows.append(
            SegmentRow(
                layer.name,
                layer.node,
                layer.sample_shape,
                layer.parameters,
                sum(sizes.get(p, 0) for p in layer.parameters),
                layer.source,
                m.kind if m else None,
                m.shape if m else (),
                m.bytes if m else 0,
            )
        )
    head = tuple(p for p in sizes if p not in held)
    if head:
        rows.append(SegmentRow(HEAD, "", (), head, sum(sizes[p] for p in head)))
    chain = plan.exact_rows
    own = {p: layers for p, layers in plan.independent.items() if layers}
    return PlanReport(
        rows=tuple(rows),
        runs=tuple((k, text) for k in plan.kinds() if (text := when(k, plan))),
        derived=plan.derived,
        sequential=plan.method.sequential,
        proved=len(own) if plan.independent else None,
        exact=len(plan.independent) - len(own),
        symbolic_batch=plan.captured.batch is not None,
        tap=", ".join(str(n.name) for n in plan.placement.taps),
        exact_from=plan.placement.exact,
        exact_rows=None if chain is None else (chain.count(plan.batch_size), plan.batch_size),
        exact_late=chain is not None and chain.late,
    )


def when(kind: str, plan: Plan) -> str:
    """When the runtime runs a step of this kind, in words; empty for never."""
    o: Options = plan.options
    others = [k for k in plan.kinds() if k != "calibration"]
    if not others:
        return "every step: exact gradients"
    if kind == "calibration":
        return _calibrations(o)
    if others == [kind]:
        return "all other steps" + (f": {MEAN_FIELD}" if kind == "mean_field" else "")
    if kind == "mean_field":
        return f"one step in {o.mean_field}: {MEAN_FIELD}"
    if "mean_field" in others:
        return "the steps between: the feedback maps stay as they are"
    if kind == "align":
        if o.align_every == 1:
            return "all other steps: the feedback maps learn from tangents"
        return f"one step in {o.align_every}: the feedback maps learn from tangents"
    return "the steps between: the feedback maps stay as they are" if o.align_every > 1 else ""


def _calibrations(o: Options) -> str:
    times = []
    start = o.calib_init if o.calib_init is not None else o.calib_every is not None
    if start:
        times.append("at step 0")
    if o.calib_every == "auto":
        times.append(f"when alignment asks for it, in {o.calib_budget:.0%} of the steps at most")
    elif o.calib_every == "geometric":
        most = "" if o.calib_gap is None else f", {o.calib_gap} at most"
        times = [f"at steps whose gaps grow by {o.calib_growth:g}{most}"]
    elif o.calib_every is not None:
        unit = o.calib_unit if o.calib_every == 1 else f"{o.calib_every} {o.calib_unit}s"
        times.append(f"once every {unit}")
    if not times:
        return "only inside net.calibration() (calib_every=None)"
    does = {
        "weights": "exact gradients",
        "feedback": "the feedback maps are refitted",
        "both": "exact gradients, and the feedback maps are refitted",
    }
    refits = o.calib_refit if not isinstance(o.mean_field, int) else "weights"
    return f"{' and '.join(times)}: {does[refits]}"


def parameter_count(plan: Plan) -> int:
    """The number of parameters that the plan's graph reads, shared ones once."""
    return sum(_parameter_sizes(plan).values())


def _parameter_sizes(plan: Plan) -> dict[str, int]:
    return {s.name: int(n.meta["val"].numel()) for s, n in plan.joint.select("parameter")}


def _sizes(plan: Plan, graph: Graph, batch: int) -> dict[str, int]:
    """What each size symbol of a graph is at a batch size: tangents may have rows of their own."""
    return {s: batch if s == str(plan.batch) else plan.rows(batch) for s in size_symbols(graph)}
