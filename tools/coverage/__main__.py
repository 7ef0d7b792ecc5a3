"""Which published architectures work: capture, exact gradients, feedback steps, tangents.

    python -m tools.coverage --zoo timm              # everything not measured yet, then a summary
    python -m tools.coverage --zoo torchvision --only resnet18 vit_b_16 --again
    python -m tools.coverage --zoo timm --inductor   # compiled steps against uncompiled ones
    python -m tools.coverage --zoo timm --capture    # bp alone; Dynamo's capture against export's
    python -m tools.coverage --table                 # only docs/coverage.md, from what is there

Each model runs in a process of its own under a time and a memory limit, in float64 on the CPU,
without a compiler (``backend="eager"``) unless ``--inductor`` asks for it; nothing is downloaded,
weights are random. One JSON line a model is written as soon as it is known, so a killed run goes on
where it was.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from tools import ROOT
from tools.common import cli, process, results
from tools.common.results import Row
from tools.coverage.page import document, line, summary
from tools.coverage.stages import (
    Mismatch,
    Stages,
    examine,
    examine_captured,
    examine_compiled,
)
from tools.coverage.zoos import ZOOS, Sample

RESULTS = ROOT / "docs/results"
# the file, the stages, seconds a model may take
RUNS = {
    "": (RESULTS / "coverage.jsonl", examine, 240),
    "capture": (RESULTS / "coverage_capture.jsonl", examine_captured, 600),
    "inductor": (RESULTS / "coverage_inductor.jsonl", examine_compiled, 1800),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a zoo and write the table."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as kernels:
        # a process killed by its limit leaves torn files in Inductor's cache
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kernels)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    path, stages, limit = RUNS[args.kind]
    path, limit = args.jsonl or path, args.timeout or limit
    known = _read(path)
    if args.zoo:
        jobs = [
            (args.zoo, name)
            for name in ZOOS[args.zoo]()
            if (not args.only or name in args.only)
            and (args.again or (args.zoo, name) not in known)
        ]
        unknown = sorted(set(args.only or ()) - set(ZOOS[args.zoo]()))
        if unknown:
            print(f"{args.zoo} has no model {', '.join(unknown)}", file=sys.stderr)
            return 2
        print(f"{len(jobs)} models of {args.zoo} to run", flush=True)
        if len(jobs) > 1:
            warm_up()
        for k, (zoo, name) in enumerate(jobs):
            job = functools.partial(_report, zoo, name, args.depth, stages)
            row = {"zoo": zoo, "name": name, **guarded(job, limit, args.memory * 2**30)}
            results.append(path, row)
            known[zoo, name] = row
            print(f"[{k + 1}/{len(jobs)}] {line(row)}", flush=True)
    if args.table:
        runs = {kind: known if kind == args.kind else _read(RUNS[kind][0]) for kind in RUNS}
        args.out.write_text(document(*(run.values() for run in runs.values())))
        print(f"wrote {args.out}")
    shown = [r for r in known.values() if not args.zoo or r["zoo"] == args.zoo]
    print(summary(shown))
    return 0


def _read(path: Path) -> dict[tuple[str, str], Row]:
    return results.latest(path, lambda r: (r["zoo"], r["name"]))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = cli.parser("tools.coverage", __doc__)
    p.add_argument("--zoo", choices=sorted(ZOOS), help="which models to run")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these models of the zoo only")
    p.add_argument("--again", action="store_true", help="run models with a result once more")
    for kind, what in (
        ("capture", "compare the two ways to capture, and gradients of bp; no more"),
        ("inductor", "compare compiled steps with uncompiled ones"),
    ):
        p.add_argument(f"--{kind}", action="store_const", const=kind, dest="kind", help=what)
    p.set_defaults(kind="")
    p.add_argument(
        "--jsonl",
        type=Path,
        help="results, one line a model (default: docs/results/coverage[_KIND].jsonl)",
    )
    p.add_argument(
        "--depth",
        type=int,
        default=0,
        metavar="N",
        help="keep N of each run of equal blocks (default: all): the same code in less time",
    )
    p.add_argument("--table", action="store_true", help="write the table of all results")
    p.add_argument("--out", type=Path, default=RESULTS.parent / "coverage.md", help="where to")
    p.add_argument("--timeout", type=float, help="seconds a model may take")
    p.add_argument("--memory", type=float, default=16, help="GiB that a model may take")
    args = p.parse_args(argv)
    if not args.zoo and not args.table:
        p.error("name a --zoo, or ask for the --table")
    return args


# one model in a process


def warm_up() -> None:
    """Load what torch loads on first use, before there are children to do it each anew."""
    torch.set_num_threads(1)
    small = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    )
    for _ in examine(Sample(small, (torch.randn(3, 3, 8, 8),)), 0):
        pass


def guarded(job: process.Job, timeout: float, memory: float) -> Row:
    """One model in a process of its own; a crash, a hang or a hunger becomes its reason."""
    out = process.run(job, timeout=timeout, memory=memory)
    row: Row = dict(out.row)
    if "ok" not in row:
        row |= {"ok": False, "reason": f"{row.get('stage', 'build')}: {out.stop or out.death}"}
    return row | {"rss_mib": out.rss_mib, "seconds": out.seconds}


def _report(
    zoo: str,
    name: str,
    depth: int,
    stages: Callable[[Sample, int], Stages],
    send: Callable[[Row], None],
) -> None:
    row: Row = {"stage": "build", "torch": torch.__version__.split("+")[0]}
    try:
        torch.manual_seed(0)
        for stage, found in stages(ZOOS[zoo]()[name](), depth):
            row |= found
            row["stage"] = stage
            send(row)
        row["ok"] = True
    except BaseException as e:  # whatever it is, it is this model's result
        row |= {"ok": False, "reason": reason(row["stage"], e)}
        if os.environ.get("GRAPEFX_COVERAGE_TRACE"):
            traceback.print_exc()
    send(row)


def reason(stage: str, error: BaseException) -> str:
    """One line: where it failed and the first line of the error."""
    say = process.one_line if isinstance(error, Mismatch) else process.error_text
    return f"{stage}: {say(error)}"[:300]


if __name__ == "__main__":
    raise SystemExit(main())
