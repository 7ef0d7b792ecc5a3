"""Seconds of training until a network is as good as backpropagation will be, nearly.

    python -m tools.bench.time_to_accuracy                              # MLP 8x1024, bundled MNIST
    python -m tools.bench.time_to_accuracy --model fdfa_cnn --epochs 10 --data-dir DIR

Every variant trains from the same weights on the same batches with Adam, its rate decayed linearly
to 0. They take turns of some steps in shuffled order, so that a slow minute is everyone's;
evaluation and compilation do not count. Subnormal numbers are flushed to 0 for all: a CPU is slow
with them, and feedback that starts badly makes many. The goal is a part of what compiled
backpropagation reaches at the end.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

import grapefx
from tools.bench.models import MODELS
from tools.common import cli
from tools.common.data import DataError, ImageData, load_images
from tools.common.table import Table
from tools.common.timing import interleaved, seconds
from tools.common.train import Batch, Training, accuracy, adam, whole_batches

VARIANTS: dict[str, dict[str, Any] | None] = {
    "compiled": None,
    "dfa, calibrated": {"method": "dfa"},
    "grape, calibrated (the default)": {"method": "grape"},
    "grape, calibrated, tangents on 1/8": {"method": "grape", "tangent_fraction": 1 / 8},
    "grape": {"method": "grape", "calib_every": None},
}


@dataclass
class Runner(Training):
    """One variant in training."""

    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)  # seconds, accuracy

    def turns(self, queue: Sequence[Sequence[Batch]], data: ImageData) -> Callable[[], None]:
        """What takes the next turn when it is called: steps on the clock, then an evaluation."""
        ahead = iter(queue)

        def turn() -> None:
            batches = next(ahead)
            self.seconds += seconds(lambda: self.train(batches))
            self.curve.append((self.seconds, accuracy(self.model, data)))

        return turn

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
    return Runner(model, net, *adam(model, a.lr, steps))


def race(data: ImageData, a: argparse.Namespace) -> dict[str, Runner]:
    """Train all variants in turns."""
    x_all = data.pixels(data.train_x)
    total = a.epochs * a.steps
    runners = {v: start(a.model, o, total, a) for v, o in VARIANTS.items()}
    order = torch.Generator().manual_seed(a.seed)
    batches: list[Batch] = []
    for _ in range(a.epochs):
        index = whole_batches(len(data.train_y), a.batch, order)
        batches += [(x_all[i], data.train_y[i]) for i in index]
    queue = [batches[first : first + a.turn] for first in range(0, total, a.turn)]
    interleaved({name: r.turns(queue, data) for name, r in runners.items()}, len(queue))
    return runners


def table(runners: dict[str, Runner], parts: Sequence[float]) -> str:
    """Markdown: seconds to each part of backpropagation's last accuracy."""
    final = statistics.fmean(acc for _, acc in runners["compiled"].curve[-3:])
    goals = [(p, p * final) for p in parts]
    columns = [(f"to {100 * p:g} % of BP ({g:.1f} %), s:", "ratio:") for p, g in goals]
    table = Table("variant", *(c for pair in columns for c in pair), "all steps, s:", "last %:")
    rows = []
    for name, r in runners.items():
        cells: list[str] = []
        for _, goal in goals:
            own, base = r.reached(goal), runners["compiled"].reached(goal)
            cells += ["never", "-"] if own is None else [f"{own:.2f}", f"{own / (base or own):.2f}"]
        rows.append((name, *cells, f"{r.seconds:.1f}", f"{r.curve[-1][1]:.2f}"))
    return table.markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = cli.parser("tools.bench.time_to_accuracy", __doc__)
    images = sorted(n for n, m in MODELS.items() if m.kind == "image" and m.shape[0] == 1)
    p.add_argument("--model", default="mlp8x1024", choices=images)
    p.add_argument("--data-dir", help="folder with MNIST; default: the bundled subset")
    p.add_argument("--epochs", type=cli.count(), default=10)
    p.add_argument("--batch", type=cli.count(), default=128)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--test", type=cli.count(), default=2000, help="test images of an evaluation")
    p.add_argument("--turn", type=cli.count(), default=10, help="steps between evaluations")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--parts", type=float, nargs="+", default=[0.95, 0.99])
    a = p.parse_args(argv)
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
    raise SystemExit(main())
