"""A step graph in stages: bit for bit the whole step, no work twice, and no chain in an update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from grapefx.analysis.cost import graph_cost
from grapefx.errors import PlacementError, VerifyError
from grapefx.ir import Slot, StepGraph
from grapefx.lowering import prepare
from grapefx.methods import get_method
from grapefx.options import Options
from grapefx.passes.divide.stages import SEND, Stages, legal_ends, split_stages
from grapefx.passes.graph import meta
from grapefx.passes.graph.verify import check
from grapefx.plan import Plan, build_plan
from grapefx.runtime.program import sizes_of
from tests.stages.models import MODELS, make
from tests.zoo import step_inputs

KINDS = {"update": "dfa", "align": "grape", "calibration": "grape"}


@functools.cache
def base(name: str) -> Plan:
    model, args = make(name)
    return build_plan(model, args, method="grape")


def plan_of(name: str, method: str) -> Plan:
    return dataclasses.replace(
        base(name), method=get_method(method, {}), options=Options(), _graphs={}, independent={}
    )


def fixed(plan: Plan, kind: str, args: tuple[Any, ...]) -> StepGraph:
    step = plan.graph(kind)
    batch = args[0].shape[0]
    return prepare(step, sizes_of(step, batch, plan.rows(batch)), "eager")


def run_stages(found: Stages, given: dict[Slot, Any]) -> dict[Slot, Any]:
    """What all stages return, gradients in parts summed.

    The stages in order compute what they can, then in the opposite order the rest.
    """
    out: dict[Slot, Any] = {}
    made: dict[str, Any] = {}
    env: list[dict[Any, Any]] = [{} for _ in found.stages]
    for late in (False, True):
        order = reversed(found.stages) if late else found.stages
        for stage in order:
            _interpret(stage.step, env[stage.index], given, made)
    for stage in found.stages:
        for slot, node in zip(stage.step.outputs, stage.step.results(), strict=True):
            if slot.name.startswith(SEND):
                continue
            value = env[stage.index][node]
            out[slot] = out[slot] + value if slot in out else value
    return out


def _interpret(
    step: StepGraph, env: dict[Any, Any], given: dict[Slot, Any], made: dict[str, Any]
) -> None:
    """Run what can be run of a stage, once; what it sends is in ``made`` at once."""
    sends = {n: s.name.removeprefix(SEND) for s, n in zip(step.outputs, step.results(), strict=True)
             if s.name.startswith(SEND)}  # fmt: skip
    slots = dict(zip(step.placeholders(), step.inputs, strict=True))
    for node in step.gm.graph.nodes:
        if node in env or node.op == "output":
            continue
        if node.op == "placeholder":
            kind, _, name = slots[node].name.partition(":")
            if kind in ("recv", "late", "chain") and slots[node] not in given:
                if name in made:
                    env[node] = made[name]
            else:
                env[node] = given[slots[node]]
        elif all(a in env for a in node.all_input_nodes):
            value = lambda a: env[a]  # noqa: E731
            args, kwargs = (torch.fx.map_arg(x, value) for x in (node.args, node.kwargs))
            env[node] = node.target(*args, **kwargs)
        if node in env and node in sends:
            made[sends[node]] = env[node]


def cuts(plan: Plan, stages: int) -> list[tuple[int, ...]]:
    """Two divisions into (at most) so many stages: even, and early."""
    legal = [k for k in legal_ends(plan.layers) if k < len(plan.layers)]
    count = min(stages - 1, len(legal))
    even = tuple(legal[(i + 1) * len(legal) // (count + 1)] for i in range(count))
    return list({tuple(sorted(set(even))), tuple(legal[:count])})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_stages_are_the_whole_step_bit_for_bit(name: str, kind: str) -> None:
    plan = plan_of(name, KINDS[kind])
    model, args = make(name)
    step = fixed(plan, kind, args)
    whole_step = plan.graph(kind)
    inputs = step_inputs(plan, whole_step, model, args)
    torch.manual_seed(0)
    whole = dict(zip(whole_step.outputs, whole_step.gm(*inputs), strict=True))
    given = dict(zip(whole_step.inputs, inputs, strict=True))
    for ends in {e for p in (2, 3, 4, 9) for e in cuts(plan, p)}:
        found = split_stages(step, plan.layers, ends, exact=kind == "calibration")
        for stage in found.stages:
            check(stage.step, f"stage {stage.index}")
        torch.manual_seed(0)
        out = run_stages(found, given)
        for slot, value in whole.items():
            if value is None:
                assert slot not in out
            elif slot.role == "metric" and slot.name != "finite":
                for layer, entry in zip(plan.layers, value, strict=True):
                    mine = out.pop(Slot("metric", f"{slot.name}/{layer.name}"), torch.tensor(0.0))
                    assert torch.equal(entry.nan_to_num(), mine.float().nan_to_num()), (slot, ends)
            else:
                assert torch.equal(value.nan_to_num(), out.pop(slot).nan_to_num()), (slot, ends)
        assert not out, list(out)


def flops(step: StepGraph) -> int:
    """FLOPs of a step, without the ridge system, which each stage solves for itself."""
    nodes = graph_cost(step.gm).nodes.items()
    return sum(c.flops for n, c in nodes if (meta.phase(n), meta.layer(n)) != ("refit", None))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_no_work_is_done_twice(name: str, kind: str) -> None:
    plan = plan_of(name, KINDS[kind])
    _, args = make(name)
    step = fixed(plan, kind, args)
    whole = flops(step)
    for ends in cuts(plan, 2) + cuts(plan, 4):
        found = split_stages(step, plan.layers, ends, exact=kind == "calibration")
        parts = [flops(s.step) for s in found.stages]
        assert sum(parts) == whole, (ends, parts)
        assert all(parts)
