"""Exact rows: the chain of a part of the batch, and the cotangents that it corrects."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.analysis.cost import GraphCost
from grapefx.errors import OptionError, VerifyError
from grapefx.ir import StepGraph
from grapefx.passes.feedback.exact_rows import ExactRows
from grapefx.passes.graph import meta
from grapefx.passes.graph.verify import independence
from grapefx.plan import Plan, build_plan
from grapefx.report.from_plan import method_graphs
from tests.zoo import (
    MLP,
    ZOO,
    Masked,
    Residual,
    assert_same_gradients,
    cnn,
    compiled,
    loss_of,
    make,
    plan_of,
    train_step,
)

WHOLE: dict[str, Any] = {"exact_rows": 1.0, "exact_weight": 1.0, "calib_every": None}


def still(model: nn.Module) -> nn.Module:
    """Without dropout, and with batch norms that use their running statistics."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model


def nets(model: nn.Module, args: tuple[Any, ...], **options: Any) -> tuple[nn.Module, nn.Module]:
    """The compiled net and the eager model, each after one step on the same batch."""
    net = compiled(copy.deepcopy(model), options.pop("method", "dfa"), **{**WHOLE, **options})
    train_step(net, args)
    train_step(model, args)
    return net, model


class Unrolled(nn.Module):
    """A recurrent net written out over time, so that feedback points lie inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.keep, self.out = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros(x.shape[0], 7, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(self.read(x[:, t]) + self.keep(h))
        return self.out(h)


class TimeFirst(nn.Module):
    """An encoder whose batch is the second dim inside, and attention over the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.attend = nn.MultiheadAttention(8, 2)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x)).transpose(0, 1)
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0])
        return self.out(h).transpose(0, 1)


class Instance(nn.Module):
    """Instance and group norms: statistics of each sample alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.group = nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.norm(self.a(x)))
        return self.out(F.adaptive_avg_pool2d(self.group(self.b(h)), 1).flatten(1))


MORE = {
    "unrolled": lambda: (Unrolled(), (torch.randn(4, 5, 6),)),
    "time first": lambda: (TimeFirst(), (torch.randn(4, 3, 8),)),
    "instance norm": lambda: (Instance(), (torch.randn(4, 2, 6, 6),)),
}


def doubled(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model in float64 and without randomness, and the arguments of a call."""
    torch.manual_seed(2)
    model, args = make(name) if name in ZOO else MORE[name]()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    return still(model.double()), args


@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_all_rows_at_weight_one_are_backpropagation(name: str) -> None:
    """Whatever the maps are, every gradient is that of eager autograd."""
    assert_same_gradients(*nets(*doubled(name)), tol=1e-10)


@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_a_part_equals_the_gradient_of_a_mixed_cotangent(name: str) -> None:
    """c = B e on all samples but the first n, where it is delta: linear in who is exact.

    With maps alone, all rows exact, and the first n exact, on a loss that only the first n or only
    the others feel: the three agree where they must.
    """
    model, args = doubled(name)
    lead = next(a for a in args if a.ndim and a.shape[0] == args[0].shape[0])
    batch = lead.shape[0]
    n = ExactRows(0.4, 1.0, "first", None, batch).count(batch)

    def step(first: bool, **options: Any) -> nn.Module:
        net = compiled(copy.deepcopy(model), "dfa", calib_every=None, **options)
        out = net(*args)
        out = out["logits"] if isinstance(out, dict) else out
        loss_of(out[:n] if first else out[n:]).backward()
        return net

    part = {"exact_rows": 0.4, "exact_weight": 1.0}
    whole = {"exact_rows": 1.0, "exact_weight": 1.0}
    assert_same_gradients(step(True, **part), step(True, **whole), tol=1e-10)
    assert_same_gradients(step(False, **part), step(False), tol=1e-10)


@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_the_largest_errors_are_the_first_once_sorted(name: str) -> None:
    """The same samples in the order of their errors, of which the first n are exact."""
    model, args = doubled(name)
    lead = next(a for a in args if a.ndim and a.shape[0] == args[0].shape[0])
    batch = lead.shape[0]
    order = torch.arange(batch - 1, -1, -1)
    factor = 10.0 ** torch.arange(batch).double()  # the last sample's error is the largest

    def step(pick: str, order: Tensor) -> nn.Module:
        net = compiled(
            copy.deepcopy(model), "dfa", calib_every=None, exact_rows=0.4, exact_pick=pick
        )
        out = net(*(a[order] if a.ndim and a.shape[0] == batch else a for a in args))
        out = out["logits"] if isinstance(out, dict) else out
        wide = factor[order].view(-1, *[1] * (out.ndim - 1))
        out.backward(torch.ones_like(out) * wide)
        return net

    same = torch.arange(batch)
    found = step("largest", same)
    assert_same_gradients(found, step("first", order), tol=1e-9)
    if batch > 2:
        with pytest.raises(AssertionError):
            assert_same_gradients(found, step("first", same), tol=1e-9)


@pytest.mark.parametrize("weight", [1.0, 2.0])
@pytest.mark.parametrize("batch", [8, 5, 3, 1])
def test_an_mlp_by_hand(weight: float, batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    model.double()
    net = compiled(
        copy.deepcopy(model), "dfa", calib_every=None, exact_rows=0.3, exact_weight=weight
    )
    x = torch.randn(batch, 6, dtype=torch.float64)
    out = net(x)
    e = torch.randn(batch, 3, dtype=torch.float64)
    out.backward(e)
    n = {8: 3, 5: 2, 3: 1, 1: 1}[batch]
    grads = {k: p.grad for k, p in net.named_parameters()}
    (w1, b1), (w2, b2), (w3, _) = ((m.weight, m.bias) for m in (model[0], model[2], model[4]))
    h1 = torch.tanh(x @ w1.T + b1)
    h2 = torch.tanh(h1 @ w2.T + b2)
    delta2 = e @ w3
    delta1 = (delta2 * (1 - h2 * h2)) @ w2
    for h, below, delta, i in ((h1, x, delta1, 0), (h2, h1, delta2, 2)):
        c = e @ net.feedback[f"{i}/B"].double()
        c[:n] += weight * (delta - c)[:n]
        local = c * (1 - h * h)
        torch.testing.assert_close(grads[f"{i}.weight"], local.T @ below)
        torch.testing.assert_close(grads[f"{i}.bias"], local.sum(0))


@pytest.mark.parametrize("kind", ["residual", "columns"])
def test_batch_norm_in_training_is_differentiated_whole(kind: str) -> None:
    """All rows exact: what eager autograd gives, through the batch's own mean and variance."""
    torch.manual_seed(1)
    if kind == "residual":
        model, x = still(Residual().double()).train(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    else:
        layers = [
            m for _ in range(3) for m in (nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())
        ]
        model, x = nn.Sequential(*layers, nn.Linear(6, 3)).double(), torch.randn(7, 6).double()
    assert_same_gradients(*nets(model, (x,)), tol=1e-10)


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "encoder"])
def test_inductor_at_any_batch_size(kind: str, dynamic: bool | None) -> None:
    """Compiled for one size or for all: what the uncompiled graph gives, from one exact row on."""
    torch.manual_seed(4)
    mask = torch.ones(5, 5).tril() == 0
    model, shape, rest = {
        "mlp": (MLP(depth=2), (8,), ()),
        "cnn": (cnn(), (2, 8, 8), ()),
        "encoder": (Masked(depth=1), (5, 8), (mask,)),
    }[kind]
    model = still(model.double())
    made = [
        compiled(
            copy.deepcopy(model), "dfa", exact_rows=0.3, calib_every=None,
            backend=backend, dynamic=dynamic,
        )
        for backend in ("inductor", "eager")
    ]  # fmt: skip
    for batch in (3, 9, 5, 1):
        x = torch.randn(batch, *shape, dtype=torch.float64)
        fresh = compiled(copy.deepcopy(model), "dfa", exact_rows=0.3, calib_every=None)
        for net in (*made, fresh):
            train_step(net, (x, *rest))
        for net in made:
            assert_same_gradients(net, fresh, tol=1e-9)


@pytest.mark.parametrize("method", ["dfa", "fdfa", "grape"])
@pytest.mark.parametrize(
    "options",
    [
        {"radial": "auto"}, {"feedback": "pooled:1"}, {"feedback": "sparse:2"},
        {"calib_every": 1}, {"calib_every": 1, "calib_refit": "feedback"},
        {"tangent_fraction": 0.5}, {"parallel": "horizontal"},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)  # fmt: skip
def test_with_every_method_and_other_options(method: str, options: dict[str, Any]) -> None:
    """All rows exact is backpropagation, whatever else is on."""
    torch.manual_seed(3)
    model, args = make("cnn")
    net, eager = nets(still(model), args, method=method, **options)
    if options.get("calib_every"):
        for _ in range(2):  # the first step calibrates
            train_step(net, args)
    assert_same_gradients(net, eager, tol=1e-9)


def test_autocast_and_gradient_of_every_parameter() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net = compiled(model, "dfa", exact_rows=0.5, radial=True, calib_every=None)
    for batch in (6, 1):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = net(torch.randn(batch, 6))
        out.float().pow(2).mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


class Mixed(nn.Module):
    """Values of other samples reach a sample: by ``how``."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.c(torch.tanh(self.b(self.how(torch.tanh(self.a(x))))))


@pytest.mark.parametrize(
    "how",
    [
        lambda h: h - h.mean(0), lambda h: h.flip(0), lambda h: h.roll(1, 0),
        lambda h: torch.softmax(h, 0), lambda h: h.cumsum(0), lambda h: h @ (h.T @ h),
        lambda h: h[torch.arange(h.shape[0]) - 1],
    ],
)  # fmt: skip
def test_samples_that_mix_are_refused(how: Any) -> None:
    """The error names the operator and the remedy; without the option the model trains."""
    x = torch.randn(6, 8)
    options: dict[str, Any] = {"calib_every": None, "points": ["a", "b"]}
    net = compiled(Mixed(how), "dfa", exact_rows=0.5, **options)
    with pytest.raises(OptionError, match=r"exact_rows=0\.5") as caught:
        loss_of(net(x)).backward()
    assert re.search(r"aten\.\w+", str(caught.value))
    assert "remedy: exact_rows=0" in str(caught.value)
    loss_of(compiled(Mixed(how), "dfa", **options)(x)).backward()


@pytest.mark.parametrize("method", ["bp", "fa", "fg-w", "pepita"])
def test_options_that_do_not_go_together(method: str) -> None:
    with pytest.raises(OptionError, match=r"exact_rows=0\.5"):
        grapefx.compile(MLP(), method=method, exact_rows=0.5)


@pytest.mark.parametrize("bad", [{"exact_rows": 1.5}, {"exact_rows": -0.1}, {"exact_weight": 0}])
def test_values_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        grapefx.compile(MLP(), method="dfa", **bad)


def _phases(step: StepGraph) -> set[str | None]:
    return {meta.phase(n) for n in step.gm.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize("name", ZOO)
def test_only_the_option_makes_a_chain_and_the_verifier_knows(name: str) -> None:
    plain, chained = plan_of(name, "dfa"), plan_of(name, "dfa", exact_rows=0.25)
    assert "exact_rows" not in _phases(plain.graph("update"))
    step = chained.graph("update")
    assert "exact_rows" in _phases(step)
    with pytest.raises(VerifyError, match="nobody asked for"):
        independence(step, chained.layers)
    # a chain that reads an update is found
    node = next(n for n in step.gm.graph.nodes if meta.phase(n) == "projection")
    broken = step.copy()
    found = next(n for n in broken.gm.graph.nodes if n.name == node.name)
    user = next(u for u in found.users if u.op == "call_function")
    user.meta = {**user.meta, meta.PHASE: "exact_rows"}
    with pytest.raises(VerifyError, match="reads the update"):
        independence(broken, chained.layers, exact_rows=True)


def _cost(plan: Plan, kind: str, batch: int) -> GraphCost:
    return method_graphs(plan).cost(plan.graph(kind).gm, batch)


def _by_phase(cost: GraphCost) -> dict[str, int]:
    return cost.by(lambda n: meta.phase(n) or "", "matmul_flops")


@pytest.mark.parametrize("fraction", [0.125, 0.25, 1.0])
def test_the_chain_costs_that_part_of_the_input_gradients(fraction: float) -> None:
    """Products of the chain: the fraction of those that backpropagation spends on inputs."""
    model, x = MLP(64, 6), torch.randn(64, 8)
    plan = build_plan(model, (x,), method="dfa", exact_rows=fraction)
    chain = _by_phase(_cost(plan, "update", 64))["exact_rows"]
    # 2 FLOPs a multiply-add: 5 products of 64 x 64 between points, one of 5 x 64 from the error
    assert chain == fraction * 2 * 64 * (5 * 64 * 64 + 5 * 64)
    bp = build_plan(model, (x,), method="bp")
    assert chain == fraction * _by_phase(_cost(bp, "calibration", 64))["input_grad"]


def test_the_report_says_what_waits() -> None:
    net = compiled(MLP(), "dfa", exact_rows=0.25, exact_pick="largest", exact_weight=1.0)
    loss_of(net(torch.randn(8, 8))).backward()
    text = " ".join(str(net.explain()).split())
    assert "a backward chain on 2 of 8 samples" in text


def test_a_frozen_model_passes_the_gradient_of_its_input() -> None:
    """Nothing learns and nothing is corrected, whatever was asked."""
    model, x = MLP().requires_grad_(False), torch.randn(4, 8, requires_grad=True)
    net = compiled(model, "dfa", exact_rows=0.25, exact_pick="largest", exact_weight=1.0)
    loss_of(net(x)).backward()
    found, x.grad = x.grad, None
    loss_of(model(x)).backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize(
    ("fraction", "batch", "n"), [(0.125, 128, 16), (0.125, 5, 1), (0.3, 10, 3), (1.0, 7, 7)]
)
def test_how_many_rows(fraction: float, batch: int, n: int) -> None:
    """The least number that is not below the fraction; 0.3 is taken as three tenths."""
    assert ExactRows(fraction, 1.0, "first", None, batch).count(batch) == n
