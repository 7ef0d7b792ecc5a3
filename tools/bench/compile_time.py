"""Time from the model to the end of its first step, and how it grows with depth.

    python -m tools.bench.compile_time                  # ResNet-50, 224x224, 1000 classes
    python -m tools.bench.compile_time --depths 10 20 40 80 160 320 --no-kernels

Each row is a process of its own with an empty kernel cache. ``plan`` is the capture and all passes
for every kind of step; ``first step`` everything from the model to the first gradients, kernels
compiled; ``calibration`` the first step of the second kind. ``processor`` is the first step's
processor time without compile workers, which ``--depths`` turns off: it says what grows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from grapefx.choices import resolve
from grapefx.plan import build_plan
from tools import ROOT
from tools.bench.models import PLAIN, VARIANTS, benchmark, make
from tools.common import cli
from tools.common.results import Row
from tools.common.table import Table, fixed
from tools.common.timing import seconds

TABLE = Table(
    "network", "variant", "plan s:", "first step s:", "calibration s:", "processor s:", "nodes:"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    p = cli.parser("tools.bench.compile_time", __doc__)
    p.add_argument("--model", default="resnet50", help="of tools.bench.models, or of torchvision")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--depths", type=int, nargs="+", help="MLPs of these depths, 64 wide, instead")
    p.add_argument(
        "--variants",
        nargs="+",
        choices=("compiled", *VARIANTS),
        default=["compiled", "dfa", "grape"],
    )
    p.add_argument("--no-kernels", action="store_true", help="the passes alone, no Inductor")
    p.add_argument("--one", nargs=2, metavar=("NAME", "VARIANT"), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.one:
        print(json.dumps(measure(*args.one, batch=args.batch, kernels=not args.no_kernels)))
        return 0
    print(TABLE.head())
    for name in [f"depth{d}" for d in args.depths] if args.depths else [args.model]:
        for variant in args.variants:
            row = compile_seconds(
                name, variant, args.batch, workers=not args.depths, kernels=not args.no_kernels
            )
            parts = [row[k] for k in ("plan", "first", "calibration", "processor")]
            cells = [fixed(part, 1, "") for part in parts]
            print(TABLE.line(name, variant, *cells, row["nodes"] or ""), flush=True)
    return 0


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
    row: Row = {"plan": None, "calibration": None, "nodes": None}
    if variant not in PLAIN:
        row |= _planned(name, variant, batch)
    step = make(name, variant, batch, "inductor" if kernels else "eager")
    cpu = time.process_time()
    row["first"] = seconds(step)
    row["processor"] = time.process_time() - cpu
    if variant in (*PLAIN, "bp"):
        return row

    def calibrate() -> None:
        with step.net.calibration():  # type: ignore[operator]
            step()

    row["calibration"] = seconds(calibrate)
    return row


def _planned(name: str, variant: str, batch: int) -> Row:
    found = benchmark(name)
    options = VARIANTS[variant][0] | dict(found.options)
    method, resolved = resolve(options.pop("method"), options)
    model, (x, _) = found.build(), found.example(batch)
    start = time.perf_counter()
    plan = build_plan(model, (x,), {}, method=method, options=resolved)
    for kind in plan.kinds():
        plan.graph(kind)
    return {"plan": time.perf_counter() - start, "nodes": len(plan.joint.gm.graph.nodes)}


if __name__ == "__main__":
    sys.exit(main())
