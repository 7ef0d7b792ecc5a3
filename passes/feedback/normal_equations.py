"""The ridge regression of a calibration, and its memory of earlier calibrations.

A calibration fits each map to the pairs (e, delta_l) of one batch. With a memory the normal
equations are kept: A <- f A + e^T e and R_l <- f R_l + e^T delta_l, with f how much of the earlier
calibrations stays, and B_l = (A + ridge tr(A) / C I)^-1 R_l. The fit of several ranks is that of
all their samples when A and R_l are added up before they are solved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grapefx.maps import FeedbackMap
from grapefx.methods.base import State

GRAM, CROSS = MEMORY = ("gram", "cross")


def memory_shapes(m: FeedbackMap) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What a map with a memory keeps beside its state: A (G, C, C) and R (C, n).

    A sparse map reads C entries of the error in each of its G groups.
    """
    c, n = m.shape
    return ((GRAM, (m.groups, c, c)), (CROSS, (c, n)))


def without_memory(state: State) -> State:
    """The part of a state that belongs to the method."""
    return {k: t for k, t in state.items() if k not in MEMORY}


def products(m: FeedbackMap, e: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(A, R) of one batch, from error rows (R, C) and true cotangents (R, n), at least float32."""
    dtype = torch.promote_types(e.dtype, torch.float32)
    e, rows = e.to(dtype), rows.to(dtype)
    picked = [m.pick(e, g) for g in range(m.groups)]
    grams = [p.t() @ p for p in picked]
    crosses = [p.t() @ rows[:, m.columns(g)] for g, p in enumerate(picked)]
    return torch.stack(grams), crosses[0] if len(crosses) == 1 else torch.cat(crosses, 1)


def solve(gram: Tensor, cross: Tensor, ridge: float) -> list[Tensor]:
    """B of each group, (C, n_g), from A (G, C, C) and R (C, n)."""
    groups, c, n = gram.shape[0], gram.shape[1], cross.shape[1]
    fitted = []
    for g in range(groups):
        a, r = gram[g], cross[:, g * n // groups : (g + 1) * n // groups]
        # errors are scaled by 1/N and by any loss scale: normalise before the solve
        size = (a.trace() / c).clamp_min(1e-30)
        eye = torch.eye(c, dtype=a.dtype, device=a.device)
        # LAPACK's result lies by columns; the steps were compiled for rows
        fitted.append(torch.linalg.solve(a / size + ridge * eye, r / size).contiguous())
    return fitted
