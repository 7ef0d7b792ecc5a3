"""The records of the report on a training; ``training`` makes them, ``render/`` shows them.

Cosines are those of ``net.alignment()``: "cos_gradient", between the feedback gradient and the true
one, is measured by calibrations; "cos_jacobian", between feedback map and Jacobian estimate, by
steps that learn from tangents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grapefx.report.records import ReportData

# what the time of a recorded step is spent on, in the order of a step
PARTS = {
    "forward": "forward graph of a step",
    "update": "update graph of a step",
    "calibration forward": "forward graph of a calibration",
    "calibration update": "update graph of a calibration",
    "else": "everything else: loss, optimizer, data, your loop, compiling",
}


@dataclass(frozen=True)
class StepRecord:
    """One completed training step.

    Attributes:
        step: its number, counted from 0 over checkpoints.
        epoch: as announced by ``set_epoch``; None where none was.
        kind: "update", "align", "mean_field", "start" or "calibration".
        cosines: "cos_jacobian" and "cos_gradient" of ``net.alignment()``, each by layer, as far as
            this step measured them.
        finite: whether the feedback maps could learn from it.
        seconds: of the "forward" and the "update" graph; empty unless it was recorded.
        at: ``time.perf_counter()`` at its end.
    """

    step: int
    epoch: int | None
    kind: str
    cosines: dict[str, dict[str, float]]
    finite: bool
    seconds: dict[str, float]
    at: float


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
class TrainingData:
    """What was measured in a training.

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

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        found = asdict(replace(self, explain=_unexplained))
        del found["explain"]
        return {"schema": 1, **found}

    def json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def _unexplained() -> ReportData:
    raise AssertionError("a report as plain data has no plan")
