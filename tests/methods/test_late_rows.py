"""Exact rows one step late: their chain corrects the gradients of the next step."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.analysis import Dag, build_dag
from grapefx.errors import GrapefxWarning, InputError, StateError, VerifyError
from grapefx.ir import Slot, StepGraph
from grapefx.options import Options
from grapefx.passes.graph import meta
from grapefx.passes.graph.verify import independence
from grapefx.plan import Plan, build_plan
from grapefx.report.from_plan import method_graphs
from grapefx.torch_compat import size_hint
from tests.methods.test_exact_rows import MORE
from tests.zoo import (
    MLP,
    ZOO,
    assert_same_gradients,
    compiled,
    gradients,
    make,
    plan_of,
    step_inputs,
)

PART: dict[str, Any] = {"exact_rows": 0.4, "calib_every": None}


class Counted(nn.Module):
    """An embedding whose gradient is divided by how often a word is in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6, scale_grad_by_freq=True)
        self.a, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.tanh(self.a(self.embed(x))))


class Mixes(nn.Module):
    """In the last segment, which no chain passes, samples meet: by a mean, and one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        h = torch.tanh(self.a(self.second(h * (h + 1).mean(0)).flip(0).cumsum(0)))
        return self.out(torch.tanh(self.b(h)))


SHARED = {
    **MORE,
    "counted": lambda: (Counted(), (torch.tensor([0, 1, 1, 2, 1, 0, 1]),)),
    "mixes": lambda: (Mixes(), (torch.randn(7, 6),)),
}


def planned(name: str) -> tuple[Any, nn.Module, tuple[Any, ...]]:
    """How a plan with given options is made, and the model in float64 with a call's arguments."""
    if name in ZOO:
        return lambda **o: plan_of(name, "dfa", **o), *make(name)
    torch.manual_seed(2)
    model, args = SHARED[name]()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    first = {"points": ["a", "b"]} if name == "mixes" else {}
    base = build_plan(model.double(), args, method="dfa", **first)

    def plan(**options: Any) -> Plan:
        own = Options(**first, **options)
        return dataclasses.replace(base, options=own, _graphs={}, independent={}, passes={})

    return plan, model, args


def laid(value: Tensor, like: Tensor) -> Tensor:
    """A value in memory as the graph was traced for."""
    order = sorted(range(like.ndim), key=lambda d: -size_hint(like.stride(d)))
    back = [order.index(d) for d in range(like.ndim)]
    return value.permute(order).contiguous().permute(back)


def results(step: StepGraph, given: list[Any]) -> dict[tuple[str, str], Tensor]:
    vals = [n.meta["val"] for n in step.placeholders()]
    torch.manual_seed(4)
    found = step.gm(*map(laid, given, vals))
    slots = [(s.role, s.name) for s in step.outputs]
    return dict(zip(slots, found, strict=True))


@pytest.mark.parametrize("pick", ["first", "largest"])
@pytest.mark.parametrize("name", [*ZOO, *SHARED])
def test_what_waits_is_what_is_added_at_once(name: str, pick: str) -> None:
    """A step's gradients: its own and the pending ones. What it leaves: the difference that the
    same rows make at once. To 1e-10, through batch norm in training, shared weights and shortcuts.
    """
    plan, model, args = planned(name)
    runs = {}
    for kind, options in (
        ("plain", {"calib_every": None}),
        ("once", {**PART, "exact_pick": pick}),
        ("late", {**PART, "exact_pick": pick, "exact_late": True}),
    ):
        made = plan(**options)
        step = made.graph("update")
        given = step_inputs(made, step, model, args)
        before = {s.name: v for s, v in zip(step.inputs, given, strict=True)}
        runs[kind] = results(step, given)
    assert "late" in kind and made.late
    size = max(
        float(g.norm())
        for (role, _), g in runs["once"].items()
        if role == "gradient" and g is not None
    )
    moved = 0.0
    for slot, plain in runs["plain"].items():
        role, parameter = slot
        if role != "gradient":
            assert plain is None or torch.equal(plain, runs["late"][slot]), slot
        elif plain is not None:
            missing = runs["once"][slot] - plain
            pending = before.get(f"{parameter}/late", torch.zeros_like(plain))
            left = runs["late"].get(("feedback", f"{parameter}/late"), torch.zeros_like(plain))
            assert float((runs["late"][slot] - plain - pending).norm()) < 1e-10 * size, parameter
            assert float((missing - left).norm()) < 1e-10 * size, parameter
            moved = max(moved, float(missing.norm()))
    assert moved > 1e-3 * size


def late_state(net: nn.Module) -> dict[str, Tensor]:
    """What waits for the next step, by parameter."""
    found = net.feedback.items()  # type: ignore[operator, union-attr]
    return {k.removesuffix("/late"): t for k, t in found if k.endswith("/late")}


def data(steps: int = 6, batch: int = 5, width: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(9)
    made = [torch.randn(batch, width + 5, dtype=torch.float64) for _ in range(steps)]
    return [(t[:, :width], t[:, width:]) for t in made]


def train(net: nn.Module, batches: list[tuple[Tensor, Tensor]], lr: float = 0.2) -> None:
    """SGD on an inner product with given numbers: they are the error."""
    for x, e in batches:
        net.zero_grad()
        net(x).backward(e)
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= lr * p.grad


def mlp(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A small net in float64, compiled and plain."""
    torch.manual_seed(0)
    model = MLP(width=6, depth=2, act=nn.Tanh).double()
    given = {**PART, "exact_late": True, **options}
    return compiled(copy.deepcopy(model), given.pop("method", "dfa"), **given), model


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_three_steps_by_hand(weight: float) -> None:
    """Three steps of SGD, as the rule is written: g(c) + the P of the step before, which is 0."""
    net, model = mlp(exact_weight=weight)
    batches = data(3)
    train(net, batches)
    (w1, b1), (w2, b2), (w3, b3) = (
        (m.weight.detach().clone(), m.bias.detach().clone())
        for m in (*model.layers, model.out)  # type: ignore[union-attr, misc]
    )
    maps = [net.feedback[f"layers.{k}/B"].double() for k in (0, 1)]  # type: ignore[index]
    pending = [torch.zeros_like(p) for p in (w1, b1, w2, b2)]
    for x, e in batches:
        h1 = torch.tanh(x @ w1.T + b1)
        h2 = torch.tanh(h1 @ w2.T + b2)
        delta2 = e @ w3
        delta1 = (delta2 * (1 - h2 * h2)) @ w2
        grads, made = [], []
        for h, below, delta, b in ((h1, x, delta1, maps[0]), (h2, h1, delta2, maps[1])):
            c = e @ b
            local, rest = c * (1 - h * h), (weight * (delta - c) * (1 - h * h))[:2]
            grads += [local.T @ below, local.sum(0)]
            made += [rest.T @ below[:2], rest.sum(0)]
        head = (e.T @ h2, e.sum(0))
        for p, g, late in zip((w1, b1, w2, b2), grads, pending, strict=True):
            p -= 0.2 * (g + late)
        w3 -= 0.2 * head[0]
        b3 -= 0.2 * head[1]
        pending = made
    for p, q in zip(net.parameters(), (w1, b1, w2, b2, w3, b3), strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(late_state(net).values(), pending, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("how", ["checkpoint", "deepcopy", "pickle"])
def test_a_run_that_is_interrupted_goes_on_as_it_was(how: str) -> None:
    batches = data()
    whole, _ = mlp()
    train(whole, batches)
    first, _ = mlp()
    train(first, batches[:3])
    if how == "checkpoint":
        again, _ = mlp(seed=7)
        again.load_state_dict(first.state_dict())
        again.load_feedback_state_dict(first.feedback_state_dict())  # type: ignore[operator]
    else:
        again = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    train(again, batches[3:])
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert all(torch.equal(t, late_state(again)[k]) for k, t in late_state(whole).items())


def test_a_checkpoint_of_other_options() -> None:
    """One without corrections starts at zero; one with them is refused where nothing reads them."""
    late, _ = mlp()
    train(late, data(1))
    once, _ = mlp(exact_late=False)
    train(once, data(1))
    with pytest.raises(StateError, match="late"):
        once.load_feedback_state_dict(late.feedback_state_dict())  # type: ignore[operator]
    late.load_feedback_state_dict(once.feedback_state_dict())  # type: ignore[operator]
    assert not any(t.any() for t in late_state(late).values())
    train(late, data(1))
    assert all(t.any() for t in late_state(late).values())


def test_a_calibration_takes_none_and_leaves_none() -> None:
    net, model = mlp()
    (x, e), *_ = data()
    train(net, data(2), lr=0.0)
    assert all(t.any() for t in late_state(net).values())
    net.zero_grad()
    with net.calibration():  # type: ignore[operator]
        net(x).backward(e)
    model(x).backward(e)
    assert_same_gradients(net, model)
    assert not any(t.any() for t in late_state(net).values())


def test_a_calibration_that_only_refits_corrects_late_as_any_step() -> None:
    options = {"calib_every": 1, "calib_unit": "step", "calib_refit": "feedback"}
    late, _ = mlp(**options)
    plain, _ = mlp(**options, exact_late=False, exact_rows=0)
    first, second = data(2)
    train(late, [first], lr=0.0)
    train(plain, [first], lr=0.0)
    assert_same_gradients(late, plain)
    pending = late_state(late)
    assert all(t.any() for t in pending.values())
    train(late, [second], lr=0.0)
    train(plain, [second], lr=0.0)
    for name, waited in pending.items():
        torch.testing.assert_close(gradients(late)[name], gradients(plain)[name] + waited)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    net, _ = mlp()
    batches = data()
    train(net, batches[:1], lr=0.0)
    before = dict(net.feedback)  # type: ignore[arg-type]
    x, e = batches[1]
    with pytest.warns(GrapefxWarning, match="not finite"):
        train(net, [(x, e.clone().fill_(float("nan")))], lr=0.0)
    assert net.skipped_updates == 1
    assert all(torch.equal(t, before[k]) for k, t in net.feedback.items())  # type: ignore[union-attr, operator]


def test_a_correction_that_overflows_is_not_kept() -> None:
    """A finite error whose chain is not: the gradients are the method's own."""
    net, _ = mlp()
    (x, e), *_ = data()
    train(net, [(x, e)], lr=0.0)
    before = late_state(net)
    with torch.no_grad():
        net.out.weight.fill_(1e300)  # type: ignore[union-attr]
    net.zero_grad()
    with pytest.warns(GrapefxWarning, match="not finite"):
        net(x).backward(e * 1e200)
    assert all(torch.equal(t, before[k]) for k, t in late_state(net).items())
    hidden = [p.grad for n, p in net.named_parameters() if n.startswith("layers")]
    assert all(g is not None and g.isfinite().all() for g in hidden)


def test_what_a_frozen_parameter_left_is_dropped() -> None:
    net, _ = mlp()
    train(net, data(1), lr=0.0)
    net.layers[0].weight.requires_grad_(False)  # type: ignore[union-attr, operator, index]
    train(net, data(1), lr=0.0)
    assert not late_state(net)["layers.0.weight"].any()
    assert late_state(net)["layers.0.bias"].any()


def test_a_batch_of_one_takes_part() -> None:
    """It has a graph of its own, all of whose samples are exact, and the same state."""
    late, _ = mlp(exact_weight=1.0)
    plain, _ = mlp(exact_late=False, exact_rows=0)
    pending = {}
    for k, batch in enumerate((5, 1, 1, 5)):
        _, (x, e) = data(2, batch)
        for net in (late, plain):
            train(net, [(x, e)], lr=0.0)
        for name, waited in pending.items():
            torch.testing.assert_close(gradients(late)[name], gradients(plain)[name] + waited)
        pending = late_state(late)
        assert all(t.any() for t in pending.values()), k


def test_nothing_is_corrected_while_only_maps_learn() -> None:
    net, _ = mlp(method="grape", align_warmup=1)
    train(net, data(1), lr=0.0)
    assert not any(t.any() for t in late_state(net).values())
    train(net, data(1), lr=0.0)
    assert all(t.any() for t in late_state(net).values())


@pytest.mark.parametrize(
    "options",
    [
        {"mean_field": 1}, {"radial": "auto"}, {"feedback": "seeded"}, {"exact_rows": 1.0},
        {"parallel": "horizontal"}, {"method": "fdfa", "tangent_fraction": 0.5},
        {"method": "grape"}, {"feedback": "sparse:2"},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)  # fmt: skip
def test_with_other_methods_and_options(options: dict[str, Any]) -> None:
    """What waits after a step is the difference that the same rows make at once."""
    late, once = mlp(**options)[0], mlp(**options, exact_late=False)[0]
    plain = mlp(**{**options, "exact_late": False, "exact_rows": 0})[0]
    first = data(1)
    for net in (late, once, plain):
        train(net, first, lr=0.0)
    assert_same_gradients(late, plain)
    for name, waiting in late_state(late).items():
        torch.testing.assert_close(gradients(plain)[name] + waiting, gradients(once)[name])


def test_the_gradient_of_an_input_is_of_its_own_batch() -> None:
    """No correction of the last batch's samples is added to it."""
    late, plain = mlp()[0], mlp(exact_late=False, exact_rows=0)[0]
    found = []
    for net in (late, plain):
        train(net, data(1), lr=0.0)
        x, e = data(2)[1]
        net(x.requires_grad_()).backward(e)
        found.append(x.grad)
    assert torch.equal(*found)


def test_a_scale_that_may_change_is_refused() -> None:
    net = compiled(MLP(), "dfa", **PART, exact_late=True)
    with torch.autocast("cpu", torch.float16), pytest.raises(InputError, match="exact_late"):
        net(torch.randn(4, 8))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(4, 8)).float().sum().backward()
    assert all(t.dtype == torch.float32 and t.any() for t in late_state(net).values())


def renamed(slot: Slot) -> Slot:
    return Slot(slot.role, "layer/B") if slot.role == "feedback" else slot


@pytest.mark.parametrize("name", ZOO)
def test_the_verifier_lets_no_update_wait(name: str) -> None:
    plain = plan_of(name, "dfa", calib_every=None)
    late = plan_of(name, "dfa", **PART, exact_late=True)
    step = late.graph("update")
    plain.graph("update")
    assert late.independent == plain.independent
    chain = next(n for n in step.gm.graph.nodes if meta.phase(n) == "exact_rows")
    for planted in ("projection", "gradient", "output", "feedback"):
        broken = step.copy()
        node = next(n for n in broken.gm.graph.nodes if n.name == chain.name)
        while isinstance(node.meta["val"], tuple | torch.SymInt):
            node = next(u for u in node.users if u.op == "call_function")
        said = f"the {planted}"
        if planted == "projection":
            said = "the update of layer"
            user = next(u for u in node.users if u.op == "call_function")
            layer = late.layers[0].name
            user.meta = {**user.meta, meta.PHASE: "projection", meta.LAYER: layer}
        elif planted == "feedback":  # what waits, under the name of another state
            broken = dataclasses.replace(broken, outputs=tuple(map(renamed, broken.outputs)))
        else:
            results = broken.results()
            results[next(i for i, s in enumerate(broken.outputs) if s.role == planted)] = node
            broken.output_node().args = (tuple(results),)
        with pytest.raises(VerifyError, match=f"{said}.*waits for the chain of exact rows"):
            independence(broken, late.layers, exact_rows=True, late=late.late)
    once = plan_of(name, "dfa", **PART)
    with pytest.raises(VerifyError, match="waits for the chain"):
        independence(once.graph("update"), once.layers, exact_rows=True, late=late.late)


def test_what_it_costs_and_who_waits() -> None:
    """Products: n / N of the input gradients and of the weight gradients behind points. Span: that
    without exact rows, where at once it is the whole chain's as well.
    """
    model, x = MLP(64, 6), torch.randn(64, 8)

    def analysed(**options: Any) -> tuple[dict[str, int], Dag]:
        plan = build_plan(model, (x,), method="dfa", calib_every=None, **options)
        cost = method_graphs(plan).cost(plan.graph("update").gm, 64)
        flops = cost.by(lambda n: meta.phase(n) or "", "matmul_flops")
        return flops, build_dag(cost)

    part = {"exact_rows": 0.25}
    (plain, a), (_, b), (late, c) = analysed(), analysed(**part), analysed(**part, exact_late=True)
    assert late["exact_rows"] == 0.25 * 2 * 64 * (5 * 64 * 64 + 5 * 64)
    assert late["late_rows"] == 0.25 * 2 * 64 * (5 * 64 * 64 + 8 * 64)
    assert late["weight_grad"] == plain["weight_grad"]
    spans = [d.span("matmul_flops") for d in (a, b, c)]
    assert spans[0] == spans[2] < spans[1]
    stages = [d.by_stage().span("matmul_flops") for d in (a, b, c)]
    assert stages[0] == stages[2] < stages[1]


def test_the_report_says_that_it_comes_late() -> None:
    net = compiled(MLP(), "dfa", exact_rows=0.25, exact_late=True)
    net(torch.randn(8, 8)).sum().backward()
    text = " ".join(str(net.explain()).split())
    assert "one step late: no update waits for the backward chain on 2 of 8 samples" in text
    assert "late_rows" in text


@pytest.mark.slow
@pytest.mark.parametrize("pick", ["first", "largest"])
def test_inductor_gives_the_same(pick: str) -> None:
    """Three steps at two batch sizes, compiled: batch norm, convolutions, a state that goes on."""
    torch.manual_seed(3)
    layers = [
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
    ]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 5)).double()
    made = [
        compiled(copy.deepcopy(model), "dfa", **PART, exact_pick=pick, exact_late=True, backend=b)
        for b in ("inductor", "eager")
    ]
    for batch in (6, 4, 6):
        x, e = torch.randn(batch, 2, 6, 6).double(), torch.randn(batch, 5).double()
        for net in made:
            train(net, [(x, e)], lr=0.1)
    assert_same_gradients(*made, tol=1e-9)
    a, b = map(late_state, made)
    for name, waiting in a.items():
        torch.testing.assert_close(waiting, b[name], rtol=1e-8, atol=1e-10)
