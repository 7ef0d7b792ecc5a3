"""What compiling the optimizer into the step could bring: its share of a step, fused and compiled.

    python -m tools.bench.optimizer_share mlp8x1024 mlp3x1024

Weight gradients are results of library products, which no compiler fuses with an optimizer: beside
call overhead, a step that contains the optimizer can only win what a compiled optimizer wins.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from tools.bench.models import MODELS
from tools.common import cli
from tools.common.table import Table
from tools.common.timing import interleaved, median_ms

TABLE = Table("network", "optimizer", "", "step ms:", "of it the optimizer:")


def stepper(net: nn.Module, name: str, compiled: bool) -> Callable[[], object]:
    """The optimizer's step: PyTorch's fused kernel, or Inductor's of its loop over tensors."""
    parameters = list(net.parameters())
    how = {"foreach": True} if compiled else {"fused": True}
    opt: torch.optim.Optimizer
    if name == "Adam":
        opt = torch.optim.Adam(parameters, 1e-4, **how)  # type: ignore[arg-type]
    else:
        opt = torch.optim.SGD(parameters, 1e-2, momentum=0.9, **how)  # type: ignore[arg-type]
    return torch.compile(opt.step) if compiled else opt.step


def timed(net: Any, step: Callable[[], object], x: Tensor, y: Tensor) -> tuple[float, float]:
    """Seconds of a step, and of the optimizer's part of it."""
    start = time.perf_counter()
    F.cross_entropy(net(x), y).backward()
    middle = time.perf_counter()
    step()
    net.zero_grad()
    end = time.perf_counter()
    return end - start, end - middle


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table, two lines as soon as they are known."""
    p = cli.parser("tools.bench.optimizer_share", __doc__)
    p.add_argument(
        "models", nargs="*", choices=list(MODELS), default="mlp8x1024", metavar="MODEL",
        help=f"default: mlp8x1024; of {', '.join(MODELS)}",
    )  # fmt: skip
    p.add_argument("--rounds", type=int, default=21)
    a = p.parse_args(argv)
    print(TABLE.head())
    for model in [a.models] if isinstance(a.models, str) else a.models:
        x, y = MODELS[model].example(128)
        for name in ("Adam", "SGD"):
            steps = {}
            for compiled in (False, True):
                net = grapefx.compile(MODELS[model].build(), method="dfa", calib_every=None)
                step = stepper(net, name, compiled)
                steps["compiled" if compiled else "fused"] = functools.partial(
                    timed, net, step, x, y
                )
            for label, found in interleaved(steps, a.rounds, warm_up=4).items():
                whole, part = (f"{median_ms(times):.2f}" for times in zip(*found, strict=True))
                print(TABLE.line(model, name, label, whole, part), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
