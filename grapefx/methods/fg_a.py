"""fg-a: activity-perturbed forward gradients (Ren et al. 2023; FDFA 2024 algorithm 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from grapefx.methods.base import Method, Rows, choose

DERIVATIVES = ("sample", "batch")


@dataclass(frozen=True)
class FGA(Method):
    """delta_l = s_i v_{l,i} for each sample i, with s_i = e_i . d_i; unbiased, of high variance.

    v is the noise at h_l (FDFA 2024 perturbs after the activation, Ren et al. before) and d the
    tangent at the output. For a map with one row a token, s_i is summed over the sample's tokens.
    The output layer uses e itself (FDFA 2024 algorithm 3 prints noise there). No state.

    derivative: "sample" as above, or "batch": sum_i s_i for every sample, the one number that a JVP
    of the mean loss gives. Unbiased as well, with N times the variance.
    """

    derivative: str = "sample"

    name: ClassVar[str] = "fg-a"
    reads: ClassVar[frozenset[str]] = frozenset({"error", "tangent"})
    full_tangents: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {"noise": "gaussian", "calib_every": None}

    def __post_init__(self) -> None:
        choose("derivative", self.derivative, DERIVATIVES)

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.noise is not None
        return directional(rows, self.derivative) * rows.noise


def directional(rows: Rows, derivative: str) -> Tensor:
    """s_i = e_i . d_i, the loss's derivative along the sample's noise, for each row (R, 1)."""
    assert rows.error is not None and rows.tangent is not None
    s = (rows.error * rows.tangent).sum(1, keepdim=True)
    if derivative == "batch":
        return s.sum()
    if rows.tokens is not None:  # rows of one sample share its directional derivative
        s = s.view(-1, rows.tokens).sum(1, keepdim=True).expand(-1, rows.tokens).reshape(-1, 1)
    return s
