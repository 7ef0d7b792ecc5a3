"""Adam for feedback maps, as state tensors that a method carries beside its map."""

from __future__ import annotations

import torch
from torch import Tensor

from grapefx.methods.base import State

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def adam_state(b: Tensor) -> State:
    """Moments m, v like ``b`` and the number of steps t (one element), all zero."""
    return {"m": torch.zeros_like(b), "v": torch.zeros_like(b), "t": torch.zeros_like(b[:1, :1])}


def adam(state: State, gradient: Tensor, lr: float, decay: float = 0.0) -> State:
    """One step of ``state["B"]`` (Kingma & Ba 2015); ``decay`` is L2, as in torch.optim.Adam."""
    b = state["B"]
    if decay:
        gradient = gradient + decay * b
    t = state["t"] + 1
    m = BETA1 * state["m"] + (1 - BETA1) * gradient
    v = BETA2 * state["v"] + (1 - BETA2) * gradient * gradient
    step = (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
    return {"B": b - lr * step, "m": m, "v": v, "t": t}


def restarted(state: State, fitted: Tensor) -> State:
    """A fitted map with its optimizer at rest: the old moments belong to the old map."""
    return {"B": fitted, **{k: torch.zeros_like(state[k]) for k in ("m", "v", "t")}}
