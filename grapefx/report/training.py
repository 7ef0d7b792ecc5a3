"""The report on a training: what the steps measured, as plain records.

``net.report()`` makes it. Cosines are those of ``net.alignment()``: "cos_gradient", between the
feedback gradient and the true one, is measured by calibrations; "cos_jacobian", between feedback map
and Jacobian estimate, by steps that learn from tangents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grapefx.errors import InputError
from grapefx.report.records import ReportData
from grapefx.runtime.history import StepRecord

# what the time of a recorded step is spent on, in the order of a step
PARTS = {
    "forward": "forward graph of a step",
    "update": "update graph of a step",
    "calibration forward": "forward graph of a calibration",
    "calibration update": "update graph of a calibration",
    "else": "everything else: loss, optimizer, data, your loop, compiling",
}


@dataclass(frozen=True)
class Curve:
    """One cosine of one layer: pairs of step and value."""

    layer: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Found:
    """What one calibration found before it changed anything: cosines of the gradients by layer."""

    step: int
    epoch: int | None
    cosines: dict[str, float]
    finite: bool

    @property
    def mean(self) -> float | None:
        """Over the layers; None where nothing was learned yet that could be compared."""
        return sum(self.cosines.values()) / len(self.cosines) if self.cosines else None

    @property
    def lowest(self) -> tuple[str, float] | None:
        """The layer whose feedback gradient was farthest from the true one."""
        return min(self.cosines.items(), key=lambda item: item[1]) if self.cosines else None


@dataclass(frozen=True)
class Memory:
    """One tensor of the learning state."""

    name: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class TrainingReport:
    """What ``net.report()`` returns; ``print`` it, or open :meth:`html`.

    Attributes:
        model, method: the model's class and the method's name.
        steps, epoch: completed training steps, and the epoch last announced.
        recorded: how many steps other than calibrations were kept (``net.record()``).
        curves: by cosine, then a curve for each layer, first layer first.
        calibrations: those that were kept; ``calibration_count`` counts over checkpoints too.
        seconds: of the recorded steps, by ``PARTS``; empty without ``net.record()``.
        compile_seconds: what compiling took so far (part of "else" where it fell into it).
        memory: the learning state, largest first.
        skipped: steps whose feedback update was skipped because a value was not finite.
    """

    model: str
    method: str
    steps: int
    epoch: int | None
    recorded: int
    curves: dict[str, tuple[Curve, ...]]
    calibrations: tuple[Found, ...]
    calibration_count: int
    seconds: dict[str, float]
    compile_seconds: float
    memory: tuple[Memory, ...]
    skipped: int
    explain: Callable[[], ReportData] = field(repr=False, compare=False)

    @property
    def memory_bytes(self) -> int:
        """Of the whole learning state."""
        return sum(m.bytes for m in self.memory)

    def text(self) -> str:
        """For a terminal, at most 100 columns wide."""
        from grapefx.report.render.training import render_text

        return render_text(self)

    def html(self) -> str:
        """One self-contained HTML page."""
        from grapefx.report.render.training import render_html  # jinja2 is loaded for pages only

        return render_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        found = asdict(replace(self, explain=_unexplained))
        del found["explain"]
        return {"schema": 1, **found}

    def json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def _repr_html_(self) -> str:
        from grapefx.report.render.html import framed

        return framed(self.html())

    def __str__(self) -> str:
        return self.text()


def _unexplained() -> ReportData:
    raise AssertionError("a report as plain data has no plan")


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
            "  for what will happen in one: net.explain() after a call, or grapefx.inspect(model, x)"
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


def _curves(
    history: Sequence[StepRecord], kind: str, layers: Sequence[str]
) -> tuple[Curve, ...]:
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
