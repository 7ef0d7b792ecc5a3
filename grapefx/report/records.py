"""Holds what a report says as plain frozen records, so that every renderer says the same.

A report compares a training step of several methods with one of backpropagation (BP). A *step* is
one whole training step as a graph of tensor operators; a *layer* is what lies between two feedback
points, the places where a method replaces the gradient; a *phase* is what an operator is for
(forward, weight gradient, ...).

Units: FLOPs (a multiply-add is 2), bytes, seconds of one step. Ratios named ``*_ratio`` are BP's
value over the method's: above 1 the method is better.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

SCHEMA = 1


@dataclass(frozen=True)
class PhaseRow:
    """All nodes of one phase of a step.

    An op that makes both gradients at once is an input-gradient node; its FLOPs count in both.
    ``bytes`` counts each op alone; ``moved`` and ``seconds`` are after pointwise fusion.
    """

    phase: str
    nodes: int
    flops: int
    bytes: int
    moved: int
    seconds: float


@dataclass(frozen=True)
class LayerRow:
    """One layer of a step: FLOPs by phase, and the time of its forward and of its update."""

    layer: str
    flops: dict[str, int]
    bytes: int
    forward_seconds: float
    update_seconds: float
    parameters: int
    critical: bool


@dataclass(frozen=True)
class PathStep:
    """A run of consecutive nodes of the critical path that share layer and phase."""

    layer: str
    phase: str
    nodes: tuple[str, ...]
    flops: int
    seconds: float


@dataclass(frozen=True)
class Bar:
    """One bar of the Gantt chart: what a worker does from ``start`` to ``end``."""

    worker: int
    start: float
    end: float
    layer: str
    phase: str
    nodes: int
    critical: bool


@dataclass(frozen=True)
class ScheduleRow:
    """A step on P workers (None: unlimited): list schedule, and the bounds around it."""

    workers: int | None
    used: int
    seconds: float
    lower_bound: float
    brent_bound: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class LayerNode:
    """A box of the layer graph: one layer's forward, its update, or the output error."""

    name: str
    layer: str
    stage: str
    flops: int
    seconds: float
    critical: bool


@dataclass(frozen=True)
class LayerGraph:
    """Boxes in topological order, and who waits for whom, as pairs (from, to) of their indices.

    ``edges`` leaves out what follows from other edges; ``critical_edges`` are the steps that the
    critical path takes from box to box.
    """

    nodes: tuple[LayerNode, ...]
    edges: tuple[tuple[int, int], ...]
    critical_edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StepReport:
    """One kind of step ("update", "align", or BP's "calibration") as its graph says.

    ``span_flops`` is the longest path through single ops; ``layer_span_flops`` the longest path
    when a layer's forward, or its whole update, is one indivisible task. ``update_waits`` lists
    the pairs (a, b) where layer b's update reads something that layer a's update computes, and
    ``update_depth`` is the longest chain of updates: 1 when all can run at the same time.
    """

    kind: str
    share: float
    nodes: int
    work_flops: int
    work_bytes: int
    work_seconds: float
    span_flops: int
    layer_span_flops: int
    span_seconds: float
    parallelism: float
    phases: tuple[PhaseRow, ...]
    layers: tuple[LayerRow, ...]
    critical_path: tuple[PathStep, ...]
    schedules: tuple[ScheduleRow, ...]
    graph: LayerGraph
    update_waits: tuple[tuple[str, str], ...]
    update_depth: int
    unknown_ops: dict[str, int]
    unmarked_nodes: int


@dataclass(frozen=True)
class FeedbackRow:
    """One layer's feedback map."""

    layer: str
    kind: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class CalibrationRow:
    """What full backward steps add (GrAPE 2026 eq. 21).

    ``steps_per_epoch`` and ``overhead`` are None where the epoch's length is not known.
    """

    every: float
    steps_per_epoch: int | None
    backward_flops: int
    overhead: float | None


@dataclass(frozen=True)
class SegmentRow:
    """One feedback point: the value that is cut, the parameters behind it, its feedback map.

    ``value`` is the graph node of the feedback point and ``shape`` one sample's part of it; both
    are empty for the head, which gets the true error. ``map_kind`` is None without a map.
    """

    layer: str
    value: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    parameter_count: int
    source: str = ""
    map_kind: str | None = None
    map_shape: tuple[int, ...] = ()
    map_bytes: int = 0


@dataclass(frozen=True)
class PlanReport:
    """What the compiler decided for one method.

    ``runs`` pairs each kind of step with when it runs. ``derived`` are the operators whose tangent
    comes from torch's own forward AD. ``proved`` counts the parameter gradients of which the graph
    shows that they depend on their own segment's cotangent alone (None: nothing was proved, the
    method is sequential or its graph was not built), ``exact`` those that no feedback reaches;
    ``exact_from`` says where the part with true gradients begins; ``exact_rows``: how many of how
    many samples have a backward chain of their own (None: none), ``exact_late``: which corrects the
    next step.
    """

    rows: tuple[SegmentRow, ...]
    runs: tuple[tuple[str, str], ...]
    derived: tuple[str, ...]
    sequential: bool
    proved: int | None
    exact: int
    symbolic_batch: bool
    tap: str
    exact_from: tuple[str, ...] = ()
    exact_rows: tuple[int, int] | None = None
    exact_late: bool = False


@dataclass(frozen=True)
class MethodReport:
    """One method. Averages are over its kinds of step, by how often each runs.

    ``alpha`` and ``beta`` are the tangent's and BP's backward FLOPs over the forward's;
    ``arithmetic_ratio`` is (1 + beta) / (1 + alpha) of GrAPE 2026 appendix D, which leaves the
    method's weight gradients out; the other ratios count everything.
    """

    method: str
    steps: tuple[StepReport, ...]
    work_flops: float
    work_bytes: float
    span_flops: float
    layer_span_flops: float
    work_seconds: float
    span_seconds: float
    alpha: float
    beta: float
    arithmetic_ratio: float | None
    work_ratio: float
    span_ratio: float
    layer_span_ratio: float
    seconds: dict[str, float]
    time_ratio: dict[str, float]
    calibration: CalibrationRow | None
    feedback: tuple[FeedbackRow, ...]
    warnings: tuple[str, ...]
    plan: PlanReport | None = None

    @property
    def shown(self) -> StepReport:
        """The step that the pictures show: the most frequent one, an aligning one on ties."""
        return max(self.steps, key=lambda s: (s.share, s.kind == "align"))

    @property
    def independent(self) -> bool:
        """True when no layer's update waits for another layer's."""
        return not any(s.update_waits for s in self.steps)

    @property
    def feedback_bytes(self) -> int:
        """Memory of all feedback maps."""
        return sum(f.bytes for f in self.feedback)


@dataclass(frozen=True)
class DeviceRow:
    """The device model that the times assume."""

    name: str
    description: str
    worker: str
    workers: int
    source: str


@dataclass(frozen=True)
class PassRow:
    """What one compiler pass did to the graph of one kind of step; ``seconds`` with its checks."""

    step: str
    name: str
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass(frozen=True)
class ReportData:
    """What ``grapefx-inspect`` shows: BP first, then the methods asked for.

    ``passes`` are those of the last method, where they were asked for. ``chosen``: what the preset
    added for this network, and why.
    """

    model: str
    batch: int | None
    parameters: int
    device: DeviceRow
    workers: tuple[int | None, ...]
    methods: tuple[MethodReport, ...]
    warnings: tuple[str, ...]
    passes: tuple[PassRow, ...] = ()
    chosen: str = ""

    def method(self, name: str) -> MethodReport:
        """The report of one method; KeyError when there is none."""
        for m in self.methods:
            if m.method == name:
                return m
        raise KeyError(name)

    def noting(self, warning: str) -> Self:
        """The same report with one more warning."""
        return replace(self, warnings=(warning, *self.warnings))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; ``schema`` is the format's version.

        Unlimited workers are ``null``, in dict keys ``"inf"``.
        """
        return {"schema": SCHEMA, **asdict(self)}

    def json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def worker_key(workers: int | None) -> str:
    """A number of workers as a dict key: "4", or "inf"."""
    return "inf" if workers is None else str(workers)
