"""What a step learns from microbatches is what it learns from the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grapefx.errors import MethodError
from grapefx.ir import Slot, StepGraph
from grapefx.passes.divide.commit import cut_commit, reduced, reduction_of
from grapefx.passes.graph.verify import check
from tests.stages.models import make
from tests.stages.test_split_stages import plan_of
from tests.zoo import step_inputs

M = 3


def run(step: StepGraph, given: dict[Slot, Any]) -> dict[Slot, Any]:
    return dict(zip(step.outputs, step.gm(*[given[s] for s in step.inputs]), strict=True))


@pytest.mark.parametrize("method", ["grape", "fdfa"])
@pytest.mark.parametrize("kind", ["align", "calibration"])
@pytest.mark.parametrize("name", ["mlp", "branches", "unused", "wide"])
def test_microbatches_learn_what_the_batch_does(name: str, kind: str, method: str) -> None:
    plan = plan_of(name, method)
    model, args = make(name)
    step = plan.graph(kind)
    whole = dict(zip(step.inputs, step_inputs(plan, step, model, args), strict=True))
    for slot in whole:
        if slot.name.endswith("scale"):
            whole[slot] = whole[slot].abs() + 1
    expected = run(step, whole)
    names = [layer.name for layer in plan.layers]
    main, commit = cut_commit(step, names, method)
    check(main, "commit")
    assert commit.first == (kind == "align")

    moving = ("input", "cotangent", "noise", "target")
    parts = {s: v.chunk(M) if s.role in moving else (v,) * M for s, v in whole.items()}
    seen = [run(main, {s: parts[s][m] for s in main.inputs}) for m in range(M)]
    kept = {s: reduced(reduction_of(s), [out[s] for out in seen]) for s in commit.reads}
    values = commit.gm(*[kept[s] for s in commit.reads], *[whole[s] for s in commit.states])
    learned = dict(zip(commit.outputs, values, strict=True))
    # each layer's own part gives the same
    for own in names:
        part = commit.only([own])
        found = part.gm(*[kept[s] for s in part.reads], *[whole[s] for s in part.states])
        for slot, value in zip(part.outputs, found, strict=True):
            assert torch.equal(value, learned[slot])
    assert {s for own in names for s in commit.only([own]).outputs} == set(commit.outputs)

    for slot, value in expected.items():
        if slot.role == "metric" and slot.name != "finite":
            for layer, entry in zip(names, value, strict=True):
                mine = learned.get(Slot("metric", f"{slot.name}/{layer}"), torch.tensor(0.0))
                torch.testing.assert_close(mine.float(), entry, equal_nan=True)
        elif slot.role in ("metric", "feedback"):
            torch.testing.assert_close(learned[slot], value, rtol=1e-9, atol=1e-11)

    after = {**whole, **{s: v for s, v in learned.items() if s.role == "feedback"}}
    if commit.first:
        seen = [run(main, {s: parts.get(s, after)[m] if s.role in moving else after[s]
                           for s in main.inputs}) for m in range(M)]  # fmt: skip
    for slot, value in expected.items():
        if slot.role == "gradient" and isinstance(value, Tensor):
            total = reduced("sum", [out[slot] for out in seen])
            torch.testing.assert_close(total, value, rtol=1e-9, atol=1e-11)


def test_a_method_that_learns_from_each_sample_is_refused() -> None:
    plan = plan_of("mlp", "dkp")
    with pytest.raises(MethodError, match=r"learns from .* which cannot be put together"):
        cut_commit(plan.graph("update"), [x.name for x in plan.layers], "dkp")
