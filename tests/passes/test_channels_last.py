"""Cotangents in the memory order of saved values: the same numbers, and only where it helps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grapefx.passes.divide.partition import Split, split
from grapefx.passes.peephole.channels_last import channels_last
from grapefx.plan import Plan
from tests.zoo import make, plan_of, step_inputs

aten = torch.ops.aten


def saved_strides(parts: Split, last: bool) -> list[Any]:
    """Strides of every saved value; with ``last`` planes lie with their channels last."""
    found: list[Any] = []
    for node in [n for n in parts.update.graph.nodes if n.op == "placeholder"][: parts.saved]:
        val = node.meta["val"]
        if last and isinstance(val, Tensor) and val.ndim == 4:
            _, c, h, w = (int(s) if isinstance(s, int) else 1 for s in val.shape)
            found.append((h * w * c, 1, w * c, c))
        else:
            found.append(tuple(val.stride()) if isinstance(val, Tensor) else None)
    return found


def update_inputs(plan: Plan, parts: Split, kind: str) -> list[Any]:
    model, args = make("cnn")
    inputs = step_inputs(plan, plan.graph(kind), model, args)
    torch.manual_seed(0)
    first = list(parts.forward(*[inputs[i] for i in parts.forward_inputs]))
    return [*first[len(parts.forward_outputs) :], *[inputs[i] for i in parts.late_inputs]]


@pytest.mark.parametrize(("method", "kind"), [("dfa", "update"), ("grape", "align")])
def test_the_same_numbers_in_another_order(method: str, kind: str) -> None:
    plan = plan_of("cnn", method)
    parts = split(plan.graph(kind))
    inputs = update_inputs(plan, parts, kind)
    before = [v.clone() for v in parts.update(*inputs)]
    found = channels_last(parts.update, saved_strides(parts, last=True))
    assert found > 0
    parts.update.graph.lint()
    for a, b in zip(before, parts.update(*inputs), strict=True):
        torch.testing.assert_close(b, a)
    planes = [
        n
        for n in parts.update.graph.nodes
        if n.target is aten.permute.default and n.args[0].args[0].target is aten.mm.default
    ]
    assert len(planes) == found and all(n.meta["val"].stride()[1] == 1 for n in planes)


@pytest.mark.parametrize("strides", ["contiguous", "unknown"])
def test_nothing_is_done_for_values_in_the_usual_order(strides: str) -> None:
    parts = split(plan_of("cnn", "dfa").graph("update"))
    text = str(parts.update.graph)
    given = saved_strides(parts, last=False) if strides == "contiguous" else []
    assert channels_last(parts.update, given) == 0
    assert str(parts.update.graph) == text
