"""The noise v_l of the tangents, drawn outside the graph from a generator of its own.

The draw of step k depends on (seed, k) alone: it leaves the user's random stream untouched, a
forward without a backward repeats it, and a resumed run continues it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOWEST_OF_EACH_BYTE = 0x0101010101010101


def seed_of(seed: int, *counters: int) -> int:
    """A well-mixed 63-bit seed from small integers (splitmix64)."""
    x = seed & 0xFFFFFFFFFFFFFFFF
    for c in counters:
        x = (x + 0x9E3779B97F4A7C15 * (c + 1)) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x >> 1


def draw(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
    kind: str,
) -> list[Tensor]:
    """One tensor a shape: normal numbers, or bytes 0 and 1 that stand for the signs -1 and +1.

    Both give E[v v^T] = I. Bytes are a quarter to keep, and far cheaper to draw: one random word
    is 64 of them.
    """
    total = sum(map(math.prod, shapes))
    if kind == "rademacher":
        words = torch.empty((total + 63) // 64, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=generator)
        places = torch.arange(8, dtype=torch.int64, device=device)[:, None]
        bits = torch.bitwise_right_shift(words, places).bitwise_and_(_LOWEST_OF_EACH_BYTE)
        return _cut(bits.view(-1).view(torch.int8), shapes)
    flat = torch.empty(total, dtype=dtype, device=device)
    flat.normal_(generator=generator)
    return _cut(flat, shapes)


def _cut(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    out, start = [], 0
    for s in shapes:
        size = math.prod(s)
        out.append(flat[start : start + size].view(s))
        start += size
    return out
