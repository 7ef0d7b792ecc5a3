"""Works out what the panels of the HTML page show, where a record does not say it as it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grapefx.report.records import (
    LayerRow,
    MethodReport,
    ReportData,
    ScheduleRow,
    SegmentRow,
    StepReport,
    worker_key,
)


@dataclass(frozen=True)
class Schedules:
    """The Gantt charts for one number of workers, of all methods on one time scale in seconds."""

    workers: int | None
    key: str
    scale: float
    rows: tuple[tuple[MethodReport, ScheduleRow], ...]


@dataclass(frozen=True)
class LayerColumns:
    """The table of layers: its phases, each row beside BP's, and the longest update in seconds."""

    phases: tuple[str, ...]
    rows: tuple[tuple[LayerRow, float], ...]
    longest: float
    totals: dict[str, int]
    parameters: int


def tone(ratio: float | None) -> str:
    """The CSS class of BP's value over the method's: better, worse, or (within 2 %) neither."""
    if ratio is None or 0.98 <= ratio <= 1.02:
        return ""
    return "good" if ratio > 1 else "bad"


def schedules(report: ReportData) -> Iterator[Schedules]:
    """The charts for every number of workers."""
    for i, p in enumerate(report.workers):
        rows = tuple((m, m.shown.schedules[i]) for m in report.methods)
        scale = max((row.seconds for _, row in rows), default=0.0)
        yield Schedules(p, worker_key(p), scale, rows)


def path_by_phase(step: StepReport) -> dict[str, float]:
    """Seconds of the critical path by phase, in the order in which the path meets them."""
    totals: dict[str, float] = {}
    for p in step.critical_path:
        totals[p.phase] = totals.get(p.phase, 0.0) + p.seconds
    return {phase: seconds for phase, seconds in totals.items() if seconds > 0}


def layer_columns(step: StepReport, bp: StepReport) -> LayerColumns:
    """The layers of a step, and the seconds of each one's update in BP's step (0 for none)."""
    before = {row.layer: row.update_seconds for row in bp.layers}
    flops = {p.phase: p.flops for p in step.phases}
    phases = tuple(p for p in flops if any(row.flops.get(p) for row in step.layers))
    return LayerColumns(
        phases,
        tuple((row, before.get(row.layer, 0.0)) for row in step.layers),
        max((row.update_seconds for row in (*step.layers, *bp.layers)), default=0.0),
        {p: flops[p] for p in phases},
        sum(row.parameters for row in step.layers),
    )


def map_rows(method: MethodReport) -> tuple[SegmentRow, ...]:
    """Feedback points and maps as the plan has them; without a plan, the maps alone."""
    if method.plan:
        return method.plan.rows
    return tuple(
        SegmentRow(f.layer, "", (), (), 0, "", f.kind, f.shape, f.bytes) for f in method.feedback
    )
