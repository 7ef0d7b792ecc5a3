"""Train the demo networks with every method in lock-step and compare them in one table.

    python -m tools.demo            a first look, then the whole demo: some minutes on 2 cores
    python -m tools.demo --quick    one epoch, 1,000 images, small networks

The first look trains a small network without compiling anything, so that there is something to see
at once.

All variants of a network see the same batches in the same order, one step each in turn, so that
their times are paired and their accuracies differ by the method alone. Results are appended to
``runs/NAME/metrics.jsonl`` after every epoch: a run that is stopped keeps what it had.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

import grapefx
from tools import ROOT
from tools.common import cli, results
from tools.common.data import DATASETS, DataError, ImageData, load_images
from tools.common.live import Progress, bar
from tools.common.machine import machine
from tools.common.networks import initialise, mlp
from tools.common.table import Table
from tools.common.timing import median_ms, ratios
from tools.common.train import Training, accuracy, adam, cosine, whole_batches

REFERENCE = "torch.compile"
PLAIN: dict[str, Any] = {"calib_every": None, "calib_init": False}
CALIBRATED: dict[str, Any] = {"calib_every": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("bp", PLAIN),
    "dfa": ("dfa", PLAIN),
    "fdfa": ("fdfa", PLAIN),
    "grape": ("grape", PLAIN),
    "dfa + calibration": ("dfa", CALIBRATED),
    "fdfa + calibration": ("fdfa", CALIBRATED),
    "grape + calibration": ("grape", CALIBRATED),
}
# without being asked for: what fits into a few minutes; --methods has them all
SHOWN = ("dfa", "fdfa", "grape", "grape + calibration")
START, END = "<!-- results:start -->", "<!-- results:end -->"
PROBES = 3  # times an epoch that gradients are compared with the true ones


@dataclass(frozen=True)
class Task:
    """One network and how it is trained; learning rates fall linearly to 0."""

    title: str
    epochs: int
    lr: float
    width: int


TASKS = {
    "mlp": Task("MLP, 8 layers x 512", epochs=4, lr=3e-4, width=512),
    "cnn": Task("CNN, 3 conv blocks", epochs=2, lr=1e-3, width=8),
}
FIRST_LOOK = "first look"
FIRST_TASK = Task("First look: MLP, 8 layers x 128, not compiled", epochs=2, lr=1e-3, width=128)
FIRST_METHODS = ("dfa", "grape + calibration")
QUICK_TASKS = {
    "mlp": Task("MLP, 8 layers x 64", epochs=1, lr=1e-3, width=64),
    "cnn": Task("CNN, 3 conv blocks", epochs=1, lr=1e-3, width=4),
}


def cnn(channels: int, size: int, classes: int, width: int) -> nn.Sequential:
    """Three blocks of convolution, batch norm, ReLU and pooling, then a linear layer."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, width, size = width, 2 * width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes))


def build(name: str, data: ImageData, width: int) -> nn.Sequential:
    """The network of a task, sized for ``data``."""
    _, channels, size, _ = data.train_x.shape
    if name == "cnn":  # all others are MLPs
        return cnn(channels, size, data.classes, width)
    model = mlp((channels, size, size), data.classes, 8, width, "relu", False)
    initialise(model, "he_uniform")
    return model


class Variant(Training):
    """One network under training with one method, and what has been measured of it."""

    def __init__(self, label: str, model: nn.Module, task: Task, steps: int, backend: str) -> None:
        net: Any
        if label == REFERENCE:
            net = torch.compile(model, backend=backend)
        else:
            method, options = VARIANTS[label]
            chosen: dict[str, Any] = {"seed": 0, "backend": backend, **options}
            net = grapefx.compile(model, method=method, **chosen)
        super().__init__(model, net, *adam(model, task.lr, steps))
        self.label = label
        self.seconds: list[float] = []  # forward, loss and gradients of each step
        self.last_loss = torch.zeros(())
        self.probes: list[dict[str, dict[str, float]]] = []

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """The timed part of a step."""
        start = time.perf_counter()
        self.last_loss = super().gradients(x, y)
        self.seconds.append(time.perf_counter() - start)
        return self.last_loss

    def probe(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Compare the gradients at hand with those of ``model``, a plain copy of the network."""
        model.load_state_dict(self.model.state_dict())
        model.train()
        # The last layer's gradient is exact in every method, and biases say little.
        weights = [(n, p) for n, p in model.named_parameters() if p.ndim > 1][:-1]
        loss = F.cross_entropy(model(x), y)
        true = torch.autograd.grad(loss, [p for _, p in weights])
        mine = dict(self.model.named_parameters())
        gradient = {
            name.removesuffix(".weight"): cosine(mine[name].grad, g)
            for (name, _), g in zip(weights, true, strict=True)
        }
        layers = {} if self.label == REFERENCE else self.net.alignment()
        jacobian = {n: c["cos_jacobian"] for n, c in layers.items() if "cos_jacobian" in c}
        self.probes.append({"cos_gradient": gradient, "cos_jacobian": jacobian})

    def alignment(self) -> dict[str, dict[str, float]]:
        """Each cosine's median over the probes since the last call, by layer."""
        seen: dict[str, dict[str, list[float]]] = {"cos_gradient": {}, "cos_jacobian": {}}
        for probe in self.probes:
            for kind, layers in probe.items():
                for layer, value in layers.items():
                    seen[kind].setdefault(layer, []).append(value)
        self.probes.clear()
        return {
            kind: {layer: round(statistics.median(v), 4) for layer, v in layers.items()}
            for kind, layers in seen.items()
        }

    def timing(self, reference: Sequence[float]) -> dict[str, float]:
        """Median step, median of the paired ratios to ``reference``, time spent compiling."""
        median = statistics.median(self.seconds)
        # Graphs are compiled when first needed, which may be late: such steps stand out.
        compiling = sum(s - median for s in self.seconds if s > max(10 * median, 0.2))
        return {
            "step_ms": round(median_ms(self.seconds), 2),
            "ratio": round(ratios(self.seconds, reference).median, 3),
            "compile_s": round(compiling, 1),
        }


def train(
    name: str,
    task: Task,
    labels: Sequence[str],
    data: ImageData,
    args: argparse.Namespace,
    backend: str,
    record: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> None:
    """Train every variant of one network, a step each in turn; ``record`` gets the results."""
    torch.manual_seed(args.seed)
    start_model = build(name, data, task.width)
    scratch = build(name, data, task.width)
    if not 0 < args.batch_size <= len(data.train_y):
        sys.exit(f"--batch-size must be from 1 to {len(data.train_y)}, the number of images")
    per_epoch = len(data.train_y) // args.batch_size
    total = task.epochs * per_epoch
    variants = []
    for label in labels:
        model = build(name, data, task.width)
        model.load_state_dict(start_model.state_dict())
        variants.append(Variant(label, model, task, total, backend))
    probe_at = {round((i + 1) * per_epoch / (PROBES + 1)) for i in range(PROBES)}
    progress.line(f"{task.title}: {len(labels)} variants, {task.epochs} epochs on {data.name}")
    shuffle = torch.Generator().manual_seed(args.seed)
    rounds: list[float] = []
    for epoch in range(task.epochs):
        for v in variants:
            if v.label != REFERENCE:
                v.net.set_epoch(epoch)
        batches = whole_batches(len(data.train_y), args.batch_size, shuffle)
        for step, index in enumerate(batches):
            x, y = data.pixels(data.train_x[index]), data.train_y[index]
            began, done = time.monotonic(), epoch * per_epoch + step
            # Everyone takes a turn at being first, so none always follows the same neighbour.
            turn = done % len(variants)
            for v in variants[turn:] + variants[:turn]:
                if done == 0:
                    progress.show(f"{name} compiling {v.label} ...", force=True)
                v.gradients(x, y)
                if step in probe_at:
                    v.probe(scratch, x, y)
                v.update()
            if done:  # the first round compiles
                rounds = [*rounds[-19:], time.monotonic() - began]
            seconds = statistics.median(rounds) * (total - done - 1) if rounds else 0
            left = f", {seconds:.0f} s left" if rounds else ""
            losses = "  ".join(f"{v.label} {v.last_loss:.2f}" for v in variants)
            progress.show(
                f"{name} {bar(done + 1, total)} epoch {epoch + 1}/{task.epochs}"
                f"{left}  loss: {losses}"
            )
        progress.show(f"{name} testing ...", force=True)
        shown = []
        for v in variants:
            percent = round(accuracy(v.model, data), 2)
            shown.append(f"{v.label} {percent:.1f}")
            record(
                {"model": name, "method": v.label, "epoch": epoch + 1, "accuracy": percent}
                | {"loss": round(float(v.last_loss), 4)}
                | v.timing(variants[0].seconds)
                | v.alignment()
            )
        progress.line(f"  epoch {epoch + 1}/{task.epochs}  accuracy: " + "  ".join(shown))


TABLE = Table(
    "model", "method", "accuracy %:", "cos gradient:", "cos Jacobian:", "ms/step:", "x BP:",
    "compile s:",
)  # fmt: skip


FIRST_TABLE = Table("method", "accuracy %:", "cos gradient:", "cos Jacobian:")
LEGEND = """
cos gradient: a layer's weight gradient against the true one, mean over the hidden layers
cos Jacobian: feedback map against its estimate from tangents (-: none made)
ms/step: forward, loss and gradients, median; x BP: median of the paired ratios to bp"""
NEXT = """
Three things to try next:
  .venv/bin/grapefx-inspect torchvision:resnet18 -o resnet18.html
      what waits for what in a training step, as a page, before anything is trained
  .venv/bin/python examples/train_classifier.py --method grape --report training.html
      a plain loop with one line changed, and a page on what happened
  examples/tutorial.ipynb
      alignment by layer: where it lags, and how it is repaired"""


def last_records(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The latest record of each variant."""
    return list({(r["model"], r["method"]): r for r in records}.values())


def table_rows(records: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row a variant: the figures of its last epoch, cosines averaged over the layers."""

    def mean(values: dict[str, float]) -> str:
        return f"{statistics.fmean(values.values()):.2f}" if values else "-"

    return [
        (
            r["model"],
            "bp (torch.compile)" if r["method"] == REFERENCE else r["method"],
            f"{r['accuracy']:.1f}",
            mean(r["cos_gradient"]),
            mean(r["cos_jacobian"]),
            f"{r['step_ms']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['compile_s']:.0f}",
        )
        for r in last_records(records)
    ]


def update_readme(path: Path, rows: Sequence[tuple[str, ...]], caption: str) -> None:
    """Put the table between the two markers in ``path``."""
    text = path.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{path} has no {START} ... {END}")
    body = f"\n{TABLE.markdown(rows)}\n\n{caption}\n"
    path.write_text(before + start + body + end + after, encoding="utf-8")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy by epoch, and both cosines by layer after the last epoch, a row a network."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in records))
    figure, axes = plt.subplots(
        len(models), 3, figsize=(15, 4.2 * len(models)), squeeze=False, layout="constrained"
    )
    panels = {"cos_gradient": "cos(gradient, true gradient)", "cos_jacobian": "cos(B, J^)"}
    for row, model in zip(axes, models, strict=True):
        curves = defaultdict(list)
        for r in records:
            if r["model"] == model:
                curves[r["method"]].append(r)
        for i, (method, points) in enumerate(curves.items()):
            style = {"color": f"C{i}", "marker": "o", "markersize": 3, "label": method}
            style["linestyle"] = "--" if "calibration" in method else "-"
            row[0].plot([p["epoch"] for p in points], [p["accuracy"] for p in points], **style)
            for axis, kind in zip(row[1:], panels, strict=True):
                layers = points[-1][kind]
                if layers:
                    axis.plot(range(1, len(layers) + 1), list(layers.values()), **style)
        row[0].set(title=f"{model}: accuracy", xlabel="epoch", ylabel="%")
        row[0].legend(fontsize=8)
        for axis in row:
            axis.xaxis.get_major_locator().set_params(integer=True)
        for axis, title in zip(row[1:], panels.values(), strict=True):
            axis.set(title=f"{model}: {title}, last epoch", xlabel="layer")
            axis.axhline(0, color="grey", linewidth=0.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser("tools.demo", __doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch, 1,000 images, tiny nets")
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(SHOWN),
        choices=list(VARIANTS),
        metavar="METHOD",
        help="any of: " + ", ".join(VARIANTS),
    )
    parser.add_argument("--dataset", default="mnist", choices=DATASETS)
    parser.add_argument("--data-dir", help="folder of a full data set (default: bundled MNIST)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="inductor", help="compiler, as for torch.compile")
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="where runs are kept")
    parser.add_argument("--name", default=f"demo-{datetime.now():%Y%m%d-%H%M%S}")
    parser.add_argument(
        "--update-readme",
        type=Path,
        nargs="?",
        const=ROOT / "README.md",
        help="put the table between the results markers of this file (default README.md)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 130 when it was interrupted, after showing what there was."""
    args = parse_args(argv)
    try:
        data = load_images(args.dataset, args.data_dir)
    except DataError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    folder = args.out / args.name
    if folder.exists():
        print(f"demo: {folder} exists; choose another --name", file=sys.stderr)
        return 2
    folder.mkdir(parents=True)
    tasks = QUICK_TASKS if args.quick else TASKS
    if args.quick:
        data = data.head(1000, 500)
    config = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
    config |= {"machine": machine(), "data": data.name, "python": platform.python_version()}
    config["tasks"] = {name: vars(tasks[name]) for name in args.models}
    config["variants"] = {label: dict(VARIANTS[label][1]) for label in args.methods}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    return run(args, tasks, data, folder)


def run(args: argparse.Namespace, tasks: dict[str, Task], data: ImageData, folder: Path) -> int:
    """Train, show and keep the results; the exit code."""
    records: list[dict[str, Any]] = []
    start, status = time.monotonic(), 0

    def record(result: dict[str, Any]) -> None:
        records.append(result)
        results.append(folder / "metrics.jsonl", result)

    with Progress() as progress:
        progress.line(machine())
        try:
            if not args.quick:
                first_look(data, args, record, progress)
                progress.line(f"({time.monotonic() - start:.0f} s so far)\n")
            for name in args.models:
                labels = [REFERENCE, *args.methods]
                train(name, tasks[name], labels, data, args, args.backend, record, progress)
        except KeyboardInterrupt:
            progress.line("interrupted; what follows is what there is")
            status = 130
    records = [r for r in records if r["model"] in tasks]
    if records:
        rows = table_rows(records)
        print("\n" + TABLE.text(rows))
        print(LEGEND)
        plot(records, folder / "curves.png")
        if args.update_readme and status == 0:
            caption = (
                f"`make demo` on {data.name}, seed {args.seed}, batch {args.batch_size}; "
                f"{machine()}. One seed, a subset: a look, not a benchmark."
            )
            update_readme(args.update_readme, rows, caption)
    print(f"\n{time.monotonic() - start:.0f} s; results in {folder}")
    if status == 0:
        print(NEXT)
    return status


def first_look(
    data: ImageData,
    args: argparse.Namespace,
    record: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> None:
    """A small network on a part of the images, uncompiled: a table within seconds."""
    rows: list[dict[str, Any]] = []

    def both(result: dict[str, Any]) -> None:
        rows.append(result)
        record(result)

    some = data.head(4000, 1000)
    labels = [REFERENCE, *FIRST_METHODS]
    train(FIRST_LOOK, FIRST_TASK, labels, some, args, "eager", both, progress)
    progress.line("\n" + FIRST_TABLE.text([row[1:5] for row in table_rows(rows)]))
    progress.line(
        "The last layers' gradients are exact; cos gradient says how well the others point."
    )


if __name__ == "__main__":
    raise SystemExit(main())
