"""What grapefx does, measured: every number comes from ``grapefx.compile`` in float64.

The tests and ``tools.figures`` call these functions with the same arguments. A two-layer net
with a linear output has J = W^(2) at its only feedback point, for every sample: any J can be
dialled in. J^ is read from fdfa at alpha = 1 (B is then J^ of the step), cosines of samples from
grape with ``order="cosine-then-mean"``.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import grapefx
from grapefx.runtime.module import FeedbackModule
from tests.theory import closed_forms as theory

Z = 4.5  # two-sided 7e-6: how many standard errors a test allows
SPECTRA = ("rank one", "two coordinates", "decaying", "flat")


@dataclass(frozen=True)
class Mean:
    """A sample mean and its standard error."""

    value: float
    se: float

    @staticmethod
    def of(samples: Tensor) -> Mean:
        """Of independent numbers (K,)."""
        return Mean(float(samples.mean()), float(samples.std()) / math.sqrt(len(samples)))

    def log(self) -> Mean:
        """Of the logarithm, by the delta method."""
        return Mean(math.log(self.value), self.se / self.value)

    def z(self, expected: float) -> float:
        """Standard errors from ``expected``; rounding is allowed where there is no noise."""
        return (self.value - expected) / (self.se + 1e-9 * abs(expected) + 1e-300)

    def z_of_scale(self, expected: float) -> float:
        """The same for a mean of squares, whose standard error grows with it: that at the claim."""
        return Mean(self.value, self.se * expected / self.value).z(expected)


def slope(xs: list[float], ys: list[Mean]) -> Mean:
    """Least-squares slope of log y over log x, and its standard error, of independent points."""
    x = torch.tensor([math.log(v) for v in xs]).double()
    w = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    logs = [y.log() for y in ys]
    value = sum(float(a) * y.value for a, y in zip(w, logs, strict=True))
    return Mean(value, math.sqrt(sum((float(a) * y.se) ** 2 for a, y in zip(w, logs, strict=True))))


def cosine(a: Tensor, b: Tensor) -> float:
    """Frobenius cosine, GrAPE 2026 eq. 3."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def weight(model: nn.Sequential | list[nn.Module], k: int) -> Tensor:
    """The weight of the linear layer ``model[k]``."""
    layer = model[k]
    assert isinstance(layer, nn.Linear)
    return layer.weight


def gradient(model: nn.Sequential) -> Tensor:
    """What the last step left in the first layer's ``grad``."""
    found = weight(model, 0).grad
    assert found is not None
    return found


def two_layers(n0: int, n1: int, out: int, seed: int = 0) -> nn.Sequential:
    """Linear, ReLU, linear output; no biases, W^(2) frozen (FDFA 2024: no noise at the output
    layer).
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n0, n1, bias=False), nn.ReLU(), nn.Linear(n1, out, bias=False))
    weight(model, 2).requires_grad_(False)
    return model.double()


def compiled(model: nn.Module, method: str, seed: int = 0, **options: Any) -> FeedbackModule:
    """Eager graphs, no calibration. A point has something to train behind it, but for fg-w, which
    would perturb it.
    """
    if method != "fg-w":
        model.requires_grad_()
    return grapefx.compile(
        model, method=method, backend="eager", calib_every=None, seed=seed, **options
    )


def step(net: FeedbackModule, x: Tensor, error: Tensor) -> None:
    """One training step whose output error dL/dy is ``error``; weights stay."""
    net.zero_grad()
    (net(x) * error).sum().backward()


def with_map(net: FeedbackModule, key: str, b: Tensor) -> None:
    """Set a feedback map through the public state dict; the step counter, so the noise, goes on."""
    state = net.feedback_state_dict()
    state["tensors"][key] = b.clone()
    net.load_feedback_state_dict(state)


# The Jacobian estimate of one layer


def jacobian_with(spectrum: str, out: int, n: int) -> Tensor:
    """J (out, n) with |J|_F = 1: rank one, the same along (1, 1, 0, ...), decaying, or flat."""
    generator = torch.Generator().manual_seed(n)
    u, _ = torch.linalg.qr(torch.randn(out, out, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(n, out, generator=generator).double())
    if spectrum == "two coordinates":
        v = torch.zeros_like(v)
        v[:2, 0] = 0.5**0.5
    k = torch.arange(out).double()
    s = {"decaying": 2.0**-k, "flat": torch.ones(out).double()}.get(spectrum, (k == 0).double())
    return (u * (s / s.norm())) @ v.t()


@functools.cache
def _probe(method: str, n: int, out: int, noise: str) -> tuple[nn.Sequential, FeedbackModule, Any]:
    options: dict[str, Any] = {"fdfa": {"alpha": 1.0}}.get(method, {})
    if method == "grape":  # its state J is then the step's mean of J^_i / |J^_i|_F over samples
        options = {"order": "cosine-then-mean", "cosine": "frobenius"}
        options |= {"average": "ema", "rate": 1.0}
    model = two_layers(4, n, out)
    net = compiled(model, method, noise=noise, dynamic=True, **options)
    net(torch.ones(3, 4).double())
    return model, net, net.feedback_state_dict()


def _probed(method: str, key: str, j: Tensor, batch: int, steps: int, noise: str) -> Tensor:
    """A feedback tensor after each of ``steps`` steps on a net whose Jacobian is ``j``.

    Starts from the same state at every call, with a noise of its own for each batch size.
    """
    model, net, start = _probe(method, j.shape[1], j.shape[0], noise)
    net.load_feedback_state_dict(
        {**start, "schedule": {**start["schedule"], "step": 10**6 * batch}}
    )
    with torch.no_grad():
        weight(model, 2).copy_(j)
    x, error = torch.ones(batch, 4).double(), torch.ones(batch, j.shape[0]).double()
    kept = []
    for _ in range(steps):
        step(net, x, error)
        kept.append(net.feedback[key].clone())
    return torch.stack(kept)


def estimates(j: Tensor, batch: int, steps: int, noise: str) -> Tensor:
    """J^ (steps, C, n) of ``steps`` independent batches, by fdfa."""
    return _probed("fdfa", "0/B", j, batch, steps, noise)


def mean_cosines(j: Tensor, batch: int, steps: int, noise: str) -> Tensor:
    """C-bar_B (steps,): the mean over a batch of cos_F(J, J^_i), by grape."""
    return (_probed("grape", "0/J", j, batch, steps, noise) * j).sum((1, 2)) / j.norm()


@functools.cache
def expected_cosine(spectrum: str, n: int, noise: str) -> tuple[Tensor, Mean]:
    """J and E[cos_F(J, J^)] of one sample (GrAPE 2026 eq. 4), from 20 batches of 400."""
    j = jacobian_with(spectrum, 6, n)
    return j, Mean.of(mean_cosines(j, 400, 20, noise))


BATCHES = (1, 4, 16, 64)


@functools.cache
def concentration() -> dict[int, Tensor]:
    """Samples of C-bar_B for each B (GrAPE 2026 appendix B.3)."""
    j = jacobian_with("rank one", 6, 32)
    return {b: mean_cosines(j, b, 160, "gaussian") for b in BATCHES}


@dataclass(frozen=True)
class BatchMean:
    """Of J^ = (1/B) sum_i d_i v_i^T: <J^, J> and |J^|^2 over |J|^2, and the cosine."""

    projection: Mean
    square: Mean
    cosine: Mean
    second_order: float

    @staticmethod
    def of(found: Tensor, j: Tensor) -> BatchMean:
        """Of independent estimates (K, C, n)."""
        x = (found * j).sum((1, 2)) / j.norm() ** 2
        y = (found**2).sum((1, 2)) / j.norm() ** 2
        cov = torch.cov(torch.stack([x, y]))
        # E[x / sqrt(y)] to second order around x / sqrt(y) of the means
        mx, my = x.mean(), y.mean()
        second = mx / my.sqrt() * (3 / 8 * cov[1, 1] / my**2 - cov[0, 1] / (2 * mx * my))
        return BatchMean(Mean.of(x), Mean.of(y), Mean.of(x / y.sqrt()), float(second))


@functools.cache
def batch_mean(noise: str) -> dict[int, BatchMean]:
    """The cosine of a batch mean for each B, n = 32."""
    j = jacobian_with("decaying", 6, 32)
    return {b: BatchMean.of(estimates(j, b, 120, noise), j) for b in BATCHES}


# Lemma B.2 along a training run


@dataclass(frozen=True)
class Triple:
    """One layer at one step: cos(B, J^), cos(J^, J), cos(B, J), and what ``alignment()`` said."""

    layer: str
    step: int
    learned: float
    estimated: float
    true: float
    reported: float


def deep(sizes: tuple[int, ...], seed: int = 0) -> nn.Sequential:
    """Linear layers with ReLU between, He-normal."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
        nn.init.kaiming_normal_(weight(layers, -2))
    return nn.Sequential(*layers[:-1]).double()


def jacobians(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """True J (N, C, n_l) at every feedback point, behind each ReLU, by plain autograd."""
    values, h = [], x
    for module in model:
        h = module(h)
        if isinstance(module, nn.ReLU):
            values.append(h)
    rows = [
        torch.autograd.grad(h[:, c].sum(), values, retain_graph=True) for c in range(h.shape[1])
    ]
    return [torch.stack([r[k] for r in rows], 1) for k in range(len(values))]


@functools.cache
def alignment_run() -> list[Triple]:
    """grape trains a four-layer net for 120 steps; J^ is read from its average at rate 1."""
    model = deep((8, 16, 16, 16, 4))
    net = compiled(model, "grape", average="ema", rate=1.0, eta=0.05, noise="gaussian")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    x = torch.randn(256, 8).double()
    y = torch.tanh(x @ torch.randn(8, 4).double())
    found = []
    net(x)
    for k in range(120):
        before = {key: v.clone() for key, v in net.feedback.items() if key.endswith("/B")}
        true = jacobians(model, x)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        after, said = net.feedback, net.alignment()
        for (key, b), j in zip(before.items(), true, strict=True):
            name = key.removesuffix("/B")
            e, m = after[f"{name}/J"], j.mean(0)
            said_here = said[name]["cos_jacobian"]
            found.append(Triple(name, k, cosine(b, e), cosine(e, m), cosine(b, m), said_here))
        optimizer.step()
    return found


@functools.cache
def column_weights() -> Mean:
    """Sum of the weights w_k of GrAPE 2026 appendix C for unit columns of B and one sample's J^."""
    e = estimates(jacobian_with("decaying", 6, 128), 1, 100, "gaussian")
    norms = e.norm(dim=1)  # of columns (K, n); those of B are 1, |B|_F = sqrt(n)
    return Mean.of(norms.sum(1) / (128**0.5 * e.norm(dim=(1, 2))))


# Variances of gradients


@dataclass(frozen=True)
class Setting:
    """A two-layer net at one sample, and what its closed forms need."""

    model: nn.Sequential
    x: Tensor
    error: Tensor
    gradient: Tensor  # dL/dW^(1)
    delta: Tensor  # dL/dy^(1)
    local: Tensor  # dy_i/dw_ij


def setting_of(model: nn.Sequential, x: Tensor, error: Tensor) -> Setting:
    """Closed-form ingredients by plain autograd."""
    h = model[1](model[0](x))
    delta = (error @ weight(model, 2))[0]
    local = (h[0] > 0).double()[:, None] * x
    return Setting(model, x, error, delta[:, None] * local, delta, local)


def balanced(n0: int, n1: int, kaiming: bool = False) -> Setting:
    """Half the units alive, |delta_i| and |x_j| equal: dL/dw is +-1 or 0 at every size.

    ``kaiming`` divides W^(2) by sqrt(n1), as initialisations do.
    """
    model = two_layers(n0, n1, 1)
    generator = torch.Generator().manual_seed(n0 * 1000 + n1)
    with torch.no_grad():
        weight(model, 0)[1::2] = -weight(model, 0)[::2]
        signs = torch.randint(0, 2, (1, n1), generator=generator) * 2.0 - 1
        weight(model, 2).copy_(signs / (n1**0.5 if kaiming else 1))
    x = torch.randint(0, 2, (1, n0), generator=generator).double() * 2 - 1
    return setting_of(model, x, torch.ones(1, 1).double())


def skewed() -> Setting:
    """One weight has most of the gradient, so that g_ij^2 beside |g|^2 is seen."""
    model = two_layers(3, 4, 2)
    with torch.no_grad():
        weight(model, 0).copy_(weight(model, 0).abs())
        weight(model, 2).copy_(torch.tensor([[2.0, 0.3, 0.2, 0.1], [0.1, 0.2, 0.1, 0.3]]))
    x, error = torch.tensor([[2.0, 0.3, 0.2]]).double(), torch.tensor([[1.0, -0.5]]).double()
    return setting_of(model, x, error)


def draws(s: Setting, method: str, steps: int, seed: int = 0, **options: Any) -> Tensor:
    """Gradients of W^(1) (steps, n1, n0) at fixed weights."""
    net = compiled(s.model, method, seed=seed, **options)
    kept = []
    for _ in range(steps):
        step(net, s.x, s.error)
        kept.append(gradient(s.model).clone())
    return torch.stack(kept)


def total_variance(found: Tensor, mean: Tensor) -> Mean:
    """Sum over entries of the variance, about a known mean, of independent draws."""
    return Mean.of(((found - mean) ** 2).sum((1, 2)))


NS = (8, 32, 128)


@functools.cache
def variance_in_size(
    method: str, which: str, kaiming: bool = False
) -> dict[int, tuple[Mean, float]]:
    """n -> variance of an entry (mean over entries): measured, and propositions 5 and 6.

    ``which`` is "n0" or "n1"; the other one is 16.
    """
    out = {}
    for k, n in enumerate(NS):
        n0, n1 = (n, 16) if which == "n0" else (16, n)
        s = balanced(n0, n1, kaiming)
        options: dict[str, Any] = {} if method == "fg-w" else {"noise": "gaussian"}
        total = total_variance(draws(s, method, 160, seed=k, **options), s.gradient)
        if method == "fg-w":
            expected = theory.fgw_variance(s.gradient)
        else:
            expected = theory.fga_variance(s.delta, s.local, "gaussian")
        out[n] = Mean(total.value / (n0 * n1), total.se / (n0 * n1)), float(expected.mean())
    return out


@functools.cache
def largest_entry(method: str, noise: str) -> tuple[Mean, float]:
    """Variance of the entry with the largest gradient on ``skewed``: measured, closed form."""
    s = skewed()
    options: dict[str, Any] = {} if method == "fg-w" else {"noise": noise}
    found = draws(s, method, 1600 if noise == "gaussian" else 500, **options)
    if method == "fg-w":
        expected = theory.fgw_variance(s.gradient)
    else:
        expected = theory.fga_variance(s.delta, s.local, noise)
    where = int(s.gradient.abs().argmax())
    deviation = (found - s.gradient).flatten(1)[:, where]
    return Mean.of(deviation**2), float(expected.flatten()[where])


ALPHAS = (0.001, 0.01, 0.1, 1.0)


def random_setting() -> Setting:
    """A generic net for proposition 2."""
    model = two_layers(6, 12, 5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 6, generator=generator).double()
    return setting_of(model, x, torch.randn(1, 5, generator=generator).double())


@functools.cache
def variance_in_alpha() -> dict[float, tuple[Mean, float]]:
    """alpha -> total variance of an fdfa gradient whose map starts each step at W^(2); prop. 2."""
    s = random_setting()
    out = {}
    for k, alpha in enumerate(ALPHAS):
        net = compiled(s.model, "fdfa", seed=k, alpha=alpha, noise="gaussian")
        net(s.x)
        kept = []
        for _ in range(90):
            with_map(net, "0/B", weight(s.model, 2))
            step(net, s.x, s.error)
            kept.append(gradient(s.model).clone())
        expected = theory.fdfa_variance(s.delta, s.local, alpha, "gaussian").sum()
        out[alpha] = total_variance(torch.stack(kept), s.gradient), float(expected)
    return out


RUNNING = (0.2, 0.4)


@dataclass(frozen=True)
class Running:
    """fdfa left to run at fixed weights, seen after burn-in in blocks of steps."""

    maps: Tensor  # block means of B (K, C, n)
    square: Mean  # |B - W|_F^2
    variance: Mean  # total variance of the gradient
    expected_square: float
    expected_variance: float


@functools.cache
def running(alpha: float, blocks: int = 30) -> Running:
    """Blocks are 8 / alpha steps long, so that their means are all but independent."""
    s = random_setting()
    w = weight(s.model, 2)
    net = compiled(s.model, "fdfa", seed=7, alpha=alpha, noise="gaussian")
    length = math.ceil(8 / alpha)
    maps, squares, variances = [], [], []
    for k in range((blocks + 1) * length):
        step(net, s.x, s.error)
        if k >= length:
            b = net.feedback["0/B"].clone()
            maps.append(b)
            squares.append(((b - w) ** 2).sum())
            variances.append(((gradient(s.model) - s.gradient) ** 2).sum())

    def blocked(values: list[Tensor]) -> Tensor:
        t = torch.stack(values).detach()
        return t.view(blocks, length, *t.shape[1:]).mean(1)

    factor = theory.running_factor(alpha)
    ratio = theory.noise_to_signal(w.shape[1], "gaussian")
    return Running(
        blocked(maps),
        Mean.of(blocked(squares)),
        Mean.of(blocked(variances)),
        factor * ratio * float((w**2).sum()),
        factor * float(theory.fga_variance(s.delta, s.local, "gaussian").sum()),
    )


@functools.cache
def approach(alpha: float = 0.05, chains: int = 10, steps: int = 80) -> Tensor:
    """<B_t, W> / |W|^2 after each step (chains, steps) from B = 0: eq. 13 says it tends to 1."""
    s = random_setting()
    w = weight(s.model, 2)
    net = compiled(s.model, "fdfa", alpha=alpha, noise="gaussian", dynamic=False)
    x, error = s.x.expand(8, -1), s.error.expand(8, -1)
    net(x)
    out = []
    for _ in range(chains):
        with_map(net, "0/B", torch.zeros_like(w))
        row = []
        for _ in range(steps):
            step(net, x, error)
            row.append((net.feedback["0/B"] * w).sum() / (w**2).sum())
        out.append(torch.stack(row).detach())
    return torch.stack(out)


# GrAPE 2024 figure 2

DEPTHS = (2, 8, 32)
SIZES = (1, 16, 256)


@dataclass(frozen=True)
class FirstLayer:
    """Cosine at the first layer of a deep net: measured moments, and the closed form's ratio."""

    found: BatchMean
    ratio: float  # noise to signal of one sample, with the other layers' noise in it
    cumulative: Tensor  # cosine of grape's cumulative average after 1, 2, ... JVPs


@functools.cache
def _deep_probe(depth: int, streams: str) -> tuple[nn.Sequential, FeedbackModule, Any]:
    model = deep((16,) * (depth + 2))
    net = compiled(
        model, "grape", average="cumulative", noise="gaussian", streams=streams, dynamic=True
    )
    net(torch.ones(3, 16).double())
    return model, net, net.feedback_state_dict()


@functools.cache
def first_layer(depth: int, batch: int, streams: str = "shared", steps: int = 24) -> FirstLayer:
    """``depth`` layers of width 16 behind the first; grape keeps the cumulative average of J^."""
    model, net, start = _deep_probe(depth, streams)
    net.load_feedback_state_dict(
        {**start, "schedule": {**start["schedule"], "step": 10**6 * batch}}
    )
    x = torch.randn(max(SIZES), 16, generator=torch.Generator().manual_seed(1)).double()[:batch]
    true = jacobians(model, x)
    j = true[0].mean(0)
    error = torch.full((batch, 16), 1e-3).double()
    kept = [torch.zeros_like(j)]
    for _ in range(steps):
        step(net, x, error)
        kept.append(net.feedback["0/J"].clone())
    averages = torch.stack(kept[1:])
    k = torch.arange(1, steps + 1).double()[:, None, None]
    singles = k * averages - (k - 1) * torch.stack(kept[:-1])  # J^ of each step
    # E|J^ - mean J|^2 of one sample: n + 1 times its own |J_1|^2, n times the other layers' |J_m|^2
    norms = [float((t**2).sum((1, 2)).mean()) for t in true]
    others = sum(norms[1:]) / norms[0] if streams == "shared" else 0.0
    ratio = theory.noise_to_signal(16, "gaussian", others) * norms[0] / float((j**2).sum())
    cosines = (averages * j).sum((1, 2)) / averages.norm(dim=(1, 2)) / j.norm()
    return FirstLayer(BatchMean.of(singles, j), ratio, cosines)
