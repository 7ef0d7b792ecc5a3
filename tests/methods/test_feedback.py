"""Oracles of the feedback: exact maps give exact gradients; estimates, refit, cosines."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grapefx.runtime.module import FeedbackModule
from tests.zoo import (
    MLP,
    assert_same_gradients,
    compiled,
    eager_twin,
    gradients,
    loss_of,
    make,
    train_step,
)


def linear_net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers).double()


def jacobian_behind(net: nn.Sequential, layer: int) -> Tensor:
    """d yhat / d h_l of a linear stack: the product of the later weights, (C, n_l)."""
    j = torch.eye(net[-1].out_features, dtype=torch.float64)  # type: ignore[arg-type]
    for later in reversed(list(net)[layer + 1 :]):
        j = j @ later.weight.detach()  # type: ignore[union-attr,operator]
    return j


def set_maps(net: FeedbackModule, maps: dict[str, Tensor]) -> None:
    """Load B for each layer; grape's column norms go with it."""
    state = net.feedback_state_dict()
    for name, b in maps.items():
        assert state["tensors"][f"{name}/B"].shape == b.shape
        state["tensors"][f"{name}/B"] = b
        if f"{name}/scale" in state["tensors"]:
            state["tensors"][f"{name}/scale"] = b.norm(dim=0, keepdim=True)
    net.load_feedback_state_dict(state)


# learning is switched (almost) off: the maps must stay what the test sets
STILL: dict[str, dict[str, Any]] = {"dfa": {}, "fdfa": {"alpha": 1e-13}, "grape": {"eta": 1e-13}}


@pytest.mark.parametrize("method", list(STILL))
def test_true_jacobian_gives_true_gradients(method: str) -> None:
    model = linear_net(6, 7, 9, 5, 4)
    twin = eager_twin(model)
    net = compiled(model, method, calib_every=None, **STILL[method])
    x = torch.randn(11, 6).double()
    net(x)  # the layers are known after the first call
    names = [layer.name for layer in net.plan.layers]  # type: ignore[union-attr]
    assert names == ["0", "1", "2"]
    set_maps(net, {n: jacobian_behind(model, int(n)) for n in names})
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


def test_true_jacobian_of_a_token_model() -> None:
    """Where value and error share the tokens, one (C, D) map serves every position."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(10, 6)
            self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.emb(x)))

    torch.manual_seed(0)
    model = Tokens().double()
    twin = eager_twin(model)
    net = compiled(model, "dfa", calib_every=None)
    x = torch.randint(0, 10, (3, 5))
    net(x)
    assert [m.kind for m in net.plan.maps] == ["token", "token"]  # type: ignore[union-attr]
    b, a = model.b.weight.detach(), model.a.weight.detach()
    set_maps(net, {"emb": b @ a, "a": b})
    train_step(net, (x,))
    train_step(twin, (x,))
    assert_same_gradients(net, twin)


class Laid(nn.Module):
    """A token model whose inner values and logits lie as asked."""

    def __init__(self, inside: str, logits: str) -> None:
        super().__init__()
        self.inside, self.logits = inside, logits
        self.emb = nn.Embedding(10, 6)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    @staticmethod
    def put(x: Tensor, how: str) -> Tensor:
        """(N, T, ...) as (N T, ...), (T, N, ...) or (T N, ...)."""
        x = x.transpose(0, 1) if how.startswith("time") else x
        return x.flatten(0, 1) if how.endswith("flat") else x

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(self.put(self.emb(x), self.inside)))
        if self.inside.endswith("flat"):
            h = h.unflatten(0, x.shape if self.inside == "flat" else x.shape[::-1])
        if self.inside.startswith("time"):
            h = h.transpose(0, 1)
        return self.put(self.b(h), self.logits)


@pytest.mark.parametrize(
    ("method", "options"),
    [("dfa", {}), ("fdfa", {}), ("grape", {}), ("grape", {"tangent_fraction": 0.5}),
     ("lg-fg-a", {})],
)  # fmt: skip
@pytest.mark.parametrize(
    ("inside", "logits"),
    [("", "flat"), ("", "time"), ("", "time flat"), ("flat", ""), ("time", "time"),
     ("time flat", ""), ("time flat", "flat")],
)  # fmt: skip
def test_layout_does_not_matter(
    method: str, options: dict[str, Any], inside: str, logits: str
) -> None:
    """Where batch and tokens lie changes neither the maps nor what a step learns."""
    torch.manual_seed(0)
    models = Laid("", "").double(), Laid(inside, logits).double()
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randint(0, 10, (4, 5)), torch.randint(0, 4, (4, 5))
    nets = [compiled(m, method, calib_every=None, **options) for m in models]
    for net, model in zip(nets, models, strict=True):
        target = Laid.put(y, model.logits)
        for _ in range(2):
            net.zero_grad()
            out = net(x)
            net.targets(target)
            nn.functional.cross_entropy(out.flatten(0, -2), target.flatten()).backward()
    kinds = [[m.kind for m in net.plan.maps] for net in nets]  # type: ignore[union-attr]
    assert kinds[0] == kinds[1]
    if inside.startswith("time") and method != "dfa":
        return  # noise is drawn in the order of the value: the numbers are others
    for k, v in nets[0].feedback.items():
        torch.testing.assert_close(v, nets[1].feedback[k])
    assert_same_gradients(*nets)


@pytest.mark.parametrize("method", list(STILL))
def test_refit_finds_the_jacobian_of_a_linear_network(method: str) -> None:
    """delta = e J exactly, so one calibration batch makes every later gradient exact."""
    model = linear_net(6, 7, 9, 4)
    twin = eager_twin(model)
    net = compiled(model, method, ridge=1e-12, **STILL[method])
    for seed in range(3):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)).double()
        train_step(net, (x,))
        train_step(twin, (x,))
        assert_same_gradients(net, twin, tol=1e-6)


def test_refit_is_ridge_regression() -> None:
    model, args = make("mlp")
    net = compiled(model, "dfa", ridge=0.05)
    train_step(net, args)

    hidden = []
    h = args[0]
    for layer in model.layers:  # type: ignore[union-attr]
        h = torch.relu(layer(h))
        h.retain_grad()
        hidden.append(h)
    out = model.out(h)  # type: ignore[operator]
    out.retain_grad()
    loss_of(out).backward()
    e = out.grad
    gram = e.T @ e
    gram = gram + 0.05 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=e.dtype)
    for k, value in enumerate(hidden):
        fitted = torch.linalg.inv(gram) @ (e.T @ value.grad)
        torch.testing.assert_close(net.feedback[f"layers.{k}/B"], fitted, rtol=1e-8, atol=1e-10)


def test_refit_does_not_depend_on_the_loss_scale() -> None:
    found = []
    for scale in (1.0, 1e-9, 65536.0):
        model, args = make("mlp", torch.float32)
        net = compiled(model, "dfa")
        (loss_of(net(*args)) * scale).backward()
        found.append(net.feedback)
    for other in found[1:]:
        for k, v in found[0].items():
            torch.testing.assert_close(other[k], v, rtol=1e-4, atol=1e-5)


def _estimates(model: nn.Module, x: Tensor, steps: int, **options: Any) -> dict[str, Tensor]:
    """J^ of many steps on one batch: with alpha = 1 the map is the last estimate."""
    net = compiled(model, "fdfa", alpha=1.0, calib_every=None, **options)
    kept: dict[str, list[Tensor]] = {}
    for _ in range(steps):
        train_step(net, (x,))
        for k, v in net.feedback.items():
            kept.setdefault(k, []).append(v)
    return {k: torch.stack(v) for k, v in kept.items()}


def _mean_jacobians(model: MLP, x: Tensor) -> dict[str, Tensor]:
    out = {}
    for k in range(len(model.layers)):

        def tail(h: Tensor, k: int = k) -> Tensor:
            for layer in list(model.layers)[k + 1 :]:
                h = model.act(layer(h))
            return model.out(h)

        h = x
        for layer in list(model.layers)[: k + 1]:
            h = model.act(layer(h))
        out[f"layers.{k}/B"] = torch.func.vmap(torch.func.jacrev(tail))(h).mean(0).detach()
    return out


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_the_estimate_is_unbiased(noise: str) -> None:
    """The mean of many draws lies within the confidence interval of the true mean Jacobian."""
    torch.manual_seed(0)
    model = MLP(6, 2, nn.Tanh, 3).double()
    x = torch.randn(8, 8).double()
    steps = 400
    estimates = _estimates(model, x, steps, noise=noise)
    for name, true in _mean_jacobians(model, x).items():
        draws = estimates[name]
        error = draws.std(0) / math.sqrt(steps)
        z = (draws.mean(0) - true) / error
        assert z.abs().max() < 4.5, name
        assert 0.4 < z.pow(2).mean() < 2.0, name
        # and it is not unbiased because it is hopeless: it points the right way
        cos = torch.cosine_similarity(draws.mean(0).flatten(), true.flatten(), dim=0)
        assert cos > 0.7, name


@pytest.mark.parametrize("streams", ["shared", "per_layer"])
def test_a_sub_batch_estimates_its_own_jacobian(streams: str) -> None:
    torch.manual_seed(0)
    model = MLP(6, 2, nn.Tanh, 3).double()
    x = torch.randn(16, 8).double()
    steps = 400
    estimates = _estimates(model, x, steps, tangent_fraction=0.25, streams=streams)
    for name, true in _mean_jacobians(model, x[:4]).items():
        z = (estimates[name].mean(0) - true) / (estimates[name].std(0) / math.sqrt(steps))
        assert z.abs().max() < 4.5, name


def test_cosine_of_a_batch_mean() -> None:
    """cos(J, J^) = 1 / sqrt(1 + (n + 1) / N) for one layer of n units (docs: DESIGN 7)."""
    n, batch = 24, 16
    model = linear_net(5, n, 12)
    net = compiled(model, "fdfa", alpha=1e-13, calib_every=None)
    x = torch.randn(batch, 5).double()
    net(x)
    set_maps(net, {"0": jacobian_behind(model, 0)})
    found = []
    for _ in range(60):
        train_step(net, (x,))
        found.append(net.alignment()["0"]["cos_jacobian"])
    expected = 1 / math.sqrt(1 + (n + 1) / batch)
    assert abs(sum(found) / len(found) - expected) < 0.03


def _cos(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_cos_jacobian_is_the_cosine_of_the_map_and_the_estimate() -> None:
    model, args = make("mlp")
    net = compiled(model, "fdfa", alpha=1.0, calib_every=None)
    train_step(net, args)
    before = net.feedback
    train_step(net, args)
    after = net.feedback  # alpha = 1: this is J^
    for layer, values in net.alignment().items():
        assert values["cos_jacobian"] == pytest.approx(
            _cos(before[f"{layer}/B"], after[f"{layer}/B"]), abs=1e-6
        )
        assert "cos_gradient" not in values  # no calibration step so far


@pytest.mark.parametrize("method", ["dfa", "grape"])
def test_cos_gradient_is_the_cosine_of_both_gradients(method: str) -> None:
    model, args = make("mlp")
    other = eager_twin(model)
    net = compiled(model, method, calib_unit="step", calib_every=2, calib_init=False,
                   **STILL[method])  # fmt: skip
    plain = compiled(other, method, calib_every=None, **STILL[method])
    train_step(net, args)
    train_step(plain, args)
    assert_same_gradients(net, plain)  # a feedback step of both
    feedback = gradients(plain)
    train_step(net, args)
    train_step(plain, args)
    train_step(net, args)  # step 2 calibrates
    true = gradients(net)
    layers = net.plan.layers  # type: ignore[union-attr]
    for layer in layers:
        a = torch.cat([feedback[p].flatten() for p in layer.parameters])  # type: ignore[union-attr]
        b = torch.cat([true[p].flatten() for p in layer.parameters])  # type: ignore[union-attr]
        assert net.alignment()[layer.name]["cos_gradient"] == pytest.approx(_cos(a, b), abs=1e-5)


def test_alignment_rises_with_training_of_the_map() -> None:
    """On a fixed linear network grape's maps turn towards the Jacobian."""
    model = linear_net(6, 12, 10, 4)
    net = compiled(model, "grape", calib_every=None, eta=0.05)
    x = torch.randn(64, 6).double()
    for _ in range(150):
        train_step(net, (x,))
    for k in (0, 1):
        assert _cos(net.feedback[f"{k}/B"], jacobian_behind(model, k)) > 0.75
        norms = net.feedback[f"{k}/B"].norm(dim=0)
        torch.testing.assert_close(norms, torch.ones_like(norms))  # GrAPE 2026 eq. 6
