"""Seconds of training until a network is as good as backpropagation will be, nearly.

    python tools/bench/time_to_accuracy.py                              # MLP 8x1024, bundled MNIST
    python tools/bench/time_to_accuracy.py --model fdfa_cnn --epochs 10 --data-dir DIR

Every variant trains from the same weights on the same batches with Adam, its rate decayed linearly
to 0. They take turns of some steps in shuffled order, so that a slow minute is everyone's;
evaluation and compilation do not count. Subnormal numbers are flushed to 0 for all: a CPU is slow
with them, and feedback that starts badly makes many. The goal is a part of what compiled
backpropagation reaches at the end.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / p) for p in ("examples", "tools", "tools/bench", "")]

import grapefx  # noqa: E402
from bench_models import MODELS  # noqa: E402
from load_data import DataError, ImageData, load_images  # noqa: E402
from train_classifier import accuracy  # noqa: E402

VARIANTS: dict[str, dict[str, Any] | None] = {
    "compiled": None,
    "dfa, calibrated": {"method": "dfa"},
    "grape, calibrated (the default)": {"method": "grape"},
    "grape, calibrated, tangents on 1/8": {"method": "grape", "tangent_fraction": 1 / 8},
    "grape": {"method": "grape", "calib_every": None},
}


@dataclass
class Runner:
    """One variant in training."""

    model: nn.Module
    net: Any
    optimizer: torch.optim.Optimizer
    decay: torch.optim.lr_scheduler.LRScheduler
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, accuracy

    def train(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Some steps, on the clock."""
        start = time.perf_counter()
        for x, y in batches:
            F.cross_entropy(self.net(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.decay.step()
        self.seconds += time.perf_counter() - start

    def reached(self, goal: float) -> float | None:
        """Seconds at the first evaluation that is as good."""
        return next((s for s, a in self.curve if a >= goal), None)


def start(name: str, options: dict[str, Any] | None, steps: int, a: argparse.Namespace) -> Runner:
    """A variant with its kernels compiled and its weights as they were."""
    x, y = MODELS[name].example(a.batch)
    torch.manual_seed(a.seed)
    model = MODELS[name].build()
    net: Any = (
        torch.compile(model)
        if options is None
        else grapefx.compile(model, seed=a.seed, steps_per_epoch=a.steps, **options)
    )
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    learned = None if options is None else net.feedback_state_dict()
    if options is not None:
        with net.calibration():
            F.cross_entropy(net(x), y).backward()
    for _ in range(3):
        F.cross_entropy(net(x), y).backward()
    net.load_state_dict(weights)
    if learned is not None:  # maps and counters as well: the first step that counts calibrates
        net.load_feedback_state_dict(learned)
    model.zero_grad()
    optimizer = torch.optim.Adam(model.parameters(), lr=a.lr, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    return Runner(model, net, optimizer, decay)


def race(data: ImageData, a: argparse.Namespace) -> dict[str, Runner]:
    """Train all variants in turns."""
    x_all = data.pixels(data.train_x)
    total = a.epochs * a.steps
    runners = {v: start(a.model, o, total, a) for v, o in VARIANTS.items()}
    order = torch.Generator().manual_seed(a.seed)
    queue: list[tuple[Tensor, Tensor]] = []
    for _ in range(a.epochs):
        index = torch.randperm(len(data.train_y), generator=order)[: a.steps * a.batch]
        queue += [(x_all[i], data.train_y[i]) for i in index.split(a.batch)]
    for first in range(0, total, a.turn):
        for name in random.sample(list(runners), len(runners)):
            runner = runners[name]
            runner.train(queue[first : first + a.turn])
            runner.curve.append((runner.seconds, accuracy(runner.model, data)))
    return runners


def table(runners: dict[str, Runner], parts: Sequence[float]) -> str:
    """Markdown: seconds to each part of backpropagation's last accuracy."""
    final = statistics.fmean(acc for _, acc in runners["compiled"].curve[-3:])
    goals = [(p, p * final) for p in parts]
    head = [f"to {100 * p:g} % of BP ({g:.1f} %)" for p, g in goals]
    out = [
        f"| variant | {' | '.join(f'{h}, s | ratio' for h in head)} | all steps, s | last % |",
        "| --- " + "| ---: " * (2 * len(goals) + 2) + "|",
    ]
    for name, r in runners.items():
        cells = []
        for _, goal in goals:
            own, base = r.reached(goal), runners["compiled"].reached(goal)
            cells += ["never", "-"] if own is None else [f"{own:.2f}", f"{own / (base or own):.2f}"]
        out.append(f"| {name} | {' | '.join(cells)} | {r.seconds:.1f} | {r.curve[-1][1]:.2f} |")
    return "\n".join(out)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = sorted(n for n, m in MODELS.items() if m.kind == "image" and m.shape[0] == 1)
    p.add_argument("--model", default="mlp8x1024", choices=images)
    p.add_argument("--data-dir", help="folder with MNIST; default: the bundled subset")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--test", type=int, default=2000, help="test images of an evaluation")
    p.add_argument("--turn", type=int, default=10, help="steps between evaluations")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--parts", type=float, nargs="+", default=[0.95, 0.99])
    a = p.parse_args(argv)
    if min(a.epochs, a.batch, a.test, a.turn) < 1:
        p.error("--epochs, --batch, --test and --turn are at least 1")
    warnings.simplefilter("ignore")
    torch.set_flush_denormal(True)
    try:
        data = load_images("mnist", a.data_dir)
    except DataError as e:
        print(e, file=sys.stderr)
        return 2
    data = data.head(len(data.train_y), a.test)
    a.steps = len(data.train_y) // a.batch
    print(f"{data.name}, {a.epochs} epochs of {a.steps} steps, {torch.get_num_threads()} threads")
    print(table(race(data, a), a.parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
