"""Seconds of training until a network is as good as backpropagation will be, nearly.

    python -m tools.bench.time_to_accuracy                              # MLP 8x1024, bundled MNIST
    python -m tools.bench.time_to_accuracy --model fdfa_cnn --epochs 10 --data-dir DIR

Every variant trains from the same weights with Adam, its rate decayed linearly to 0, on the same
batches, or on smaller ones of the same samples. They take turns of some steps in shuffled order, so
that a slow minute is everyone's; evaluation and compilation do not count, calibrations and fits do.
Subnormal numbers are flushed to 0 for all: a CPU is slow with them, and feedback that starts badly
makes many. The goal is a part of what compiled backpropagation reaches at the end.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import grapefx
from tools.bench.models import MODELS
from tools.common import cli
from tools.common.data import DataError, ImageData, load_images
from tools.common.table import Table
from tools.common.timing import interleaved, seconds
from tools.common.train import Batch, Training, accuracy, adam, whole_batches


@dataclass(frozen=True)
class Variant:
    """What trains: compiled backpropagation (``options`` None) or a method.

    ``batch``: the part of the others' batch size that its batches have. ``keep``: the part of a
    batch, that of the largest error, that a step learns from.
    """

    options: dict[str, Any] | None = None
    batch: float = 1.0
    keep: float | None = None


EXACT: dict[str, Any] = {
    "method": "dfa", "calib_every": "geometric", "calib_forget": 0.7, "exact_rows": 0.125,
    "exact_pick": "largest", "exact_weight": 1.0,
}  # fmt: skip
VARIANTS: dict[str, Variant] = {
    "compiled": Variant(),
    "compiled, batches of 3/4": Variant(batch=0.75),
    "compiled, half of largest error": Variant(keep=0.5),
    "dfa, once an epoch": Variant({"method": "dfa", "calib_every": 1}),
    "dfa (recommended)": Variant({"method": "dfa"}),
    "dfa, geometric, 1/8 exact": Variant(EXACT),
    "dfa, geometric, 1/8 exact, late": Variant(EXACT | {"exact_late": True}),
    "grape, once an epoch": Variant({"method": "grape", "calib_every": 1}),
    "grape (recommended)": Variant({"method": "grape"}),
    "grape": Variant({"method": "grape", "calib_every": None}),
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


def start(name: str, variant: Variant, size: int, steps: int, a: argparse.Namespace) -> Runner:
    """A variant with its kernels compiled and its weights as they were."""
    x, y = MODELS[name].example(size)
    torch.manual_seed(a.seed)
    model = MODELS[name].build()
    options = variant.options
    net: Any = (
        torch.compile(model)
        if options is None
        else grapefx.compile(model, seed=a.seed, steps_per_epoch=a.steps, **options)
    )
    runner = Runner(model, net, *adam(model, a.lr, steps), keep=variant.keep)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    learned = None if options is None else net.feedback_state_dict()
    if options is not None:
        with net.calibration():
            runner.gradients(x, y)
    for _ in range(8):  # calibrations at growing gaps leave out the sixth step first
        runner.gradients(*runner.kept(x, y))
    net.load_state_dict(weights)
    if learned is not None:  # maps and counters as well: the first step that counts calibrates
        net.load_feedback_state_dict(learned)
    model.zero_grad()
    return runner


def race(data: ImageData, a: argparse.Namespace) -> dict[str, Runner]:
    """Train all variants in turns: as many for each, whatever its batch size."""
    x_all = data.pixels(data.train_x)
    count = -(-a.epochs * a.steps // a.turn)
    runners: dict[str, Runner] = {}
    turns: dict[str, Callable[[], None]] = {}
    for name, variant in VARIANTS.items():
        size = round(variant.batch * a.batch)
        order = torch.Generator().manual_seed(a.seed)
        batches: list[Batch] = []
        for _ in range(a.epochs):
            index = whole_batches(len(data.train_y), size, order)
            batches += [(x_all[i], data.train_y[i]) for i in index]
        ends = [len(batches) * k // count for k in range(count + 1)]
        queue = [batches[i:j] for i, j in itertools.pairwise(ends)]
        runners[name] = start(a.model, variant, size, len(batches), a)
        turns[name] = runners[name].turns(queue, data)
    interleaved(turns, count)
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
