"""Chooses the summary cards of the HTML page: one figure each, and a sentence that explains it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grapefx.report.records import CalibrationRow, MethodReport, ReportData, worker_key
from grapefx.report.render import units
from grapefx.report.render.sentences import PAPER, epochs


@dataclass(frozen=True)
class Card:
    """One figure: its title, the figure and its unit, and what it means.

    ``ratio`` colours the figure: above 1 is good, below 1 is bad, None is neither. A card with
    ``workers`` is shown while that number of workers is chosen.
    """

    title: str
    figure: str
    unit: str
    text: str
    ratio: float | None = None
    workers: str | None = None


def cards(report: ReportData, method: MethodReport) -> Iterator[Card]:
    """The cards of one method, beside BP."""
    bp = report.methods[0]
    yield Card(
        "Critical path",
        units.ratio(method.span_ratio),
        "shorter" if method.span_ratio >= 1 else "of BP's",
        f"{units.flops(method.span_flops)} on the longest path, BP {units.flops(bp.span_flops)}. "
        f"With a whole layer as one task: {units.ratio(method.layer_span_ratio)}.",
        method.span_ratio,
    )
    yield Card(
        "Total work",
        units.ratio(1 / method.work_ratio if method.work_ratio else 1.0),
        "BP's",
        f"{units.flops(method.work_flops)} a step, BP {units.flops(bp.work_flops)}; weight "
        "gradients included.",
        method.work_ratio,
    )
    for p in report.workers:
        key = worker_key(p)
        yield Card(
            "Step on 1 worker" if p == 1 else f"Step on {units.workers(p)} workers",
            units.ratio(method.time_ratio[key]),
            "BP's speed",
            f"{units.seconds(method.seconds[key])} predicted, BP {units.seconds(bp.seconds[key])}.",
            method.time_ratio[key],
            key,
        )
    yield _updates(method, bp)
    if method.arithmetic_ratio is not None:
        yield Card(
            "Paper's arithmetic bound",
            units.ratio(method.arithmetic_ratio),
            "",
            f"(1 + beta) / (1 + alpha) with alpha {method.alpha:.2f}, beta {method.beta:.2f}; it "
            "leaves the method's weight gradients out.",
        )
    if method.feedback:
        yield _feedback(method, report.parameters)
    if method.calibration:
        yield _calibration(method.calibration)


def _updates(method: MethodReport, bp: MethodReport) -> Card:
    base = bp.shown.update_depth
    if method.independent:
        text = f"No layer's update waits for another's; BP's form a chain of {base}."
        return Card("Updates", "independent", "", text, 2.0)
    waits = len({w for s in method.steps for w in s.update_waits})
    return Card(
        "Updates",
        f"{method.shown.update_depth} in a row",
        "",
        f"{waits} layer updates wait for another layer's; BP's form a chain of {base}.",
        0.5 if method is not bp else None,
    )


def _feedback(method: MethodReport, parameters: int) -> Card:
    share = ""
    if parameters:
        part = method.feedback_bytes / (4 * parameters)
        share = f", {units.percent(part) if part < 1 else units.ratio(part)} of the weights"
    text = f"{len(method.feedback)} maps{share} (in float32)."
    return Card("Feedback maps", units.size(method.feedback_bytes), "", text)


def _calibration(c: CalibrationRow) -> Card:
    every = epochs(c.every)
    if c.overhead is None:
        text = f"One BP step every {every}; --steps-per-epoch gives its share."
        return Card("Calibration", units.flops(c.backward_flops), "", text)
    return Card(
        "Calibration",
        f"+{units.percent(c.overhead)}",
        "work",
        f"One BP step every {every} of {c.steps_per_epoch} steps ({PAPER} eq. 21).",
    )
