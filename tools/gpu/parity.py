"""How far two runs of the same step are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def difference(mine: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest relative distance of tensors; infinite where one is missing or not finite.

    Never NaN, which ``max`` would pass over.
    """
    if [a is None for a in mine] != [b is None for b in theirs]:
        return math.inf
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(a, Tensor):
            continue
        x, y = a.double(), b.double()
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            return math.inf
        worst = max(worst, float((x - y).norm() / y.norm().clamp_min(1e-12)))
    return worst
