"""fdfa: forward direct feedback alignment (FDFA 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError
from grapefx.methods.base import Method, Rows, State, choose, positive
from grapefx.methods.optim import adam, adam_state, restarted


@dataclass(frozen=True)
class FDFA(Method):
    """delta_l = e B_l; B_l <- (1 - a) B_l + a J^_l (FDFA 2024 eq. 8).

    The paper's algorithm 1 misprints a sign. B starts at 0. ``optimizer``: "ema" steps by ``alpha``
    = a in (0, 1]; "adam" feeds the gradient B - J^ (FDFA 2024 eq. 10) to Adam with step ``lr``, as
    the paper's experiments do.
    """

    alpha: float = 0.01
    optimizer: str = "ema"
    lr: float = 1e-4

    name: ClassVar[str] = "fdfa"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"tangent"})
    refits: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {
        "optimizer": "adam", "noise": "gaussian", "calib_every": None,
    }  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha!r} must be in (0, 1]")
        positive("lr", self.lr)
        choose("optimizer", self.optimizer, ("ema", "adam"))

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        b = torch.zeros(shape, device=generator.device, dtype=dtype)
        return {"B": b} if self.optimizer == "ema" else {"B": b, **adam_state(b)}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]

    def learn(self, rows: Rows) -> State:
        assert rows.estimate is not None
        if self.optimizer == "adam":
            return adam(rows.state, rows.state["B"] - rows.estimate, self.lr)
        return {"B": rows.state["B"] + self.alpha * (rows.estimate - rows.state["B"])}

    def refit(self, state: State, fitted: Tensor) -> State:
        return {"B": fitted} if self.optimizer == "ema" else restarted(state, fitted)
