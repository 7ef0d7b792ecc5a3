"""fdfa: forward direct feedback alignment (003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError
from grapefx.methods.base import Method, Rows, State


@dataclass(frozen=True)
class FDFA(Method):
    """delta_l = e B_l; B_l <- (1 - a) B_l + a J^_l (003 eq. 8; algorithm 1 line 22 has a sign error).

    B starts at 0. ``alpha`` is a in (0, 1].
    """

    alpha: float = 0.01

    name: ClassVar[str] = "fdfa"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"tangent"})
    refits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise OptionError(f"alpha={self.alpha!r} must be in (0, 1]")

    def init(
        self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
    ) -> State:
        return {"B": torch.zeros(shape, device=generator.device, dtype=dtype)}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]

    def learn(self, rows: Rows) -> State:
        assert rows.estimate is not None
        return {"B": rows.state["B"] + self.alpha * (rows.estimate - rows.state["B"])}
