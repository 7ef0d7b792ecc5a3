"""Train what a paper's table reports, and put our numbers beside the published ones.

    python tools/reproduce.py tools/reproduce/b6_mnist.yaml --data-dir DIR --seeds 0 1 2
    python tools/reproduce.py tools/reproduce/b6_mnist.yaml --table

A cell is a row of the config and a seed. It is saved after each epoch, so a run that was stopped
goes on where it was; a finished cell is one line of ``runs/reproduce/NAME/results.jsonl``. Several
processes may work on one config: each cell is locked by the one that trains it. A table's cells are
kept beside it, and a later table has them too.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / p) for p in ("tools/reproduce", "tools", "examples", "")]

import grapefx  # noqa: E402
from grapefx.errors import (  # noqa: E402
    BudgetError,
    MethodError,
    PlacementError,
    TangentError,
    nearest,
)
from load_data import DataError, load_images, load_text  # noqa: E402
from machine import machine  # noqa: E402
from networks import IMAGE_MODELS, Transformer, initialise  # noqa: E402
from repro_config import IMAGES, Config, ConfigError, Row, load_config  # noqa: E402
from repro_folder import FORMAT, Folder, RunError, read_cells, replace  # noqa: E402
from repro_table import render  # noqa: E402


class Images:
    """A whole image set as normalised tensors on the device."""

    def __init__(self, setting: dict[str, Any], data_dir: str | None, device: str) -> None:
        data = load_images(setting["dataset"], data_dir).head(setting["train"], setting["test"])
        for part, y in (("train", data.train_y), ("test", data.test_y)):
            if len(y) != setting[part]:
                raise DataError(f"{data.name} has {len(y)} {part} images, not {setting[part]}")
        half = (0.5,) * len(data.mean)
        zero, one = (0.0,) * len(data.mean), (1.0,) * len(data.mean)
        constants = {"half": (half, half), "none": (zero, one), "standard": (data.mean, data.std)}
        mean, std = (torch.tensor(c).view(1, -1, 1, 1) for c in constants[setting["normalise"]])
        self.name, self.classes = data.name, data.classes
        self.train_x, self.test_x = (
            ((x.float() / 255 - mean) / std).to(device) for x in (data.train_x, data.test_x)
        )
        self.train_y, self.test_y = data.train_y.to(device), data.test_y.to(device)
        self.samples = len(self.train_y)

    def model(self, spec: dict[str, Any]) -> nn.Module:
        builder: Callable[..., nn.Module] = IMAGE_MODELS[spec["kind"]][0]
        own = {k: v for k, v in spec.items() if k != "kind"}
        return builder(shape=tuple(self.train_x.shape[1:]), classes=self.classes, **own)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.train_x[index], self.train_y[index]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Test accuracy in percent."""
        batches = zip(self.test_x.split(2000), self.test_y.split(2000), strict=True)
        right = sum((model(x).argmax(1) == y).sum() for x, y in batches)
        return 100 * float(right) / len(self.test_y)


class Text:
    """Characters; a sample is a window of ``context`` of them, the first 90 % are for training."""

    def __init__(self, setting: dict[str, Any], data_dir: str | None, device: str) -> None:
        path = None if data_dir is None else Path(data_dir) / "tinyshakespeare" / "input.txt"
        text = load_text(path)
        number = {c: i for i, c in enumerate(sorted(set(text)))}
        codes = torch.tensor([number[c] for c in text], device=device)
        split = int(0.9 * len(codes))
        self.name, self.classes = "tiny-shakespeare (characters)", len(number)
        self.train, self.valid = codes[:split], codes[split:]
        self.window = torch.arange(setting["model"]["context"] + 1, device=device)
        self.samples = min(setting["train"], split // (len(self.window) - 1) - 1)
        self.test = min(setting["test"], len(self.valid) // (len(self.window) - 1) - 1)

    def model(self, spec: dict[str, Any]) -> nn.Module:
        return Transformer(self.classes, **{k: v for k, v in spec.items() if k != "kind"})

    def _windows(self, codes: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        rows = codes[index[:, None] * (len(self.window) - 1) + self.window]
        return rows[:, :-1], rows[:, 1:]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self._windows(self.train, index)

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """Perplexity a character on the last 10 %."""
        losses, index = [], torch.arange(self.test, device=self.valid.device)
        for part in index.split(256):
            x, y = self._windows(self.valid, part)
            losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten()) * len(part))
        return float((torch.stack(losses).sum() / self.test).exp())


Data = Images | Text


def load_data(setting: dict[str, Any], data_dir: str | None, device: str) -> Data:
    kind = Images if setting["dataset"] in IMAGES else Text
    return kind(setting, data_dir, device)


def make_optimizer(net: nn.Module, spec: dict[str, Any]) -> torch.optim.Optimizer:
    own = {k: v for k, v in spec.items() if k != "name"}
    if spec["name"] == "adam":
        own["betas"] = tuple(own["betas"])
        return torch.optim.Adam(net.parameters(), fused=True, **own)
    return torch.optim.SGD(net.parameters(), fused=True, **own)


def make_schedule(
    opt: torch.optim.Optimizer, spec: dict[str, Any]
) -> torch.optim.lr_scheduler.LRScheduler:
    """Stepped once an epoch."""
    if spec["name"] == "exponential":
        return torch.optim.lr_scheduler.ExponentialLR(opt, spec["gamma"])
    if spec["name"] == "milestones":
        return torch.optim.lr_scheduler.MultiStepLR(opt, spec["at"], spec["gamma"])
    return torch.optim.lr_scheduler.ConstantLR(opt, 1.0)


class Trainer:
    """One cell: everything that a checkpoint must hold, and an epoch of training."""

    def __init__(self, row: Row, seed: int, data: Data, backend: str, device: str) -> None:
        torch.manual_seed(seed)
        self.row, self.seed, self.data, self.device = row, seed, data, device
        self.setting = row.setting
        self.model = data.model(self.setting["model"]).to(device)
        initialise(self.model, self.setting["init"])
        self.net = grapefx.compile(
            self.model, method=row.method, seed=seed, backend=backend, **row.options
        )
        self.opt = make_optimizer(self.net, self.setting["optimizer"])
        self.schedule = make_schedule(self.opt, self.setting["schedule"])
        self.curve: list[dict[str, Any]] = []

    @property
    def epoch(self) -> int:
        return len(self.curve)

    def loss(self, net: Any, index: Tensor) -> Tensor:
        x, y = self.data.batch(index)
        out = net(x)
        if net is self.net:
            net.targets(y)
        out, y = out.flatten(0, -2), y.flatten()
        if self.setting.get("loss") == "bce":
            return F.binary_cross_entropy_with_logits(out, F.one_hot(y, out.shape[1]).to(out))
        return F.cross_entropy(out, y)

    def train_epoch(self) -> None:
        """Whole batches only, in an order of the seed and the epoch."""
        start = time.monotonic()
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        self.net.set_epoch(self.epoch)
        self.model.train()
        batches, mean_loss = self.train_pass(generator)
        every = self.setting.get("bp_epoch_every")
        if every is not None and (self.epoch + 1) % every == 0:
            with self.net.calibration():
                self.train_pass(generator)
        seconds = time.monotonic() - start
        self.schedule.step()
        angles = self.alignment(batches[: self.setting["alignment_batches"]])
        self.model.eval()
        score = self.data.score(self.model)
        self.model.train()
        line = {"loss": round(mean_loss, 5), "score": round(score, 4), "cosine": angles}
        self.curve.append(line | {"seconds": round(seconds, 2)})

    def train_pass(self, generator: torch.Generator) -> tuple[Sequence[Tensor], float]:
        """Every sample once: the batches and the mean loss."""
        size = self.setting["batch_size"]
        order = torch.randperm(self.data.samples, generator=generator).to(self.device)
        steps = max(1, len(order) // size)
        batches = order[: steps * size].split(size)
        total = torch.zeros((), device=self.device)
        for index in batches:
            loss = self.loss(self.net, index)
            loss.backward()
            self.opt.step()
            self.opt.zero_grad()
            total += loss.detach()
        return batches, float(total) / steps

    def alignment(self, batches: Sequence[Tensor]) -> dict[str, float]:
        """Cosines by weight between the method's gradient and the true one, over ``batches``.

        Nothing is learned: feedback, buffers and the random stream are put back.
        """
        if not batches or self.row.method == "bp":
            return {}
        feedback, rng = self.net.feedback_state_dict(), torch.get_rng_state()
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        sums: list[dict[str, Tensor]] = []
        for net in (self.net, self.model):
            torch.set_rng_state(rng)
            for index in batches:
                self.loss(net, index).backward()
            named = self.model.named_parameters()
            sums.append({k: p.grad for k, p in named if p.grad is not None and p.ndim > 1})
            self.opt.zero_grad()
        self.net.load_feedback_state_dict(feedback)
        for k, b in self.model.named_buffers():
            b.copy_(buffers[k])
        torch.set_rng_state(rng)
        return {
            k: round(float(F.cosine_similarity(g.flatten(), sums[1][k].flatten(), 0)), 4)
            for k, g in sums[0].items()
            if k in sums[1]
        }

    def state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state() if self.device == "cuda" else None
        return {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "schedule": self.schedule.state_dict(),
            "feedback": self.net.feedback_state_dict(),
            "rng": (torch.get_rng_state(), cuda),
            "curve": self.curve,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])
        self.net.load_feedback_state_dict(state["feedback"])
        cpu, cuda = state["rng"]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        self.curve = state["curve"]


def gpu() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"


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
        "machine": machine() if args.device == "cpu" else gpu(),
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
            folder.append(cell)
            folder.checkpoint(row, seed).unlink(missing_ok=True)
        result = cell.get("undefined") or f"best {cell['best']:.2f}, last {cell['last']:.2f}"
        print(f"{where}: {result}", flush=True)


def keep(config: Config, folder: Folder, results: Path) -> list[dict[str, Any]]:
    """All finished cells, kept in ``results`` too: an earlier table's, and newer ones."""
    kept = results / f"{config.name}.jsonl"
    cells = {(c["row"], c["seed"]): c for c in [*read_cells(kept, config), *folder.read()]}
    order = {name: i for i, name in enumerate(config.rows)}
    known = [cells[key] for key in sorted(cells, key=lambda k: (order.get(k[0], len(order)), k))]
    replace(kept, "".join(f"{json.dumps(c)}\n" for c in known))
    return known


def _clock(seconds: float) -> str:
    minutes = int(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
        command = f"python tools/reproduce.py {_shown(args.config)} --data-dir DIR{changes}"
        out = args.results / f"{config.name}.md"
        replace(out, render(config, keep(config, folder, args.results), command))
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
    sys.exit(main())
