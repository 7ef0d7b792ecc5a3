"""One cell of a table under training: a row of the config and a seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import grapefx
from tools.common.networks import initialise
from tools.common.train import Training, cosine, whole_batches
from tools.reproduce.cells import FORMAT
from tools.reproduce.config import Row
from tools.reproduce.data import Data


def make_optimizer(net: nn.Module, spec: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that a config describes."""
    own = {k: v for k, v in spec.items() if k != "name"}
    if spec["name"] == "adam":
        own["betas"] = tuple(own["betas"])
        return torch.optim.Adam(net.parameters(), fused=True, **own)
    return torch.optim.SGD(net.parameters(), fused=True, **own)


def make_schedule(
    opt: torch.optim.Optimizer, spec: dict[str, Any], steps: int
) -> lr_scheduler.LRScheduler:
    """Stepped once an epoch; ``linear``, which falls to 0 over all ``steps``, once a step."""
    if spec["name"] == "linear":
        return lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=steps)
    if spec["name"] == "exponential":
        return lr_scheduler.ExponentialLR(opt, spec["gamma"])
    if spec["name"] == "milestones":
        return lr_scheduler.MultiStepLR(opt, spec["at"], spec["gamma"])
    return lr_scheduler.ConstantLR(opt, 1.0)


def binary_cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Of sigmoid outputs, one a class."""
    return F.binary_cross_entropy_with_logits(out, F.one_hot(y, out.shape[1]).to(out))


class Trainer:
    """Everything that a checkpoint must hold, and an epoch of training."""

    def __init__(self, row: Row, seed: int, data: Data, backend: str, device: str) -> None:
        torch.manual_seed(seed)
        self.row, self.seed, self.data, self.device = row, seed, data, device
        self.setting = row.setting
        self.model = data.model(self.setting["model"]).to(device)
        initialise(self.model, self.setting["init"])
        options: dict[str, Any] = {"seed": seed, "backend": backend, **row.options}
        if "preset" not in options:
            options.setdefault("calib_every", 1)  # the options' defaults, whatever is recommended
        self.net = grapefx.compile(self.model, method=row.method, **options)
        self.opt = make_optimizer(self.net, self.setting["optimizer"])
        epochs, every = self.setting["epochs"], self.setting.get("bp_epoch_every")
        passes = epochs + (epochs // every if every else 0)
        steps = passes * max(1, data.samples // self.setting["batch_size"])
        self.schedule = make_schedule(self.opt, self.setting["schedule"], steps)
        self.by_step = self.setting["schedule"]["name"] == "linear"
        bce = self.setting.get("loss") == "bce"
        self.training = Training(
            self.model,
            self.net,
            self.opt,
            self.schedule if self.by_step else None,
            binary_cross_entropy if bce else F.cross_entropy,
            self.setting.get("keep_largest"),
        )
        self.curve: list[dict[str, Any]] = []

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return len(self.curve)

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
        if not self.by_step:
            self.schedule.step()
        angles = self.alignment(batches[: self.setting["alignment_batches"]])
        self.model.eval()
        score = self.data.score(self.model)
        self.model.train()
        line = {"loss": round(mean_loss, 5), "score": round(score, 4), "cosine": angles}
        self.curve.append(line | {"seconds": round(seconds, 2)})

    def train_pass(self, generator: torch.Generator) -> tuple[Sequence[Tensor], float]:
        """Every sample once: the batches' indices and the mean loss."""
        order = whole_batches(self.data.samples, self.setting["batch_size"], generator)
        batches = [index.to(self.device) for index in order]
        return batches, float(self.training.train(map(self.data.batch, batches)))

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
                self.training.loss(net, *self.data.batch(index)).backward()
            named = self.model.named_parameters()
            sums.append({k: p.grad for k, p in named if p.grad is not None and p.ndim > 1})
            self.opt.zero_grad()
        self.net.load_feedback_state_dict(feedback)
        for k, b in self.model.named_buffers():
            b.copy_(buffers[k])
        torch.set_rng_state(rng)
        return {k: round(cosine(g, sums[1][k]), 4) for k, g in sums[0].items() if k in sums[1]}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
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
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.schedule.load_state_dict(state["schedule"])
        self.net.load_feedback_state_dict(state["feedback"])
        cpu, cuda = state["rng"]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        self.curve = state["curve"]
