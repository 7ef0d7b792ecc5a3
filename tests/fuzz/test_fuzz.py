"""Random models: exact gradients, or an error of ours; never a crash or a wrong number.

``GRAPEFX_FUZZ_CASES=2000 pytest tests/fuzz`` runs more; a failure names its seed.
"""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.errors import GrapefxError
from tests.fuzz.random_models import Case, random_case
from tests.zoo import assert_same_buffers, assert_same_gradients, compiled, tensors

CASES = int(os.environ.get("GRAPEFX_FUZZ_CASES", "20"))
CHUNK = max(1, min(25, CASES // 20))  # a test is stopped after 15 minutes


def _loss(out: Any) -> Tensor:
    """Without symmetry, and defined on a batch of nothing."""
    total = torch.zeros((), dtype=torch.float64)
    for t in tensors(out):
        weight = torch.linspace(0.3, 1.7, max(t.numel(), 1), dtype=torch.float64)[: t.numel()]
        total = total + (torch.sin(t) * weight.view(t.shape)).sum()
    return total


def _step(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    model.zero_grad()
    args, extra = call
    out = model(*args, **extra)
    _loss(out).backward()
    return out


def _run(case: Case) -> bool:
    """Whether grapefx takes the model; raises where it does something else than eager."""
    twin = copy.deepcopy(case.model)
    net = compiled(case.model, "bp")
    for call in case.calls:
        try:
            wanted = _step(twin, call)
        except Exception:
            return True  # not a model: eager PyTorch refuses it (batch norm of one sample)
        try:
            found = _step(net, call)
        except GrapefxError as e:
            assert str(e).strip(), "an error without words"
            return False
        for ours, theirs in zip(tensors(found), tensors(wanted), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11, equal_nan=True)
        if all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters()):
            assert_same_gradients(net, twin)
        assert_same_buffers(net, twin)
    return True


@pytest.mark.parametrize("start", range(0, CASES, CHUNK))
def test_random_models(start: int) -> None:
    seeds = range(start, min(start + CHUNK, CASES))
    refused = []
    for seed in seeds:
        case = random_case(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                taken = _run(case)
            except Exception as e:
                raise AssertionError(f"{case}: {type(e).__name__}: {e}") from e
        if not taken:
            refused.append(seed)
    # an error of ours is an answer, but not the usual one
    assert len(refused) < max(5, len(seeds) // 2), refused
