"""What training steps measured: every calibration, and after ``record()`` every other step too.

Calibrations are rare, so keeping their few numbers costs nothing that could be noticed. Other steps
are kept only when asked for: their times have to be taken, on an accelerator by waiting for it.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grapefx.ir import Layer
from grapefx.report.training_records import StepRecord

KEPT = 10_000  # calibrations


@dataclass(frozen=True)
class _Entry:
    """A step as it was left: nothing has been read from an accelerator yet."""

    step: int
    epoch: int | None
    kind: str
    layers: tuple[str, ...]
    metrics: dict[str, Tensor]
    seconds: dict[str, float]
    at: float

    def read(self) -> StepRecord:
        cosines: dict[str, dict[str, float]] = {}
        for name in ("cos_jacobian", "cos_gradient"):
            if name in self.metrics:
                values = self.metrics[name].tolist()
                known = zip(self.layers, values, strict=True)
                cosines[name] = {layer: v for layer, v in known if v == v}
        finite = bool(self.metrics["finite"]) if "finite" in self.metrics else True
        return StepRecord(self.step, self.epoch, self.kind, cosines, finite, self.seconds, self.at)


@dataclass
class History:
    """The records of one net, oldest first; the oldest go when there are too many."""

    calibrations: deque[_Entry] = field(default_factory=lambda: deque(maxlen=KEPT))
    steps: deque[_Entry] | None = None

    def start(self, steps: int) -> None:
        """From now on keep every step, the last ``steps`` of them."""
        self.steps = deque(self.steps or (), maxlen=steps)

    def stop(self) -> None:
        """Keep no further steps but calibrations; those that were kept stay."""
        self.calibrations = deque(self._all(), maxlen=KEPT + len(self.steps or ()))
        self.steps = None

    def timed(
        self, seconds: dict[str, float], part: str, device: str
    ) -> contextlib.AbstractContextManager[None]:
        """Put the time of what runs inside under ``part``, if steps are being recorded."""
        if self.steps is None:
            return contextlib.nullcontext()
        return _timed(seconds, part, device)

    def note(
        self,
        step: int,
        epoch: int | None,
        kind: str,
        layers: Sequence[Layer],
        metrics: dict[str, Tensor],
        seconds: dict[str, float],
    ) -> None:
        """A step has been completed."""
        kept = self.calibrations if kind == "calibration" else self.steps
        if kept is not None:
            at = time.perf_counter()
            names = tuple([layer.name for layer in layers])
            kept.append(_Entry(step, epoch, kind, names, metrics, seconds, at))

    def records(self) -> tuple[StepRecord, ...]:
        """All that is kept, by step."""
        return tuple(entry.read() for entry in self._all())

    def _all(self) -> list[_Entry]:
        return sorted((*self.calibrations, *(self.steps or ())), key=lambda entry: entry.at)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str, device: str) -> Iterator[None]:
    _wait(device)
    start = time.perf_counter()
    yield
    _wait(device)
    seconds[part] = time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
