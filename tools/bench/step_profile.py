"""Where a step's time goes: library calls by kind, and the kernels that Inductor generated.

    python -m tools.bench.step_profile resnet20 fdfa_cnn --variants compiled dfa grape

Each round profiles one step of every variant in shuffled order; the table has means. ``generated``
is the time that a compiled graph spends outside library calls.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from tools.bench.measure import period
from tools.bench.models import MODELS, PEERS, PLAIN, VARIANTS, Step, make
from tools.common import cli
from tools.common.table import Table
from tools.common.timing import interleaved

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


def profiled(step: Step) -> dict[str, float]:
    """Milliseconds by kind, of one step."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        step()
    return shares((e.name, e.self_cpu_time_total) for e in prof.events() or ())


def measure(
    model: str, variants: Sequence[str], batch: int, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Milliseconds by kind, of each variant's steps."""
    torch.compiler.reset()
    steps = {v: make(model, v, batch) for v in variants}
    for v, step in steps.items():
        for _ in range(3 * period(v)):
            step()
    return interleaved({v: functools.partial(profiled, s) for v, s in steps.items()}, rounds)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a markdown table."""
    p = cli.parser("tools.bench.step_profile", __doc__)
    p.add_argument("models", nargs="+", choices=list(MODELS), metavar="MODEL", help=str([*MODELS]))
    every = [*PLAIN, *PEERS, *VARIANTS]
    p.add_argument("--variants", nargs="+", choices=every, default=["compiled", "dfa", "grape"])
    p.add_argument("--batch", type=cli.count(), default=128)
    p.add_argument("--rounds", type=cli.count(), default=10)
    a = p.parse_args(argv)
    table = Table("network", "variant", *(f"{k}:" for k in KINDS), "all, ms:")
    print(table.head())
    for model in a.models:
        for v, found in measure(model, a.variants, a.batch, a.rounds).items():
            means = [sum(f[k] for f in found) / len(found) for k in KINDS]
            print(table.line(model, v, *(f"{m:.1f}" for m in [*means, sum(means)])), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
