"""Batched updates are the same updates: parity in float64, what is found, what is left alone."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from grapefx.passes.divide import families, horizontal
from grapefx.passes.divide.horizontal import WORTH, batch_layers
from grapefx.passes.divide.partition import Split, split
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan import Plan, build_plan, sizes_of
from tests.zoo import MLP, Masked, Residual, make, plan_of, step_inputs
from tools.common import networks

ANY = 2**60  # every group pays


def blocks() -> nn.Module:
    """Three residual blocks of one width, as in a stage of ResNet-18."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), *(Residual.Block(4, 4) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "mlp": (lambda: MLP(depth=5), (6, 8), {}),
    "micro": (lambda: Masked(depth=3), (4, 5, 8), {"granularity": "layer"}),
    "macro": (
        lambda: networks.Transformer(11, 5, 8, 2, 3, 12, 0.1),
        (4, 5),
        {"granularity": "block"},
    ),
    "resnet": (blocks, (5, 2, 6, 6), {}),
}
# layers that must end up in one group, at least
GROUPS = {"mlp": 5, "micro": 3, "macro": 3, "resnet": 6}


@functools.cache
def captured(name: str) -> tuple[Plan, nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    build, shape, options = MODELS[name]
    model = build().double()
    args: tuple[Any, ...] = (torch.randn(*shape, dtype=torch.float64),)
    if len(shape) == 2 and name != "mlp":
        args = (torch.randint(0, 11, shape),)
    elif len(shape) == 3:
        args += (torch.ones(shape[1], shape[1]).tril() == 0,)
    return build_plan(model, args, method="grape", **options), model, args


def case(name: str, method: str) -> tuple[Plan, nn.Module, tuple[Any, ...]]:
    """A model's plan for a method; the capture is shared."""
    plan, model, args = captured(name)
    return plan.for_method(method, plan.options), model, args


def kind_of(plan: Plan) -> str:
    return "align" if plan.method.needs_tangents() else "update"


def parts_of(plan: Plan, kind: str, args: tuple[Any, ...], backend: str, fixed: bool) -> Split:
    step = plan.graph(kind)
    batch = args[0].shape[0]
    sizes = sizes_of(step, batch, plan.rows(batch)) if fixed else None
    return split(prepare(step, "update", backend, LowerContext(sizes)))


def real_inputs(plan: Plan, kind: str, parts: Split, model: nn.Module, args: Any) -> list[Any]:
    """What the update graph gets: saved values of a real forward, then the late inputs."""
    inputs = step_inputs(plan, plan.graph(kind), model, args)
    torch.manual_seed(0)
    first = list(parts.forward(*[inputs[i] for i in parts.forward_inputs]))
    return [*first[len(parts.forward_outputs) :], *[inputs[i] for i in parts.late_inputs]]


def products(gm: GraphModule) -> Counter[str]:
    """Calls of products in a graph."""
    names = (str(n.target).split(".")[1] for n in gm.graph.nodes if n.op == "call_function"
             and str(n.target).startswith("aten"))  # fmt: skip
    heavy = ("mm", "bmm", "addmm", "convolution_backward")
    return Counter(n for n in names if n in heavy or n.startswith("_scaled_dot"))


def assert_same(update: GraphModule, batched: GraphModule, inputs: list[Any]) -> None:
    for old, new in zip(update(*inputs), batched(*inputs), strict=True):
        assert (old is None) == (new is None)
        if isinstance(old, Tensor):
            assert old.stride() == new.stride() and old.dtype == new.dtype
            a, b = old.double().nan_to_num(), new.double().nan_to_num()
            assert float((a - b).norm() / a.norm().clamp_min(1e-8)) < 1e-10


@pytest.mark.parametrize("method", ["dfa", pytest.param("fdfa", marks=pytest.mark.slow), "grape"])
@pytest.mark.parametrize("name", list(MODELS))
def test_batched_updates_are_the_same(name: str, method: str) -> None:
    plan, model, args = case(name, method)
    kind = kind_of(plan)
    for backend in ("inductor", "eager") if method == "grape" else ("inductor",):
        parts = parts_of(plan, kind, args, backend, True)
        batched, groups = batch_layers(parts.update, decompose=backend == "inductor", worth=ANY)
        assert max(len(g) for g in groups) >= GROUPS[name]
        assert sum(products(batched).values()) < 0.7 * sum(products(parts.update).values())
        assert_same(parts.update, batched, real_inputs(plan, kind, parts, model, args))


@pytest.mark.parametrize("name", ["residual", "branches", "encoder", "tied", "inplace"])
def test_mixed_models_survive(name: str) -> None:
    """Mixed, tied, recurrent and branching models: whatever is batched computes the same."""
    model, args = make(name)
    plan = plan_of(name)
    parts = parts_of(plan, "align", args, "eager", True)
    batched, _ = batch_layers(parts.update, decompose=False, worth=ANY)
    assert_same(parts.update, batched, real_inputs(plan, "align", parts, model, args))


def test_a_symbolic_batch_size_is_left_alone() -> None:
    """Some of vmap's rules would fix it, for the whole plan."""
    plan, _, args = case("micro", "dfa")
    parts = parts_of(plan, "update", args, "eager", False)
    batched, groups = batch_layers(parts.update, decompose=False, worth=ANY)
    assert batched is parts.update and groups == ()


def test_mlp_becomes_one_product_of_each_sort() -> None:
    """Five layers: one projection; the first layer's weight gradient and the head's stay alone."""
    plan, _, args = case("mlp", "dfa")
    parts = parts_of(plan, "update", args, "inductor", True)
    batched, groups = batch_layers(parts.update, decompose=True, worth=ANY)
    assert products(parts.update) == {"mm": 11}
    assert products(batched) == {"mm": 2, "bmm": 2}
    assert len(groups) == 1
    assert {layer.name for layer in plan.layers} == set(groups[0])


def test_what_does_not_pay_stays_as_it_is() -> None:
    plan, _, args = case("mlp", "dfa")
    parts = parts_of(plan, "update", args, "inductor", True)
    batched, groups = batch_layers(parts.update, decompose=True, worth=0)
    assert batched is parts.update and groups == ()
    assert WORTH["cpu"] < WORTH["cuda"]


def test_a_chain_is_never_batched() -> None:
    """Backpropagation's layers are alike and wait for each other."""
    plan, model, args = case("mlp", "bp")
    parts = parts_of(plan, "calibration", args, "eager", True)
    batched, _ = batch_layers(parts.update, decompose=False, worth=ANY)
    inputs = real_inputs(plan, "calibration", parts, model, args)
    assert_same(parts.update, batched, inputs)
    assert products(batched)["bmm"] == 0


@pytest.fixture
def without_rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every product and every attention fails to batch."""
    failed: list[str] = []
    batched = horizontal._Rewrite.batched

    def refuse(self: Any, family: Any, node: Any) -> None:
        if str(node.target).split(".")[1] in ("mm", "bmm", "convolution_backward"):
            failed.append(node.name)
            raise NotImplementedError
        batched(self, family, node)

    monkeypatch.setattr(horizontal._Rewrite, "batched", refuse)
    yield failed


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_an_operator_without_a_rule_runs_layer_by_layer(
    name: str, without_rules: list[str]
) -> None:
    plan, model, args = case(name, "dfa")
    parts = parts_of(plan, "update", args, "eager", True)
    batched, _ = batch_layers(parts.update, decompose=False, worth=ANY)
    assert without_rules
    assert products(batched) == products(parts.update)
    assert_same(parts.update, batched, real_inputs(plan, "update", parts, model, args))


def test_what_is_shared_is_not_stacked() -> None:
    """The error goes into the batched projection as it is."""
    plan, _, args = case("mlp", "dfa")
    parts = parts_of(plan, "update", args, "eager", True)
    (projection,) = [
        f for f in families.find_families(parts.update, ANY) if len(f.nodes) == 5
        and all(n.target is torch.ops.aten.mm.default for n in f.nodes.values())
    ]  # fmt: skip
    assert len(list(families.stacks(projection, {}))) == 1
