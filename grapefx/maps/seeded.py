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
    rows, columns = (torch.arange(n, device=device) for n in shape)
    # A compiler computes a running sum once. Other words it writes into each of their uses, of
    # which _mix has two a round: the time to compile would grow with 2 to the power of the rounds.
    # xor in front of the sum: another seed is no shift of the same numbers.
    rows = _mix((rows ^ (seed * 0x9E3779B1 & _MASK)).cumsum(0) & _MASK).cumsum(0)
    columns = (columns * 0x9E3779B1 & _MASK).cumsum(0)  # sums far below 2**63
    return _mix((rows.unsqueeze(1) + columns.unsqueeze(0)) & _MASK)


def uniform(shape: tuple[int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """U[-1, 1), in steps of 2**-23."""
    return (_words(shape, seed, device) >> 8).to(dtype) * 2.0**-23 - 1.0


def signs(shape: tuple[int, int], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """+1 or -1."""
    return ((_words(shape, seed, device) >> 15) & 1).to(dtype) * 2.0 - 1.0
