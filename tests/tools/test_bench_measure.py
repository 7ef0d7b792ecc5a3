"""The peak memory of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.bench.measure import peak_memory
from tools.bench.models import Step

MIB = 2**18  # float32 values


class Holding(Step):
    """Gradients of 4 MiB, and 8 MiB of saved values that end before they are there."""

    def __call__(self) -> None:
        self.clear()
        torch.empty(8 * MIB)
        self.net.weight.grad = torch.zeros(1, 4 * MIB)  # type: ignore[union-attr]


@pytest.mark.parametrize("before", [0, 1])
def test_the_peak_counts_from_a_network_without_gradients(before: int) -> None:
    step = Holding(nn.Linear(4 * MIB, 1, bias=False), torch.empty(0), torch.empty(0))
    for _ in range(before):  # gradients that an earlier profile knows the size of
        with torch.profiler.profile(profile_memory=True):
            step()
    assert peak_memory(step, 2) == pytest.approx(8.0, abs=0.01)
