"""dkp: direct Kolen-Pollack (Webster et al. 2021; FDFA 2024 section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError
from grapefx.methods.base import Method, Rows, State, choose, he_uniform, positive
from grapefx.methods.optim import adam, adam_state, restarted


@dataclass(frozen=True)
class DKP(Method):
    """delta_l = e B_l; the gradient of B_l is e^T h_l, as if it were the output layer's weight.

    B learns by Adam (``lr``) after the step's projection. ``decay`` is L2 on B and on the weights W
    behind each feedback point: what is not reinforced on both sides fades. ``init_b``: "he" (He
    uniform; webstah/dkp-gist) or "zero" (FDFA 2024's code).
    """

    lr: float = 1e-4
    decay: float = 1e-6
    init_b: str = "he"

    name: ClassVar[str] = "dkp"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"error", "value"})
    refits: ClassVar[bool] = True
    project_after_learn: ClassVar[bool] = False
    paper: ClassVar[dict[str, Any]] = {"calib_every": None}

    def __post_init__(self) -> None:
        positive("lr", self.lr)
        if self.decay < 0:
            raise OptionError(f"decay={self.decay!r} must not be negative")
        choose("init_b", self.init_b, ("he", "zero"))

    @property
    def weight_decay(self) -> float:
        return self.decay

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        b = he_uniform(shape, generator, dtype)
        b = torch.zeros_like(b) if self.init_b == "zero" else b
        return {"B": b, **adam_state(b)}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]

    def learn(self, rows: Rows) -> State:
        assert rows.error is not None and rows.value is not None
        dtype = rows.state["B"].dtype
        gradient = rows.error.to(dtype).t() @ rows.value.to(dtype)
        return adam(rows.state, gradient, self.lr, self.decay)

    def refit(self, state: State, fitted: Tensor) -> State:
        return restarted(state, fitted)
