"""The split pair is the joint graph, and no update subgraph depends on another layer's."""

from __future__ import annotations

import pytest
import torch

from grapefx.errors import VerifyError
from grapefx.passes.divide.partition import split
from grapefx.passes.feedback.builder import Builder, Feedback
from grapefx.passes.feedback.projection import project, replace_cuts
from grapefx.passes.graph import markers
from grapefx.passes.graph.verify import independence
from grapefx.plan import Plan
from tests.zoo import METHODS, ZOO, make, plan_of, step_inputs

SOME = ("mlp", "cnn", "encoder", "lstm", "tied", "inplace")


@pytest.mark.parametrize("kind", ["align", "calibration"])
@pytest.mark.parametrize("name", SOME)
def test_split_pair_equals_the_joint_graph_bit_for_bit(name: str, kind: str) -> None:
    plan = plan_of(name, "grape")
    step = plan.graph(kind)
    parts = split(step)
    model, args = make(name)

    inputs = step_inputs(plan, step, model, args)
    torch.manual_seed(0)
    whole = dict(zip(step.outputs, step.gm(*inputs), strict=True))

    inputs = step_inputs(plan, step, model, args)
    torch.manual_seed(0)
    first = list(parts.forward(*[inputs[i] for i in parts.forward_inputs]))
    outs, saved = first[: len(parts.forward_outputs)], first[len(parts.forward_outputs) :]
    second = parts.update(*saved, *[inputs[i] for i in parts.late_inputs])

    found = dict(zip(parts.forward_outputs, outs, strict=True))
    found |= dict(zip(parts.update_outputs, second, strict=True))
    for i, slot in enumerate(step.inputs):
        if slot.role == "buffer":  # written in place by the forward half
            found[type(slot)("buffer", slot.name)] = inputs[i]
    for slot, value in whole.items():
        if value is None:
            assert slot not in found
        else:
            assert torch.equal(value.nan_to_num(), found[slot].nan_to_num()), slot


@pytest.mark.parametrize("name", list(ZOO))
def test_no_update_depends_on_another_layer(name: str) -> None:
    for method in METHODS:
        plan = plan_of(name, method)
        if plan.method.sequential:
            continue
        kind = "align" if plan.method.aligns() else "update"
        step = plan.graph(kind)
        found = independence(step, plan.layers)
        owners = {p: {x.name for x in plan.layers if p in x.parameters} for p in found}
        for parameter, layers in found.items():
            assert set(layers) <= owners[parameter], parameter
        # every layer learns something from its own cotangent
        assert {x for layers in found.values() for x in layers} == {x.name for x in plan.layers}


def _leaky(plan: Plan, index: int) -> object:
    """The method's update graph with one cut left to the chain rule."""
    feedback = Feedback(plan.method, plan.maps, plan.error_rows, plan.states())
    b = Builder(plan.joint, feedback)
    b.add_states()
    cotangents = project(b, b.state_nodes)
    chain = markers.find(b.graph, markers.CUT_BACKWARD)[index].args[0]
    cotangents[index] = chain  # type: ignore[assignment]
    replace_cuts(b, cotangents)
    return b.finish()


@pytest.mark.parametrize("name", ["mlp", "residual", "encoder-prenorm", "branches"])
def test_a_leak_is_found(name: str) -> None:
    plan = plan_of(name, "dfa")
    for index in (0, len(plan.layers) - 2):
        with pytest.raises(VerifyError, match=r"depends on the cotangent of layer|waits for layer"):
            independence(_leaky(plan, index), plan.layers)  # type: ignore[arg-type]


def test_a_chain_gradient_inside_a_projection_is_found() -> None:
    """A cotangent computed from the incoming gradient waits for the layer above."""
    plan = plan_of("mlp", "dfa")
    step = plan.graph("update").copy()
    nodes = [n for n in step.gm.graph.nodes if n.meta.get("grapefx_phase") == "projection"]
    first = [n for n in nodes if n.meta["grapefx_layer"] == plan.layers[0].name]
    other = [n for n in nodes if n.meta["grapefx_layer"] == plan.layers[1].name]
    target = max(first, key=list(step.gm.graph.nodes).index)
    source = max(other, key=list(step.gm.graph.nodes).index)
    with step.gm.graph.inserting_after(max(target, source, key=list(step.gm.graph.nodes).index)):
        mixed = step.gm.graph.call_function(torch.ops.aten.add.Tensor, (target, source))
    mixed.meta = dict(target.meta)
    target.replace_all_uses_with(mixed, delete_user_cb=lambda u: u is not mixed)
    with pytest.raises(VerifyError, match="waits for layer"):
        independence(step, plan.layers)
