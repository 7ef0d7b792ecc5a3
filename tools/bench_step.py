"""The benchmark of record: step time against compiled backpropagation, interleaved.

    python -m tools.bench_step                            # quick: four networks, three variants
    python -m tools.bench_step --full --jsonl bench.jsonl --page bench.md --plot bench.png
    python -m tools.bench_step --full --jsonl bench.jsonl --go-on              # what a kill left
    python -m tools.bench_step --show bench.jsonl --page bench.md              # of an earlier run
    python -m tools.bench_step --models mlp8x1024 cnn --batch 8 32 128 512 --rounds 30

Each round runs one step (gradients cleared, forward, loss, backward) of every variant in shuffled
order; ``ratio`` is the median of the paired ratios to ``torch.compile``d backpropagation, between
its quartiles. Two floors: ``FLOPs``, the ratio of the products' FLOPs (what they allow if all else
were free), and ``bytes``, that of the bytes which kernels and library calls read and write.
``roofline`` is the longer of the FLOPs at a large product's rate and the bytes at the memory's,
both measured at the start; only a step whose data stays in caches can be faster. ``peak`` counts
what one step allocates at most, from the allocator's events; ``compile`` is the time to the end of
the first step (+ of the first calibration step, more) in a new process with an empty kernel cache
(``tools.bench.compile_time``). Where the package ``biotorch`` is installed, its DFA is measured
as well.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from grapefx.analysis.device import DeviceModel
from tools.bench.measure import peaks, run_model
from tools.bench.models import MODELS, VARIANTS
from tools.common import cli, results
from tools.common.machine import machine
from tools.common.results import Row
from tools.common.table import Table, fixed

QUICK = ("mlp8x1024", "mlp3x1024", "cnn", "lenet")
SHORT = ("dfa", "grape", "grape 1/8")
SWEEP = ("dfa", "grape")


class Case(NamedTuple):
    """A network at one batch size; ``whole``: moved bytes and calibration steps count too."""

    model: str
    batch: int
    rounds: int
    variants: Sequence[str]
    whole: bool


# networks, batch sizes, rounds, variants, whether the cases are whole
FULL: tuple[tuple[Sequence[str], Sequence[int], int, Sequence[str], bool], ...] = (
    (("mlp8x1024",), (128,), 40, tuple(VARIANTS), True),
    (("mlp3x1024", "cnn", "lenet", "fdfa_cnn"), (128,), 40, ("bp", *SHORT), True),
    (("tiny",), (128,), 100, ("bp", *SHORT), False),
    (("resnet20",), (128,), 12, SHORT, False),
    (("vgg16",), (32,), 8, SHORT, False),
    (("transformer2-micro",), (32,), 20, SHORT, True),
    (("transformer2-macro",), (32,), 12, SHORT, False),
    (("transformer8-micro", "transformer16-micro"), (32,), 12, SWEEP, False),
    (("transformer4-micro",), (32,), 12, ("dfa",), False),
    (tuple(f"transformer{n}-macro" for n in (4, 8, 16)), (32,), 12, ("dfa",), False),
    (("mlp32x256",), (128,), 20, SHORT, False),
    (("mlp2x512", "mlp4x512", "mlp16x512"), (128,), 20, SWEEP, False),
    (("mlp64x512",), (128,), 20, ("dfa",), False),
    (("mlp8x1024", "cnn"), (8, 32, 512), 15, SWEEP, False),
)


# title, key of a row, digits
FIGURES = (
    ("ms:", "step_ms", 2),
    ("forward:", "forward_ms", 2),
    ("update:", "update_ms", 2),
    ("calibration:", "calibration_ms", 2),
    ("ratio:", "ratio", 2),
    ("quartiles:", "", 2),
    ("FLOPs:", "floor", 2),
    ("bytes:", "floor_bytes", 2),
    ("roofline ms:", "roofline_ms", 2),
    ("peak MiB:", "peak_mib", 1),
    ("maps MiB:", "maps_mib", 2),
)


def table(rows: list[Row]) -> str:
    """Every row, as Markdown."""
    found = []
    for r in rows:
        figures = [
            fixed(r.get(key), digits) if key else f"{r['low']:.2f}-{r['high']:.2f}"
            for _, key, digits in FIGURES
        ]
        parts = [r.get("compile_s", {}).get(k) for k in ("first", "calibration")]
        compiling = " + ".join(f"{s:.1f}" for s in parts if s) or "-"
        found.append((r["model"], r["batch"], r["variant"], *figures, compiling))
    titles = [title for title, _, _ in FIGURES]
    return Table("network", "batch:", "variant", *titles, "compile s:").markdown(found)


def summary(rows: list[Row]) -> str:
    """One line a network: each variant's ratio and, in brackets, its floors of FLOPs and bytes."""
    names = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] != "compiled"))
    out = []
    for case in dict.fromkeys((r["model"], r["batch"]) for r in rows):
        mine = {r["variant"]: r for r in rows if (r["model"], r["batch"]) == case}
        cells = []
        for name in names:
            row = mine.get(name)
            floors = [row[k] for k in ("floor", "floor_bytes") if row.get(k)] if row else []
            inside = f" ({', '.join(f'{f:.2f}' for f in floors)})" if floors else ""
            cells.append(f"{row['ratio']:.2f}{inside}" if row else "")
        out.append((*case, f"{mine['compiled']['step_ms']:.1f}", *cells))
    columns = [f"{name}:" for name in names]
    return Table("network", "batch:", "compiled, ms:", *columns).markdown(out)


@dataclass
class Run:
    """What one command measured, and how long it took."""

    rows: list[Row]
    machine: str
    command: str
    minutes: float


def page(run: Run) -> str:
    """The results as a page: the summary, then every row."""
    return "\n\n".join(
        [
            "# Step time over compiled backpropagation",
            f"Made by `{run.command}`, whose help says what is measured, in "
            f"{run.minutes:.0f} minutes.\n{run.machine[0].upper()}{run.machine[1:]}.",
            "Ratios to compiled BP (in brackets: the ratio of FLOPs and, where counted, of bytes).",
            summary(run.rows),
            "## All rows",
            table(run.rows) + "\n",
        ]
    )


def command_of(argv: Sequence[str]) -> str:
    """The command for a page: without where its results go."""
    given = list(argv)
    for option in ("--jsonl", "--page", "--plot"):
        if option in given:
            at = given.index(option)
            del given[at : at + 2]
    given = [word for word in given if word != "--go-on"]
    return shlex.join(["python", "-m", "tools.bench_step", *given])


def roofline(row: Row, device: DeviceModel) -> float | None:
    """Milliseconds of a step's products and moved bytes at a device's rates."""
    if "gflop" not in row or "moved_mib" not in row:
        return None
    flops, moved = row["gflop"] * 1e9, row["moved_mib"] * 2**20
    return 1e3 * device.seconds(flops, 0, moved, torch.float32, launches=0)


def plot(rows: list[Row], path: Path) -> None:
    """Ratios as bars by network and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((r["model"], r["batch"]) for r in rows))
    names = list(dict.fromkeys(r["variant"] for r in rows if r["variant"] in VARIANTS))
    figure, axes = pyplot.subplots(figsize=(max(6, 0.45 * len(cases)), 4.2))
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        found = {(r["model"], r["batch"]): r for r in rows if r["variant"] == name}
        places = [i for i, c in enumerate(cases) if c in found]
        values = [found[cases[i]]["ratio"] for i in places]
        axes.bar([i + k * width for i in places], values, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([i + 0.4 for i in range(len(cases))])
    axes.set_xticklabels([f"{m}, {b}" for m, b in cases], fontsize=7, rotation=45, ha="right")
    axes.set_ylabel("step time / compiled backpropagation")
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line, checked."""
    p = cli.parser("tools.bench_step", __doc__)
    p.add_argument(
        "--models", nargs="+", choices=list(MODELS), metavar="MODEL", help=str([*MODELS])
    )
    p.add_argument("--full", action="store_true", help="every network and sweep (long)")
    p.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), help="default: all; quick: some"
    )
    p.add_argument("--batch", type=int, nargs="+", help="default: 128")
    p.add_argument("--rounds", type=int, help="default: 30")
    p.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time on one thread: for a machine that does other work meanwhile",
    )
    p.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    p.add_argument("--no-bytes", action="store_true", help="leave the count of moved bytes out")
    p.add_argument("--compile-time", action="store_true", help="also compile in a new process")
    p.add_argument("--jsonl", type=Path, help="append results here, one line a network and batch")
    p.add_argument(
        "--go-on",
        action="store_true",
        help="keep what --jsonl holds, measure the networks it lacks",
    )
    p.add_argument("--show", type=Path, help="measure nothing: the rows of this file")
    p.add_argument("--page", type=Path, help="write all rows here as a markdown page")
    p.add_argument("--plot", type=Path, help="draw the ratios here (matplotlib)")
    a = p.parse_args(argv)
    if a.full and (a.models or a.variants or a.batch or a.rounds):
        p.error("--full has networks, variants, batch sizes and rounds of its own")
    if a.go_on and (a.show or not a.jsonl):
        p.error("--go-on goes on with a file that it measures for: --jsonl FILE, no --show")
    return p, a


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, a network and batch size after the other."""
    p, a = parse_args(argv)
    warnings.simplefilter("ignore")
    if a.show:
        write(a, read(p, "--show", a.show))
        return 0
    command = command_of(sys.argv[1:] if argv is None else argv)
    if a.cpu_time:
        torch.set_num_threads(1)
    here = peaks()
    setting = f"{machine()}, {'processor' if a.cpu_time else 'wall'} time"
    where = (
        f"{setting}, products {here.matmul_flops['float32'] / 1e9:.0f} GFLOP/s, "
        f"memory {here.bandwidth / 1e9:.0f} GB/s"
    )
    print(where, flush=True)
    run = Run([], where, command, 0.0)
    if a.go_on and a.jsonl.exists():
        run = read(p, "--jsonl", a.jsonl)
        if run.command != command:
            p.error(f"--go-on: {a.jsonl} is of another command: {run.command}")
        if not run.machine.startswith(f"{setting}, "):
            p.error(f"--go-on: {a.jsonl} was measured with {run.machine}; here: {setting}")
    elif a.jsonl:
        a.jsonl.unlink(missing_ok=True)
    measure(a, run, here)
    write(a, run)
    return 0


def cases(a: argparse.Namespace) -> Iterator[Case]:
    """What the command line asks for."""
    for models, batches, rounds, variants, whole in FULL if a.full else ():
        for model, batch in itertools.product(models, batches):
            yield Case(model, batch, rounds, variants, whole)
    if not a.full:
        variants = a.variants or (tuple(VARIANTS) if a.models else SHORT)
        for model, batch in itertools.product(a.models or QUICK, a.batch or (128,)):
            yield Case(model, batch, a.rounds or 30, variants, bool(a.models))


def measure(a: argparse.Namespace, run: Run, here: DeviceModel) -> None:
    """Add the cases that a run lacks, and put all in their order."""
    done = {(r["model"], r["batch"]) for r in run.rows}
    places = {(c.model, c.batch): i for i, c in enumerate(cases(a))}
    for case in cases(a):
        if (case.model, case.batch) in done:
            continue
        begin = time.perf_counter()
        found = run_model(
            case.model,
            case.variants,
            case.batch,
            case.rounds,
            clock=time.process_time if a.cpu_time else time.perf_counter,
            memory=not a.no_memory,
            count_bytes=case.whole and not a.no_bytes,
            calibrate=case.whole,
            compile_time=a.compile_time,
        )
        for row in found:
            row["roofline_ms"] = roofline(row, here)
        minutes = (time.perf_counter() - begin) / 60
        run.rows.extend(found)
        run.minutes += minutes
        print(f"{table(found)}\n{run.minutes:.1f} min so far", flush=True)
        if a.jsonl:
            line = {"place": places[case.model, case.batch], "rows": found, "minutes": minutes}
            results.append(a.jsonl, line | {"machine": run.machine, "command": run.command})
    run.rows.sort(key=lambda r: places[r["model"], r["batch"]])


def read(p: argparse.ArgumentParser, option: str, path: Path) -> Run:
    """What ``--jsonl`` wrote; ends the program where it is something else."""
    try:
        lines = sorted(results.read(path), key=lambda line: line["place"])
        rows = [row for line in lines for row in line["rows"]]
        first, minutes = lines[0], sum(line["minutes"] for line in lines)
        return Run(rows, first["machine"], first["command"], minutes)
    except (OSError, LookupError, TypeError) as e:
        p.error(f"{option} {path}: not a file that --jsonl wrote ({type(e).__name__}: {e})")


def write(a: argparse.Namespace, run: Run) -> None:
    """The page and the picture, where they are wanted."""
    if a.page:
        a.page.write_text(page(run))
    elif a.show:
        print(table(run.rows))
    if a.plot:
        plot(run.rows, a.plot)


if __name__ == "__main__":
    raise SystemExit(main())
