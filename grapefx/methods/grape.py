"""grape: gradient-aligned projected error (001)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError, nearest
from grapefx.methods.base import Method, Rows, State, unit_columns

_EPS = 1e-12
_STEPS = ("column", "mean")
_NORMS = ("fitted", "unit")


@dataclass(frozen=True)
class GrAPE(Method):
    """delta_l = e B_l; B_l ascends the columnwise cosine with J^_l, then columns are rescaled.

    001 eq. 5-6 and 17, with momentum (001 appendix E): m <- mu m + grad(1 - cos(B_k, J^_k)),
    B <- colnorm(B - eta m).

    eta, momentum: the feedback optimizer's step and mu.
    step: "column" steps each column by eta; "mean" divides by n_l (001 eq. 17 read literally, which
        hardly moves B).
    norm: "unit" rescales columns to norm 1 (001 eq. 6); "fitted" to the norms that the last
        calibration gave them, so that the magnitudes of a fitted B survive (docs/method.md).
    """

    eta: float = 0.01
    momentum: float = 0.9
    step: str = "column"
    norm: str = "fitted"

    name: ClassVar[str] = "grape"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"tangent"})
    refits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise OptionError(f"eta={self.eta!r} must be positive")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum={self.momentum!r} must be in [0, 1)")
        if self.step not in _STEPS:
            raise OptionError(f"step={self.step!r}.{nearest(self.step, _STEPS)}")
        if self.norm not in _NORMS:
            raise OptionError(f"norm={self.norm!r}.{nearest(self.norm, _NORMS)}")

    def init(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
    ) -> State:
        b = torch.empty(shape, device=generator.device, dtype=dtype)
        b = unit_columns(b.normal_(generator=generator))
        state = {"B": b, "m": torch.zeros_like(b)}
        if self.norm == "fitted":
            state["scale"] = torch.ones_like(b[:1])
        return state

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]

    def learn(self, rows: Rows) -> State:
        assert rows.estimate is not None
        state, j = rows.state, rows.estimate
        scale = state.get("scale")
        b = state["B"] if scale is None else state["B"] / scale  # columns of norm 1
        j_norm = (j * j).sum(0, keepdim=True).sqrt()
        # a dead unit has a zero column: its cosine is 0 and its gradient too
        j = torch.where(j_norm > _EPS, j / j_norm.clamp_min(_EPS), 0.0)
        grad = (b * j).sum(0, keepdim=True) * b - j
        if self.step == "mean":
            grad = grad / j.shape[1]
        m = self.momentum * state["m"] + grad
        b = b - self.eta * m
        b = b * (b * b).sum(0, keepdim=True).clamp_min(_EPS).rsqrt()
        if scale is None:
            return {"B": b, "m": m}
        return {"B": b * scale, "m": m, "scale": scale}

    def refit(self, state: State, fitted: Tensor) -> State:
        norms = fitted.norm(dim=0, keepdim=True).clamp_min(_EPS)
        # a column that the fit leaves at zero keeps its direction at no magnitude
        alive = norms > 10 * _EPS
        direction = torch.where(alive, fitted / norms, unit_columns(state["B"]))
        m = torch.zeros_like(state["m"])
        if self.norm == "unit":
            return {"B": direction, "m": m}
        return {"B": direction * norms, "m": m, "scale": norms}
