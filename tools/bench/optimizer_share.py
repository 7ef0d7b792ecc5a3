"""What compiling the optimizer into the step could bring: its share of a step, fused and compiled.

    python tools/bench/optimizer_share.py mlp8x1024 mlp3x1024

Weight gradients are results of library products, which no compiler fuses with an optimizer: beside
call overhead, a step that contains the optimizer can only win what a compiled optimizer wins.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools" / "bench"), str(ROOT / "tools"), str(ROOT)]

import grapefx  # noqa: E402
from bench_models import MODELS  # noqa: E402

ROUNDS, WARM = 25, 4


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


def main() -> None:
    """Print a markdown table."""
    print("| network | optimizer | | step ms | of it the optimizer |\n" + "| --- " * 5 + "|")
    for model in sys.argv[1:] or ["mlp8x1024"]:
        x, y = MODELS[model].example(128)
        for name in ("Adam", "SGD"):
            nets, whole, part = [], [[], []], [[], []]  # type: ignore[var-annotated]
            for compiled in (False, True):
                net = grapefx.compile(MODELS[model].build(), method="dfa", calib_every=None)
                nets.append((net, stepper(net, name, compiled)))
            for r in range(ROUNDS):
                for k, (net, step) in enumerate(nets):
                    start = time.perf_counter()
                    F.cross_entropy(net(x), y).backward()
                    middle = time.perf_counter()
                    step()
                    net.zero_grad()
                    end = time.perf_counter()
                    if r >= WARM:
                        whole[k].append(end - start)
                        part[k].append(end - middle)
            for k, label in enumerate(("fused", "compiled")):
                a, b = (1e3 * statistics.median(t[k]) for t in (whole, part))
                print(f"| {model} | {name} | {label} | {a:.2f} | {b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
