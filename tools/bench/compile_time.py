"""Time from the model to the end of its first step, and how it grows with depth.

    python -m tools.bench.compile_time                  # ResNet-50, 224x224, 1000 classes
    python -m tools.bench.compile_time --rounds 3 --variants compiled bp dfa \\
        --models depth120 resnet18@64 resnet50@64 transformer8-micro    # make first-step
    python -m tools.bench.compile_time --depths 10 20 40 80 160 320 --no-kernels

Each measurement is a process of its own with an empty kernel cache; those of a network take turns,
and the table has their medians. ``first step`` is everything from the model to the first gradients,
kernels compiled, and ``ratio`` what it is over compiled backpropagation's. ``in front`` is the part
of it that is not Inductor's: capture and passes, or Dynamo and AOTAutograd; ``capture`` that of our
capture alone. ``processor`` is processor time, which other load on the machine changes little: of
the process, and of the C++ compilers that it started. ``calibration`` is the first step of the
second kind. With ``--depths`` nothing is compiled beside the process: it says what grows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from torch._inductor import compile_fx

import grapefx.plan.build
from grapefx.torch_compat import PendingKernels
from tools import ROOT
from tools.bench.models import PLAIN, VARIANTS, make
from tools.common import cli
from tools.common.results import Row
from tools.common.table import Table, fixed
from tools.common.timing import interleaved, ratios, seconds

TIMES = ("first", "front", "capture", "calibration", "processor", "compilers")
TABLE = Table(
    "network", "variant", "first step s:", "ratio:", "in front s:", "capture s:", "calibration s:",
    "processor s:", "of compilers s:", "nodes:",
)  # fmt: skip
# what a part of the first step is spent in
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "capture": ((grapefx.plan.build, "capture"),),
    "inductor": ((compile_fx, "_compile_fx_inner"), (PendingKernels, "wait")),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    p = cli.parser("tools.bench.compile_time", __doc__)
    p.add_argument(
        "--models", nargs="+", default=["resnet50"], help="of tools.bench.models, or of torchvision"
    )
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--depths", type=int, nargs="+", help="MLPs of these depths, 64 wide, instead")
    p.add_argument(
        "--variants",
        nargs="+",
        choices=("compiled", *VARIANTS),
        default=["compiled", "dfa", "grape"],
    )
    p.add_argument("--rounds", type=int, default=1, help="measurements of each variant")
    p.add_argument("--no-kernels", action="store_true", help="the passes alone, no Inductor")
    p.add_argument("--one", nargs=2, metavar=("NAME", "VARIANT"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.one:
        print(json.dumps(measure(*args.one, batch=args.batch, kernels=not args.no_kernels)))
        return 0
    print(TABLE.head())
    how = {"workers": not args.depths, "kernels": not args.no_kernels}
    for name in [f"depth{d}" for d in args.depths] if args.depths else args.models:
        calls = {
            v: functools.partial(compile_seconds, name, v, args.batch, **how) for v in args.variants
        }
        for line in lines(name, interleaved(calls, args.rounds)):
            print(line, flush=True)
    return 0


def lines(name: str, found: dict[str, list[Row]]) -> Iterator[str]:
    """The table's rows for a network, from what was measured of each variant by round."""
    base = [row["first"] for row in found.get("compiled", ())]
    for variant, rows in found.items():
        times = {
            k: statistics.median(r[k] for r in rows) if rows[0][k] is not None else None
            for k in TIMES
        }
        ratio = ratios([r["first"] for r in rows], base).median if base else None
        cells = [fixed(times[k], 1, "") for k in TIMES]
        cells.insert(1, fixed(ratio, 2, ""))
        yield TABLE.line(name, variant, *cells, rows[0]["nodes"] or "")


def compile_seconds(
    name: str, variant: str, batch: int, *, workers: bool = True, kernels: bool = True
) -> Row:
    """``measure`` in a new process without caches."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        if not workers:
            env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "tools.bench.compile_time", "--one", name, variant]
        command += ["--batch", str(batch)]
        command += [] if kernels else ["--no-kernels"]
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True, text=True
        )
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, variant: str, *, batch: int, kernels: bool) -> Row:
    """Seconds of each part, in this process; None where a variant has no such part."""
    step = make(name, variant, batch, "inductor" if kernels else "eager")
    before = os.times()
    with _timed() as parts:
        first = seconds(step)
    now = os.times()
    row: Row = {
        "first": first,
        "front": first - parts["inductor"],
        "capture": parts["capture"] or None,
        "processor": now.user + now.system - before.user - before.system,
        "compilers": now.children_user + now.children_system
        - before.children_user - before.children_system,
        "calibration": None,
        "nodes": None,
    }  # fmt: skip
    if variant in PLAIN:
        return row
    row["nodes"] = len(step.net.plan.joint.gm.graph.nodes)  # type: ignore
    if variant == "bp":
        return row

    def calibrate() -> None:
        with step.net.calibration():  # type: ignore[operator]
            step()

    row["calibration"] = seconds(calibrate)
    return row


@contextlib.contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each of ``PARTS`` inside."""
    found = dict.fromkeys(PARTS, 0.0)

    def timed(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                found[part] += time.perf_counter() - start

        return run

    with contextlib.ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                call = timed(getattr(owner, name), part)
                stack.enter_context(mock.patch.object(owner, name, call))
        yield found


if __name__ == "__main__":
    sys.exit(main())
