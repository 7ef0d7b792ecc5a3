"""dfa: direct feedback alignment (Nokland 2016; GrAPE 2026 eq. 2, FDFA 2024 eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError, nearest
from grapefx.methods.base import Method, Rows, State, he_bound, he_uniform, unit_columns


@dataclass(frozen=True)
class DFA(Method):
    """delta_l = e B_l with B_l fixed: He-uniform (``init_b="he"``) or unit columns ("unit")."""

    init_b: str = "he"

    name: ClassVar[str] = "dfa"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    refits: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {"calib_every": None}

    def __post_init__(self) -> None:
        if self.init_b not in ("he", "unit"):
            raise OptionError(f"init_b={self.init_b!r}.{nearest(self.init_b, ('he', 'unit'))}")

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        b = he_uniform(shape, generator, dtype)
        return {"B": unit_columns(b) if self.init_b == "unit" else b}

    def from_uniform(self, u: Tensor) -> State:
        return {"B": unit_columns(u) if self.init_b == "unit" else u * he_bound(u.shape[1])}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]
