"""How a tensor lies in memory, for tensors that may have no strides (sparse ones)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def strided(value: Any) -> bool:
    """Whether a value is a tensor with strides."""
    return isinstance(value, Tensor) and value.layout is torch.strided


def strides(value: Tensor) -> tuple[Any, ...]:
    """The strides; none of a sparse tensor."""
    return tuple(value.stride()) if value.layout is torch.strided else ()


def described(value: Tensor) -> Any:
    """What of a tensor's layout a graph depends on, hashable: strides, or the kind of sparse."""
    if value.layout is torch.strided:
        return value.stride()
    coalesced = value.layout is not torch.sparse_coo or value.is_coalesced()
    return (value.layout, value.sparse_dim(), value.dense_dim(), coalesced)


def contiguous(value: Tensor) -> bool:
    """Whether a tensor lies as ``contiguous()`` would lay it; a sparse one always does."""
    return value.layout is not torch.strided or value.is_contiguous()
