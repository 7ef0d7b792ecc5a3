"""What unbiased exact rows are worth: the noise that their draw adds to a gradient."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from grapefx.analysis.theory import batch_as_good
from tests.zoo import compiled

N, ROWS = 6, 2


def gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    net.zero_grad()
    (net(x) - y).square().sum().backward()
    weights = [p for n, p in net.named_parameters() if n.startswith("0.")]
    return torch.cat([w.grad.flatten() for w in weights if w.grad is not None])


def test_mean_and_variance_over_every_draw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    model = model.double()
    x, y = torch.randn(N, 3).double(), torch.randn(N, 2).double()
    plain = compiled(copy.deepcopy(model), "dfa", calib_every=None)
    maps = plain.feedback_state_dict()
    net = compiled(
        copy.deepcopy(model), "dfa", calib_every=None, exact_rows=ROWS / N, exact_weight=N / ROWS
    )
    net.load_feedback_state_dict(maps)

    true = torch.stack([gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(N)])
    made = torch.stack([gradient(plain, x[i : i + 1], y[i : i + 1]) for i in range(N)])
    assert not torch.allclose(true, made, rtol=0.1)
    draws = []
    for first in itertools.combinations(range(N), ROWS):
        order = [*first, *(i for i in range(N) if i not in first)]
        draws.append(gradient(net, x[order], y[order]))
    drawn = torch.stack(draws)

    torch.testing.assert_close(drawn.mean(0), true.sum(0), rtol=1e-10, atol=1e-10)
    rest = true - made
    spread = (rest - rest.mean(0)).square().sum() / (N - 1)  # of one sample
    variance = (drawn - true.sum(0)).square().sum(1).mean()
    torch.testing.assert_close(variance, N**2 * (1 / ROWS - 1 / N) * spread, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows", [1 / 8, 1 / 3, 0.9])
def test_at_break_even_a_smaller_batch_is_as_noisy_for_the_same_work(rows: float) -> None:
    left = rows / (2 + rows)  # docs/theory.md: the most that maps may leave unexplained
    work = (2 + rows) / 3  # in that of backpropagation
    assert batch_as_good(left, rows) == pytest.approx(work)
    assert batch_as_good(left / 2, rows) > work > batch_as_good(2 * left, rows)


def test_the_ends() -> None:
    assert batch_as_good(0, 0.25) == batch_as_good(3, 1) == 1  # exact maps; all rows
    assert batch_as_good(1, 0.25) == pytest.approx(0.25)  # maps that say nothing
    with pytest.raises(ValueError, match="rows must be"):
        batch_as_good(0.1, 0)
