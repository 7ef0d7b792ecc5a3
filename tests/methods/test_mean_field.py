"""Mean-field maps: the chain at mean derivatives, when it runs, and what it depends on."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.analysis import build_dag
from grapefx.errors import OptionError, PlacementError, StateError, VerifyError
from grapefx.ir import Slot
from grapefx.maps.seeded import signs
from grapefx.passes.graph import meta
from grapefx.passes.graph.edit import Edit
from grapefx.passes.graph.verify import independence
from grapefx.plan import build_plan
from grapefx.report.from_plan import method_graphs
from tests.methods.test_exact_rows import Instance, Unrolled, still
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
    train_step,
)

ONLY: dict[str, Any] = {"mean_field": 1, "calib_every": None}


class Block(nn.Module):
    """A transformer block of pre-norms and attention, with a head on the mean of the tokens."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.read, self.qkv, self.mix = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        n, t, _ = h.shape
        q, k, v = (p.view(n, t, 2, 4).transpose(1, 2) for p in self.qkv(self.norm1(h)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.mix(a.transpose(1, 2).reshape(n, t, 8))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        out: Tensor = self.head(h.mean(1))
        return out


class Pooled(nn.Module):
    """An encoder with an attention mask, and the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Masked(0.0, depth=1)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.encoder(x, mask).mean(1)


class Windows(nn.Module):
    """Windows that overlap, of different sizes, and up-sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        h = F.interpolate(F.max_pool2d(torch.relu(self.a(x)), 3, 2, 1), scale_factor=2.0)
        return self.out(F.adaptive_max_pool2d(F.hardswish(self.b(h)), 1).flatten(1))


class Chosen(nn.Module):
    """Maxima, sorted entries and quotients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 7), nn.Linear(7, 7), nn.Linear(7, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x)).unsqueeze(1) * torch.arange(1, 4).view(1, 3, 1)
        h = self.b(h).max(1).values
        h = self.c(h + h.gather(1, h.argsort(1)))
        return self.out(h / (1 + h.norm(dim=1, keepdim=True)) * h.topk(2, 1).values.sum(1, True))


MORE: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "block": lambda: (Block(), (torch.randn(4, 5, 3),)),
    "causal": lambda: (Block(causal=True), (torch.randn(4, 5, 3),)),
    "pooled": lambda: (Pooled(), (torch.randn(4, 5, 8), torch.ones(5, 5).tril() == 0)),
    "windows": lambda: (Windows(), (torch.randn(4, 2, 9, 9),)),
    "chosen": lambda: (Chosen(), (torch.randn(4, 8),)),
    "unrolled": lambda: (Unrolled(), (torch.randn(4, 5, 6),)),
    "instance norm": lambda: (Instance(), (torch.randn(4, 2, 6, 6),)),
}
TOKENS = {"encoder", "encoder-prenorm", "tied"}  # one map for all tokens, not for each


@pytest.mark.parametrize("name", [*(n for n in ZOO if n not in TOKENS), *MORE])
def test_where_samples_are_equal_it_is_backpropagation(name: str) -> None:
    """A mean over copies of one sample is that sample's derivative, whatever the model does."""
    torch.manual_seed(2)
    model, args = make(name) if name in ZOO else MORE[name]()
    model = still(model.double())
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    x = args[0][:1].expand_as(args[0]).contiguous()
    net = compiled(copy.deepcopy(model), "dfa", **ONLY)
    train_step(net, (x, *args[1:]))
    train_step(model, (x, *args[1:]))
    assert_same_gradients(net, model, tol=1e-8)


LINEAR: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)), (6,)),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.AvgPool2d(2), nn.Conv2d(4, 5, 1, groups=1),
            nn.ConvTranspose2d(5, 3, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3),
        ),
        (2, 9, 9),
    ),
    "residual": lambda: (still(nn.Sequential(Sum(), Sum(), nn.Linear(6, 4))), (6,)),
}  # fmt: skip


class Sum(nn.Module):
    """A shortcut around a layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        return x + self.norm(self.layer(x))


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_network_has_its_jacobian(name: str) -> None:
    """At any batch and any step: there is nothing to average."""
    torch.manual_seed(0)
    model, shape = LINEAR[name]()
    net = compiled(copy.deepcopy(model.double()), "dfa", **ONLY)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (net, model)]
    for _ in range(3):
        x = torch.randn(5, *shape, dtype=torch.float64)
        for m in (net, model):
            train_step(m, (x,))
        assert_same_gradients(net, model, tol=1e-9)
        for optimizer in optimizers:
            optimizer.step()


# by hand


def mean_derivative(act: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    a = a.detach().requires_grad_()
    (found,) = torch.autograd.grad(act(a).sum(), a)
    return found.mean(0)


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.GELU, nn.Hardtanh, nn.SiLU])
@pytest.mark.parametrize("every", [1, 3])
def test_an_mlp_by_hand(act: type[nn.Module], every: int) -> None:
    """Maps of every step: weights as they are, means as the steps before have left them."""
    torch.manual_seed(0)
    model = MLP(act=act).double()
    net = compiled(copy.deepcopy(model), "dfa", mean_field=every, calib_every=None)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    means: list[Tensor] = []
    for step in range(7):
        x = torch.randn(6, 8, dtype=torch.float64)
        weights = [p.detach().clone() for k, p in net.named_parameters() if "weight" in k]
        h, now = x, []
        for layer in net.layers:
            now.append(mean_derivative(act(), layer(h).detach()))
            h = act()(layer(h)).detach()
        means = means or now
        before = net.feedback
        train_step(net, (x,))
        after = {k: t for k, t in net.feedback.items() if k.endswith("/B")}
        if step % every:
            assert all(torch.equal(t, before[k]) for k, t in after.items())
        else:
            b = weights[-1]
            for k, (w, m) in enumerate(zip(weights[-2::-1], means[::-1], strict=True)):
                torch.testing.assert_close(after[f"layers.{2 - k}/B"], b)
                b = (b * m) @ w
            if step:
                rate = 1 - 0.8**every
                means = [m + rate * (n - m) for m, n in zip(means, now, strict=True)]
        optimizer.step()


def conv_t(c: Tensor, layer: nn.Conv2d) -> Tensor:
    """The transposed convolution: a cotangent at a layer's output, taken to its input."""
    return F.conv_transpose2d(c, layer.weight, None, layer.stride, layer.padding)


def gain(norm: nn.BatchNorm2d, a: Tensor) -> Tensor:
    """gamma / sigma of a batch norm in training."""
    return (norm.weight / (a.var((0, 2, 3), unbiased=False) + norm.eps).sqrt()).view(1, -1, 1, 1)


@torch.no_grad()
def test_a_cnn_with_batch_norm_by_hand() -> None:
    torch.manual_seed(0)
    model = cnn().double()
    model[9].p = 0.0
    net = compiled(copy.deepcopy(model), "dfa", points=["0", "2", "4", "10"], **ONLY)
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    with torch.enable_grad():
        train_step(net, (x,))
    conv1, norm1, conv2, norm2, fc, out = (model[i] for i in (0, 1, 4, 5, 10, 12))
    a1 = conv1(x)
    n1 = norm1(a1)
    pooled, at = F.max_pool2d(torch.relu(n1), 2, return_indices=True)
    a2 = conv2(pooled)
    n2 = norm2(a2)
    flat = F.avg_pool2d(F.silu(n2), 2).flatten(1)
    b = out.weight * (fc(flat) > 0).double().mean(0)
    found = {"10": b}
    c = (b @ fc.weight).view(5, 6, 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    with torch.enable_grad():
        silu = mean_derivative(F.silu, n2)
    c = c * silu * gain(norm2, a2)
    found["4"] = c
    # each place of a window gets its part of the batch in which it is the largest
    largest = F.max_unpool2d(torch.ones_like(pooled), at, 2).mean(0)
    c = conv_t(c, conv2).repeat_interleave(2, 2).repeat_interleave(2, 3) * largest
    found["2"] = c
    found["0"] = c * (n1 > 0).double().mean(0) * gain(norm1, a1)
    for name, b in found.items():
        torch.testing.assert_close(net.feedback[f"{name}/B"], b.flatten(1), msg=name)


@torch.no_grad()
def test_a_residual_net_by_hand() -> None:
    """Shortcuts add; batch norm in training is gamma / sigma; ReLU is the part that is open."""
    torch.manual_seed(0)
    model = Residual().double()
    net = compiled(copy.deepcopy(model), "dfa", **ONLY)
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    with torch.enable_grad():
        train_step(net, (x,))
    h = torch.relu(model.stem(x))
    seen = []
    for block in model.blocks:
        a1 = block.conv1(h)
        inner = torch.relu(block.bn1(a1))
        a2 = block.conv2(inner)
        below, h = h, torch.relu(block.bn2(a2) + block.short(h))
        seen.append((block, below, a1, inner, a2, h))
    b = model.fc.weight
    found = {"blocks.1.conv2": b}
    c = b.view(5, 6, 1, 1).expand(5, 6, 6, 6) / 36
    for k in (1, 0):
        block, _, a1, inner, a2, h = seen[k]
        found.setdefault(f"blocks.{k}.conv2", c)
        c = c * (h > 0).double().mean(0)
        at = conv_t(c * gain(block.bn2, a2), block.conv2)
        found[f"blocks.{k}.conv1"] = at
        at = at * (inner > 0).double().mean(0) * gain(block.bn1, a1)
        c = conv_t(at, block.conv1) + (c if k == 0 else conv_t(c, block.short))
    found["stem"] = c
    for name, b in found.items():
        torch.testing.assert_close(net.feedback[f"{name}/B"], b.flatten(1), msg=name)


def norm_back(c: Tensor, norm: nn.LayerNorm, h: Tensor) -> Tensor:
    """A layer norm's derivative at the means of its normalised value and of 1 / sigma."""
    spread = (h.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    x = ((h - h.mean(-1, keepdim=True)) * spread).mean(0)
    g = c * norm.weight
    return (g - g.mean(-1, True) - x * (g * x).mean(-1, True)) * spread.mean(0)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_transformer_block_by_hand(causal: bool) -> None:
    torch.manual_seed(0)
    model = Block(causal).double()
    net = compiled(copy.deepcopy(model), "dfa", **ONLY)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with torch.enable_grad():
        train_step(net, (x,))
    h0 = model.read(x)
    q, k, v = (p.view(4, 5, 2, 4).transpose(1, 2) for p in model.qkv(model.norm1(h0)).chunk(3, -1))
    scores = q @ k.mT / 2
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).tril() == 0, -torch.inf)
    p = scores.softmax(-1)
    h1 = h0 + model.mix((p @ v).transpose(1, 2).reshape(4, 5, 8))
    inner = model.up(model.norm2(h1))
    q, k, v, p = (t.mean(0) for t in (q, k, v, p))
    found = {"down": model.head.weight}
    c = (model.head.weight / 5).view(4, 1, 8).expand(4, 5, 8)
    found["up"] = c @ model.down.weight
    with torch.enable_grad():
        gelu = mean_derivative(F.gelu, inner)
    c = c + norm_back(found["up"] * gelu @ model.up.weight, model.norm2, h1)
    found["mix"] = c
    found["qkv"] = c @ model.mix.weight
    g = found["qkv"].view(4, 5, 2, 4).transpose(1, 2)
    dp = g @ v.mT
    ds = p * (dp - (dp * p).sum(-1, True)) / 2
    parts = [t.transpose(1, 2).reshape(4, 5, 8) for t in (ds @ k, ds.mT @ q, p.mT @ g)]
    found["read"] = c + norm_back(torch.cat(parts, -1) @ model.qkv.weight, model.norm1, h0)
    for name, b in found.items():
        torch.testing.assert_close(net.feedback[f"{name}/B"], b.flatten(1), msg=name)


@torch.no_grad()
def test_a_token_s_map_is_the_mean_of_tokens() -> None:
    """Of what their own error does to them; here nothing goes from one to another."""
    torch.manual_seed(0)
    model = MLP(act=nn.Tanh).double()
    net = compiled(copy.deepcopy(model), "dfa", **ONLY)
    x = torch.randn(6, 4, 8, dtype=torch.float64)
    with torch.enable_grad():
        train_step(net, (x,))
    c = model.out.weight.expand(4, 5, 12)
    for k in (2, 1, 0):
        torch.testing.assert_close(net.feedback[f"layers.{k}/B"], c.mean(0))
        h = x
        for layer in model.layers[: k + 1]:
            h = torch.tanh(layer(h))
        c = (c * (1 - h * h).mean(0).unsqueeze(1)) @ model.layers[k].weight


@pytest.mark.parametrize("rank", [None, 3])
def test_what_goes_from_token_to_token_has_a_sign(rank: int | None) -> None:
    """Of equal samples: s_t s_u dy_t / dh_u, meant over the tokens u and summed over t."""
    torch.manual_seed(0)
    model = Masked(0.0, depth=2).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    mask = torch.ones(5, 5).tril() == 0
    kind = "dense" if rank is None else f"low-rank:{rank}"
    net = compiled(
        copy.deepcopy(model), "dfa", points=["enc.layers.0.linear2"], feedback=kind, **ONLY
    )
    train_step(net, (x.expand(4, 5, 8).contiguous(), mask))
    assert net.plan is not None
    block = model.enc.layers[0]
    with torch.no_grad():
        inner = block.norm1(x + block.self_attn(x, x, x, attn_mask=mask, need_weights=False)[0])
        h = block.linear2(torch.relu(block.linear1(inner)))

    def rest(h: Tensor) -> Tensor:
        out: Tensor = model.head(model.enc.layers[1](block.norm2(inner + h), src_mask=mask))
        return out[0]

    jacobian: Any = torch.autograd.functional.jacobian(rest, h)
    jacobian = jacobian[:, :, 0]  # (t, C, u, n)
    if rank is not None:
        eye = torch.eye(4, dtype=torch.float64).unsqueeze(1)
        p = net.plan.error_rows["token"]([eye])
        jacobian = torch.einsum("tcun,cr->trun", jacobian, p)
    s = signs((jacobian.shape[1], 5), 0, x.device, x.dtype)
    want = torch.einsum("ct,cu,tcun->cn", s, s, jacobian) / 5
    torch.testing.assert_close(net.feedback["enc.layers.0.linear2/B"], want)


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_maps_of_tokens_point_with_backpropagation(name: str) -> None:
    model, args = make(name)
    net = compiled(still(copy.deepcopy(model)), "dfa", **ONLY)
    train_step(net, args)
    train_step(still(model), args)
    pairs = zip(net.parameters(), model.parameters(), strict=True)
    found = [F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), 0) for p, q in pairs]  # type: ignore[union-attr]
    assert float(torch.stack(found).median()) > 0.8, found


# kinds of maps, forms and precisions


def trained(
    model: nn.Module, *batches: Tensor, cast: bool = False, **options: Any
) -> dict[str, Tensor]:
    """The learning state and the weights after a step on each batch."""
    net = compiled(copy.deepcopy(model), "dfa", **{**ONLY, **options})
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = loss_of(net(x))
        loss.backward()
        optimizer.step()
    return {**net.feedback, **{k: p.detach() for k, p in net.named_parameters()}}


def quiet() -> nn.Module:
    torch.manual_seed(0)
    model = cnn().double()
    model[9].p = 0.0
    return model


def test_every_kind_of_map_stands_for_the_full_one() -> None:
    """Blocks hold their mean; sparse maps some entries; low rank the sums of the error's rows."""
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    full, pooled = trained(quiet(), x), trained(quiet(), x, feedback="pooled:1")
    b = full["0/B"].view(5, 4, 16).mean(2)
    torch.testing.assert_close(pooled["0/B"], b)
    net = compiled(quiet(), "dfa", feedback="low-rank:3", **ONLY)
    train_step(net, (x,))
    assert net.plan is not None
    p = net.plan.error_rows["dense"]([torch.eye(5, dtype=torch.float64)])
    torch.testing.assert_close(net.feedback["4/B"], p.T @ full["4/B"])
    net = compiled(quiet(), "dfa", feedback="sparse:2", **ONLY)
    train_step(net, (x,))
    assert net.plan is not None
    m = next(m for m in net.plan.maps if m.layer.name == "4")
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(net.feedback["4/B"], m.outer(eye, full["4/B"]))


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "inductor"}, {"capture": "export"},
        pytest.param({"backend": "inductor", "mean_field": 3}, marks=pytest.mark.slow),
        pytest.param({"backend": "inductor", "dynamic": True}, marks=pytest.mark.slow),
        pytest.param({"backend": "inductor", "parallel": "horizontal"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_every_form_gives_the_same(options: dict[str, Any]) -> None:
    batches = [torch.randn(n, 2, 8, 8, dtype=torch.float64) for n in (6, 6, 3, 6)]
    every = options.get("mean_field", 1)
    want = trained(quiet(), *batches, mean_field=every)
    found = trained(quiet(), *batches, **options)
    assert want.keys() == found.keys()
    for key, t in want.items():
        torch.testing.assert_close(found[key], t, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("options", [{"radial": "auto"}, {"exact_rows": 0.3}, {"exact_rows": 1.0}])
def test_beside_corrections(options: dict[str, Any]) -> None:
    """The maps are those without; the gradients are not."""
    x = torch.randn(6, 8, dtype=torch.float64)
    model = MLP().double()
    plain, with_it = trained(model, x), trained(model, x, **options)
    assert all(torch.equal(t, with_it[k]) for k, t in plain.items() if "/" in k)
    assert not torch.equal(plain["layers.0.weight"], with_it["layers.0.weight"])


def test_autocast() -> None:
    batches = [torch.randn(6, 2, 8, 8) for _ in range(3)]
    model = quiet().float()
    want, found = trained(model, *batches), trained(model, *batches, cast=True)
    for key, t in want.items():
        assert found[key].dtype == torch.float32
        assert float((found[key] - t).norm()) <= 0.05 * float(t.norm()) + 1e-4, key


def test_one_sample_uses_the_maps_that_there_are() -> None:
    """The rest of an epoch may be a batch of one, whose graph has no batch to average over."""
    x = torch.randn(4, 8, dtype=torch.float64)
    net = compiled(MLP().double(), "dfa", **ONLY)
    train_step(net, (x,))
    before = net.feedback
    train_step(net, (x[:1],))
    assert all(torch.equal(t, before[k]) for k, t in net.feedback.items())
    train_step(net, (2 * x,))
    assert not all(torch.equal(t, before[k]) for k, t in net.feedback.items())


# what it depends on, and when


def test_no_error_and_no_update_is_read() -> None:
    """Maps and means are equal for another loss; the verifier sees it, and the schedule."""
    model, x = MLP().double(), torch.randn(6, 8, dtype=torch.float64)
    states = []
    for seed in (1, 2):
        net = compiled(copy.deepcopy(model), "dfa", **ONLY)
        for _ in range(3):
            train_step(net, (x,), seed=seed)
            loss_of(net(x), seed=seed).backward()
        states.append(net.feedback)
    assert states[0].keys() == states[1].keys() and len(states[0]) == 4
    assert all(torch.equal(t, states[1][k]) for k, t in states[0].items())
    plan = build_plan(model, (x,), method="dfa", **ONLY)
    step = plan.graph("mean_field")
    assert set(independence(step, plan.layers)) == {n for n, _ in model.named_parameters()}
    plain = build_plan(model, (x,), method="dfa", calib_every=None)
    spans = [
        build_dag(method_graphs(p).cost(p.graph(kind).gm, 6)).span("flops")
        for p, kind in ((plan, "mean_field"), (plain, "update"))
    ]
    assert spans[0] == spans[1]  # the maps are ready before the error is


@pytest.mark.parametrize("wrong", ["error", "update"])
def test_the_verifier_refuses_a_chain_that_waits(wrong: str) -> None:
    model, x = MLP().double(), torch.randn(6, 8, dtype=torch.float64)
    plan = build_plan(model, (x,), method="dfa", **ONLY)
    edit = Edit(plan.graph("mean_field"))
    if wrong == "error":
        source = next(n for n in edit.graph.nodes if meta.role(n) == "cotangent")
    else:
        source = next(n for n in edit.graph.nodes if meta.phase(n) == "projection")
    with edit.emitter.before(edit.output, phase="mean_field"):
        made = edit.emitter.call(torch.ops.aten.mul.Tensor, source, 2.0)
    edit.add_output(Slot("metric", "x"), made)
    with pytest.raises(VerifyError, match="wait for"):
        independence(edit.finish(), plan.layers)


def test_the_kinds_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start, then every k-th step; calibrations between, which refit nothing."""
    x = torch.randn(6, 8, dtype=torch.float64)

    def kinds(count: int, method: str = "dfa", **options: Any) -> list[str]:
        net = compiled(MLP().double(), method, calib_unit="step", **options)
        net.record()
        for _ in range(count):
            before = net.feedback
            train_step(net, (x,))
            if net.history[-1].kind == "calibration" and "mean_field/" in "".join(before):
                assert all(torch.equal(t, before[k]) for k, t in net.feedback.items())
        return [r.kind for r in net.history]

    m, u, c = "mean_field", "update", "calibration"
    assert kinds(4, mean_field=1, calib_every=None) == ["start", m, m, m]
    assert kinds(6, mean_field=2, calib_every=None) == ["start", u, m, u, m, u]
    assert kinds(6, mean_field=2, calib_every=3) == [c, "start", m, c, m, u]
    started = ["start", "align", "align"]
    assert kinds(3, "grape", mean_field="start", calib_every=None) == started
    later = kinds(4, mean_field="start", calib_every=2, calib_init=False)
    assert later == ["start", u, c, u]


def test_a_start_for_maps_that_learn() -> None:
    """The first step of any method that can take maps over is one with the mean field's."""
    model, x = MLP().double(), torch.randn(6, 8, dtype=torch.float64)
    want = trained(model, x)
    for method in ("fdfa", "grape"):
        net = compiled(copy.deepcopy(model), method, mean_field="start", calib_every=None)
        train_step(net, (x,))
        for key, b in want.items():
            if key.endswith("/B") and method == "fdfa":
                torch.testing.assert_close(net.feedback[key], b)
        assert not any(k.startswith("mean_field") for k in net.feedback)


@pytest.mark.parametrize("every", [1, 2])
def test_resuming_is_bit_exact(every: int) -> None:
    batches = list(torch.randn(6, 6, 8, dtype=torch.float64))
    model = MLP().double()

    def run(net: Any, some: list[Tensor]) -> None:
        for x in some:
            train_step(net, (x,))
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.05 * p.grad

    def fresh(**options: Any) -> Any:
        chosen = {**ONLY, "mean_field": every, **options}
        return compiled(copy.deepcopy(model), "dfa", **chosen)

    whole, first, second = fresh(), fresh(), fresh()
    run(whole, batches)
    run(first, batches[:3])
    second.load_state_dict(first.state_dict())
    second.load_feedback_state_dict(first.feedback_state_dict())
    copied = copy.deepcopy(first)
    for net in (second, copied):
        run(net, batches[3:])
        for a, b in zip(net.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(t, net.feedback[k]) for k, t in whole.feedback.items())
    other = fresh(mean_field=None)
    with pytest.raises(StateError, match="other options"):
        other.load_feedback_state_dict(first.feedback_state_dict())
    run(other, batches[:1])
    third = fresh()
    third.load_feedback_state_dict(other.feedback_state_dict())  # no means yet: it starts
    run(third, batches[:2])


def test_another_resolution_has_means_of_its_own() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    net = compiled(model.double(), "dfa", points=["0"], **ONLY)
    net.record()
    for size in (8, 6, 8, 6):
        train_step(net, (torch.randn(5, 2, size, size, dtype=torch.float64),))
    assert [r.kind for r in net.history] == ["start", "start", "mean_field", "mean_field"]
    assert sum(k.startswith("mean_field/") for k in net.feedback) == 2


def test_overflow_leaves_no_trace() -> None:
    """A step whose activations are not finite makes no mean that is not."""
    net = compiled(MLP().double(), "dfa", **ONLY)
    x = torch.randn(6, 8, dtype=torch.float64)
    for scale in (torch.inf, 1.0, torch.nan, 1.0):
        train_step(net, (x * scale,))
    assert all(t.isfinite().all() for t in net.feedback.values())


# what is refused and said


class Looked(nn.Module):
    """Rows of a table that the data picks, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        h = h[torch.arange(h.shape[0]).unsqueeze(1), h.argsort(1)]
        return self.out(torch.tanh(self.b(h)))


def test_what_cannot_be_averaged_is_refused_with_its_line() -> None:
    net = compiled(Looked(), "dfa", points=["a"], **ONLY)
    with pytest.raises(
        OptionError, match=r"positions that differ.*\n.*test_mean_field.*\n.*argsort"
    ):
        net(torch.randn(4, 8))


@pytest.mark.parametrize("mix", [lambda h: h.cumsum(0), lambda h: h.flip(0), lambda h: h.roll(1)])
def test_samples_that_mix_are_refused(mix: Callable[[Tensor], Tensor]) -> None:
    class Mixing(MLP):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(mix(torch.tanh(self.layers[0](x))))
            return out

    with pytest.raises(OptionError, match="may mix the samples"):
        compiled(Mixing(depth=1), "dfa", **ONLY, points=["layers.0"])(torch.randn(4, 8))


def test_a_mean_over_the_batch_is_left_out() -> None:
    class Centred(MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = self.layers[0](x)
            out: Tensor = self.out(h - h.mean(0))
            return out

    net = compiled(Centred(depth=1), "dfa", **ONLY)
    train_step(net, (torch.randn(4, 8),))
    torch.testing.assert_close(net.feedback["layers.0/B"], net.out.weight.detach())


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("grape", {}, "learns its own"),
        ("bp", {}, "none that can be set"),
        ("fa", {}, "none that can be set"),
        ("drtp", {}, "none that can be set"),
        ("dfa", {"calib_refit": "feedback"}, "refits maps"),
        ("dfa", {"calib_forget": 0.5}, "refit feedback maps"),
        ("dfa", {"mean_field": "start"}, "calib_init=False"),
        ("dfa", {"mean_field": 0}, "mean_field=0"),
    ],
)
def test_options_that_do_not_go_together(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        grapefx.compile(MLP(), method=method, **{"mean_field": 1, "calib_every": 1, **options})


class Spread(nn.Module):
    """A layer in front of which there are no tokens yet, and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x)).unsqueeze(1) * torch.arange(1, 5).view(4, 1)
        return self.out(torch.tanh(self.b(h)))


def test_maps_of_two_kinds_are_refused() -> None:
    with pytest.raises(PlacementError, match="'b' serves each token, that of layer 'a' a sample"):
        compiled(Spread(), "dfa", **ONLY)(torch.randn(4, 8))


def test_what_is_said_about_it() -> None:
    net = compiled(MLP(), "dfa", mean_field=4)
    for _ in range(3):
        train_step(net, (torch.randn(4, 8),))
    said = " ".join(str(net.explain()).split())
    assert "one step in 4: the feedback maps are computed from the weights" in said
    assert "at step 0 and once every epoch: exact gradients" in said
    assert "mean field" in said or "mean_field" in said
    assert any(m.name.startswith("mean_field/") for m in net.report().memory)


@pytest.mark.slow
def test_a_deep_network_learns_without_a_true_gradient() -> None:
    """As well as with backpropagation, where fixed random maps are far behind."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(20, 32)
    labels = torch.arange(20) % 10
    draw = torch.randint(0, 20, (4000,))
    x, y = centres[draw] + 1.5 * torch.randn(4000, 32), labels[draw]

    def accuracy(**options: Any) -> float:
        torch.manual_seed(1)
        sizes = [32, *[64] * 7]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
            nn.init.kaiming_uniform_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
        net = compiled(nn.Sequential(*layers, nn.Linear(64, 10)), calib_every=None, **options)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(200):
            at = torch.randint(0, 3000, (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
        with torch.no_grad():
            return float((net(x[3000:]).argmax(1) == y[3000:]).float().mean())

    found = {
        "bp": accuracy(method="bp"),
        "fixed": accuracy(method="dfa"),
        "ours": accuracy(method="dfa", mean_field=1),
        "thinned": accuracy(method="dfa", mean_field=8, radial=True),
    }
    assert min(found["ours"], found["thinned"]) > found["bp"] - 0.03, found
    assert found["fixed"] < found["bp"] - 0.06, found


@pytest.mark.parametrize("mean_field", [1, "start"])
def test_a_first_batch_of_one_sample_is_refused(mean_field: Any) -> None:
    """Its graph takes no means: the maps would stay random without a word."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net = grapefx.compile(
        model, method="dfa", mean_field=mean_field, calib_every=None, backend="eager"
    )
    with pytest.raises(grapefx.InputError, match="begin with a batch of more"):
        net(torch.randn(1, 6)).sum().backward()
    net(torch.randn(4, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
