"""Builds the report from the step graphs of several methods, beside those of backpropagation.

What a method does is read off its graphs; none is known by name, except BP as the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, GraphModule, Node

from grapefx.analysis import (
    DeviceModel,
    GraphCost,
    Loss,
    amortised_calibration,
    arithmetic_ratio,
    graph_cost,
    load_device,
)
from grapefx.errors import OptionError
from grapefx.ir import StepGraph
from grapefx.report.records import (
    CalibrationRow,
    DeviceRow,
    FeedbackRow,
    MethodReport,
    PlanReport,
    StepReport,
    worker_key,
)
from grapefx.report.report import Report
from grapefx.report.step import build_step

BASELINE = "bp"
BACKWARD = "calibration"


@dataclass(frozen=True)
class LayerInfo:
    """What the report says of a layer that its graph does not: parameters and feedback map."""

    name: str
    parameters: int = 0
    feedback_kind: str | None = None
    feedback_shape: tuple[int, ...] = ()
    feedback_bytes: int = 0


@dataclass(frozen=True)
class MethodGraphs:
    """A method's whole-step graphs by kind: "update", "align", "calibration" (BP: this one only).

    A ``StepGraph`` also says which of its inputs is the loss's gradient; the error then waits for
    the outputs. Nodes carry fake values, phases and layers.

    ``plan`` is asked after the graphs were built. ``sizes`` gives a graph's size symbols at a batch
    size where it has more than one.
    """

    method: str
    graphs: Mapping[str, GraphModule | StepGraph]
    layers: Sequence[LayerInfo] = ()
    notes: Sequence[str] = ()
    plan: Callable[[], PlanReport] | None = None
    sizes: Callable[[Graph, int], Mapping[str, int]] | None = None
    every: int = 1

    def cost(self, gm: GraphModule, batch: int | None) -> GraphCost:
        """The cost of one of the graphs at a batch size."""
        values = self.sizes(gm.graph, batch) if self.sizes and batch is not None else {}
        return graph_cost(gm, values=values) if values else graph_cost(gm, batch=batch)


def build_report(
    methods: Iterable[MethodGraphs],
    *,
    model: str = "model",
    parameters: int = 0,
    device: DeviceModel | str = "cpu-2core",
    workers: Sequence[int | None] = (1, 2, 4, 8, None),
    batch: int | None = None,
    shown_batch: int | None = None,
    align_every: int = 1,
    calib_every: float | None = None,
    steps_per_epoch: int | None = None,
) -> Report:
    """Analyse the step graphs of several methods against BP's.

    Args:
        methods: BP ("bp") must be among them.
        model: the model's name, for the title.
        parameters: its number of parameters.
        device: a bundled device model's name, the path of a YAML file, or a model.
        workers: the numbers of workers to schedule for; None is unlimited.
        batch: evaluate symbolic graphs at this batch size.
        shown_batch: the batch size that the report names, where the graphs hold one size only.
        align_every: every how many steps the feedback maps are aligned (weights of the average).
        calib_every: epochs between full backward steps; None for never.
        steps_per_epoch: mini-batches an epoch, for the amortised overhead.

    Raises:
        OptionError: no BP among the methods, or a number out of range.
        InputError: ``batch`` was given but a graph has no batch symbol.
    """
    every = list(methods)
    baseline = next((m for m in every if m.method == BASELINE), None)
    if baseline is None:
        raise OptionError("the report compares with BP: pass its graph as method 'bp'")
    for name, value in (("align_every", align_every), ("steps_per_epoch", steps_per_epoch)):
        if value is not None and value < 1:
            raise OptionError(f"{name} must be at least 1, not {value}")
    if calib_every is not None and calib_every <= 0:
        raise OptionError(f"calib_every must be positive (or None for never), not {calib_every}")
    if any(p is not None and p < 1 for p in workers):
        raise OptionError(f"workers must be at least 1, not {list(workers)}")
    roofline = load_device(device) if isinstance(device, str) else device
    build = _Builder(
        roofline, tuple(dict.fromkeys(workers)), batch, align_every, calib_every, steps_per_epoch
    )
    bp = build.method(baseline, None)
    reports = [bp, *(build.method(m, bp) for m in every if m is not baseline)]
    row = DeviceRow(
        roofline.name, roofline.description, roofline.worker, roofline.workers, roofline.source
    )
    return Report(
        model,
        batch or shown_batch,
        parameters,
        row,
        build.workers,
        tuple(reports),
        tuple(dict.fromkeys(w for m in reports for w in m.warnings)),
    )


@dataclass(frozen=True)
class _Builder:
    device: DeviceModel
    workers: tuple[int | None, ...]
    batch: int | None
    align_every: int
    calib_every: float | None
    steps_per_epoch: int | None

    def method(self, given: MethodGraphs, bp: MethodReport | None) -> MethodReport:
        shares = self._shares(given)
        steps = []
        for kind, share in shares.items():
            gm, loss = opened(given.graphs[kind])
            costs = given.cost(gm, self.batch)
            args = (costs, self.device, self.workers, given.layers, loss)
            steps.append(build_step(kind, share, *args))
        return self._summary(given, tuple(steps), bp)

    def _shares(self, given: MethodGraphs) -> dict[str, float]:
        kinds = set(given.graphs) - {BACKWARD}
        if not kinds:
            return {BACKWARD: 1.0}
        if "mean_field" in kinds:
            often = 1 / given.every
            return {k: s for k, s in (("mean_field", often), ("update", 1 - often)) if s}
        if "align" not in kinds:
            return {"update": 1.0}
        share = 1 / self.align_every
        if share == 1 or "update" not in kinds:
            return {"align": 1.0}
        return {"align": share, "update": 1 - share}

    def _summary(
        self, given: MethodGraphs, steps: tuple[StepReport, ...], bp: MethodReport | None
    ) -> MethodReport:
        def mean(what: str) -> float:
            return sum(s.share * float(getattr(s, what)) for s in steps)

        forward = sum(s.share * _phase(s, "forward", "buffer") for s in steps)
        alpha = _over(sum(s.share * _phase(s, "tangent") for s in steps), forward)
        backward = sum(s.share * _phase(s, "weight_grad", "input_grad") for s in steps)
        beta = bp.beta if bp else _over(backward, forward)
        seconds = {
            worker_key(p): sum(
                s.share * row.seconds for s in steps for row in s.schedules if row.workers == p
            )
            for p in self.workers
        }
        work, span, layer_span = mean("work_flops"), mean("span_flops"), mean("layer_span_flops")
        base = bp.seconds if bp else seconds
        return MethodReport(
            method=given.method,
            steps=steps,
            work_flops=work,
            work_bytes=mean("work_bytes"),
            span_flops=span,
            layer_span_flops=layer_span,
            work_seconds=mean("work_seconds"),
            span_seconds=mean("span_seconds"),
            alpha=alpha,
            beta=beta,
            arithmetic_ratio=arithmetic_ratio(alpha, beta) if bp else None,
            work_ratio=_over(bp.work_flops if bp else work, work, 1.0),
            span_ratio=_over(bp.span_flops if bp else span, span, 1.0),
            layer_span_ratio=_over(bp.layer_span_flops if bp else layer_span, layer_span, 1.0),
            seconds=seconds,
            time_ratio={k: _over(base[k], v, 1.0) for k, v in seconds.items()},
            calibration=self._calibration(given, work, bp),
            feedback=tuple(
                FeedbackRow(i.name, i.feedback_kind, i.feedback_shape, i.feedback_bytes)
                for i in given.layers
                if i.feedback_kind
            ),
            warnings=_warnings(given, steps),
            plan=given.plan() if given.plan else None,
        )

    def _calibration(
        self, given: MethodGraphs, work: float, bp: MethodReport | None
    ) -> CalibrationRow | None:
        if bp is None or self.calib_every is None:
            return None
        backward = bp.work_flops
        if BACKWARD in given.graphs:
            # the method's own calibration step also refits its feedback maps
            backward = given.cost(opened(given.graphs[BACKWARD])[0], self.batch).total()
        overhead = None
        if self.steps_per_epoch is not None:
            overhead = amortised_calibration(
                work, backward, every=self.calib_every, steps_per_epoch=self.steps_per_epoch
            ).overhead
        return CalibrationRow(self.calib_every, self.steps_per_epoch, int(backward), overhead)


def opened(graph: GraphModule | StepGraph) -> tuple[GraphModule, Loss | None]:
    """The graph, and where the loss stands in it if it says so."""
    if isinstance(graph, GraphModule):
        return graph, None
    errors = graph.select("cotangent")
    names = {slot.name for slot, _ in errors}
    outputs = graph.produced("output")
    # only an output that has a gradient is read by the loss; none matches: all are
    read = [n for slot, n in outputs if slot.name in names] or [n for _, n in outputs]
    return graph.gm, Loss(
        tuple(n for n in read if isinstance(n, Node)), tuple(n for _, n in errors)
    )


def _phase(step: StepReport, *names: str) -> int:
    return sum(p.flops for p in step.phases if p.phase in names)


def _over(a: float, b: float, otherwise: float = 0.0) -> float:
    return a / b if b else otherwise


def _warnings(given: MethodGraphs, steps: Sequence[StepReport]) -> tuple[str, ...]:
    out = list(given.notes)
    unknown: dict[str, int] = {}
    for s in steps:
        for op, n in s.unknown_ops.items():
            unknown[op] = max(n, unknown.get(op, 0))
    if unknown:
        listed = ", ".join(f"{op} ({n})" for op, n in sorted(unknown.items()))
        out.append(
            f"ops without a cost rule, counted as one FLOP an element: {listed}; "
            "grapefx.analysis.register_cost prices them"
        )
    unmarked = max(s.unmarked_nodes for s in steps)
    if unmarked:
        out.append(f"{given.method}: {unmarked} nodes carry no phase and count as 'other'")
    waits = {w: None for s in steps for w in s.update_waits}
    if waits and given.method != BASELINE:
        shown = ", ".join(f"{b} for {a}" for a, b in list(waits)[:5])
        more = f" and {len(waits) - 5} more" if len(waits) > 5 else ""
        out.append(f"{given.method}: updates wait for another layer's update: {shown}{more}")
    return tuple(out)
