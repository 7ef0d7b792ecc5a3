"""Random matrices computed from a seed inside a graph: nothing is stored, nothing is drawn.

Each entry is a hash of (seed, row, column) in integer arithmetic that a compiler fuses. The same
seed gives the same numbers on every device and rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = 0x45D9F3B  # below 2**31: products of 32-bit words stay inside int64


def _mix(x: Tensor) -> Tensor:
    for _ in range(2):
        x = ((x >> 16) ^ x) * _MULTIPLIER & _MASK
    return (x >> 16) ^ x


def _words(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    rows = torch.arange(shape[0], device=device).unsqueeze(1)
    columns = torch.arange(shape[1], device=device).unsqueeze(0)
    # xor between two rounds: another seed is no shift of the same numbers
    own = _mix(_mix(rows) ^ (seed * 0x9E3779B1 & _MASK))
    return _mix((own + columns * 0x9E3779B1) & _MASK)


def uniform(shape: tuple[int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """U[-1, 1), in steps of 2**-23."""
    return (_words(shape, seed, device) >> 8).to(dtype) * 2.0**-23 - 1.0


def signs(shape: tuple[int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """+1 or -1."""
    return ((_words(shape, seed, device) >> 15) & 1).to(dtype) * 2.0 - 1.0
