"""All stages driven in one process equal the whole step on the whole batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from grapefx.ir import Slot
from grapefx.options import Options
from tests.stages.local import drive, ends_for, engines, given_of, whole
from tests.stages.models import make
from tests.stages.test_split_stages import plan_of

CASES = [("dfa", "update"), ("fdfa", "align"), ("grape", "align"), ("grape", "calibration"),
         ("bp", "calibration")]  # fmt: skip


def compare(
    name: str,
    method: str,
    kind: str,
    stages: int,
    microbatches: int,
    backend: str = "eager",
    **options: Any,
) -> None:
    chosen = Options(backend=backend, **options)
    plan = dataclasses.replace(plan_of(name, method), options=chosen, _graphs={}, passes={})
    model, args = make(name)
    args = tuple(torch.cat([a, a.flip(0)])[:8] if a.shape[0] < 8 else a[:8] for a in args)
    given = given_of(plan, kind, model, args)
    expected = whole(plan, kind, given, microbatches)
    found = engines(plan, kind, given, ends_for(plan, stages), microbatches)
    drive(found)
    gradients: dict[str, Tensor] = {}
    learned: dict[Slot, Tensor] = {}
    for engine in found:
        for n, g in engine.gradients.items():
            gradients[n] = gradients[n] + g if n in gradients else g
        learned |= engine.learned
    for slot, value in expected.items():
        if slot.role == "gradient" and isinstance(value, Tensor):
            torch.testing.assert_close(gradients.pop(slot.name), value, rtol=1e-10, atol=1e-12)
        elif slot.role == "feedback":
            torch.testing.assert_close(learned[slot], value, rtol=1e-8, atol=1e-10)
    assert not gradients


@pytest.mark.parametrize(("method", "kind"), CASES)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 2), (2, 1), (2, 4), (4, 8), (4, 2)])
@pytest.mark.parametrize("name", ["deep"])
def test_stages_equal_the_whole_batch(
    name: str, method: str, kind: str, stages: int, microbatches: int
) -> None:
    compare(name, method, kind, stages, microbatches)


@pytest.mark.parametrize(("method", "kind"), CASES)
@pytest.mark.parametrize("name", ["unet", "rotary", "wide", "tied", "branches", "inplace"])
def test_stages_of_other_models(name: str, method: str, kind: str) -> None:
    compare(name, method, kind, 3, 2)


@pytest.mark.parametrize("kind", ["update", "calibration"])
def test_corrections_and_memory_go_through_stages(kind: str) -> None:
    """The radial correction and the kept normal equations are those of the whole batch."""
    compare("unet", "dfa", kind, 2, 2, radial=True, calib_forget=0.7)


@pytest.mark.parametrize(("method", "kind"), CASES[-3:])
def test_compiled_stages(method: str, kind: str) -> None:
    compare("unet", method, kind, 2, 2, "inductor")
