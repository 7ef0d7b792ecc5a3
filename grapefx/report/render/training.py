"""Renders the report on a training, as text and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from grapefx.report.render import units
from grapefx.report.render.chart import chart, thinned
from grapefx.report.render.html import templates
from grapefx.report.render.text import table
from grapefx.report.training_records import PARTS, Curve, TrainingData

MEANING = {
    "cos_gradient": "feedback gradient against true gradient, at calibrations",
    "cos_jacobian": "feedback map against Jacobian estimate",
}
BARS = " ▁▂▃▄▅▆▇█"
SPARK = 24
MAX_LAYERS = 32
WIDTH = 100


def render_text(report: TrainingData) -> str:
    """What a terminal shows, at most 100 columns wide."""
    r = report
    epoch = "" if r.epoch is None else f" (epoch {r.epoch})"
    parts = [
        f"{r.model} trained by {r.method}: {r.steps:,} steps{epoch}, {r.calibration_count} "
        f"calibrations, {r.skipped} skipped updates, {units.size(r.memory_bytes)} of feedback"
    ]
    for kind, curves in r.curves.items():
        rows = [_row(curve) for curve in curves[:MAX_LAYERS]]
        more = len(curves) - MAX_LAYERS
        note = [f"  ... and {more} more layers"] if more > 0 else []
        head = f"{kind}: {MEANING[kind]}"
        columns = ("layer", "over time", "first", "last", "lowest")
        parts.append("\n".join([head, table(columns, rows), *note]))
    if r.seconds:
        whole = sum(r.seconds.values())
        shares = [
            (PARTS[p], units.seconds(s), units.percent(s / whole)) for p, s in r.seconds.items()
        ]
        parts.append("time\n" + table(("", "spent", "share"), shares))
    return "\n\n".join(parts) + "\n"


def _row(curve: Curve) -> Sequence[str]:
    values = [v for _, v in curve.points]
    return (
        units.elide(curve.layer, 28),
        sparkline(values).ljust(SPARK),
        f"{values[0]:.2f}",
        f"{values[-1]:.2f}",
        f"{min(values):.2f}",
    )


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """Values from 0 (or less) to 1 as blocks, the mean of as many as a block stands for."""
    size = -(-len(values) // width)
    groups = [values[k : k + size] for k in range(0, len(values), size)]
    means = [sum(group) / len(group) for group in groups]
    return "".join(BARS[round(max(0.0, min(1.0, m)) * (len(BARS) - 1))] for m in means)


def render_html(report: TrainingData) -> str:
    """A whole HTML document, light and dark by the reader's setting."""
    method = report.explain().methods[-1]
    phases: dict[str, float] = {}
    for step in method.steps:
        for row in step.phases:
            phases[row.phase] = phases.get(row.phase, 0.0) + step.share * row.seconds
    charts = {
        kind: chart([(curve.layer, thinned(curve.points)) for curve in curves])
        for kind, curves in report.curves.items()
    }
    return (
        templates()
        .get_template("training.html.j2")
        .render(
            r=report,
            charts=charts,
            meaning=MEANING,
            parts=PARTS,
            phases={p: s for p, s in phases.items() if s},
            whole=sum(report.seconds.values()),
            modelled=sum(phases.values()),
        )
    )
