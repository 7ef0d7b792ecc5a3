"""pepita: error-driven input modulation (Dellaferrera & Kreiman 2022; GiorgiaD/PEPITA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.methods.base import Method, State, he_uniform, positive


@dataclass(frozen=True)
class PEPITA(Method):
    """Two forwards: the second on x - eps F^T with eps = softmax(y) - y*, same dropout masks.

    The gradient of W_l is (h_l - h'_l)^T h'_{l-1} / N with h'_0 the changed input, of the last
    layer eps^T h'_{L-1} / N (GrAPE 2024 and 2026 omit the sign and the last layer). F (n_0, C) is
    ``scale`` U(-sqrt(6 / n_0), sqrt(6 / n_0)), fixed. Needs class targets (``net.targets``) and a
    plain stack of Linear and Conv layers; the loss itself is not used, biases do not learn.
    """

    scale: float = 0.05

    name: ClassVar[str] = "pepita"
    reads: ClassVar[frozenset[str]] = frozenset({"target", "output"})
    mechanism: ClassVar[str] = "two_forwards"
    state_at: ClassVar[str] = "input"
    paper: ClassVar[dict[str, Any]] = {"calib_every": None}

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        f = he_uniform((shape[1], shape[0]), generator, dtype).t().contiguous()
        return {"F": self.scale * f}

    def second_input(
        self, state: State, x: Tensor, output: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        eps = torch.softmax(output, -1) - target
        return x - eps.to(state["F"].dtype) @ state["F"].t(), eps
