"""Step time against compiled backpropagation, interleaved in one process.

    python tools/bench_step.py --models mlp8x1024 cnn --batch 128 --rounds 30

Each round runs one step (zero_grad, forward, loss, backward) of every variant in shuffled order;
ratios are medians of the paired ratios to ``torch.compile``d BP. ``floor`` is the ratio of products
alone: what FLOPs allow if everything else were free. Peak memory is measured in a process of its
own (``--memory``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx

Step = Callable[[], None]


def mlp(depth: int, width: int) -> nn.Module:
    """``depth`` weight layers."""
    sizes = [784] + [width] * (depth - 1) + [10]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + ([nn.ReLU()] if i < depth - 1 else [])
    return nn.Sequential(*layers)


def cnn() -> nn.Module:
    """A LeNet-like net with batch norm for 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tiny": (lambda: mlp(3, 16), (1, 28, 28)),
    "mlp8x1024": (lambda: mlp(8, 1024), (1, 28, 28)),
    "mlp3x1024": (lambda: mlp(3, 1024), (1, 28, 28)),
    "cnn": (cnn, (1, 28, 28)),
}

VARIANTS: dict[str, dict[str, Any]] = {
    "bp": {"method": "bp"},
    "dfa": {"method": "dfa", "calib_every": None},
    "fdfa": {"method": "fdfa", "calib_every": None},
    "grape": {"method": "grape", "calib_every": None},
    "grape 1/8": {"method": "grape", "calib_every": None, "tangent_fraction": 1 / 8},
    "grape k=8": {"method": "grape", "calib_every": None, "align_every": 8},
}


def make_step(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """One step without the optimizer."""

    def step() -> None:
        for p in net.parameters():
            p.grad = None
        F.cross_entropy(net(x), y).backward()

    return step


def build(name: str, variant: str, x: Tensor, seed: int = 0) -> nn.Module:
    """A model under one variant; ``eager`` and ``compiled`` are plain backpropagation."""
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    if variant == "eager":
        return model
    if variant == "compiled":
        return torch.compile(model)  # type: ignore[return-value]
    return grapefx.compile(model, **VARIANTS[variant])


def products(net: Any, batch: int) -> dict[str, float]:
    """FLOPs of the products in a step of each kind, counted on the step graph itself."""
    from torch.utils.flop_counter import FlopCounterMode

    plan = net.plan
    out = {}
    for kind in plan.kinds():
        step = plan.graph(kind)
        inputs = []
        for node in step.placeholders():
            val = node.meta["val"]
            # every symbolic dim stands for the batch, or for the samples that carry tangents
            rows = plan.rows(batch) if node.meta.get("grapefx_role") == "noise" else batch
            shape = [rows if isinstance(s, torch.SymInt) else s for s in val.shape]
            inputs.append(torch.zeros(shape, dtype=val.dtype))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            step.gm(*inputs)
        out[kind] = float(counter.get_total_flops())
    return out


def run_model(
    name: str, variants: list[str], batch: int, rounds: int, warmup: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    shape = MODELS[name][1]
    torch.manual_seed(1)
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    nets: dict[str, nn.Module] = {}
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    for v in ["eager", "compiled", *variants]:
        nets[v] = build(name, v, x)
        steps[v] = make_step(nets[v], x, y)
        start = time.perf_counter()
        steps[v]()
        if v == "grape k=8":
            for _ in range(8):
                steps[v]()
        first[v] = time.perf_counter() - start
    for _ in range(warmup):
        for s in steps.values():
            s()
    times: dict[str, list[float]] = {v: [] for v in steps}
    order = list(steps)
    repeats = {v: 8 if v == "grape k=8" else 1 for v in steps}
    for _ in range(rounds):
        random.shuffle(order)
        for v in order:
            start = clock()
            for _ in range(repeats[v]):
                steps[v]()
            times[v].append((clock() - start) / repeats[v])
    reference = None
    rows = []
    for v in steps:
        ratios = sorted(a / b for a, b in zip(times[v], times["compiled"], strict=True))
        row: dict[str, Any] = {
            "model": name,
            "variant": v,
            "batch": batch,
            "ms": 1e3 * statistics.median(times[v]),
            "ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[(3 * len(ratios)) // 4],
            "first_call_s": first[v],
            "floor": None,
        }
        if v in VARIANTS:
            flops = products(nets[v], batch)
            if v == "bp":
                reference = flops["calibration"]
            if reference:
                kind = (
                    "align"
                    if "align" in flops
                    else ("update" if "update" in flops else "calibration")
                )
                mine = flops[kind]
                if v == "grape k=8":
                    mine = flops["align"] / 8 + flops["update"] * 7 / 8
                row["floor"] = mine / reference
        rows.append(row)
    return rows


def paired(name: str, variants: list[str], *, batch: int, rounds: int) -> dict[str, list[float]]:
    """Each variant's step times over those of compiled BP in the same round."""
    shape = MODELS[name][1]
    torch.manual_seed(1)
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    steps = {v: make_step(build(name, v, x), x, y) for v in ["compiled", *variants]}
    times: dict[str, list[float]] = {v: [] for v in steps}
    for i in range(rounds + 5):
        for v in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[v]()
            if i >= 5:
                times[v].append(time.perf_counter() - start)
    return {v: [a / b for a, b in zip(times[v], times["compiled"], strict=True)] for v in variants}


def memory_of(name: str, variant: str, batch: int, steps: int = 5) -> float:
    """Peak resident MiB above the process's level before the first step."""
    shape = MODELS[name][1]
    x, y = torch.randn(batch, *shape), torch.randint(0, 10, (batch,))
    step = make_step(build(name, variant, x), x, y)
    step()  # compiling has a peak of its own: a fresh high-water mark is not to be had, so settle
    from pathlib import Path

    Path("/proc/self/clear_refs").write_text("5")
    base = _status("VmRSS")
    for _ in range(steps):
        step()
    return (_status("VmHWM") - base) / 1024


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key))


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table."""
    out = [
        "| model | variant | ms | ratio to compiled BP | quartiles | floor | first call s "
        "| peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        floor = f"{r['floor']:.2f}" if r["floor"] else "-"
        peak = f"{r['peak_mib']:.0f}" if r.get("peak_mib") is not None else "-"
        out.append(
            f"| {r['model']} | {r['variant']} | {r['ms']:.2f} | {r['ratio']:.2f} | "
            f"{r['low']:.2f}-{r['high']:.2f} | {floor} | {r['first_call_s']:.1f} | {peak} |"
        )
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--models", nargs="+", default=["mlp8x1024", "mlp3x1024", "cnn"], choices=list(MODELS)
    )
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--rounds", type=int, default=30)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time on one thread: for a machine that does other work meanwhile",
    )
    p.add_argument(
        "--memory", action="store_true", help="also measure peak memory (one process each)"
    )
    p.add_argument("--json", help="write the rows to this file")
    p.add_argument("--one-memory", nargs=2, metavar=("MODEL", "VARIANT"), help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    warnings.simplefilter("ignore")
    if a.one_memory:
        print(memory_of(a.one_memory[0], a.one_memory[1], a.batch))
        return 0
    if a.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if a.cpu_time else time.perf_counter
    print(
        f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, batch {a.batch}, {a.rounds} rounds"
    )
    rows: list[dict[str, Any]] = []
    for name in a.models:
        rows += run_model(name, a.variants, a.batch, a.rounds, a.warmup, clock)
    if a.memory:
        for r in rows:
            command = [
                sys.executable,
                __file__,
                "--batch",
                str(a.batch),
                "--one-memory",
                r["model"],
                r["variant"],
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            r["peak_mib"] = (
                float(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
            )
    print(table(rows))
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"torch": torch.__version__, "rows": rows}, f, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
