"""Accuracy of the methods on one network over several seeds, and the table of it.

    python tools/experiments.py --data-dir DIR --seeds 0 1 2     train what is missing
    python tools/experiments.py --table docs/results/mnist_depth8.md    only write the table

Full MNIST, 20,000 of its images, an MLP of 8 weight layers, Adam decayed linearly to 0. A finished
cell (variant, seed) is one line of ``runs/experiments.jsonl``; a run that was stopped goes on
where it was.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT))

import grapefx  # noqa: E402
from load_data import DataError, ImageData, load_images  # noqa: E402
from machine import machine  # noqa: E402
from train_classifier import accuracy, mlp  # noqa: E402

NEVER: dict[str, Any] = {"calib_every": None}
NORMAL: dict[str, Any] = {"noise": "gaussian"}  # as in the papers; random signs are the default
EIGHTH: dict[str, Any] = NORMAL | {"tangent_fraction": 1 / 8}

# label -> (method, options); the table follows this order
MAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("bp", NEVER),
    "dfa": ("dfa", NEVER),
    "grape": ("grape", NEVER | NORMAL | {"norm": "unit"}),
    "fdfa": ("fdfa", NEVER | NORMAL),
    "dfa, calibrated": ("dfa", {}),
    "grape, calibrated": ("grape", NORMAL),
    "grape, calibrated, unit columns": ("grape", NORMAL | {"norm": "unit"}),
    "fdfa, calibrated": ("fdfa", NORMAL),
    "grape, tangents on 1/8": ("grape", NEVER | EIGHTH),
    "fdfa, tangents on 1/8": ("fdfa", NEVER | EIGHTH | {"alpha": 0.003}),
    "grape, calibrated, tangents on 1/8": ("grape", EIGHTH | {"eta": 0.003}),
    "fdfa, calibrated, tangents on 1/8": ("fdfa", EIGHTH | {"alpha": 0.003}),
    "grape, random signs": ("grape", NEVER),
    "fdfa, random signs": ("fdfa", NEVER),
    "grape, calibrated, random signs (the default)": ("grape", {}),
    "fdfa, calibrated, random signs": ("fdfa", {}),
}
RIDGE: dict[str, tuple[str, dict[str, Any]]] = {
    f"{method}, calibrated, ridge {ridge:g}": (method, options | {"ridge": ridge})
    for method, options in (("dfa", {}), ("grape", NORMAL))
    for ridge in (1e-3, 1e-2, 1e-1)
}
# what goes beyond the papers, against their forms
BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "grape, paper preset": ("grape", {"preset": "paper"}),
    "fdfa, paper preset": ("fdfa", {"preset": "paper"}),
    "dfa, calibrated, weights only": ("dfa", {"calib_refit": "weights"}),
    "grape, calibrated, weights only": ("grape", {"calib_refit": "weights"}),
    "dfa, calibrated on demand": ("dfa", {"calib_every": "auto"}),
    "grape, calibrated on demand": ("grape", {"calib_every": "auto"}),
    "dfa, calibrated on demand, a tenth of the steps": (
        "dfa",
        {"calib_every": "auto", "calib_budget": 0.1},
    ),
    "grape, calibrated on demand, a tenth of the steps": (
        "grape",
        {"calib_every": "auto", "calib_budget": 0.1},
    ),
    "grape, 4 directions": ("grape", NEVER | {"directions": 4}),
    "grape, warm-up of 50 steps": ("grape", NEVER | {"align_warmup": 50}),
}
# what a command may change, and what it is otherwise
DEFAULTS: dict[str, Any] = {
    "depth": 8,
    "width": 512,
    "images": 20000,
    "epochs": 4,
    "lr": 3e-4,
    "batch_size": 128,
}

GRIDS = {"main": MAIN, "ridge": RIDGE, "beyond": BEYOND}


def train(
    data: ImageData, method: str, options: dict[str, Any], seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One cell: accuracy and the last cosines."""
    torch.manual_seed(seed)
    model = mlp(784, data.classes, args.depth, args.width)
    net = grapefx.compile(model, method=method, seed=seed, backend=args.backend, **options)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    steps = len(data.train_y) // args.batch_size
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=args.epochs * steps)
    x_all = data.pixels(data.train_x)
    start = time.monotonic()
    for epoch in range(args.epochs):
        net.set_epoch(epoch)
        order = torch.randperm(len(data.train_y))
        for index in order[: steps * args.batch_size].split(args.batch_size):
            loss = F.cross_entropy(net(x_all[index]), data.train_y[index])
            loss.backward()
            opt.step()
            opt.zero_grad()
            decay.step()
    return {
        "accuracy": round(accuracy(model, data), 2),  # the plain model shares the weights
        "loss": round(float(loss.detach()), 4),
        "seconds": round(time.monotonic() - start, 1),
        "alignment": {k: list(v.values()) for k, v in net.alignment().items()},
    }


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What two cells must share to stand in one table."""
    return {name: getattr(args, name) for name in DEFAULTS} | {"init": "he"}


def read(path: Path) -> list[dict[str, Any]]:
    """The finished cells. A line torn by a kill is left out, and so done again."""
    cells = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            cells.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: a damaged line is left out", file=sys.stderr)
    return cells


def command(where: dict[str, Any]) -> str:
    """What makes the table of a setting."""
    own = [
        f"--{name.replace('_', '-')} {where[name]} "
        for name, usual in DEFAULTS.items()
        if where[name] != usual
    ]
    return f"python tools/experiments.py --data-dir DIR {''.join(own)}--table FILE"


def key(label: str, options: dict[str, Any], seed: int, where: dict[str, Any]) -> str:
    return json.dumps([label, options, seed, where], sort_keys=True)


def table(cells: Sequence[dict[str, Any]], where: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over the seeds of every variant."""
    cells = [c for c in cells if c["setting"] == where]
    lines = [
        "# MNIST, {depth} weight layers x {width}".format(**where),
        "",
        "{images:,} training images (10,000 test), {epochs} epochs, batch {batch_size}, Adam "
        "{lr:g} decayed linearly to 0, inputs normalised, He initialisation.".format(**where),
        f"Made by `{command(where)}`.",
        "",
        "| variant | options | accuracy % | sd | seeds |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for grid in GRIDS.values():
        for label, (method, options) in grid.items():
            mine = [c for c in cells if c["variant"] == label and c["options"] == options]
            found = [c["accuracy"] for c in {c["seed"]: c for c in mine}.values()]
            if not found:
                continue
            spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
            shown = " ".join(f"{k}={v!r}" for k, v in options.items())
            lines.append(
                f"| {label} | `{method}` {shown} | {statistics.fmean(found):.2f} | {spread} "
                f"| {len(found)} |"
            )
    machines = sorted({c["machine"] for c in cells})
    lines += ["", *(f"Machine: {m}." for m in machines), ""]
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", help="folder of full MNIST (MNIST/raw)")
    parser.add_argument("--grid", choices=list(GRIDS), default="main")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="some variants of the grid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, usual in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(usual), default=usual)
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments.jsonl")
    parser.add_argument("--table", type=Path, help="write the table of all finished cells here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the missing cells of the grid, a seed after the other; then the table."""
    args = parse_args(argv)
    grid, where = GRIDS[args.grid], setting(args)
    for label in args.only or ():
        if label not in grid:
            print(f"experiments: no variant {label!r} in {args.grid}", file=sys.stderr)
            return 2
    if args.data_dir is not None:
        try:
            data = load_images("mnist", args.data_dir).head(args.images, 10000)
        except DataError as error:
            print(f"experiments: {error}", file=sys.stderr)
            return 2
        warnings.simplefilter("ignore", grapefx.GrapefxWarning)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.out.exists() and not args.out.read_bytes().endswith(b"\n"):
            with args.out.open("a") as log:  # a kill tore the last line: the next starts afresh
                log.write("\n")
        done = {key(c["variant"], c["options"], c["seed"], c["setting"]) for c in read(args.out)}
        todo = [
            (label, seed)
            for seed in args.seeds
            for label in (args.only or grid)
            if key(label, grid[label][1], seed, where) not in done
        ]
        for i, (label, seed) in enumerate(todo):
            method, options = grid[label]
            result = train(data, method, options, seed, args)
            cell = {"variant": label, "method": method, "options": options, "seed": seed}
            cell |= {"setting": where, "backend": args.backend, "machine": machine()} | result
            with args.out.open("a") as log:
                log.write(json.dumps(cell) + "\n")
            print(
                f"[{i + 1}/{len(todo)}] {label}, seed {seed}: {result['accuracy']:.2f} % "
                f"in {result['seconds']:.0f} s",
                flush=True,
            )
    text = table(read(args.out), where)
    if args.table is not None:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
