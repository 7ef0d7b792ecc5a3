"""drtp: direct random target projection (Frenkel et al. 2021; GrAPE 2026 section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.methods.base import Method, Rows, State, he_bound, he_uniform


@dataclass(frozen=True)
class DRTP(Method):
    """delta_l = y* B_l with one-hot targets y*; B_l fixed, He-uniform. The output layer uses e.

    No layer waits for the forward pass to end. Needs class targets: ``net.targets(y)``.

    sign_error: sDFA of the same paper, sign(softmax(y) - y*) B_l.
    mean: divide by the number of rows, as a mean loss does, so that hidden layers learn at the
        output layer's pace; False leaves the sum (the authors' code).
    """

    sign_error: bool = False
    mean: bool = True

    name: ClassVar[str] = "drtp"
    reads: ClassVar[frozenset[str]] = frozenset({"target"})
    paper: ClassVar[dict[str, Any]] = {"mean": False, "calib_every": None}

    def __post_init__(self) -> None:
        if self.sign_error:  # what is read depends on the option
            object.__setattr__(self, "reads", frozenset({"target", "output"}))

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        return {"B": he_uniform(shape, generator, dtype)}

    def from_uniform(self, u: Tensor) -> State:
        return {"B": u * he_bound(u.shape[1])}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.target is not None
        signal = rows.target
        if self.sign_error:
            assert rows.output is not None
            signal = torch.sign(torch.softmax(rows.output, 1) - signal)
        if self.mean:
            signal = signal / rows.target.shape[0]
        return signal @ rows.state["B"]
