"""fa: feedback alignment (Lillicrap et al. 2016; GrAPE 2026 section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.methods.base import Method, State


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, *kernel), as torch.nn.init counts them."""
    kernel = 1
    for size in shape[2:]:
        kernel *= size
    return shape[1] * kernel, shape[0] * kernel


def xavier_uniform(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """U(-sqrt(6 / (fan_in + fan_out)), ...)."""
    bound = (6.0 / sum(fans(shape))) ** 0.5
    out = torch.empty(shape, device=generator.device, dtype=dtype)
    return out.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class FA(Method):
    """delta_{l-1} = (delta_l * sigma') M_l with M_l in place of W_l, fixed, Xavier-uniform.

    Sequential: the backward chain stays, the output layer's weight is replaced too. The gradient
    of W_l is computed from the incoming cotangent, as in backpropagation (BioTorch).
    """

    name: ClassVar[str] = "fa"
    reads: ClassVar[frozenset[str]] = frozenset({"next_delta"})
    mechanism: ClassVar[str] = "weights"
    state_at: ClassVar[str] = "weight"
    transparent: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {"calib_every": None}

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        return {"M": xavier_uniform(shape, generator, dtype)}

    def weight(self, state: State, w: Tensor, noise: Tensor | None) -> Tensor:
        return state["M"]
