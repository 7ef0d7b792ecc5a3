"""The draw of random signs: one bit a sign, balanced, independent, the same for a seed."""

from __future__ import annotations

import torch

from grapefx.runtime.noise import draw

CPU = torch.device("cpu")


def signs(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = draw(shapes, torch.float64, CPU, generator, "rademacher")
    assert all(v.dtype == torch.int8 and v.shape == s for v, s in zip(drawn, shapes, strict=True))
    return [v.double() * 2 - 1 for v in drawn]


def test_bytes_are_zero_or_one_and_repeat() -> None:
    first = signs(3, (5, 7), (3, 11, 2))
    assert all(v.abs().eq(1).all() for v in first)
    assert all(a.equal(b) for a, b in zip(first, signs(3, (5, 7), (3, 11, 2)), strict=True))
    assert not first[0].equal(signs(4, (5, 7), (3, 11, 2))[0])


def test_signs_are_balanced_and_independent() -> None:
    """E[v v^T] = I: what comes of one word of 64 bits included. Bounds: five deviations."""
    n = 64 * 1024
    (v,) = signs(0, (n,))
    assert abs(v.mean()) < 5 / n**0.5
    # the 64 signs of one word lie n / 8 apart and next to each other
    words = v.view(8, -1, 8).transpose(0, 1).reshape(-1, 64)
    cov = words.t() @ words / len(words)
    assert (cov - torch.eye(64)).abs().max() < 5 / len(words) ** 0.5
    neighbours = v.view(-1, 64)
    cov = neighbours.t() @ neighbours / len(neighbours)
    assert (cov - torch.eye(64)).abs().max() < 5 / len(neighbours) ** 0.5
