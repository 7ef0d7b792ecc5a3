"""The radial correction: Euler's identity holds where the pass says so, and cotangents obey it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.errors import PlacementError
from grapefx.maps import to_samples
from grapefx.passes.feedback.radial import bias_of, corrected, homogeneous_points
from grapefx.passes.graph import markers
from grapefx.plan import build_plan
from tests.zoo import compiled, loss_of, step_inputs


class Branches(nn.Module):
    """Two paths from one value, put together again: homogeneous behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        self.left = nn.Linear(8, 8, bias=False)
        self.right = nn.Linear(8, 4, bias=False)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        both = torch.cat([nn.functional.leaky_relu(self.left(h)), torch.relu(self.right(h))], 1)
        return self.last(both)


class Residual(nn.Module):
    """A shortcut past the second layer: its own value is not all that the output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        self.inside = nn.Linear(8, 8, bias=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        return self.last(h + torch.relu(self.inside(h)))


class Gated(nn.Module):
    """The output is the product of two layers of the same value: of degree 2."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.left, self.right = body, nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return self.left(h) * self.right(h)


def mlp(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), activation(), nn.Linear(8, 7, bias=False), activation(),
        nn.Linear(7, 3),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, bias=False), nn.LeakyReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(5, 3),
    )  # fmt: skip


def folded() -> nn.Module:
    """Tokens: the batch shares a dim with them in the middle."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8, bias=False)
            self.second = nn.Linear(8, 8, bias=False)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            n, t, _ = x.shape
            h = torch.relu(self.first(x)).reshape(n * t, 8)
            return self.last(torch.relu(self.second(h))).reshape(n, t, 3)

    return Tokens()


class Changed(nn.Module):
    """An MLP whose second layer sees ``change`` of the first one's value."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.last, self.change = nn.Linear(8, 3), change

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.change(self.second(h))))


# what stands behind the first layer, and how many points are homogeneous then
CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "plus-a-number": (lambda h: h + 1, 1),
    "minus-a-number": (lambda h: h - 0.05, 1),
    "number-minus": (lambda h: 1 - h, 1),
    "scaled": (lambda h: h * 3 / 2, 2),
    "divisor": (lambda h: 1 / (h + 9), 1),
    "floor": (lambda h: torch.div(h, 0.1, rounding_mode="floor"), 1),
    "maximum-of-ones": (lambda h: torch.maximum(h, torch.ones(8, dtype=h.dtype)), 1),
    "padded-with-zeros": (lambda h: nn.functional.pad(h[:, :6], (1, 1)), 2),
    "padded-with-ones": (lambda h: nn.functional.pad(h[:, :6], (1, 1), value=1.0), 0),
    "clamped": (lambda h: h.clamp(-0.1, 0.1), 1),
    "squared": (lambda h: h * h, 1),
}

FEW = lambda: torch.randn(5, 6)  # noqa: E731
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "mlp": (mlp, FEW, 2),
    "cnn": (cnn, lambda: torch.randn(5, 2, 8, 8), 2),
    "branches": (Branches, FEW, 1),
    "residual": (Residual, FEW, 2),
    "tanh": (lambda: mlp(nn.Tanh), FEW, 1),
    "gelu": (lambda: mlp(nn.GELU), FEW, 1),
    **{k: (lambda c=c: Changed(c), FEW, n) for k, (c, n) in CHANGES.items()},
    "tokens": (folded, lambda: torch.randn(5, 4, 6), 2),
}


def case(name: str) -> tuple[nn.Module, Tensor, int]:
    torch.manual_seed(3)
    model, x, found = CASES[name]
    return model().double(), x().double(), found


@pytest.mark.parametrize("name", CASES)
def test_which_points_are_homogeneous(name: str) -> None:
    """The graph decides: no activation of another degree, no other data in the tail."""
    model, x, found = case(name)
    assert len(homogeneous_points(build_plan(model, (x,), method="dfa").joint)) == found


class Watch(torch.fx.Interpreter):
    """Keeps the values of all nodes."""

    def run_node(self, n: torch.fx.Node) -> Any:
        self.seen: dict[torch.fx.Node, Any] = getattr(self, "seen", {})
        self.seen[n] = super().run_node(n)
        return self.seen[n]


@pytest.mark.parametrize("name", CASES)
def test_eulers_identity_holds_exactly_where_the_pass_says(name: str) -> None:
    """<h, delta> = <e, y - b> of each sample, to 1e-10, at these points; not at the others."""
    model, x, _ = case(name)
    plan = build_plan(model, (x,), method="dfa")
    graph = plan.joint.gm.graph
    watch = Watch(plan.joint.gm)
    watch.run(*step_inputs(plan, plan.joint, model, (x,)))

    def values(marker: Any) -> dict[int, Tensor]:
        return {i: watch.seen[n] for i, n in markers.find(graph, marker).items()}

    h, delta = values(markers.CUT), values(markers.CUT_BACKWARD)
    y, e = values(markers.TAP)[0], values(markers.TAP_BACKWARD)[0]
    bias = bias_of(markers.find(graph, markers.TAP)[0])
    s = (e * (y - watch.seen[bias])).flatten(1).sum(1)
    points = homogeneous_points(plan.joint)
    for layer in plan.layers:
        i = layer.index
        inner = to_samples(h[i] * delta[i], layer.fold).flatten(1).sum(1)
        assert torch.allclose(inner, s, rtol=1e-10, atol=1e-12) == (i in points), layer.name


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_behind_a_norm_the_degree_is_zero(norm: type[nn.Module], shortcut: bool) -> None:
    """<h, delta> = 0, for each sample or in the sum over the batch, unless a shortcut passes it."""
    torch.manual_seed(4)
    inner = nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), norm(6, eps=1e-15)
    ).double()
    last = nn.Linear(6, 3).double()
    h = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    y = last(inner(h) + h if shortcut else inner(h))
    (delta,) = torch.autograd.grad(nn.functional.cross_entropy(y, torch.arange(8) % 3), h)
    along = (h * delta).sum(1) if norm is nn.LayerNorm else (h * delta).sum()
    assert torch.allclose(along, torch.zeros_like(along), atol=1e-12) != shortcut


@pytest.mark.parametrize("name", ["mlp", "cnn", "branches", "tokens"])
def test_the_true_gradient_is_left_alone(name: str) -> None:
    """Where maps give the true cotangent (the last layer's weight), the correction is zero."""
    model, x, found = case(name)
    nets = {
        radial: compiled(copy.deepcopy(model), "dfa", radial=radial, calib_every=None, seed=1)
        for radial in (False, "auto")
    }
    for net in nets.values():
        loss_of(net(x)).backward()
    changed = [
        not torch.allclose(p.grad, q.grad)  # type: ignore[arg-type]
        for p, q in zip(nets[False].parameters(), nets["auto"].parameters(), strict=True)
    ]
    assert any(changed) == bool(found)
    exact = {n for n, _ in model.named_parameters() if n.startswith(("last", "4", "7"))}
    for (n, p), q in zip(nets[False].named_parameters(), nets["auto"].parameters(), strict=True):
        if n in exact:
            torch.testing.assert_close(p.grad, q.grad)


def test_an_mlp_by_hand() -> None:
    """Every gradient of an MLP equals the formula written out."""
    model, x, _ = case("mlp")
    net = compiled(copy.deepcopy(model), "dfa", radial=True, calib_every=None, seed=1)
    out = net(x)
    e = 2 * out.detach() / out.numel()
    out.pow(2).mean().backward()
    w = [p.detach() for n, p in model.named_parameters() if n.endswith("weight")]
    b = model[4].bias.detach()  # type: ignore[index, union-attr]
    a1 = x @ w[0].T
    h1 = a1.relu()
    a2 = h1 @ w[1].T
    h2 = a2.relu()
    s = (e * (h2 @ w[2].T)).sum(1)
    torch.testing.assert_close(h2 @ w[2].T + b, out.detach())
    maps = net.feedback
    for weight, h, a, below, key in ((0, h1, a1, x, "0/B"), (1, h2, a2, h1, "2/B")):
        c = e @ maps[key].double()
        c = c + h * ((s - (c * h).sum(1)) / ((h * h).sum(1) + 1e-12))[:, None]
        torch.testing.assert_close((c * h).sum(1), s)
        expected = (c * (a > 0)).T @ below
        found = [p.grad for n, p in net.named_parameters() if n.endswith("weight")][weight]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fold", [(0, 1, 1), (1, 1, 1), (0, 1, 4), (0, 4, 1), (1, 2, 2)])
def test_corrected_in_every_layout(fold: tuple[int, int, int]) -> None:
    """After it, <h, c> = s for each sample, wherever the batch is."""
    torch.manual_seed(0)
    dim, outer, inner = fold
    shape = [3, 3, 3]
    shape[dim] = outer * 5 * inner
    c, h, s = torch.randn(shape), torch.randn(shape), torch.randn(5)
    made = corrected(c, h, s, fold) * h
    sums = made.movedim(dim, 0).reshape(outer, 5, inner, -1).sum((0, 2, 3))
    torch.testing.assert_close(sums, s)


@pytest.mark.parametrize("method", ["dfa", "fdfa", "grape", "dkp"])
@pytest.mark.parametrize("options", [{}, {"feedback": "pooled:1"}, {"feedback": "sparse:2"}])
def test_every_method_and_kind_of_map(method: str, options: dict[str, Any]) -> None:
    """Updates stay independent, and gradients finite."""
    model, x, _ = case("cnn")
    net = compiled(model, method, radial=True, **options)
    for _ in range(2):
        net.zero_grad()
        loss_of(net(x)).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_true_needs_a_point() -> None:
    torch.manual_seed(0)
    norms = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Softmax(1))
    model, x = Gated(norms), torch.randn(5, 6)
    with pytest.raises(PlacementError, match="radial='auto'"):
        compiled(model, "dfa", radial=True)(x)
    net = compiled(model, "dfa", radial="auto")
    loss_of(net(x)).backward()


def test_under_autocast_and_other_batch_sizes() -> None:
    model, x, _ = case("mlp")
    net = compiled(model.float(), "dfa", radial=True, calib_every=None)
    for n in (5, 3, 1):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x[:n].float())
        out.float().pow(2).mean().backward()
    assert net.plan is not None and len(net.plan.radial) == 2
