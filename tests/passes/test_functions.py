"""Custom autograd functions keep the derivative that they declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.errors import CaptureError, TangentError
from grapefx.passes.differentiate.tangent import add_tangents, streams_of
from grapefx.passes.graph.custom_functions import FUNCTION
from grapefx.passes.graph.verify import independence
from grapefx.plan import Plan, build_plan


class Gelu(torch.autograd.Function):
    """Saves its input only, and a number, as memory-saving activations do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return F.gelu(slope * x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        z = ctx.slope * x
        cdf = 0.5 * (1 + torch.erf(z / 2**0.5))
        pdf = torch.exp(-0.5 * z * z) / (2 * torch.pi) ** 0.5
        return grads[0] * ctx.slope * (cdf + z * pdf), None


class Sign(torch.autograd.Function):
    """Straight-through, clipped: what its forward computes has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (ctx.saved_tensors[0].abs() < 1)


class Product(torch.autograd.Function):
    """A linear layer of one's own, in the style with ``setup_context``."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        out = x @ w.t()
        return out if b is None else out + b

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].t() @ x, grads[0].sum(0) if ctx.needs_input_grad[2] else None


class Top(torch.autograd.Function):
    """Several results, one of them without a derivative, and a wrong gradient on purpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = x.argmax(1)
        ctx.mark_non_differentiable(best)
        return x * 2, best, x.exp()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 7 * grads[0] - grads[2]


class Net(nn.Module):
    """All of them in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = Gelu.apply(self.a(x), 1.3)
        h = Sign.apply(Product.apply(h, self.b.weight, self.b.bias))
        double, best, e = Top.apply(h * 0.3)
        return self.c(double + e.tanh() * best.unsqueeze(1))


def plan_of(model: nn.Module, x: Tensor, **options: Any) -> Plan:
    return build_plan(model, (x,), **{"method": "dfa", **options})


@pytest.mark.parametrize("options", [{}, {"calib_every": None}])
def test_exact_gradients_are_those_of_the_declared_backward(options: dict[str, Any]) -> None:
    """Of bp, and of a calibration step."""
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(8, 5).double().requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    method = "dfa" if not options else "bp"
    net = grapefx.compile(model, method=method, backend="eager", **options)
    net(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    for g, w in zip(found, want, strict=True):
        assert w.any()
        torch.testing.assert_close(g, w)
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x))


def test_a_weight_inside_is_a_layer() -> None:
    plan = plan_of(Net(), torch.randn(8, 5))
    assert [layer.name for layer in plan.layers] == ["a", "b"]
    graph = plan.graph("update")
    assert not [n for n in graph.gm.graph.nodes if n.target is FUNCTION]
    assert independence(graph, plan.layers)["b.weight"] == ("b",)


@pytest.mark.parametrize("method", ["dfa", "grape", "fdfa"])
def test_feedback_steps(method: str) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 5)
    net = grapefx.compile(model, method=method, backend="eager", calib_every=None)
    for _ in range(2):
        net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tangents_are_the_declared_gradient_transposed() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(8, 5).double()
    plan = plan_of(model, x, points="a")
    made = add_tangents(plan.joint, plan.layers, batch=plan.batch, batch_size=8, streams=((0,),))
    v = torch.randn(8, 6).double()
    graph = made.gm.graph
    graph.output_node().args = ((streams_of(made)[0].taps[0],),)
    made.gm.recompile()
    values = dict(model.named_parameters())
    inputs = {"input": x, "noise": v, "cotangent": torch.zeros(8, 3).double()}
    d = made.gm(*[inputs.get(s.role, values.get(s.name)) for s in made.inputs])[0]

    def behind(h: Tensor) -> Tensor:
        h = Gelu.apply(h, 1.3)
        h = Sign.apply(Product.apply(h, model.b.weight, model.b.bias))
        double, best, e = Top.apply(h * 0.3)
        return model.c(double + e.tanh() * best.unsqueeze(1))

    # this torch function transposes the gradient, too
    want = torch.autograd.functional.jvp(behind, model.a(x).detach(), v)[1]
    assert want.any()
    torch.testing.assert_close(d, want)


class Once(Gelu):
    """A backward without a derivative of its own."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.slope, None


class Uses(nn.Module):
    """One function behind a layer."""

    def __init__(self, fn: Any, *args: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.fn, self.args = fn, args

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.fn.apply(self.a(x), *self.args)).tanh())


def test_a_backward_that_is_differentiated_once() -> None:
    model, x = Uses(Once, 2.0), torch.randn(6, 4)
    plan_of(model, x, points="a").graph("update")
    plan_of(model, x, method="grape", points="a").graph("align")  # Dynamo has traced its operators
    exported = plan_of(model, x, method="grape", points="a", capture="export")
    with pytest.raises(TangentError, match=r"function(.|\n)*without tangents"):
        exported.graph("align")


class Draws(Sign):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + torch.rand_like(x)


class Writes(Sign):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mark_dirty(x)
        return x.mul_(2)


class WritesView(Sign):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mark_dirty(x)
        x[:, 0] = 0
        return x


class Given(Sign):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Any) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 3, None


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (Draws, "which draws random numbers(.|\\n)*detach"),
        # torch 2.11 traces the write and forgets that it was declared
        (Writes, "(mark_dirty|writes into its arguments)(.|\\n)*remedy"),
        (WritesView, "(mark_dirty|writes into its arguments)(.|\\n)*remedy"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_name(fn: Any, match: str) -> None:
    with pytest.raises(CaptureError, match=match):
        plan_of(Uses(fn), torch.randn(6, 4))
    x = torch.ones(2, requires_grad=True)
    Sign.apply(x * 0.5).sum().backward()  # and functions work again outside
    assert x.grad is not None and x.grad[0] == 0.5


@pytest.mark.parametrize("given", [nn.Linear(2, 2), lambda x: x, [torch.zeros(2)]])
def test_a_function_may_be_given_anything_that_dynamo_follows(given: Any) -> None:
    model, x = Uses(Given, given), torch.randn(6, 4)
    model(x).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    net = grapefx.compile(model, method="bp", backend="eager", calib_every=None)
    net(x).sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])
