"""What must hold of every registered method; a new one in ``BUILTIN`` is covered by being there."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

import grapefx
from grapefx.errors import MethodError
from grapefx.ir import StepGraph
from grapefx.methods import BUILTIN, Method, get_method
from grapefx.plan import Plan
from grapefx.runtime.module import FeedbackModule
from tests.zoo import (
    MLP,
    assert_same_gradients,
    compiled,
    eager_twin,
    gradients,
    make,
    plan_of,
    step_inputs,
    train_step,
)
from tools.common.data import load_images

NAMES = list(BUILTIN)
# one of each kind of model that the core must train
MODELS = ("mlp", "cnn", "residual", "encoder", "lstm", "tied")


def kind_of(plan: Plan) -> str:
    """The step that learns most."""
    kinds = plan.kinds()
    return next(k for k in ("align", "update", "calibration") if k in kinds)


def ancestors(nodes: list[Node]) -> set[Node]:
    found, stack = set(nodes), list(nodes)
    while stack:
        for a in stack.pop().all_input_nodes:
            if a not in found:
                found.add(a)
                stack.append(a)
    return found


def roles(step: StepGraph, nodes: set[Node]) -> set[str]:
    """The roles of the step's inputs among ``nodes``."""
    inputs = zip(step.inputs, step.placeholders(), strict=True)
    return {slot.role for slot, node in inputs if node in nodes}


def step_of(net: FeedbackModule, x: Tensor, y: Tensor) -> Tensor:
    """One training step of any method, class targets included."""
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    net.targets(y)
    loss.backward()
    return loss.detach()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (9,), generator=generator)


def small(seed: int = 0, act: type[nn.Module] = nn.Tanh) -> MLP:
    torch.manual_seed(seed)
    return MLP(7, 3, act).double()


# what is declared


@pytest.mark.parametrize("name", NAMES)
def test_graph_reads_what_is_declared(name: str) -> None:
    """The inputs that reach a cotangent (or a gradient) are those that the method reads."""
    plan = plan_of("mlp", name)
    method, kind = plan.method, kind_of(plan)
    step = plan.graph(kind)
    reads = set(method.reads)
    if method.project_after_learn and kind == "align":
        reads |= method.learns_from
    if method.mechanism == "points" and not method.transparent:
        ends = [n for n in step.gm.graph.nodes if n.meta.get("grapefx_phase") == "projection"]
        assert {n.meta["grapefx_layer"] for n in ends} == {x.name for x in plan.layers}
    else:
        ends = [n for s, n in step.produced("gradient") if isinstance(n, Node)]
    found = roles(step, ancestors(ends))
    assert ("cotangent" in found) == bool(reads & {"error", "next_delta"})
    assert ("target" in found) == ("target" in reads)
    assert (bool({"noise", "random"} & found)) == bool(reads & {"tangent", "noise"})
    assert ("feedback" in found) == method.keeps_state


@pytest.mark.parametrize("name", NAMES)
def test_sequential_or_parallel_as_declared(name: str) -> None:
    """A chain through other layers exists exactly where the method says that it is sequential."""
    plan = plan_of("mlp", name)
    step = plan.graph(kind_of(plan))
    first = plan.layers[0]
    ends = [n for s, n in step.produced("gradient") if s.name in first.parameters and n]
    assert ends
    behind = ancestors(ends)
    if plan.method.mechanism == "two_forwards":  # the chain runs forwards, behind the error
        ((_, target),) = step.select("target")
        last = [
            n for s, n in step.produced("gradient") if s.name in plan.layers[-1].parameters and n
        ]
        again = [n for n in ancestors(last) if n.op == "call_function" and target in ancestors([n])]
        assert first.name in {n.meta.get("grapefx_layer") for n in again}
        assert plan.method.sequential
        return
    phases = ("projection", "input_grad", "weight_grad")
    others = {
        n.meta["grapefx_layer"]
        for n in behind
        if n.meta.get("grapefx_phase") in phases and n.meta.get("grapefx_layer") != first.name
    } - {None}
    assert bool(others) == plan.method.sequential
    if not plan.method.sequential and plan.method.mechanism == "points":
        proved = plan.independent
        for x in plan.layers:
            for p in x.parameters:
                assert set(proved[p]) <= {x.name}


@pytest.mark.parametrize("name", NAMES)
def test_declaration_is_complete(name: str) -> None:
    method = get_method(name, {})
    assert method.name == name and type(method).__doc__
    assert grapefx.compile(small(), method=name, preset="paper")._method.name == name


# oracles


@pytest.mark.parametrize("name", [n for n in NAMES if BUILTIN[n].refits])
def test_fitted_feedback_of_a_linear_network_is_exact(name: str) -> None:
    """A batch that only fits the maps trains with the fitted maps: the gradients are exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 9), nn.Linear(9, 5)).double()
    twin = eager_twin(model)
    options: dict[str, Any] = {} if name != "grape" else {"norm": "fitted"}
    net = compiled(model, name, calib_refit="feedback", ridge=1e-12, **options)
    x = torch.randn(16, 6).double()
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin, tol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bp"])
def test_calibration_steps_are_exact(name: str) -> None:
    model = small()
    twin = eager_twin(model)
    net = compiled(model, name)
    x, y = batch()
    step_of(net, x, y)
    F.cross_entropy(twin(x), y).backward()
    assert_same_gradients(net, twin)


# state


def trained(name: str, steps: int, seed: int = 0) -> tuple[FeedbackModule, torch.optim.Optimizer]:
    net = compiled(small(), name, seed=seed, calib_unit="step", calib_every=3, calib_init=False)
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    for k in range(steps):
        step_of(net, *batch(k))
        opt.step()
    return net, opt


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_repeats_a_run_and_a_resumed_run_continues_it(name: str) -> None:
    whole, _ = trained(name, 5)
    first, opt = trained(name, 2)
    file = io.BytesIO()
    saved = (first.state_dict(), opt.state_dict(), first.feedback_state_dict())
    torch.save(saved, file)
    file.seek(0)
    model_state, opt_state, feedback = torch.load(file)
    net = compiled(small(3), name, calib_unit="step", calib_every=3, calib_init=False)
    net.load_state_dict(model_state)
    net.load_feedback_state_dict(feedback)
    again = torch.optim.Adam(net.parameters(), lr=0.01)
    again.load_state_dict(opt_state)
    for k in range(2, 5):
        step_of(net, *batch(k))
        again.step()
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)
    assert net.feedback.keys() == whole.feedback.keys()
    for key, t in net.feedback.items():
        assert torch.equal(t, whole.feedback[key]), key
    method = get_method(name, {})
    random = method.keeps_state or bool({"tangent", "noise"} & (method.reads | method.learns_from))
    other, _ = trained(name, 2, seed=1)
    pairs = zip(gradients(first).values(), gradients(other).values(), strict=True)
    same = all(
        (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
        for a, b in pairs
    )
    assert same != random  # another seed gives other feedback


# models


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_runs_on(model_name: str, name: str) -> None:
    """Finite gradients of every kind of step, or a MethodError that names node and reason."""
    model, args = make(model_name)
    plan = plan_of(model_name, name)
    try:
        plan.state_specs()
        graphs = {kind: plan.graph(kind) for kind in plan.kinds()}
    except MethodError as e:
        assert "remedy" in str(e) and name in str(e)
        return
    for kind, step in graphs.items():
        torch.manual_seed(0)
        inputs = [
            t.abs() if slot.role == "feedback" and slot.name[-2:] in ("/v", "/t", "/k") else t
            for slot, t in zip(step.inputs, step_inputs(plan, step, model, args), strict=True)
        ]  # second moments and counts
        results = step.gm(*inputs)
        for slot, value in zip(step.outputs, results, strict=True):
            if slot.role in ("gradient", "feedback") and value is not None:
                assert value.isfinite().all(), (kind, slot)
                assert slot.role == "feedback" or value.any() or "bias" in slot.name, slot


STEPS = {"fg-w": (3e-4, 60), "fg-a": (0.05, 40), "lg-fg-a": (0.05, 40)}  # by their variance


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_on_digits(name: str) -> None:
    """A few steps of SGD on real images, without calibration."""
    data = load_images("mnist").head(256, 1)
    x, y = data.pixels(data.train_x).flatten(1), data.train_y.long()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    lr, steps = STEPS.get(name, (0.1, 25))
    net = compiled(model, name, calib_every=None)
    opt = torch.optim.SGD(net.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        losses.append(float(step_of(net, x, y)))
        opt.step()
    assert losses[-1] < losses[0] - 0.01, losses


def test_methods_are_frozen_and_comparable() -> None:
    for cls in BUILTIN.values():
        assert cls() == cls() and hash(cls()) == hash(cls())
        assert isinstance(cls(), Method)
