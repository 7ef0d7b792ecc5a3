"""The papers' step-cost formulas: amortised calibration, and the arithmetic critical-path ratio."""

from __future__ import annotations

from dataclasses import dataclass

PAPER_BETA = 2.0  # GrAPE 2026, appendix D.1


def arithmetic_ratio(alpha: float, beta: float = PAPER_BETA) -> float:
    """BP's critical path over GrAPE's, (1 + beta) / (1 + alpha) (GrAPE 2026, appendix D.1).

    ``alpha`` is the tangent's FLOPs over the forward's, ``beta`` the backward's over the forward's.
    The formula leaves GrAPE's weight-gradient products out and keeps BP's in.
    """
    return (1 + beta) / (1 + alpha)


@dataclass(frozen=True)
class Calibration:
    """The cost of one full-backward step every ``every`` epochs of ``steps_per_epoch`` steps.

    ``per_step`` is the amortised cost of a step, calibration included, in the unit of the costs
    given; ``overhead`` the fraction that calibration adds; ``backward_share`` the share of full
    backward steps that remain, 1 / (T N_b).
    """

    every: float
    steps_per_epoch: int
    per_epoch: float
    per_step: float
    overhead: float
    backward_share: float


def amortised_calibration(
    step: float, backward_step: float, *, every: float, steps_per_epoch: int
) -> Calibration:
    """GrAPE 2026 eq. 21: per epoch N_b steps of the method, plus 1/T of one BP step.

    Raises:
        ValueError: ``every`` or ``steps_per_epoch`` is not positive.
    """
    if every <= 0 or steps_per_epoch <= 0:
        raise ValueError(
            "calibration needs every > 0 epochs and steps_per_epoch > 0, not "
            f"{every} and {steps_per_epoch}"
        )
    per_epoch = steps_per_epoch * step + backward_step / every
    added = backward_step / (every * steps_per_epoch)
    return Calibration(
        every,
        steps_per_epoch,
        per_epoch,
        step + added,
        added / step if step else 0.0,
        1 / (every * steps_per_epoch),
    )


def batch_as_good(left: float, rows: float) -> float:
    """The part of a batch whose true gradient is as noisy as feedback with unbiased exact rows.

    ``rows``: r, the part of the batch that is exact, at weight 1 / r. ``left``: the part of the
    variance of a sample's gradient that the maps leave unexplained, 0 where they give it exactly.
    1 / (1 + left (1 - r) / r); docs/theory.md has the proof.

    Raises:
        ValueError: ``rows`` is not in (0, 1], or ``left`` is negative.
    """
    if not 0 < rows <= 1 or left < 0:
        raise ValueError(f"rows must be in (0, 1] and left at least 0, not {rows} and {left}")
    return 1 / (1 + left * (1 - rows) / rows)
