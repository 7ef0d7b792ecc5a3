"""bp: backpropagation. The incoming gradient passes every feedback point unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from grapefx.methods.base import Method, Rows


@dataclass(frozen=True)
class BP(Method):
    """delta_l = J_l^T e, by the chain rule (GrAPE 2026 eq. 1). Sequential; no feedback map."""

    name: ClassVar[str] = "bp"
    reads: ClassVar[frozenset[str]] = frozenset({"next_delta"})
    transparent: ClassVar[bool] = True

    def cotangent(self, rows: Rows) -> Tensor:
        """The gradient that arrives."""
        assert rows.incoming is not None
        return rows.incoming
