"""How much of the true gradient a linear map of the error can give, block by block.

    python -m tools.explained tools/reproduce/learning_transformer.yaml --data-dir DIR

A feedback map predicts the gradient delta_l at a point from the error e alone. Here the row ``bp``
of a config trains for some steps; then the best linear map is fitted by ridge regression to half of
the samples, and R^2 = 1 - |delta - e B|^2 / |delta|^2 is taken on the other half: what is left is
lost to every map of that kind, however it was learned. "As good as": the part of a batch on which
backpropagation's gradient would be as noisy as that of feedback which explains this share, with a
third of the samples exact and unbiased (docs/theory.md). In a transformer a map serves each token,
and more columns say what a map could give that reads more than the error of its own token:

- later tokens: also A^T e, the error of later tokens as each head in each block behind weighs them;
- shortcuts: also the exact gradient of a model whose branches pass none (norms and sums alone);
- values: also the exact gradient of a model whose attention weights are constants.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grapefx.analysis.theory import batch_as_good
from tools.common import cli
from tools.common.machine import machine
from tools.common.networks import EncoderBlock, Residual, Transformer
from tools.common.table import Table, fixed
from tools.reproduce.config import load_config
from tools.reproduce.data import load_data
from tools.reproduce.trainer import Trainer

THIRD = 1 / 3
TABLE = Table(
    "block", "steps:", "own error:", "as good as:", "later tokens:", "shortcuts:", "values:"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    p = cli.parser("tools.explained", __doc__)
    p.add_argument("config", type=Path, help="a config of tools/reproduce with a row bp")
    p.add_argument("--data-dir", help="folder of the full data sets")
    p.add_argument("--steps", type=int, nargs="+", default=[30, 120, 480])
    p.add_argument("--samples", type=int, default=512)
    args = p.parse_args(argv)
    print(TABLE.head())
    for line in rows(args):
        print(line, flush=True)
    print(f"\nMachine: {machine('cpu')}.")
    return 0


def rows(args: argparse.Namespace) -> Iterator[str]:
    """The table's rows: each block at each number of steps."""
    config = load_config(args.config)
    row = next(r for r in config.rows.values() if r.method == "bp")
    data = load_data(row.setting, args.data_dir, "cpu")
    trainer = Trainer(row, 0, data, "eager", "cpu")
    done = 0
    for steps in sorted(args.steps):
        generator = torch.Generator().manual_seed(steps)
        size = row.setting["batch_size"] * (steps - done)
        order = torch.randint(data.samples, (size,), generator=generator)
        trainer.training.train(map(data.batch, order.split(row.setting["batch_size"])))
        done = steps
        index = torch.randperm(data.samples, generator=generator)[: args.samples]
        for name, *shares in explained(trainer.model, *data.batch(index)):
            worth = batch_as_good(max(0.0, 1 - shares[0]), THIRD)
            own, *more = (fixed(s, 2, "") for s in shares)
            yield TABLE.line(name, steps, own, fixed(worth, 2, ""), *more)


def explained(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Any, ...]]:
    """(block, R^2 of its own error, and with more) for each block but the last."""
    names = [n for n, m in model.named_modules() if isinstance(m, EncoderBlock | Residual)]
    inputs: dict[str, Tensor] = {}
    error, *deltas = gradients(model, names, x, y, inputs)
    if not isinstance(model, Transformer):
        for name, delta in zip(names[:-1], deltas[:-1], strict=True):
            yield name, r_squared([error], delta), None, None, None
        return
    partial = []
    for cut in ("branches", "weights"):
        with patched(model, cut):
            partial.append(gradients(model, names, x, y, inputs)[1:])
    for k, (name, delta) in enumerate(zip(names[:-1], deltas[:-1], strict=True)):
        later = [carried(b, inputs[n], error) for n, b in zip(names, model.blocks, strict=True)]
        more = [later[k + 1 :], *([p[k]] for p in partial)]
        own = r_squared([error], delta, tokens=True)
        yield name, own, *(r_squared([error, *parts], delta, tokens=True) for parts in more)


def gradients(
    model: nn.Module, names: list[str], x: Tensor, y: Tensor, inputs: dict[str, Tensor]
) -> list[Tensor]:
    """Of the mean loss at the output and at each block's output; ``inputs``: of each block."""
    outputs: list[Tensor] = []

    def keep(name: str, given: Tensor, out: Tensor) -> None:
        inputs[name] = given.detach()
        outputs.append(out)

    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _, ins, out, n=n: keep(n, ins[0], out))
        for n in names
    ]
    out = model(x)
    for hook in hooks:
        hook.remove()
    loss = F.cross_entropy(out.flatten(0, -2), y.flatten())
    return [g.detach() for g in torch.autograd.grad(loss, [out, *outputs])]


@contextlib.contextmanager
def patched(model: Transformer, cut: str) -> Iterator[None]:
    """No gradient through "branches", or through the "weights" of attention."""
    attention = F.scaled_dot_product_attention

    def constant(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return attention(q.detach(), k.detach(), v, **how)

    if cut == "weights":
        with mock.patch.object(F, "scaled_dot_product_attention", constant):
            yield
        return
    ends = [m for b in model.blocks for m in (b.proj, b.mlp)]  # type: ignore[union-attr]
    hooks = [m.register_forward_hook(lambda _, ins, out: out.detach()) for m in ends]  # type: ignore[union-attr]
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def carried(block: nn.Module, value: Tensor, error: Tensor) -> Tensor:
    """A^T e of each head: (samples, tokens, heads * entries of the error)."""
    assert isinstance(block, EncoderBlock)
    q, k, _ = (
        part.unflatten(-1, (block.heads, -1)).transpose(1, 2)
        for part in block.qkv(value).chunk(3, dim=-1)
    )
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (weights.transpose(-2, -1) @ error.unsqueeze(1)).transpose(1, 2).flatten(2)


def r_squared(
    read: list[Tensor], wanted: Tensor, tokens: bool = False, ridge: float = 1e-4
) -> float:
    """Of the best linear map, fitted to the first half of the samples, on the second half.

    ``tokens``: each token of a sample is a row, or else the sample.
    """
    rows = [t.flatten(0, 1) if tokens else t.flatten(1) for t in (torch.cat(read, -1), wanted)]
    f, wanted = (t.double() for t in rows)
    half = len(f) // 2
    f = f / f.square().mean(0).sqrt().clamp_min(1e-30)
    g = f[:half].t() @ f[:half]
    g += ridge * g.trace() / len(g) * torch.eye(len(g), dtype=g.dtype)
    b = torch.linalg.solve(g, f[:half].t() @ wanted[:half])
    rest = wanted[half:] - f[half:] @ b
    return float(1 - rest.square().sum() / wanted[half:].square().sum())


if __name__ == "__main__":
    sys.exit(main())
