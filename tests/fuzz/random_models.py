"""Random models from a seed: branches, skips, shared layers, in-place ops, views, odd inputs.

Every value is (N, 4), so that any two can meet; an operator may leave that shape and must come
back to it. Unlike ``tests/passes/test_random_models.py`` nothing here keeps to what is supported:
a model may mix samples, branch on a value or stop gradients.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 4
Op = Callable[["Fuzzed", Tensor, Tensor, dict[str, Any]], Tensor]


def _write(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    x = x.clone()
    x[:, ::2] = y[:, 1::2]
    return x


def _write_view(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    x = x * 1.5
    x.view(-1, 2, 2)[:, 0].mul_(2).add_(y[:, :2])
    return x


def _no_grad(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        scale = y.abs().amax(1, keepdim=True) + 1
    return x / scale


def _buffer(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    m.count.add_(1)
    return x * m.table


def _branch(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    return x + y if x.sum() > 0 else x - y  # on a value: refused


def _loop(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    for _ in range(2):
        x = torch.tanh(m.shared(x))
    return x


def _tokens(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    return x + m.table_of(extra["tokens"]).mean(1) if "tokens" in extra else x


def _rows(m: Fuzzed, x: Tensor, y: Tensor, extra: dict[str, Any]) -> Tensor:
    index = torch.arange(len(x)).flip(0)
    return x.index_select(0, index)


OPS: dict[str, Op] = {
    "linear": lambda m, x, y, e: m.layer(x),
    "shared": lambda m, x, y, e: m.shared(x),
    "loop": _loop,
    "relu": lambda m, x, y, e: F.relu(x),
    "relu_": lambda m, x, y, e: F.relu_(x * 1.0),
    "gelu": lambda m, x, y, e: F.gelu(x),
    "softmax": lambda m, x, y, e: x.softmax(1),
    "norm": lambda m, x, y, e: F.layer_norm(x, (WIDTH,), m.weight, m.bias),
    "batch norm": lambda m, x, y, e: m.batch_norm(x),
    "dropout": lambda m, x, y, e: F.dropout(x, 0.0, m.training),
    "conv": lambda m, x, y, e: m.conv(x.unsqueeze(1)).mean(1),
    "pool": lambda m, x, y, e: F.interpolate(F.max_pool1d(x.unsqueeze(1), 2), WIDTH)[:, 0],
    "add": lambda m, x, y, e: x + y,
    "mul": lambda m, x, y, e: x * torch.sigmoid(y),
    "addcmul": lambda m, x, y, e: torch.addcmul(x, y, m.table, value=0.3),
    "where": lambda m, x, y, e: torch.where(x > y, x, 0.1 * y),
    "cat": lambda m, x, y, e: m.wide(torch.cat([x, y], 1)),
    "chunk": lambda m, x, y, e: torch.cat(x.chunk(2, 1)[::-1], 1),
    "view": lambda m, x, y, e: x.view(-1, 2, 2).transpose(1, 2).reshape(-1, WIDTH),
    "turn": lambda m, x, y, e: m.layer(x.t().contiguous().t()),
    "stack": lambda m, x, y, e: torch.stack([x, y], 1).amax(1),
    "expand": lambda m, x, y, e: (x[:, None, :] * m.table[None, :, None]).mean(1),
    "bmm": lambda m, x, y, e: (x.view(-1, 2, 2) @ y.view(-1, 2, 2)).flatten(1),
    "attend": lambda m, x, y, e: F.scaled_dot_product_attention(
        x.view(-1, 1, 2, 2), y.view(-1, 1, 2, 2), x.view(-1, 1, 2, 2)
    ).flatten(1),
    "gather": lambda m, x, y, e: x.gather(1, y.argsort(1)),
    "sort": lambda m, x, y, e: x.sort(1).values,
    "topk": lambda m, x, y, e: torch.cat([x.topk(2, 1).values, y[:, :2]], 1),
    "cumsum": lambda m, x, y, e: x.cumsum(1),
    "norm of rows": lambda m, x, y, e: F.normalize(x, dim=1, eps=1e-3),
    "mask": lambda m, x, y, e: x.masked_fill(y < 0, 0.5),
    "in place": lambda m, x, y, e: (x * 2).add_(y).clamp_(-3, 3),
    "write": _write,
    "write view": _write_view,
    "detach": lambda m, x, y, e: x + (torch.sign(y) - y).detach(),
    "no grad": _no_grad,
    "buffer": _buffer,
    "index add": lambda m, x, y, e: x.index_add(1, m.places, y),
    "mix samples": lambda m, x, y, e: x - x.mean(0, keepdim=True),
    "similar": lambda m, x, y, e: (x @ y.t()).softmax(1) @ x,
    "turn samples": _rows,
    "scale": lambda m, x, y, e: x * e.get("factor", 0.5),
    "tokens": _tokens,
    "complex": lambda m, x, y, e: torch.fft.rfft(x, dim=1).abs().sum(1, keepdim=True) * y,
    "integers": lambda m, x, y, e: x + (y > 0).long().sum(1, keepdim=True),
    "branch": _branch,
}
# what is not about one sample alone, or refused, comes up less often
RARE = ("branch", "mix samples", "similar", "turn samples", "complex")


class Fuzzed(nn.Module):
    """Runs its program: (operator, index of one value, index of another) a line."""

    def __init__(self, program: list[tuple[str, int, int]], form: str) -> None:
        super().__init__()
        self.program, self.form = program, form
        self.first, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in program)
        self.shared, self.wide = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.table_of = nn.Embedding(7, WIDTH)
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("table", torch.rand(WIDTH) + 0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("places", torch.tensor([0, 2, 2, 1]))
        self.at = 0

    def layer(self, x: Tensor) -> Tensor:
        """The layer of the present line."""
        return self.layers[self.at](x)

    def forward(self, x: Tensor, **extra: Any) -> Any:
        values = [self.first(x)]
        for k, (op, one, other) in enumerate(self.program):
            self.at = k
            values.append(
                OPS[op](self, values[one % len(values)], values[other % len(values)], extra)
            )
        self.at = 0
        result = self.out(values[-1])
        if self.form == "tuple":
            return result, values[len(values) // 2]
        if self.form == "dict":
            return {"logits": result, "steps": len(values), "mean": values[-1].mean()}
        return result.mean() if self.form == "scalar" else result


@dataclass
class Case:
    """A model with its calls: the second comes with another batch size."""

    seed: int
    model: Fuzzed
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def __str__(self) -> str:
        sizes = [len(a[0]) for a, _ in self.calls]
        extra = sorted(self.calls[0][1])
        return f"seed {self.seed}: {self.model.program} -> {self.model.form}, {sizes}, {extra}"


def random_case(seed: int) -> Case:
    """The model and calls of a seed, always the same."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    names = [n for n in OPS for _ in range(1 if n in RARE else 3)]
    program = [
        (rng.choice(names), rng.choice([-1, -1, -1, rng.randrange(8)]), rng.randrange(8))
        for _ in range(rng.randint(1, 6))
    ]
    form = rng.choice(["tensor", "tensor", "tensor", "tuple", "dict", "scalar"])
    model = Fuzzed(program, form).double()
    with_tokens, factor = rng.random() < 0.4, rng.choice([None, None, 2, 0.3, "tensor"])
    calls = []
    for size in rng.choice([[5], [3, 6], [2, 3], [1, 4], [4, 1], [0], [3, 0]]):
        extra: dict[str, Any] = {}
        if with_tokens:
            extra["tokens"] = torch.randint(0, 7, (size, 2))
        if factor is not None:
            extra["factor"] = torch.tensor(0.7).double() if factor == "tensor" else factor
        calls.append(((torch.randn(size, 3).double(),), extra))
    return Case(seed, model, calls)
