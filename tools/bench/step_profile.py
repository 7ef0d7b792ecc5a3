"""Where a step's time goes: library calls by kind, and the kernels that Inductor generated.

    python tools/bench/step_profile.py resnet20 fdfa_cnn --variants compiled dfa grape

Each round profiles one step of every variant in shuffled order; the table has means. ``generated``
is the time that a compiled graph spends outside library calls.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / p) for p in ("tools/bench", "tools", "examples", "")]

from bench_models import MODELS, PEERS, PLAIN, VARIANTS, make  # noqa: E402

PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}
GRAPHS = {"Step", "StepBackward"}  # our graphs run in these, torch.compile's in "## Call ..."
KINDS = ("convolutions", "products", "generated", "other")


def kind(event: str) -> str:
    """Which column an event's own time belongs to."""
    if event in PRODUCTS:
        return "products"
    if event.startswith("aten::") and "conv" in event:
        return "convolutions"
    return "generated" if event in GRAPHS or event.startswith("## Call ") else "other"


def shares(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Milliseconds by kind, of names and own microseconds."""
    sums: dict[str, float] = collections.defaultdict(float)
    for name, micros in events:
        sums[kind(name)] += micros / 1e3
    return {k: sums[k] for k in KINDS}


def measure(
    model: str, variants: list[str], batch: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds by kind, of each variant's steps."""
    torch.compiler.reset()
    steps = {v: make(model, v, batch) for v in variants}
    for v, step in steps.items():
        for _ in range(3 * (VARIANTS[v][1] if v in VARIANTS else 1)):
            step()
    found: dict[str, list[dict[str, float]]] = {v: [] for v in variants}
    for _ in range(rounds):
        for v in random.sample(variants, len(variants)):
            with profile(activities=[ProfilerActivity.CPU]) as prof:
                steps[v]()
            found[v].append(shares((e.name, e.self_cpu_time_total) for e in prof.events() or ()))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print a markdown table."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("models", nargs="+", choices=list(MODELS), metavar="MODEL", help=str([*MODELS]))
    every = [*PLAIN, *PEERS, *VARIANTS]
    p.add_argument("--variants", nargs="+", choices=every, default=["compiled", "dfa", "grape"])
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--rounds", type=int, default=10)
    a = p.parse_args(argv)
    if a.batch < 1 or a.rounds < 1:
        p.error("--batch and --rounds: 1 or more")
    print(f"| network | variant | {' | '.join(KINDS)} | all, ms |\n" + "| --- " * 7 + "|")
    for model in a.models:
        for v, found in measure(model, a.variants, a.batch, a.rounds).items():
            means = [sum(f[k] for f in found) / len(found) for k in KINDS]
            cells = " | ".join(f"{m:.1f}" for m in [*means, sum(means)])
            print(f"| {model} | {v} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
