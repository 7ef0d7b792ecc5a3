"""Where the cuts fall, by name, and the proof that nothing leaks between them (DESIGN 9)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grapefx.plan import Plan, build_plan
from tests.passes import placement_models as models
from tests.zoo import live_input_gradients, plan_of


def planned(model: nn.Module, *args: Any, **options: Any) -> Plan:
    """A plan whose update graph has passed ``independence``."""
    torch.manual_seed(0)
    plan = build_plan(model, args, method="dfa", **options)
    plan.graph("update")
    assert plan.independent or not plan.layers
    return plan


def points(plan: Plan) -> dict[str, str]:
    """Layer name -> the operator that is cut."""
    return {
        c.layer.name: getattr(c.node.target, "__name__", str(c.node.target)).split(".")[0]
        for c in plan.placement.cuts
    }


@pytest.fixture(scope="module")
def resnet18() -> Plan:
    vision = pytest.importorskip("torchvision")
    return planned(vision.models.resnet18(num_classes=10), torch.randn(3, 3, 64, 64))


def test_resnet18(resnet18: Plan) -> None:
    found = points(resnet18)
    assert len(found) == 17
    assert list(found.values()).count("relu") == 15
    assert found["conv1"] == "max_pool2d"  # the narrowest value, not the first
    assert found["layer4.1.conv2"] in ("view", "flatten")  # behind the global pool
    assert list(found) == ["conv1"] + [
        f"layer{a}.{b}.conv{c}" for a in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)
    ]
    # a projection shortcut belongs to the segment of the convolution that it is added to
    (merged,) = [x for x in resnet18.layers if x.name == "layer2.0.conv2"]
    assert "layer2.0.downsample.0.weight" in merged.parameters
    assert "layer2.0.bn2.weight" in merged.parameters
    assert resnet18.placement.head == ("fc.bias", "fc.weight")
    parameters = [p for x in resnet18.layers for p in x.parameters]
    assert len(parameters) == len(set(parameters))


def test_no_dead_convolution_input_gradient(resnet18: Plan) -> None:
    """Trap: ``convolution_backward`` goes on computing input gradients that a cut made dead."""
    graph = resnet18.graph("update").gm.graph
    backward = [n for n in graph.nodes if "convolution_backward" in str(n.target)]
    assert len(backward) == 20
    assert live_input_gradients(graph) == 0
    # in the joint graph all but the first are needed
    assert live_input_gradients(resnet18.graph("calibration").gm.graph) >= 19


def test_squeeze_excite_gate_is_cut_where_it_is_narrow() -> None:
    plan = planned(models.SqueezeExcite(), torch.randn(3, 3, 8, 8))
    assert points(plan) == {"conv": "relu", "fc1": "relu", "fc2": "hardsigmoid", "proj": "mean"}
    shapes = {x.name: x.sample_shape for x in plan.layers}
    assert shapes["fc2"] == (8, 1, 1) and shapes["proj"] == (6,)


def test_unet_skips_pass_closed_segments() -> None:
    plan = planned(models.UNet(), torch.randn(3, 3, 8, 8))
    assert list(points(plan)) == ["d1", "d2", "mid", "up", "u1"]
    assert live_input_gradients(plan.graph("update").gm.graph) == 0


def test_densely_connected_pre_norm() -> None:
    plan = planned(models.Dense(), torch.randn(3, 3, 8, 8))
    assert list(points(plan)) == ["stem", "convs.0", "convs.1", "convs.2"]
    for k in range(3):
        held = next(x for x in plan.layers if x.name == f"convs.{k}").parameters
        assert f"norms.{k}.weight" in held  # a pre-norm belongs to what it feeds


def test_rotary_decoder() -> None:
    plan = planned(models.Rotary(), torch.randint(0, 20, (3, 6)))
    block = ["qkv", "o", "gate", "up", "down"]
    assert list(points(plan)) == ["emb", *[f"blocks.{b}.{x}" for b in (0, 1) for x in block]]
    by_name = {x.name: x for x in plan.layers}
    # q, k, v, their rotation and the attention core are one segment
    assert by_name["blocks.0.qkv"].sample_shape == (6, 16)
    assert "blocks.0.n1.weight" in by_name["blocks.0.qkv"].parameters
    assert {m.kind for m in plan.maps} == {"token"}


def test_blocks_hold_all_that_reaches_their_cut() -> None:
    plan = planned(models.Rotary(), torch.randint(0, 20, (3, 6)), granularity="block")
    assert list(points(plan)) == ["blocks.0.down", "blocks.1.down"]
    first, second = (set(x.parameters) for x in plan.layers)
    assert "emb.weight" in first and "blocks.0.qkv.weight" in first
    assert not first & second
    assert set(plan.placement.head) == {"out.weight", "out.bias"}
    assert "norm.weight" in second  # the final norm is no weight layer of its own


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder", ["self_attn", "self_attn.out_proj", "linear1", "linear2"]),
        ("encoder-prenorm", ["self_attn", "self_attn.out_proj", "linear1", "linear2"]),
    ],
)
def test_transformer(name: str, expected: list[str]) -> None:
    plan = plan_of(name, "dfa")
    plan.graph("update")
    assert [x.name for x in plan.layers] == [f"enc.layers.0.{e}" for e in expected]
    by_name = {x.name.removeprefix("enc.layers.0."): set(x.parameters) for x in plan.layers}
    norm = "enc.layers.0.norm1.weight"
    assert norm in by_name["self_attn.out_proj" if name == "encoder" else "self_attn"]


def test_names_of_repeated_modules_are_stable() -> None:
    assert [x.name for x in plan_of("tied", "dfa").layers] == ["emb", "lin", "lin#2"]
    again = build_plan(*_tied(), method="dfa")
    assert [x.name for x in again.layers] == ["emb", "lin", "lin#2"]


def _tied() -> Any:
    from tests.zoo import make

    return make("tied")


def test_functions_of_parameters_are_parameters() -> None:
    """A weight that is computed (weight norm, a cast) still opens a segment of its own."""
    plan = planned(models.Normed(), torch.randn(4, 8))
    names = [x.name for x in plan.layers]
    assert len(names) == 2
    assert set(plan.layers[0].parameters) == {
        "a.bias", "a.parametrizations.weight.original0", "a.parametrizations.weight.original1",
    }  # fmt: skip


def test_branches_that_meet_again_are_one_segment() -> None:
    plan = planned(models.Gated(), torch.randn(4, 8))
    found = points(plan)
    assert found["a"] == "mul" and found["b"] == "div"


def test_branches_that_meet_other_weights_are_not_cut_before_they_do() -> None:
    found = points(planned(models.DualPath(), torch.randn(4, 8)))
    assert found == {"a": "relu", "c": "linear", "skip": "cat"}


def test_frozen_layers_carry_no_feedback_point() -> None:
    model = models.Gated()
    model.b.requires_grad_(False)
    plan = planned(model, torch.randn(4, 8))
    assert list(points(plan)) == ["a"]
    model.requires_grad_(False)
    model.out.requires_grad_(True)
    plan = build_plan(model, (torch.randn(4, 8),), method="bp")
    assert plan.layers == () and plan.placement.head == ("out.bias", "out.weight")


def test_recurrent_cells_are_whole() -> None:
    plan = plan_of("lstm", "dfa")
    (layer,) = plan.layers
    assert layer.name == "rnn" and len(layer.parameters) == 8
