"""lg-fg-a: local greedy activity-perturbed forward gradients (Ren et al. 2023; FDFA 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from grapefx.methods.base import Method, Rows, State, choose, he_uniform, positive
from grapefx.methods.fg_a import DERIVATIVES, directional
from grapefx.methods.optim import adam, adam_state


@dataclass(frozen=True)
class LGFGA(Method):
    """A local head M_l (C, n_l) gives each layer a loss of its own: softmax cross-entropy.

    With e_loc = (softmax(h_l M_l^T) - y*) / N, the cotangent is s_i v_{l,i}, s_i = e_loc,i . M_l
    v_{l,i}. Neither tangents nor gradients pass between layers. M_l learns by its exact local
    gradient e_loc^T h_l after the step's projection. A layer in front of the output layer takes the
    output layer and the true loss instead of a head: s_i = e_i . d_i, with d the tangent of its own
    noise alone (its M_l learns too, unused). The output layer uses e. Needs class targets
    (``net.targets``).

    optimizer, lr: of the heads, "adam" or "sgd". derivative: as in ``fg-a``, of each layer's loss.
    """

    optimizer: str = "adam"
    lr: float = 1e-4
    derivative: str = "sample"

    name: ClassVar[str] = "lg-fg-a"
    reads: ClassVar[frozenset[str]] = frozenset({"error", "target", "value", "noise", "tangent"})
    learns_from: ClassVar[frozenset[str]] = frozenset({"target", "value"})
    project_after_learn: ClassVar[bool] = False
    full_tangents: ClassVar[bool] = True
    tangents_from: ClassVar[str] = "last"
    paper: ClassVar[dict[str, Any]] = {"noise": "gaussian", "calib_every": None}

    def __post_init__(self) -> None:
        positive("lr", self.lr)
        choose("optimizer", self.optimizer, ("adam", "sgd"))
        choose("derivative", self.derivative, DERIVATIVES)

    def init(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> State:
        m = he_uniform(shape, generator, dtype)
        return {"B": m, **(adam_state(m) if self.optimizer == "adam" else {})}

    def cotangent(self, rows: Rows) -> Tensor:
        assert rows.noise is not None
        if rows.tangent is not None:
            return directional(rows, self.derivative) * rows.noise
        s = (local_error(rows) * (rows.noise @ rows.state["B"].t())).sum(1, keepdim=True)
        return (s.sum() if self.derivative == "batch" else s) * rows.noise

    def learn(self, rows: Rows) -> State:
        assert rows.value is not None
        gradient = local_error(rows).t() @ rows.value.to(rows.state["B"].dtype)
        if self.optimizer == "adam":
            return adam(rows.state, gradient, self.lr)
        return {"B": rows.state["B"] - self.lr * gradient}


def local_error(rows: Rows) -> Tensor:
    """e_loc (R, C): the gradient of the mean cross-entropy at the local head's output."""
    assert rows.value is not None and rows.target is not None
    head = rows.state["B"]
    y = rows.target.to(head.dtype)
    logits = rows.value.to(head.dtype) @ head.t()
    if rows.classes is not None:  # several positions of the output in one row
        y, logits = y.view(-1, rows.classes), logits.view(-1, rows.classes)
    # a row of zeros (no target there) has no loss
    error = (torch.softmax(logits, 1) * y.sum(1, keepdim=True) - y) / y.shape[0]
    return error.reshape(rows.target.shape)
