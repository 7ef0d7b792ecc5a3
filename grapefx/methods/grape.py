"""grape: gradient-aligned projected error (GrAPE 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError
from grapefx.methods.base import Method, Rows, State, choose, positive, unit_columns
from grapefx.methods.estimates import (
    AVERAGES,
    EPS,
    average_state,
    averaged,
    mean_direction,
)


@dataclass(frozen=True)
class GrAPE(Method):
    """delta_l = e B_l; B_l ascends its cosine with J^_l, then columns are rescaled.

    GrAPE 2026 eq. 5-6 and 17, with momentum (its appendix E):
    m <- mu m + grad(1 - cos(B_k, J^_k)), B <- colnorm(B - eta m). Equations below are its as well.

    eta, momentum: the feedback optimizer's step and mu.
    step: "column" steps each column by eta; "mean" divides by n_l (eq. 17 read literally, which
        hardly moves B).
    norm: "unit" rescales columns to norm 1 (eq. 6); "fitted" to the norms that the last
        calibration gave them, so that the magnitudes of a fitted B survive (docs/method.md).
    order: "mean-then-cosine" averages J^ over the batch first (eq. 5); "cosine-then-mean" takes
        each sample's cosine (GrAPE 2024, review).
    cosine: "column" (eq. 17) or "frobenius" (eq. 3: one cosine for the whole matrix).
    average: of J^ over steps: "none", "ema" (``rate``) or "cumulative" (GrAPE 2024).
    """

    eta: float = 0.01
    momentum: float = 0.9
    step: str = "column"
    norm: str = "fitted"
    order: str = "mean-then-cosine"
    cosine: str = "column"
    average: str = "none"
    rate: float = 0.1

    name: ClassVar[str] = "grape"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"tangent"})
    refits: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {
        "step": "mean",
        "norm": "unit",
        "noise": "gaussian",
        "calib_init": False,
        "calib_refit": "weights",
        "calib_update": "sgd",
    }

    def __post_init__(self) -> None:
        positive("eta", self.eta)
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum={self.momentum!r} must be in [0, 1)")
        if not 0 < self.rate <= 1:
            raise OptionError(f"rate={self.rate!r} must be in (0, 1]")
        choose("step", self.step, ("column", "mean"))
        choose("norm", self.norm, ("fitted", "unit"))
        choose("order", self.order, ("mean-then-cosine", "cosine-then-mean"))
        choose("cosine", self.cosine, ("column", "frobenius"))
        choose("average", self.average, AVERAGES)

    @property
    def per_sample(self) -> bool:  # type: ignore[override]
        return self.order == "cosine-then-mean"

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        b = torch.empty(shape, device=generator.device, dtype=dtype)
        b = unit_columns(b.normal_(generator=generator))
        state = {"B": b, "m": torch.zeros_like(b)}
        if self.norm == "fitted":
            state["scale"] = torch.ones_like(b[:1])
        return {**state, **average_state(b, self.average)}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]

    def learn(self, rows: Rows) -> State:
        assert rows.estimate is not None
        state, scale = rows.state, rows.state.get("scale")
        b = state["B"] if scale is None else state["B"] / scale  # columns of norm 1
        columns = self.cosine == "column"
        j = mean_direction(rows, b, columns) if self.per_sample else rows.estimate
        j, average = averaged(state, j, self.average, self.rate)
        if not self.per_sample:
            j_norm = (j * j).sum(0 if columns else (0, 1), keepdim=True).sqrt()
            # a dead unit has a zero column: its cosine is 0 and its gradient too
            j = torch.where(j_norm > EPS, j / j_norm.clamp_min(EPS), 0.0)
        if columns:
            grad = (b * j).sum(0, keepdim=True) * b - j
        else:  # |B|_F is sqrt(n); times n, to be the size of n columns' gradients
            n = j.shape[1]
            grad = (b * j).sum() * n**-0.5 * b - j * n**0.5
        if self.step == "mean":
            grad = grad / j.shape[1]
        m = self.momentum * state["m"] + grad
        b = b - self.eta * m
        b = b * (b * b).sum(0, keepdim=True).clamp_min(EPS).rsqrt()
        if scale is None:
            return {"B": b, "m": m, **average}
        return {"B": b * scale, "m": m, "scale": scale, **average}

    def refit(self, state: State, fitted: Tensor) -> State:
        norms = fitted.norm(dim=0, keepdim=True).clamp_min(EPS)
        # a column that the fit leaves at zero keeps its direction at no magnitude
        alive = norms > 10 * EPS
        direction = torch.where(alive, fitted / norms, unit_columns(state["B"]))
        new = {**state, "m": torch.zeros_like(state["m"])}
        if self.norm == "unit":
            return {**new, "B": direction}
        return {**new, "B": direction * norms, "scale": norms}
