"""Every further method, step by step against a few lines of eager torch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.methods.fa import fans
from grapefx.runtime.module import FeedbackModule
from grapefx.runtime.noise import draw, seed_of
from tests.methods.reference import Reference
from tests.methods.test_reference import ROWS, SIZES, close, linears, noise_of, stack

CLASSES = SIZES[-1]


@dataclass
class Seen:
    """One training step as the oracle sees it, with the state of each layer before it."""

    net: FeedbackModule
    h: list[Tensor]  # x, hidden values, output
    y: Tensor
    e: Tensor
    noise: list[Tensor]
    d: Tensor
    state: list[dict[str, Tensor]]  # before the step, by hidden layer
    memory: dict[str, Any]

    @property
    def weights(self) -> list[Tensor]:
        return [m.weight.detach() for m in linears(self.net)]

    @property
    def one_hot(self) -> Tensor:
        return F.one_hot(self.y, CLASSES).double()

    def estimates(self) -> list[Tensor]:
        return [self.d.t() @ v / ROWS for v in self.noise]


@dataclass
class Case:
    """A method with its options; ``deltas`` gives the hidden cotangents, ``maps`` the new maps."""

    method: str
    options: dict[str, Any]
    deltas: Callable[[Seen, list[Tensor] | None], list[Tensor]]
    maps: Callable[[Seen], list[Tensor]] | None = None
    after: bool = False  # the step projects with the new maps
    decay: float = 0.0


def projected(s: Seen, new: list[Tensor] | None) -> list[Tensor]:
    maps = new if new is not None else [x["B"] for x in s.state]
    return [s.e @ b for b in maps]


def by_adam(s: Seen, gradients: list[Tensor], lr: float, decay: float = 0.0) -> list[Tensor]:
    """torch's own Adam on the maps that the run started from."""
    if "adam" not in s.memory:
        s.memory["B"] = [nn.Parameter(x["B"].clone()) for x in s.state]
        s.memory["adam"] = torch.optim.Adam(s.memory["B"], lr=lr, weight_decay=decay)
    for b, g in zip(s.memory["B"], gradients, strict=True):
        b.grad = g
    s.memory["adam"].step()
    return [b.detach().clone() for b in s.memory["B"]]


def fg_a(s: Seen, new: Any) -> list[Tensor]:
    return [(s.e * s.d).sum(1, keepdim=True) * v for v in s.noise]


def of_batch(deltas: Callable[[Seen, Any], list[Tensor]]) -> Callable[[Seen, Any], list[Tensor]]:
    """The same with one derivative of the whole batch for every sample."""

    def summed(s: Seen, new: Any) -> list[Tensor]:
        each = [(c / v)[:, :1] for c, v in zip(deltas(s, new), s.noise, strict=True)]
        return [slope.sum() * v for slope, v in zip(each, s.noise, strict=True)]

    return summed


def dkp(s: Seen) -> list[Tensor]:
    return by_adam(s, [s.e.t() @ h for h in s.h[1:-1]], 1e-2, 1e-6)


def fdfa_adam(s: Seen) -> list[Tensor]:
    now = s.memory.get("B", [x["B"] for x in s.state])
    return by_adam(s, [b.detach() - j for b, j in zip(now, s.estimates(), strict=True)], 1e-2)


def drtp(mean: bool, sign: bool) -> Callable[[Seen, Any], list[Tensor]]:
    def deltas(s: Seen, new: Any) -> list[Tensor]:
        t = torch.sign(s.h[-1].softmax(1) - s.one_hot) if sign else s.one_hot
        return [t @ x["B"] / (ROWS if mean else 1) for x in s.state]

    return deltas


def local(s: Seen, layer: int) -> tuple[Tensor, Tensor]:
    """(e_loc, M) of a local head, by autograd of its cross-entropy."""
    m = s.state[layer]["B"].clone().requires_grad_()
    logits = s.h[layer + 1] @ m.t()
    e, g = torch.autograd.grad(F.cross_entropy(logits, s.y), [logits, m])
    return e, g


def lg_fg_a(s: Seen, new: Any) -> list[Tensor]:
    out = []
    last = len(s.noise) - 1
    for i, v in enumerate(s.noise):
        if i == last:  # its own noise alone, through the output layer
            slope = (s.e * (v @ s.weights[-1].t())).sum(1, keepdim=True)
        else:
            slope = (local(s, i)[0] * (v @ s.state[i]["B"].t())).sum(1, keepdim=True)
        out.append(slope * v)
    return out


def local_heads(s: Seen) -> list[Tensor]:
    return [x["B"] - 0.1 * local(s, i)[1] for i, x in enumerate(s.state)]


def sample_cosines(b: Tensor, d: Tensor, v: Tensor) -> Tensor:
    """Mean over samples of the columnwise cosines of B and d_i v_i^T (n,)."""
    outer = torch.einsum("ic,ik->ick", d, v)
    return F.cosine_similarity(b.unsqueeze(0), outer, dim=1).mean(0)


def grape(order: str, cosine: str, average: str, step: str) -> Callable[[Seen], list[Tensor]]:
    def maps(s: Seen) -> list[Tensor]:
        out = []
        for i, v in enumerate(s.noise):
            b = s.state[i]["B"].clone().requires_grad_()
            j = s.d.t() @ v / ROWS
            if average != "none":
                seen = s.memory.setdefault(i, [])
                seen.append(j)
                if average == "cumulative":
                    j = torch.stack(seen).mean(0)
                else:
                    w = [0.1 * 0.9**k for k in range(len(seen))][::-1]
                    j = sum(a * x for a, x in zip(w, seen, strict=True)) / sum(w)
            n = b.shape[1]
            if cosine == "frobenius":
                if order == "mean-then-cosine":
                    c = F.cosine_similarity(b.flatten(), j.flatten(), dim=0)
                else:
                    outer = torch.einsum("ic,ik->ick", s.d, v).flatten(1)
                    c = F.cosine_similarity(b.flatten().unsqueeze(0), outer, dim=1).mean()
                loss = n * (1 - c)
            elif order == "mean-then-cosine":
                loss = (1 - F.cosine_similarity(b, j, dim=0)).sum()
            else:
                loss = (1 - sample_cosines(b, s.d, v)).sum()
            (g,) = torch.autograd.grad(loss / (n if step == "mean" else 1), b)
            m = s.memory[f"m{i}"] = 0.9 * s.memory.get(f"m{i}", 0.0) + g
            b = (b - 0.05 * m).detach()
            out.append(b / b.norm(dim=0, keepdim=True))
        return out

    return maps


def grape_2024(rule: str, order: str) -> Callable[[Seen], list[Tensor]]:
    eta, jitter = 0.1, 1e-3

    def maps(s: Seen) -> list[Tensor]:
        out = []
        for i, v in enumerate(s.noise):
            b = s.state[i]["B"]
            seen = s.memory.setdefault(i, [])
            seen.append(s.d.t() @ v / ROWS)
            j = torch.stack(seen).mean(0)
            if order == "cosine-then-mean":
                c = sample_cosines(b, s.d, v)
            else:
                c = F.cosine_similarity(b, j, dim=0)
            g = j * b.norm() / j.norm()
            z = torch.roll(s.state[i]["z"], 1)
            if rule == "shrink":
                new = (1 - eta * (1 - c)) * b + jitter * z * b.norm() / b.numel() ** 0.5
            elif rule == "alternative-1":
                new = b - eta * (1 - c) * b + eta * c * g
            else:
                new = (1 - eta) * b + eta * g
            out.append(new * b.norm() / new.norm())
        return out

    return maps


def grape_case(order: str, cosine: str, average: str = "none", step: str = "column") -> Case:
    options = {"order": order, "cosine": cosine, "average": average, "step": step}
    rule = grape(order, cosine, average, step)
    return Case("grape", {**options, "norm": "unit", "eta": 0.05}, projected, rule, after=True)


def g24_case(rule: str, order: str = "cosine-then-mean") -> Case:
    options = {"rule": rule, "order": order, "eta": 0.1}
    return Case("grape-2024", options, projected, grape_2024(rule, order), after=True)


MEAN, EACH = "mean-then-cosine", "cosine-then-mean"
CASES: dict[str, Case] = {
    "fg-a": Case("fg-a", {}, fg_a),
    "fg-a, batch": Case("fg-a", {"derivative": "batch"}, of_batch(fg_a)),
    "dkp": Case("dkp", {"lr": 1e-2}, projected, dkp, decay=1e-6),
    "dkp from zero": Case("dkp", {"lr": 1e-2, "init_b": "zero"}, projected, dkp, decay=1e-6),
    "fdfa by adam": Case(
        "fdfa", {"optimizer": "adam", "lr": 1e-2}, projected, fdfa_adam, after=True
    ),
    "drtp": Case("drtp", {}, drtp(True, False)),
    "drtp, sum": Case("drtp", {"mean": False}, drtp(False, False)),
    "sdfa": Case("drtp", {"sign_error": True}, drtp(True, True)),
    "lg-fg-a": Case("lg-fg-a", {"optimizer": "sgd", "lr": 0.1}, lg_fg_a, local_heads),
    "lg-fg-a, batch": Case(
        "lg-fg-a",
        {"optimizer": "sgd", "lr": 0.1, "derivative": "batch"},
        of_batch(lg_fg_a),
        local_heads,
    ),
    "grape, samples": grape_case(EACH, "column"),
    "grape, frobenius": grape_case(MEAN, "frobenius"),
    "grape, frobenius, samples": grape_case(EACH, "frobenius"),
    "grape, cumulative": grape_case(MEAN, "column", "cumulative"),
    "grape, ema, mean step": grape_case(MEAN, "column", "ema", "mean"),
    "grape-2024": g24_case("shrink"),
    "grape-2024, mean first": g24_case("shrink", MEAN),
    "grape-2024, alternative 1": g24_case("alternative-1"),
    "grape-2024, alternative 2": g24_case("alternative-2"),
}


def states(net: FeedbackModule) -> list[dict[str, Tensor]]:
    """The state of each hidden layer, in order."""
    plan = net.plan
    assert plan is not None
    return [
        {
            k.rpartition("/")[2]: v.clone()
            for k, v in net.feedback.items()
            if k.startswith(f"{x.name}/")
        }
        for x in plan.layers
    ]


def last_first(step: int) -> list[Tensor]:
    """The noise of a step where tangents follow the last layer's alone: it is drawn first."""
    generator = torch.Generator().manual_seed(seed_of(0, 0, step))
    order = (len(SIZES) - 2, *range(1, len(SIZES) - 2))
    shapes = [(ROWS, SIZES[k]) for k in order]
    last, *others = draw(shapes, torch.float64, torch.device("cpu"), generator, "gaussian")
    return [*others, last]


@pytest.mark.parametrize("name", CASES)
def test_method_follows_its_reference(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    net = grapefx.compile(
        stack(), method=case.method, backend="eager", calib_every=None, noise="gaussian",
        **case.options,
    )  # fmt: skip
    opt = torch.optim.Adam(net.parameters(), lr=0.01)
    net(torch.randn(ROWS, SIZES[0], dtype=torch.float64))  # the layers are known after a call
    memory: dict[str, Any] = {}
    for step in range(4):
        x = torch.randn(ROWS, SIZES[0], dtype=torch.float64)
        y = torch.randint(CLASSES, (ROWS,))
        lins = linears(net)
        weights, biases = [m.weight.detach() for m in lins], [m.bias.detach() for m in lins]
        ref = Reference("bp", weights, biases, [])
        h = ref.values(x)
        out = h[-1].clone().requires_grad_()
        (e,) = torch.autograd.grad(F.cross_entropy(out, y), out)
        noise = last_first(step) if case.method == "lg-fg-a" else noise_of(step, ROWS)
        seen = Seen(net, h, y, e, noise, ref.tangent(h, noise), states(net), memory)
        new = case.maps(seen) if case.maps else None
        deltas = [*case.deltas(seen, new if case.after else None), e]
        want = []
        for i, (below, value, delta) in enumerate(zip(h[:-1], h[1:], deltas, strict=True)):
            last = i == len(lins) - 1
            local_delta = delta if last else delta * (value > 0)
            want.append(local_delta.t() @ below + (0 if last else case.decay) * weights[i])
            want.append(local_delta.sum(0))

        opt.zero_grad()
        found = net(x)
        net.targets(y)
        F.cross_entropy(found, y).backward()
        for (p_name, p), g in zip(net.named_parameters(), want, strict=True):
            close(p.grad, g, f"step {step}, gradient of {p_name}")
        if new is not None:
            for i, (have, b) in enumerate(zip(states(net), new, strict=True)):
                close(have["B"], b, f"step {step}, map of layer {i}")
        opt.step()


def chain(net: FeedbackModule, x: Tensor, y: Tensor, stand_ins: list[Tensor]) -> list[Tensor]:
    """Backpropagation by hand in which ``stand_ins`` take the place of the later weights."""
    lins = linears(net)
    weights, biases = [m.weight.detach() for m in lins], [m.bias.detach() for m in lins]
    h = Reference("bp", weights, biases, []).values(x)
    out = h[-1].clone().requires_grad_()
    (delta,) = torch.autograd.grad(F.cross_entropy(out, y), out)
    found: list[Tensor] = []
    for i in range(len(lins) - 1, -1, -1):
        found = [delta.t() @ h[i], delta.sum(0), *found]
        if i:
            delta = (delta @ stand_ins[i - 1]) * (h[i] > 0)
    return found


@pytest.mark.parametrize("method", ["fa", "usf", "frsf"])
def test_stand_in_weights_follow_the_chain_by_hand(method: str) -> None:
    torch.manual_seed(0)
    net = grapefx.compile(stack(), method=method, backend="eager", calib_every=None)
    for _ in range(3):
        x, y = torch.randn(ROWS, SIZES[0]).double(), torch.randint(CLASSES, (ROWS,))
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        later = [f"{2 * k}.weight" for k in range(1, len(SIZES) - 1)]
        weights = dict(net.named_parameters())
        if method == "fa":
            use = [net.feedback[f"{n}/M"] for n in later]
        elif method == "frsf":
            use = [net.feedback[f"{n}/R"] * weights[n].detach().sign() for n in later]
        else:
            use = [
                (2 / sum(fans(tuple(weights[n].shape)))) ** 0.5 * weights[n].detach().sign()
                for n in later
            ]
        for (name, p), g in zip(net.named_parameters(), chain(net, x, y, use), strict=True):
            close(p.grad, g, f"gradient of {name}")
            with torch.no_grad():
                p.sub_(0.1 * g)
    assert ("0.weight/M" in net.feedback) is False  # nothing flows to the model's input


def test_brsf_redraws_its_magnitudes() -> None:
    torch.manual_seed(0)
    net = grapefx.compile(stack(), method="brsf", backend="eager", calib_every=None)
    x, y = torch.randn(ROWS, SIZES[0]).double(), torch.randint(CLASSES, (ROWS,))
    found = []
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        found.append([p.grad.clone() for p in net.parameters()])  # type: ignore[union-attr]
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][-2], found[1][-2])  # the output layer is exact
    assert not net.feedback
