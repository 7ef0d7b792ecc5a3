"""Batch norm with ``momentum=None``: averages of all batches so far, by tensors alone.

``nn.BatchNorm`` reads its count of batches as a Python number, which a trace cannot. Stochastic
weight averaging (``update_bn``) sets it so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grapefx.capture import module_tree

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextlib.contextmanager
def cumulative_norms(model: nn.Module) -> Iterator[None]:
    """A trace inside: such layers count and average in the graph."""
    if not any(isinstance(m, _NORMS) and _cumulative(m) for m in module_tree.modules(model)):
        yield
        return
    owner = nn.modules.batchnorm._BatchNorm
    plain = owner.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return _forward(self, x) if _cumulative(self) else plain(self, x)

    owner.forward = forward  # type: ignore
    try:
        yield
    finally:
        owner.forward = plain  # type: ignore[method-assign]


def _cumulative(m: Any) -> bool:
    return m.momentum is None and m.training and m.track_running_stats


def _forward(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Tensor) -> Tensor:
    norm._check_input_dim(x)
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked.add_(1)
    mean, var = torch.zeros_like(norm.running_mean), torch.ones_like(norm.running_var)
    # with a momentum of 1 they become this batch's
    out = F.batch_norm(x, mean, var, norm.weight, norm.bias, True, 1.0, norm.eps)
    with torch.no_grad():
        part = 1 / norm.num_batches_tracked.to(mean.dtype)
        norm.running_mean.copy_(norm.running_mean * (1 - part) + mean * part)
        norm.running_var.copy_(norm.running_var * (1 - part) + var * part)
    return out
