"""Train what a paper's table reports, and put our numbers beside the published ones.

    python -m tools.reproduce tools/reproduce/b6_mnist.yaml --data-dir DIR --seeds 0 1 2
    python -m tools.reproduce tools/reproduce/b6_mnist.yaml --table

A cell is a row of the config and a seed. It is saved after each epoch, so a run that was stopped
goes on where it was; a finished cell is one line of ``runs/reproduce/NAME/results.jsonl``. Several
processes may work on one config: each cell is locked by the one that trains it. A table's cells are
kept beside it, and a later table has them too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import grapefx
from grapefx.errors import BudgetError, MethodError, PlacementError, TangentError, nearest
from tools import ROOT
from tools.common import cli, results
from tools.common.data import DataError
from tools.common.machine import machine
from tools.reproduce.cells import Folder, RunError, read_cells
from tools.reproduce.config import Config, ConfigError, Row, load_config
from tools.reproduce.data import Data, load_data
from tools.reproduce.page import render
from tools.reproduce.trainer import Trainer


def train_cell(
    folder: Folder, row: Row, seed: int, data: Data, args: argparse.Namespace, say: Callable
) -> dict[str, Any]:
    """A whole cell, from its checkpoint on, as one line of results."""
    fixed = {
        "config": folder.config.hash,
        "row_hash": row.hash,
        "row": row.name,
        "method": row.method,
        "options": row.options,
        "seed": seed,
        "dataset": data.name,
        "torch": torch.__version__,
        "machine": machine(args.device),
        "threads": torch.get_num_threads(),
        "backend": args.backend,
    }
    epochs = row.setting["epochs"]
    try:
        trainer = Trainer(row, seed, data, args.backend, args.device)
        state = folder.load(row, seed)
        if state is not None:
            trainer.load(state)
        while trainer.epoch < epochs:
            trainer.train_epoch()
            folder.save(row, seed, trainer.state())
            say(trainer.curve, epochs)
    except (BudgetError, MethodError, PlacementError, TangentError) as error:
        return fixed | {"undefined": str(error).splitlines()[0], "epochs": 0}
    scores = [c["score"] for c in trainer.curve]
    best = min(scores) if row.setting["metric"] == "best_perplexity" else max(scores)
    seconds = sorted(c["seconds"] for c in trainer.curve)[epochs // 2]
    return fixed | {
        "epochs": epochs,
        "best": best,
        "last": scores[-1],
        "alignment": trainer.curve[-1]["cosine"],
        "seconds_epoch": seconds,
        "curve": trainer.curve,
    }


def run(config: Config, folder: Folder, rows: list[Row], args: argparse.Namespace) -> None:
    """Train what is missing, a seed after the other."""
    cells = [(row, seed) for seed in args.seeds for row in rows]
    done = {(c["row"], c["seed"]) for c in folder.read()}
    todo = [(row, seed) for row, seed in cells if (row.name, seed) not in done]
    if not todo:
        print(f"{config.name}: nothing left to train")
        return
    data = load_data(config.setting, args.data_dir, args.device)
    spent: list[float] = []  # seconds an epoch, of every epoch so far
    for i, (row, seed) in enumerate(todo):
        left = sum(r.setting["epochs"] for r, _ in todo[i + 1 :])
        where = f"[{i + 1}/{len(todo)}] {row.name}, seed {seed}"
        last = time.monotonic()

        def say(
            curve: list[dict[str, Any]], epochs: int, left: int = left, where: str = where
        ) -> None:
            nonlocal last
            spent.append(time.monotonic() - last)
            last = time.monotonic()
            here, mean = curve[-1]["seconds"], sum(spent) / len(spent)
            togo = (epochs - len(curve)) * here
            print(
                f"{where}: epoch {len(curve)}/{epochs}, {curve[-1]['score']:.2f}, loss "
                f"{curve[-1]['loss']:.4f}, {here:.1f} s; left: {_clock(togo)} here, "
                f"{_clock(togo + left * mean)} in all",
                flush=True,
            )

        with folder.lock(row, seed) as mine:
            if not mine:
                print(f"{where}: another process trains it", flush=True)
                continue
            if (row.name, seed) in {(c["row"], c["seed"]) for c in folder.read()}:
                continue
            cell = train_cell(folder, row, seed, data, args, say)
            results.append(folder.results, cell)
            folder.checkpoint(row, seed).unlink(missing_ok=True)
        result = cell.get("undefined") or f"best {cell['best']:.2f}, last {cell['last']:.2f}"
        print(f"{where}: {result}", flush=True)


def keep(config: Config, folder: Folder, where: Path) -> list[dict[str, Any]]:
    """All finished cells, kept in ``where`` too: an earlier table's, and newer ones."""
    kept = where / f"{config.name}.jsonl"
    cells = {(c["row"], c["seed"]): c for c in [*read_cells(kept, config), *folder.read()]}
    order = {name: i for i, name in enumerate(config.rows)}

    def place(key: tuple[str, int | None]) -> tuple[int, str, int]:
        return order.get(key[0], len(order)), key[0], -1 if key[1] is None else key[1]

    known = [cells[key] for key in sorted(cells, key=place)]
    results.write(kept, "".join(f"{json.dumps(c)}\n" for c in known))
    return known


def _clock(seconds: float) -> str:
    minutes = int(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.parser("tools.reproduce", __doc__)
    parser.add_argument("config", type=Path, help="a config of tools/reproduce")
    parser.add_argument("--data-dir", help="folder of the full data sets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="some rows of the config")
    parser.add_argument("--table", action="store_true", help="write the table and train nothing")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="sets",
        help="another setting, in a folder of its own: model.batch_norm=true",
    )
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "reproduce")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 2 something in the call, the config or the data is wrong."""
    args = parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # A loss near 0 makes gradients and Adam's moments subnormal: four times slower on a CPU.
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore", grapefx.GrapefxWarning)
    try:
        config = load_config(args.config, tuple(args.sets))
        for name in args.only or ():
            if name not in config.rows:
                raise ConfigError(f"no row {name!r}.{nearest(name, config.rows)}")
        folder = Folder(config, args.runs)
        rows = [config.rows[n] for n in (args.only or config.rows)]
        if not args.table:
            run(config, folder, rows, args)
            return 0
        changes = f" --set {' '.join(config.sets)}" if config.sets else ""
        command = f"python -m tools.reproduce {_shown(args.config)} --data-dir DIR{changes}"
        out = args.results / f"{config.name}.md"
        results.write(out, render(config, keep(config, folder, args.results), command))
        print(out)
    except (ConfigError, DataError, RunError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    return 0


def _shown(path: Path) -> str:
    """A path as a reader of the repository would type it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


if __name__ == "__main__":
    raise SystemExit(main())
