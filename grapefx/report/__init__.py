"""The inspection report: what waits for what in a training step, and what that costs."""

from grapefx.report.build import LayerInfo, MethodGraphs, build_report
from grapefx.report.model import (
    Bar,
    FeedbackRow,
    LayerGraph,
    LayerNode,
    LayerRow,
    MethodReport,
    PathStep,
    PhaseRow,
    Report,
    ScheduleRow,
    StepReport,
)

__all__ = [
    "Bar",
    "FeedbackRow",
    "LayerGraph",
    "LayerInfo",
    "LayerNode",
    "LayerRow",
    "MethodGraphs",
    "MethodReport",
    "PathStep",
    "PhaseRow",
    "Report",
    "ScheduleRow",
    "StepReport",
    "build_report",
]
