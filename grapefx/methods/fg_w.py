"""fg-w: weight-perturbed forward gradients (Baydin et al. 2022; FDFA 2024 algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from grapefx.methods.base import Method


@dataclass(frozen=True)
class FGW(Method):
    """g(W) = s V with V ~ N(0, I) for every parameter and s = sum_i e_i . d_i (FDFA 2024 eq. 2-3).

    d is the tangent at the output along V: s is the directional derivative of the loss, one number
    a batch, so g is unbiased on any differentiable model and its variance grows with the number of
    parameters. No feedback points, no backward pass, no state; every layer, the output layer
    included, learns from s alone.
    """

    name: ClassVar[str] = "fg-w"
    reads: ClassVar[frozenset[str]] = frozenset({"error", "tangent"})
    mechanism: ClassVar[str] = "parameters"
    full_tangents: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {"calib_every": None}
