"""The benchmark of stages: a step on 2 processes against torch's pipelines and data parallelism.

    export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
    torchrun --nproc-per-node 2 -m tools.bench_stages                    # quick: one network
    torchrun --nproc-per-node 2 -m tools.bench_stages --full --page docs/results/stages.md

Each round runs one step (gradients cleared, forward, loss, backward; no optimizer) of every variant
in shuffled order, the same on all ranks; a step lasts from a barrier to the next one. Given are the
median, its quartiles, the ratio to backpropagation in one process with one thread (the median of
paired ratios), what the device model predicts for that ratio on devices of their own, where it does
(these processes share one memory: two threads, which share it as well, do not halve a step either),
and the peak of the memory that one step allocates (activations, gradients, temporaries) on the rank
with most of it. Torch's pipelines run the same layers, cut where ours are cut ("interleaved" and
"ZBV" into twice as many stages).
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

import grapefx
from grapefx.analysis import pipelines as s
from grapefx.analysis.device import load_device
from grapefx.plan import build_plan
from grapefx.plan.stages import divide_plan, ends_of, schedule_of, usual_kind
from grapefx.report.stages import stage_cost
from tools.common import cli
from tools.common.machine import machine

DEVICE = "cpu-2core"
TORCH = {
    "GPipe": (pipelining.ScheduleGPipe, 1),
    "1F1B": (pipelining.Schedule1F1B, 1),
    "interleaved 1F1B": (pipelining.ScheduleInterleaved1F1B, 2),
    "interleaved ZB": (pipelining.ScheduleInterleavedZeroBubble, 2),
    "ZBV": (pipelining.ScheduleZBVZeroBubble, 2),
}
Run = Callable[[], object]
Backend = Literal["inductor", "eager"]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        n, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(a.transpose(1, 2).reshape(n, t, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def mlp() -> tuple[nn.Sequential, Tensor, Tensor]:
    """16 hidden layers of 1,024."""
    blocks = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(16)]
    return (
        nn.Sequential(*blocks, nn.Linear(1024, 10)),
        torch.randn(128, 1024),
        torch.randint(10, (128,)),
    )


def transformer() -> tuple[nn.Sequential, Tensor, Tensor]:
    """8 blocks of width 256 on 64 tokens; a class a sequence."""
    blocks = [Block(256, 4) for _ in range(8)]
    head = nn.Sequential(nn.LayerNorm(256), nn.Flatten(), nn.Linear(64 * 256, 10))
    return nn.Sequential(*blocks, head), torch.randn(16, 64, 256), torch.randint(10, (16,))


def vgg() -> tuple[nn.Sequential, Tensor, Tensor]:
    """VGG-16 for 32 x 32 images, without dropout."""
    widths = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]
    blocks: list[nn.Module] = []
    before = 3
    for w in widths:
        if w == 0:
            blocks[-1].append(nn.MaxPool2d(2))  # type: ignore[operator]
        else:
            blocks.append(nn.Sequential(nn.Conv2d(before, w, 3, padding=1), nn.ReLU()))
            before = w
    head = nn.Sequential(nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(*blocks, head), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


class Sent(nn.Module):
    """A stage of torch's pipelines, which send contiguous tensors only; Inductor's convolutions
    leave channels last.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """What the part computes."""
        if x.ndim == 4 and x.requires_grad:
            x.register_hook(torch.Tensor.contiguous)
        made: Tensor = self.part(x)
        return made.contiguous()


MODELS = {"mlp16x1024": mlp, "transformer8": transformer, "vgg16": vgg}


@dataclass
class Variant:
    """One way to take a step; ``predicted``: its part of one process's, None for no prediction."""

    name: str
    run: Run
    predicted: float | None = None
    peak: float = 0.0  # MiB


def made(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model, always the same, with a batch."""
    torch.manual_seed(0)
    return MODELS[name]()


def blocks_behind(model: nn.Sequential, x: Tensor, stages: int, m: int, method: str) -> list[int]:
    """The children of ``model`` behind which our stages end."""
    plan = build_plan(model, (x,), method=method, backend="eager")
    ends = ends_of(plan, "auto", stages, len(x) // m, DEVICE)
    return [int(plan.layers[k].name.partition(".")[0]) for k in ends]


def predicted(model: nn.Sequential, x: Tensor, stages: int, m: int, method: str) -> float:
    """A step in stages as a part of a backpropagation step in one process."""
    device = load_device(DEVICE)
    times = []
    for name, count in ((method, stages), ("bp", 1)):
        plan = build_plan(model, (x,), method=name, backend="eager", calib_every=None)
        kind = usual_kind(plan)
        parts = m if count > 1 else 1
        ends = ends_of(plan, "auto", count, len(x) // parts, DEVICE)
        found, commit = divide_plan(plan, kind, len(x) // parts, ends)
        chains = [
            {c.name for c in found.channels if c.kind == "chain" and c.source == k}
            for k in range(count)
        ]
        costs = [stage_cost(g.step, chains[g.index], device, parts) for g in found.stages]
        exact = kind == "calibration"
        schedule = schedule_of(found, commit, parts, exact)
        spans = s.simulate(schedule, lambda r, a, costs=costs: costs[r].seconds(a.do))  # type: ignore[misc]
        times.append(s.makespan(spans))
    return times[0] / times[1]


def ours(name: str, method: str, m: int, mesh: Any, backend: Backend) -> Variant:
    """A pipeline of ours."""
    model, x, y = made(name)
    net = grapefx.compile(
        model, method=method, pipeline=mesh, microbatches=m, backend=backend, calib_every=None
    )
    net.prepare(x)

    def run() -> None:
        for p in net.parameters():
            p.grad = None
        net.step(x, target=y, loss=F.cross_entropy)

    found = predicted(model, x, dist.get_world_size(), m, method)
    return Variant(f"grapefx {method}, M={m}", run, found)


def torchs(name: str, schedule: str, m: int, compiled: bool) -> Variant:
    """A pipeline of torch.distributed.pipelining on the same layers."""
    cls, each = TORCH[schedule]
    world, rank = dist.get_world_size(), dist.get_rank()
    count = world * each
    if schedule != "GPipe" and m < world:  # some raise on one rank alone, and the others wait
        raise ValueError(f"torch's {schedule} wants at least as many microbatches as ranks")
    model, x, y = made(name)
    behind = blocks_behind(model, x, count, m, "bp")
    edges = [0, *[b + 1 for b in behind], len(model)]
    if len(set(edges)) != len(edges):
        raise RuntimeError("two of our stages end inside one block")
    own = [rank, count - 1 - rank] if schedule == "ZBV" else [rank + world * k for k in range(each)]
    stages = []
    for k in own:
        part: nn.Module = model[edges[k] : edges[k + 1]]
        if compiled:
            part = torch.compile(part)  # type: ignore[assignment]
        stages.append(pipelining.PipelineStage(Sent(part), k, count, torch.device("cpu")))
    plan = cls(stages[0] if each == 1 else stages, m, loss_fn=F.cross_entropy)  # type: ignore[arg-type]
    last = count - 1 in own

    def run() -> None:
        for p in model.parameters():
            p.grad = None
        losses: list[Tensor] = []
        args = (x,) if 0 in own else ()
        plan.step(*args, **({"target": y, "losses": losses} if last else {}))

    return Variant(f"torch {schedule}, M={m}", run)


def whole(name: str, backend: Backend, threads: int, method: str | None = None) -> Variant:
    """One process; the others wait."""
    model, x, y = made(name)
    net: Any = model
    if method is not None:
        net = grapefx.compile(model, method=method, backend=backend, calib_every=None)
    elif backend == "inductor":
        net = torch.compile(model)

    def run() -> None:
        if dist.get_rank():
            return
        torch.set_num_threads(threads)
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(net(x), y).backward()
        torch.set_num_threads(1)

    return Variant(f"one process, {threads} thread{'s' * (threads > 1)}, {method or 'bp'}", run)


def data_parallel(name: str, backend: Backend, method: str | None) -> Variant:
    """DistributedDataParallel, a part of the batch each."""
    model, x, y = made(name)
    net: Any = model
    if method is not None:
        net = grapefx.compile(model, method=method, backend=backend, calib_every=None)
    ddp: Any = nn.parallel.DistributedDataParallel(net)
    if method is None and backend == "inductor":
        ddp = torch.compile(ddp)
    rank, world = dist.get_rank(), dist.get_world_size()
    own, target = x.chunk(world)[rank], y.chunk(world)[rank]

    def run() -> None:
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(ddp(own), target).backward()

    return Variant(f"data parallelism, {method or 'bp'}", run, 1 / world)


def variants(
    name: str, counts: list[int], backend: Backend, refused: dict[str, str]
) -> list[Variant]:
    """Every way that runs; why the others do not goes into ``refused``."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))["pp"]
    wanted: list[tuple[str, Callable[[], Variant]]] = [
        ("one process, 1 thread", lambda: whole(name, backend, 1)),
        ("one process, 2 threads", lambda: whole(name, backend, 2)),
        ("one process, dfa", lambda: whole(name, backend, 1, "dfa")),
        ("data parallelism", lambda: data_parallel(name, backend, None)),
        ("data parallelism, dfa", lambda: data_parallel(name, backend, "dfa")),
    ]
    for m in counts:
        for method in ("dfa", "bp"):
            wanted.append((f"grapefx {method}, M={m}",
                           lambda m=m, method=method: ours(name, method, m, mesh, backend)))  # type: ignore[misc]  # fmt: skip
        for schedule in TORCH:
            compiled = backend == "inductor" and "Z" not in schedule
            wanted.append((f"torch {schedule}, M={m}",
                           lambda m=m, k=schedule, c=compiled: torchs(name, k, m, c)))  # type: ignore[misc]  # fmt: skip
    found = []
    for title, make in wanted:
        if dist.get_rank() == 0:
            print(f"{name}: {title}", file=sys.stderr, flush=True)
        try:
            variant = make()
            variant.run()
            variant.run()
            why = ""
        except Exception as e:
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        reasons: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, why)
        if any(reasons):
            refused[title] = next(r for r in reasons if r)
        else:
            found.append(variant)
    return found


def measure(found: list[Variant], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, from barrier to barrier."""
    times: dict[str, list[float]] = {v.name: [] for v in found}
    shuffle = random.Random(0)
    for _ in range(rounds):
        for v in shuffle.sample(found, len(found)):
            dist.barrier()
            start = time.perf_counter()
            v.run()
            dist.barrier()
            times[v.name].append(time.perf_counter() - start)
    return times


def peak(run: Run) -> float:
    """MiB that a step has allocated at its peak, on the rank where that is most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    found = torch.tensor(float(max(held, default=0)))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found) / 2**20


def page(name: str, found: list[Variant], times: dict[str, list[float]], refused: dict[str, str]
         ) -> str:  # fmt: skip
    """One network's table."""
    base = times[found[0].name]
    lines = [f"## {name}", "", "| step | ms | quartiles | ratio | predicted | peak MiB |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for v in found:
        own = times[v.name]
        low, mid, high = statistics.quantiles(own, n=4)
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        wanted = "" if v.predicted is None else f"{v.predicted:.2f}"
        lines.append(f"| {v.name} | {mid * 1e3:.1f} | {low * 1e3:.1f} to {high * 1e3:.1f} "
                     f"| {ratio:.2f} | {wanted} | {v.peak:.0f} |")  # fmt: skip
    if refused:
        lines += ["", "Did not run:", *[f"- {k}: {why}" for k, why in refused.items()]]
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page where asked."""
    p = cli.parser("tools.bench_stages", __doc__)
    p.add_argument("--full", action="store_true", help="all networks, M = 1, 2, 4, 8")
    p.add_argument("--models", nargs="+", choices=list(MODELS))
    p.add_argument("--microbatches", nargs="+", type=cli.count())
    p.add_argument("--rounds", type=cli.count(3), default=None)
    p.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    p.add_argument("--page", type=Path)
    args: argparse.Namespace = p.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # every compiled nn.Sequential counts against one limit, behind which they run uncompiled
    torch._dynamo.config.recompile_limit = 100
    dist.init_process_group("gloo")
    names = args.models or (list(MODELS) if args.full else ["mlp16x1024"])
    counts = args.microbatches or ([1, 2, 4, 8] if args.full else [1, 2])
    rounds = args.rounds or (21 if args.full else 5)
    command = " ".join(["torchrun --nproc-per-node", str(dist.get_world_size()),
                        "-m tools.bench_stages", *sys.argv[1:]])  # fmt: skip
    text = [
        "# Stages",
        "",
        f"Made by `{command}` on {machine()}; {rounds} rounds, backend {args.backend}.",
        "",
        *[line for line in (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].splitlines()],
        "",
    ]
    for name in names:
        torch.compiler.reset()  # or what the models before compiled counts against its limits
        refused: dict[str, str] = {}
        found = variants(name, counts, args.backend, refused)
        times = measure(found, rounds)
        for v in found:
            v.peak = peak(v.run)
        made_page = page(name, found, times, refused)
        text.append(made_page)
        if dist.get_rank() == 0:
            print(made_page, flush=True)
    if args.page and dist.get_rank() == 0:
        args.page.write_text("\n".join(text))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
