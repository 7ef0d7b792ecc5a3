"""The inspection report: what waits for what in a training step, and what that costs.

``records`` are the data, ``build``, ``step`` and ``from_plan`` make them from step graphs,
``render/`` shows them, ``inspect`` and ``cli`` are what users call. Imports point that way only.
"""

from grapefx.report.build import LayerInfo, MethodGraphs, build_report
from grapefx.report.records import (
    Bar,
    FeedbackRow,
    LayerGraph,
    LayerNode,
    LayerRow,
    MethodReport,
    PathStep,
    PhaseRow,
    ScheduleRow,
    StepReport,
)
from grapefx.report.report import Report

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
