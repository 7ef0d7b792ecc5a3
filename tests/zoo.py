"""Small models for tests: one of each kind that the core must train, and a loss for each."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.ir import StepGraph
from grapefx.methods import get_method
from grapefx.options import OPTION_NAMES, Options
from grapefx.plan import Plan, build_plan, sizes_of
from grapefx.runtime.module import FeedbackModule
from grapefx.torch_compat import batch_symbol

Model = tuple[nn.Module, tuple[Any, ...]]


class MLP(nn.Module):
    """``depth`` hidden layers of one width."""

    def __init__(
        self, width: int = 12, depth: int = 3, act: Callable[..., nn.Module] = nn.ReLU, out: int = 5
    ) -> None:
        super().__init__()
        sizes = [8, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.act = act()
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return self.out(x)


class Residual(nn.Module):
    """Two blocks; the second has a projection shortcut."""

    class Block(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(a, b, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(b)
            self.conv2 = nn.Conv2d(b, b, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(b)
            self.short = nn.Identity() if a == b else nn.Conv2d(a, b, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.bn1(self.conv1(x)))
            return F.relu(self.bn2(self.conv2(h)) + self.short(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(self.Block(4, 4), self.Block(4, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.stem(x)))
        return self.fc(h.mean((2, 3)))


class Branches(nn.Module):
    """Three parallel branches of different depth, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.a = nn.Linear(8, 4)
        self.b = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
        self.c = nn.Linear(8, 3)
        self.mix = nn.Linear(12, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        h = torch.cat([F.relu(self.a(h)), self.b(h), torch.sigmoid(self.c(h))], 1)
        return self.out(F.silu(self.mix(h)))


class Masked(nn.Module):
    """A transformer encoder with an attention mask that has no batch dim."""

    def __init__(self, dropout: float = 0.0, norm_first: bool = False, depth: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=dropout, batch_first=True, norm_first=norm_first
        )
        self.enc = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.enc(x, mask=mask))


class Recurrent(nn.Module):
    """Two recurrent layers with dropout between; the output is a dict with a plain entry."""

    def __init__(self, cell: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = cell(6, 7, 2, batch_first=True, dropout=0.3)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h, _ = self.rnn(x)
        return {"logits": self.out(h[:, -1]), "k": 3}


class Tied(nn.Module):
    """One linear used twice, and an output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.lin = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.lin(self.emb(x)))
        return self.out(torch.tanh(self.lin(h)))


class Unused(nn.Module):
    """A layer that is never called, and one whose result is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 9)
        self.never = nn.Linear(8, 9)
        self.thrown = nn.Linear(9, 3)
        self.b = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        self.thrown(h)
        return self.b(h)


class StopGrad(nn.Module):
    """A no_grad region, a detach and a straight-through sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 9)
        self.b = nn.Linear(9, 9)
        self.c = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            m = h.mean(0, keepdim=True)
            s = h.abs().amax(1, keepdim=True)
        h = self.b((h - m) / s + h.detach())
        h = h + (torch.sign(h) - h).detach()
        return self.c(h)


class InPlace(nn.Module):
    """Writes into views of an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 10)
        self.b = nn.Linear(10, 10)
        self.c = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, ::2] *= 2
        h = torch.tanh(h)
        g = self.b(h)
        g[:, 3:].add_(h[:, 3:])
        return self.c(F.relu_(g))


def cnn() -> nn.Module:
    """Convolution, batch norm, pooling, dropout."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.25), nn.Linear(24, 9), nn.ReLU(), nn.Linear(9, 5),
    )  # fmt: skip


def _x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(0))


ZOO: dict[str, Callable[[], Model]] = {
    "mlp": lambda: (MLP(), (_x(6, 8),)),
    "cnn": lambda: (cnn(), (_x(6, 2, 8, 8),)),
    "residual": lambda: (Residual(), (_x(5, 2, 6, 6),)),
    "branches": lambda: (Branches(), (_x(6, 8),)),
    "encoder": lambda: (Masked(0.2, depth=1), (_x(4, 5, 8), torch.ones(5, 5).tril() == 0)),
    "encoder-prenorm": lambda: (Masked(0.0, True, 1), (_x(4, 5, 8), torch.ones(5, 5).tril() == 0)),
    "lstm": lambda: (Recurrent(), (_x(4, 5, 6),)),
    "gru": lambda: (Recurrent(nn.GRU), (_x(4, 5, 6),)),
    "tied": lambda: (Tied(), (_tokens(4, 5),)),
    "unused": lambda: (Unused(), (_x(6, 8),)),
    "stop": lambda: (StopGrad(), (_x(6, 8),)),
    "inplace": lambda: (InPlace(), (_x(6, 8),)),
}
METHODS = ("bp", "dfa", "fdfa", "grape")


def make(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A model of the zoo with an example call, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, args = ZOO[name]()
        model.to(dtype)
    return model, tuple(a.to(dtype) if a.is_floating_point() else a for a in args)


def compiled(model: nn.Module, method: Any = "grape", **options: Any) -> FeedbackModule:
    """``grapefx.compile`` on graphs that run uncompiled; epoch 0 is announced."""
    options.setdefault("backend", "eager")
    if not {"calib_every", "preset"} & set(options):
        options["calib_every"] = 1  # what the oracles follow, whatever is recommended
    net = grapefx.compile(model, method=method, **options)
    net.set_epoch(0)
    return net


def tensors(out: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a nested output, in order."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, dict):
        for v in out.values():
            yield from tensors(v)
    elif isinstance(out, (tuple, list)):
        for v in out:
            yield from tensors(v)


def loss_of(out: Any, seed: int = 3) -> Tensor:
    """A loss without symmetry, on every float output."""
    generator = torch.Generator().manual_seed(seed)
    total: Any = 0.0
    for t in tensors(out):
        w = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        total = total + (torch.sin(t) * w + 0.3 * t * t).mean()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all gradients, by name."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def train_step(net: nn.Module, args: tuple[Any, ...], seed: int = 5, **kwargs: Any) -> Tensor:
    """One seeded forward and backward; returns the loss."""
    net.zero_grad()
    torch.manual_seed(seed)
    loss = loss_of(net(*args, **kwargs))
    loss.backward()
    return loss.detach()


def eager_twin(model: nn.Module) -> nn.Module:
    """A copy for plain PyTorch."""
    return copy.deepcopy(model)


def assert_same_gradients(a: nn.Module, b: nn.Module, tol: float = 1e-9) -> None:
    """Every gradient of ``a`` equals that of ``b``, None included (a zero may stand for None)."""
    ga, gb = gradients(a), gradients(b)
    assert ga.keys() == gb.keys()
    for name, x in ga.items():
        y = gb[name]
        if x is None or y is None:
            rest = x if y is None else y
            assert rest is None or not rest.any(), f"{name}: one gradient is None"
            continue
        scale = max(float(y.norm()), 1e-8)
        assert float((x - y).norm()) <= tol * scale, f"{name}: {(x - y).norm() / scale}"


def assert_same_buffers(a: nn.Module, b: nn.Module) -> None:
    """Every buffer agrees."""
    for (name, x), (_, y) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}")


@functools.cache
def _base_plan(name: str) -> Plan:
    model, args = make(name)
    return build_plan(model, args, method="grape")


def plan_of(name: str, method: str = "grape", **options: Any) -> Plan:
    """The plan of a zoo model; the capture is shared between methods."""
    base = _base_plan(name)
    own = {k: v for k, v in options.items() if k in OPTION_NAMES}
    rest = {k: v for k, v in options.items() if k not in OPTION_NAMES}
    return dataclasses.replace(
        base,
        method=get_method(method, rest),
        options=Options(**own),
        _graphs={},
        independent={},
        passes={},
    )


def step_inputs(plan: Plan, step: StepGraph, model: nn.Module, args: tuple[Any, ...]) -> list[Any]:
    """Real values for every input of a step graph: random cotangents, noise and feedback."""
    generator = torch.Generator().manual_seed(7)
    known: dict[tuple[str, str], Tensor] = {}
    known |= {("parameter", n): p.detach() for n, p in model.named_parameters()}
    known |= {("buffer", n): b.clone() for n, b in model.named_buffers()}
    made = zip(plan.captured.inputs, plan.capture.examples, strict=True)
    known |= {("constant", s.name): e for s, e in made if s.role == "constant"}
    known |= {("input", str(i)): a for i, a in enumerate(args)}
    out = []
    batch = args[plan.captured.dynamic[0]].shape[0] if plan.captured.dynamic else 0
    sizes = sizes_of(step, batch, plan.rows(batch))
    for slot, node in zip(step.inputs, step.placeholders(), strict=True):
        found = known.get((slot.role, slot.name))
        if found is None:
            val = node.meta["val"]
            exprs = [(s, batch_symbol(s)) for s in val.shape]
            shape = [int(s if e is None else e.xreplace(sizes)) for s, e in exprs]
            found = torch.randn(shape, generator=generator, dtype=torch.float64).to(val.dtype)
        out.append(found.detach().clone())
    return out


def live_input_gradients(graph: torch.fx.Graph) -> int:
    """How many input-gradient products of convolutions are still computed."""
    return sum(
        bool(n.args[10][0])  # type: ignore[index]
        for n in graph.nodes
        if n.op == "call_function" and n.target is torch.ops.aten.convolution_backward.default
    )
