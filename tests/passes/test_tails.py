"""Code without parameters behind the last weights is exact, whatever it returns."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from grapefx.plan import build_plan

WIDTH = 6
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda y: y.softmax(-1),
    "log_softmax": lambda y: F.log_softmax(y, -1),
    "temperature": lambda y: y / 2.5,
    "clamp": lambda y: y.clamp(-0.6, 0.6),
    "normalize": lambda y: F.normalize(y, dim=-1),
    "layer_norm": lambda y: F.layer_norm(y, y.shape[-1:]),
    "swish": lambda y: y * y.sigmoid(),
    "glu": lambda y: torch.cat([F.glu(y, -1)] * 2, -1),
    "dueling": lambda y: y[:, :1] + y[:, 1:].repeat(1, 2)[:, :WIDTH] - y[:, 1:].mean(-1, True),
    "chunk": lambda y: torch.cat([a * b.exp() for a, b in [y.chunk(2, -1)]] * 2, -1),
    "unbind": lambda y: torch.stack([v * (k + 1) for k, v in enumerate(y.unbind(1))], 1),
    "centred": lambda y: y - y.mean(-1, keepdim=True),
    "cumsum": lambda y: y.cumsum(-1),
    "sort": lambda y: y.sort(-1).values,
    "gate": lambda y: torch.where(y > 0, y, 0.2 * y.tanh()),
    "logsumexp": lambda y: y - y.logsumexp(-1, keepdim=True),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "max": torch.maximum,
    "cat": lambda a, b: torch.cat([a[:, :3], b[:, 3:]], -1),
    "outer": lambda a, b: (a.unsqueeze(-1) * b.unsqueeze(-2)).mean(-1),
    "mix": lambda a, b: a.softmax(-1) * b + (1 - a.softmax(-1)) * b.detach(),
}
SHAPE: dict[str, Callable[[list[Tensor]], Any]] = {
    "tuple": tuple,
    "list": list,
    "dict": lambda found: {f"o{k}": v for k, v in enumerate(found)},
    "nested": lambda found: {"first": found[0], "more": [v[:, :2] for v in found], "n": 3},
}
Program = list[tuple[str, int, int]]


class Tailed(nn.Module):
    """Two hidden layers, one or two output layers, and a generated program behind them."""

    def __init__(self, program: Program, returned: list[int], shape: str, heads: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(7, WIDTH) for _ in range(heads))
        self.program, self.returned, self.shape = program, returned, shape

    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        values = [head(h) for head in self.heads]
        for name, a, b in self.program:
            if name in UNARY:
                values.append(UNARY[name](values[a]))
            else:
                values.append(BINARY[name](values[a], values[b]))
        return SHAPE[self.shape]([values[k] for k in self.returned])


def generated(seed: int) -> Tailed:
    draw = random.Random(seed)
    heads = draw.choice([1, 1, 2])
    program: Program = []
    for _ in range(draw.randint(1, 4)):
        known = heads + len(program)
        name = draw.choice([*UNARY, *BINARY])
        program.append((name, draw.randrange(known), draw.randrange(known)))
    known = heads + len(program)
    returned = sorted(draw.sample(range(known), draw.randint(1, min(3, known))))
    return Tailed(program, returned, draw.choice(list(SHAPE)), heads)


def loss_of(out: Any, keep: Callable[[int], bool] = lambda _: True) -> Tensor:
    tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
    total = tensors[0].new_zeros(())
    for k, t in enumerate(tensors):
        if keep(k):
            weight = torch.linspace(-1, 2, t[0].numel(), dtype=t.dtype).view(t[0].shape)
            total = total + (t * weight).square().mean() + (t * weight).mean()
    return total


def eager_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def check(model: nn.Module, x: Tensor, method: str, loss: Callable[[Any], Tensor]) -> Any:
    """Output layers as eager autograd's; hidden layers learn from each loss that reaches them."""
    true = eager_gradients(model, lambda: loss(model(x)))
    net = grapefx.compile(model, method=method, calib_every=None, backend="eager")
    loss(net(x)).backward()
    for name, p in model.named_parameters():
        if true[name] is None:
            assert p.grad is None or not p.grad.any(), name
        elif name.startswith("head"):
            torch.testing.assert_close(p.grad, true[name], rtol=1e-9, atol=1e-12, msg=name)
        elif true[name].abs().max() > 1e-9:
            assert p.grad is not None and p.grad.any(), name
    assert all(not p.startswith("head") for layer in net.plan.layers for p in layer.parameters)
    assert net.plan.layers[0].parameters == ("body.0.bias", "body.0.weight")
    assert net.plan.layers[1].parameters == ("body.2.bias", "body.2.weight")
    return net


@pytest.mark.parametrize("seed", range(32))
def test_generated_tails(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = generated(seed).double(), torch.randn(9, 5, dtype=torch.float64)
    check(model, x, ("dfa", "grape")[seed % 4 == 0], loss_of)


@pytest.mark.parametrize("name", UNARY)
def test_output_and_a_function_of_it(name: str) -> None:
    """A loss of the output alone, which leads to another output, trains the hidden layers too."""
    torch.manual_seed(0)
    model = Tailed([(name, 0, 0)], [0, 1], "tuple", 1).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    net = check(model, x, "dfa", lambda out: loss_of(out, lambda k: k == 0))
    (tap,) = net.plan.placement.taps
    assert "linear" in str(tap.target) or "addmm" in str(tap.target)


@pytest.mark.parametrize("which", [0, 1])
def test_parts_beside_their_combination(which: int) -> None:
    """The advantage is returned beside the values that it and the state's value add up to."""
    torch.manual_seed(0)
    model = Tailed([("add", 0, 1)], [0, 2], "dict", 2).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    net = check(model, x, "grape", lambda out: loss_of(out, lambda k: k == which))
    assert len(net.plan.placement.taps) == 2


def test_a_value_of_the_tail_can_still_be_named() -> None:
    model = Tailed([("softmax", 0, 0), ("mul", 0, 1)], [2], "tuple", 1)
    x = torch.randn(4, 5)
    named = build_plan(model, (x,), method="dfa", points=["body.1", "heads.0"])
    assert [layer.name for layer in named.layers] == ["body.1", "heads.0"]
    default = build_plan(model, (x,), method="dfa")
    assert [layer.name for layer in default.layers] == ["body.0", "body.2"]


@pytest.mark.parametrize("granularity", ["layer", "sublayer", "block", "auto"])
def test_every_granularity(granularity: str) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(
                *(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3))
            )

        def forward(self, x: Tensor) -> Any:
            y = self.blocks(x)
            return y, {"p": y.softmax(-1), "s": y * y.sigmoid()}

    torch.manual_seed(0)
    model, x = Blocks().double(), torch.randn(5, 6, dtype=torch.float64)
    true = eager_gradients(model, lambda: loss_of(model(x)))
    net = grapefx.compile(
        model, method="dfa", calib_every=None, backend="eager", granularity=granularity
    )
    loss_of(net(x)).backward()
    torch.testing.assert_close(model.blocks[2][2].weight.grad, true["blocks.2.2.weight"])
    assert all("blocks.2.2" not in p for layer in net.plan.layers for p in layer.parameters)


def test_where_the_exact_part_begins_is_said() -> None:
    model = Tailed([("softmax", 0, 0), ("mul", 0, 1)], [0, 2], "tuple", 1)
    net = grapefx.compile(model, method="dfa", calib_every=None, backend="eager")
    net(torch.randn(4, 5))
    (where,) = net.plan.placement.exact
    assert where.startswith("heads.0 (") and "test_tails.py" in where
    text = " ".join(str(net.explain()).split())
    assert "true gradients from heads.0 (" in text
