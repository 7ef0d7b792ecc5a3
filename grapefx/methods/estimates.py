"""What the methods that learn from tangents share: cosines of samples, averages of J^."""

from __future__ import annotations

import torch
from torch import Tensor

from grapefx.methods.base import Rows, State

EPS = 1e-12
AVERAGES = ("none", "ema", "cumulative")


def unit_rows(x: Tensor) -> Tensor:
    """Every row rescaled to norm 1; a zero row stays zero."""
    norms: Tensor = x.norm(dim=1, keepdim=True).clamp_min(EPS)
    return x / norms


def mean_direction(rows: Rows, like: Tensor, by_column: bool) -> Tensor:
    """Mean over samples of d_i v_i^T at unit norm (C, n): of each column, or of the whole matrix.

    A sample's J^ has rank 1: its column k is d_i v_ik, of which a columnwise cosine sees only
    sign(v_ik) d_i / |d_i| (the review of GrAPE 2024 takes cosines of samples, then averages).
    """
    assert rows.noise is not None and rows.tangent is not None
    v, d = rows.noise.to(like.dtype), unit_rows(rows.tangent.to(like.dtype))
    return d.t() @ (torch.sign(v) if by_column else unit_rows(v)) / v.shape[0]


def average_state(b: Tensor, average: str) -> State:
    """The state that ``averaged`` needs: J (C, n) and the count k, absent for "none"."""
    if average == "none":
        return {}
    return {"J": torch.zeros_like(b), "k": torch.zeros_like(b[:1, :1])}


def averaged(state: State, estimate: Tensor, average: str, rate: float) -> tuple[Tensor, State]:
    """The average of J^ over steps, and its state.

    "cumulative" is the mean of all steps (GrAPE 2024 section 2.3), "ema" is
    J <- (1 - rate) J + rate J^ without the bias of its start at 0.
    """
    if average == "none":
        return estimate, {}
    k = state["k"] + 1
    if average == "cumulative":
        j = state["J"] + (estimate - state["J"]) / k
        return j, {"J": j, "k": k}
    j = (1 - rate) * state["J"] + rate * estimate
    return j / (1 - (1 - rate) ** k), {"J": j, "k": k}
