"""Feedback projections of L layers as products of their own, as one, or written out.

    python -m tools.bench.projections

The updates of L Linear layers n wide behind ReLUs, batch 128, 10 classes, compiled by Inductor in
three forms: ``e @ B_l`` for each layer; one product ``e @ [B_1 ... B_L]`` whose columns the layers
read; ten products of a column of e and a row of B_l, added up in the kernel of the ReLU's mask.
Milliseconds are medians of interleaved runs; ratios, of the paired ones to the first form.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from tools.common import cli
from tools.common.table import Table
from tools.common.timing import interleaved, median_ms, ratios, seconds

CLASSES, BATCH = 10, 128
TABLE = Table("layers x width", "form", "ms:", "over the first:")
Update = Callable[[], object]


def local(g: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's gradients of weight and bias, from the cotangent behind its ReLU."""
    g = torch.where(h > 0, g, 0.0)
    return g.t() @ x, g.sum(0)


def forms(layers: int, width: int) -> dict[str, Update]:
    """The compiled updates of one network."""
    e = torch.randn(BATCH, CLASSES)
    maps = [torch.randn(CLASSES, width) for _ in range(layers)]
    joined = torch.cat(maps, 1)
    outs = [torch.randn(BATCH, width).relu() for _ in range(layers)]
    ins = [torch.randn(BATCH, width) for _ in range(layers)]

    def own(e: Tensor, maps: list[Tensor]) -> object:
        return [local(e @ b, h, x) for b, h, x in zip(maps, outs, ins, strict=True)]

    def one(e: Tensor, joined: Tensor) -> object:
        parts = (e @ joined).split(width, 1)
        return [local(g, h, x) for g, h, x in zip(parts, outs, ins, strict=True)]

    def written(e: Tensor, maps: list[Tensor]) -> object:
        found = []
        for b, h, x in zip(maps, outs, ins, strict=True):
            g = e[:, :1] * b[:1]
            for k in range(1, CLASSES):
                g = g + e[:, k : k + 1] * b[k : k + 1]
            found.append(local(g, h, x))
        return found

    plain: tuple[Callable[..., object], ...] = (own, one, written)
    calls = [torch.compile(f, dynamic=False) for f in plain]
    return {
        "a product a layer": lambda: calls[0](e, maps),
        "one product": lambda: calls[1](e, joined),
        "written out": lambda: calls[2](e, maps),
    }


def network(text: str) -> tuple[int, int]:
    """Layers and width."""
    layers, cross, width = text.partition("x")
    if not (cross and layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r}: layers x width, such as 8x1024")
    return int(layers), int(width)


def main(argv: list[str] | None = None) -> int:
    """Print a markdown table."""
    p = cli.parser("tools.bench.projections", __doc__)
    p.add_argument("--networks", nargs="+", type=network, default=[(2, 1024), (8, 1024), (31, 256)])
    p.add_argument("--rounds", type=cli.count(), default=100)
    a = p.parse_args(argv)
    print(TABLE.head())
    for layers, width in a.networks:
        with torch.no_grad():
            calls = {k: functools.partial(seconds, f) for k, f in forms(layers, width).items()}
            times = interleaved(calls, a.rounds, warm_up=1)
        first = times["a product a layer"]
        for name, found in times.items():
            cells = f"{median_ms(found):.2f}", f"{ratios(found, first).median:.2f}"
            print(TABLE.line(f"{layers}x{width}", name, *cells), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
