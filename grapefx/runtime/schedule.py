"""When a training step is a calibration step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from grapefx.errors import tell


@dataclass
class CalibrationSchedule:
    """Counts steps and epochs; ``due`` asks, ``done`` tells that a step has been completed.

    A step counts when its backward has finished, so a forward alone changes nothing. In units of
    epochs the first step of every ``every``-th epoch calibrates; a shuffled loader makes it a
    uniform draw (GrAPE 2026 section 3.4). ``at_start`` adds step 0.

    ``every="auto"``: a calibration that finds the mean cosine of the gradients under ``threshold``
    halves the gap to the next one, any other doubles it; no gap is under 1 / ``budget`` steps.
    ``every="geometric"``: step 0, and then gaps of 1, ``growth``, ``growth``^2, ... steps, of
    ``longest`` at most.
    """

    every: int | str | None  # a number, "auto" or "geometric"
    unit: str
    at_start: bool
    steps_per_epoch: int | None
    threshold: float = 0.0
    budget: float = 1.0
    growth: float = 1.1
    longest: int | None = None
    step: int = 0
    epoch: int | None = None
    calibrated_at: int = -1  # the last epoch (or step) that was calibrated
    calibrations: int = 0
    gap: int = 0  # "auto": steps between the last calibration and the next
    due_at: float = 0.0  # "geometric": the step from which the next calibration is due
    stride: float = 1.0  # and the gap behind it
    forced: int = 0
    told: bool = False

    def set_epoch(self, epoch: int) -> None:
        """Announce the epoch that begins."""
        self.epoch = int(epoch)

    def now(self) -> int:
        """The current epoch, or the step when the unit is steps."""
        if self.unit == "step" or self.every in ("auto", "geometric"):
            return self.step
        if self.epoch is not None:
            return self.epoch
        return self.step // self.steps_per_epoch if self.steps_per_epoch else 0

    def due(self) -> bool:
        """Whether the step that begins now is a calibration step."""
        if self.forced:
            return True
        now = self.now()
        if self.every == "geometric":
            return now >= int(self.due_at) and (self.at_start or self.step > 0)
        if self.at_start and self.calibrated_at < 0:
            return True
        if self.every is None or self.step == 0:
            return False
        if self.every == "auto":
            return now >= max(self.calibrated_at, 0) + max(self.gap, self._least())
        assert isinstance(self.every, int)
        return now > 0 and now % self.every == 0 and self.calibrated_at != now

    def done(self, calibrated: bool, cosine: float = math.nan) -> None:
        """A step's backward has finished; ``cosine``: of the gradients, if it calibrated."""
        if calibrated:
            if self.calibrated_at < 0 or cosine != cosine:  # nothing learned to judge yet
                self.gap = max(self.gap, self._least())
            elif cosine < self.threshold:
                self.gap = max(self.gap // 2, self._least())
            else:
                self.gap *= 2
            self.calibrated_at = self.now()
            self.calibrations += 1
            while int(self.due_at) <= self.step:
                self.due_at += self.stride
                most = self.longest if self.longest is not None else math.inf
                self.stride = min(self.stride * self.growth, most)
        self.step += 1

    def _least(self) -> int:
        return math.ceil(1 / self.budget)

    def tell_once(self) -> None:
        """Say that epochs are not announced, if calibration depends on them."""
        if self.told or self.every in (None, "auto", "geometric") or self.unit == "step":
            return
        if self.epoch is None and self.steps_per_epoch is None:
            start = "only at step 0" if self.at_start else "never"
            tell(
                f"calib_every={self.every} counts epochs, but none was announced: the network is "
                f"calibrated {start}. Call net.set_epoch(epoch) before each epoch, or pass "
                "steps_per_epoch= or calib_unit='step'."
            )
        self.told = True

    def state(self) -> dict[str, Any]:
        """Counters, for a checkpoint."""
        keep = ("step", "epoch", "calibrated_at", "calibrations", "gap", "due_at", "stride")
        return {k: v for k, v in asdict(self).items() if k in keep}

    def load(self, state: dict[str, Any]) -> None:
        """Counters from a checkpoint."""
        self.step, self.epoch = state["step"], state["epoch"]
        self.calibrated_at, self.gap = state["calibrated_at"], state["gap"]
        self.calibrations = state["calibrations"]
        self.due_at, self.stride = state.get("due_at", 0.0), state.get("stride", 1.0)
