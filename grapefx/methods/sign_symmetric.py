"""usf, brsf, frsf: sign-symmetric feedback (Liao et al. 2016; Moskovitz et al. 2018; BioTorch).

All share the signs of the present weights with the backward pass and differ in the magnitudes. They
are sequential, and want batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.methods.base import Method, State
from grapefx.methods.fa import fans, xavier_uniform


@dataclass(frozen=True)
class USF(Method):
    """Uniform magnitudes: M_l = s sign(W_l), s = sqrt(2 / (fan_in + fan_out)). No state."""

    name: ClassVar[str] = "usf"
    reads: ClassVar[frozenset[str]] = frozenset({"next_delta"})
    mechanism: ClassVar[str] = "weights"
    state_at: ClassVar[str] = "weight"
    transparent: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {"calib_every": None}

    def weight(self, state: State, w: Tensor, noise: Tensor | None) -> Tensor:
        return torch.sign(w) * float((2.0 / sum(fans(tuple(w.shape)))) ** 0.5)


@dataclass(frozen=True)
class BRSF(USF):
    """Batchwise random magnitudes: M_l = |R_l| sign(W_l), R_l Xavier-uniform in every step."""

    name: ClassVar[str] = "brsf"
    reads: ClassVar[frozenset[str]] = frozenset({"next_delta", "noise"})

    def weight(self, state: State, w: Tensor, noise: Tensor | None) -> Tensor:
        assert noise is not None
        bound = float((6.0 / sum(fans(tuple(w.shape)))) ** 0.5)
        # erf(z / sqrt 2) of a normal z is uniform on (-1, 1)
        return torch.sign(w) * torch.erf(noise.abs() * 0.5**0.5) * bound


@dataclass(frozen=True)
class FRSF(USF):
    """Fixed random magnitudes: M_l = |R_l| sign(W_l), R_l Xavier-uniform, drawn once."""

    name: ClassVar[str] = "frsf"

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        return {"R": xavier_uniform(shape, generator, dtype).abs()}

    def weight(self, state: State, w: Tensor, noise: Tensor | None) -> Tensor:
        return torch.sign(w) * state["R"]
