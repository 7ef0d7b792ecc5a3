"""The report on a training: what ``net.report()`` returns, and how it is made of what was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grapefx.errors import InputError
from grapefx.report.records import ReportData
from grapefx.report.training_records import (
    PARTS,
    Curve,
    Found,
    Memory,
    StepRecord,
    TrainingData,
)


@dataclass(frozen=True)
class TrainingReport(TrainingData):
    """What ``net.report()`` returns.

    ``print`` it, or open :meth:`html`; a notebook shows the page.
    """

    def text(self) -> str:
        """For a terminal, at most 100 columns wide."""
        from grapefx.report.render.training import render_text

        return render_text(self)

    def html(self) -> str:
        """One self-contained HTML page."""
        from grapefx.report.render.training import render_html  # jinja2 is loaded for pages only

        return render_html(self)

    def _repr_html_(self) -> str:
        from grapefx.report.render.html import framed

        return framed(self.html())

    def __str__(self) -> str:
        return self.text()


def training_report(
    *,
    model: str,
    method: str,
    steps: int,
    epoch: int | None,
    history: Sequence[StepRecord],
    layers: Sequence[str],
    calibration_count: int,
    compile_seconds: float,
    state: Mapping[str, Any],
    skipped: int,
    explain: Callable[[], ReportData],
) -> TrainingReport:
    """The report on what was kept; ``layers`` in the order in which they are shown.

    Raises ``InputError`` if no training step was completed.
    """
    if not steps:
        raise InputError(
            "nothing to report yet: no training step was completed\n"
            "  for what one will do: net.explain() after a call, or grapefx.inspect(model, x)"
        )
    calibrations = [r for r in history if r.kind == "calibration"]
    memory = [
        Memory(name, tuple(t.shape), t.numel() * t.element_size()) for name, t in state.items()
    ]
    return TrainingReport(
        model,
        method,
        steps,
        epoch,
        len(history) - len(calibrations),
        {kind: curves for kind in ("cos_gradient", "cos_jacobian")
         if (curves := _curves(history, kind, layers))},
        tuple(Found(r.step, r.epoch, r.cosines.get("cos_gradient", {}), r.finite)
              for r in calibrations),
        calibration_count,
        _seconds(history),
        compile_seconds,
        tuple(sorted(memory, key=lambda m: -m.bytes)),
        skipped,
        explain,
    )  # fmt: skip


def _curves(history: Sequence[StepRecord], kind: str, layers: Sequence[str]) -> tuple[Curve, ...]:
    found: dict[str, list[tuple[int, float]]] = {layer: [] for layer in layers}
    for record in history:
        for layer, value in record.cosines.get(kind, {}).items():
            found.setdefault(layer, []).append((record.step, value))
    return tuple(Curve(layer, tuple(points)) for layer, points in found.items() if points)


def _seconds(history: Sequence[StepRecord]) -> dict[str, float]:
    timed = [r for r in history if r.seconds]
    if not timed:
        return {}
    found = dict.fromkeys(PARTS, 0.0)
    for record in timed:
        before = "calibration " if record.kind == "calibration" else ""
        for part, seconds in record.seconds.items():
            found[before + part] += seconds
    # from the first step's beginning, as far as it was timed
    wall = timed[-1].at - timed[0].at + sum(timed[0].seconds.values())
    found["else"] = max(0.0, wall - sum(found.values()))
    return {part: seconds for part, seconds in found.items() if seconds}
