"""grape-2024: the first form of GrAPE (GrAPE 2024 eq. 6, as its authors clarified it in review)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.errors import OptionError
from grapefx.methods.base import Method, Rows, State, choose, positive
from grapefx.methods.estimates import EPS, average_state, averaged, mean_direction


@dataclass(frozen=True)
class GrAPE2024(Method):
    """delta_l = e B_l; columns b_k shrink by how badly they align, then |B|_F is restored.

    With c_k the cosine of b_k and column k of J^ (of each sample, then averaged) and g~ the
    cumulative average of J^ scaled to B's norm:

    rule: "shrink" is b_k <- (1 - eta (1 - c_k)) b_k + noise (GrAPE 2024 eq. 6); "alternative-1" is
        B <- B - eta (1 - c) B + eta c g~; "alternative-2" is B <- (1 - eta) B + eta g~ (GrAPE 2024,
        review).
    eta: the step (vanilla SGD).
    jitter: standard deviation of the small noise, relative to B's entries. It is a fixed draw,
        shifted by one entry in each step, so that a run can be resumed.
    order: "cosine-then-mean" (GrAPE 2024, review) or "mean-then-cosine" (c_k from the average of
        J^).

    The norm that is restored is the whole matrix's: a columnwise norm would undo the rule.
    """

    eta: float = 1e-3
    rule: str = "shrink"
    jitter: float = 1e-3
    order: str = "cosine-then-mean"

    name: ClassVar[str] = "grape-2024"
    reads: ClassVar[frozenset[str]] = frozenset({"error"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"tangent"})
    refits: ClassVar[bool] = True
    paper: ClassVar[dict[str, Any]] = {"noise": "gaussian", "calib_every": None}

    def __post_init__(self) -> None:
        positive("eta", self.eta)
        if self.jitter < 0:
            raise OptionError(f"jitter={self.jitter!r} must not be negative")
        choose("rule", self.rule, ("shrink", "alternative-1", "alternative-2"))
        choose("order", self.order, ("mean-then-cosine", "cosine-then-mean"))

    @property
    def per_sample(self) -> bool:  # type: ignore[override]
        return self.order == "cosine-then-mean"

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        b = torch.empty(shape, device=generator.device, dtype=dtype).normal_(generator=generator)
        z = torch.empty_like(b).normal_(generator=generator)
        return {"B": b, "z": z, **average_state(b, "cumulative")}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.error is not None
        return rows.error @ rows.state["B"]

    def learn(self, rows: Rows) -> State:
        assert rows.estimate is not None
        state, b = rows.state, rows.state["B"]
        j, average = averaged(state, rows.estimate, "cumulative", 0.0)
        size = b.norm()
        if self.per_sample:
            u = mean_direction(rows, b, by_column=True)
        else:
            u = j / j.norm(dim=0, keepdim=True).clamp_min(EPS)
        c = (b * u).sum(0, keepdim=True) / b.norm(dim=0, keepdim=True).clamp_min(EPS)
        g = j * (size / j.norm().clamp_min(EPS))
        z = torch.roll(state["z"], 1)
        if self.rule == "shrink":
            b = (1 - self.eta * (1 - c)) * b + z * (self.jitter * size / b.numel() ** 0.5)
        elif self.rule == "alternative-1":
            b = b - self.eta * (1 - c) * b + self.eta * c * g
        else:
            b = (1 - self.eta) * b + self.eta * g
        b = b * (size / b.norm().clamp_min(EPS))
        return {"B": b, "z": z, **average}
