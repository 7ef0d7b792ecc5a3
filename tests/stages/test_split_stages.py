"""A step graph in stages: bit for bit the whole step, no work twice, and no chain in an update."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from grapefx.analysis.cost import graph_cost
from grapefx.errors import PlacementError, VerifyError
from grapefx.ir import Slot, StepGraph
from grapefx.methods import get_method
from grapefx.options import Options
from grapefx.passes.divide.owners import legal_ends
from grapefx.passes.divide.stages import SEND, Stages, split_stages
from grapefx.passes.feedback.builder import Builder, Feedback
from grapefx.passes.feedback.projection import project, replace_cuts
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.annotate import annotate
from grapefx.passes.graph.order import descendants
from grapefx.passes.graph.verify import check
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan import Plan, build_plan, sizes_of
from tests.stages.models import MODELS, make
from tests.zoo import step_inputs

KINDS = {"update": "dfa", "align": "grape", "calibration": "grape"}


@functools.cache
def base(name: str) -> Plan:
    model, args = make(name)
    return build_plan(model, args, method="grape")


def plan_of(name: str, method: str) -> Plan:
    fresh: dict[str, Any] = {"_graphs": {}, "independent": {}, "passes": {}}
    return dataclasses.replace(
        base(name), method=get_method(method, {}), options=Options(), **fresh
    )


def fixed(plan: Plan, kind: str, args: tuple[Any, ...]) -> StepGraph:
    step = plan.graph(kind)
    batch = args[0].shape[0]
    sizes = sizes_of(step, batch, plan.rows(batch))
    return prepare(step, kind, "eager", LowerContext(sizes))


def leaky(plan: Plan, index: int) -> StepGraph:
    """The method's update graph with one cut left to the chain rule."""
    feedback = Feedback(plan.method, plan.maps, plan.error_rows, plan.states())
    b = Builder(plan.joint, feedback)
    b.add_states()
    cotangents = project(b, b.state_nodes)
    chain = markers.find(b.graph, markers.CUT_BACKWARD)[index].args[0]
    cotangents[index] = chain  # type: ignore[assignment]
    replace_cuts(b, cotangents)
    step = b.finish()
    annotate(step, plan.layers)
    return step


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
    """FLOPs of what depends on the batch or the error, without the ridge system of all layers."""
    roles = ("parameter", "buffer", "constant")
    slots = zip(step.placeholders(), step.inputs, strict=True)
    moving = descendants(n for n, s in slots if s.role not in roles)
    nodes = [(n, c) for n, c in graph_cost(step.gm).nodes.items() if n in moving]
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
        # parts of a shared parameter's gradient are added by the runtime
        grads = [s for x in found.stages for s in x.step.outputs if s.role == "gradient"]
        sizes = {s: n.meta["val"].numel() for s, n in step.produced("gradient") if n is not None}
        sums = sum(sizes[s] for s in grads) - sum(sizes[s] for s in set(grads))
        assert sum(parts) + sums == whole, (ends, parts)
        assert all(parts)


def test_a_stage_cannot_end_inside_a_shared_parameter() -> None:
    plan = plan_of("tied", "dfa")
    with pytest.raises(PlacementError, match=r"cannot end behind layer 'lin'.*'lin\.bias'"):
        split_stages(plan.graph("update"), plan.layers, (1,))


@pytest.mark.parametrize("ends", [(1, 0), (0, 0), (5,), (-1,)])
def test_ends_are_ascending_layers(ends: tuple[int, ...]) -> None:
    plan = plan_of("mlp", "dfa")
    with pytest.raises(PlacementError, match="ascending"):
        split_stages(plan.graph("update"), plan.layers, ends)


@pytest.mark.parametrize("name", ["mlp", "unet", "branches"])
def test_a_chain_is_refused_outside_exact_steps(name: str) -> None:
    """One cut of an update is left to the chain rule: its stage waits for a later one's update."""
    plan = plan_of(name, "dfa")
    step = leaky(plan, 0)
    batch = make(name)[1][0].shape[0]
    step = prepare(step, "update", "eager", LowerContext(sizes_of(step, batch, batch)))
    with pytest.raises(VerifyError, match="only exact steps may chain stages"):
        split_stages(step, plan.layers, (0,))


def test_updates_receive_no_gradient() -> None:
    for name in ("unet", "rotary", "encoder", "residual"):
        plan = plan_of(name, "grape")
        step = fixed(plan, "align", make(name)[1])
        found = split_stages(step, plan.layers, legal_ends(plan.layers)[:1])
        assert {c.kind for c in found.channels} <= {"recv", "late"}
