"""The one training loop: what a network is trained by, a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from tools.common.data import ImageData

Batch = tuple[Tensor, Tensor]  # inputs and class indices


@dataclass
class Training:
    """A network under training.

    ``net`` is what a step calls: ``grapefx.compile(model)``, ``torch.compile(model)`` or ``model``
    itself, whose weights are those of the plain ``model``. ``decay`` is stepped once a step.
    ``keep``: the part of each batch, that of the largest error, that a step learns from (selective
    backpropagation); None for all of it.
    """

    model: nn.Module
    net: Any
    optimizer: torch.optim.Optimizer
    decay: LRScheduler | None = None
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    keep: float | None = None

    def loss(self, net: Any, x: Tensor, y: Tensor) -> Tensor:
        """The loss of ``net``: positions of a sequence count as samples of their own."""
        out = net(x)
        if hasattr(net, "targets"):  # what some methods learn from
            net.targets(y)
        return self.criterion(out.flatten(0, -2), y.flatten())

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """The first half of a step: it fills ``grad`` and returns the loss."""
        loss = self.loss(self.net, x, y)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def kept(self, x: Tensor, y: Tensor) -> Batch:
        """The samples to learn from; the error is that of a cross-entropy, softmax(y) - target."""
        if self.keep is None:
            return x, y
        out = self.net(x)  # compiled where the step is
        error = out.softmax(-1) - F.one_hot(y, out.shape[-1])
        norms = error.flatten(1).norm(dim=1)
        index = norms.topk(max(1, round(self.keep * len(x)))).indices
        return x[index], y[index]

    def update(self) -> None:
        """The rest of a step."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.decay is not None:
            self.decay.step()

    def train(self, batches: Iterable[Batch]) -> Tensor:
        """A step on each batch: the mean loss."""
        losses = []
        for x, y in batches:
            losses.append(self.gradients(*self.kept(x, y)))
            self.update()
        return torch.stack(losses).mean()


def adam(model: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Adam, LRScheduler]:
    """Adam, and what lets its rate fall linearly to 0 over all steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    return optimizer, LinearLR(optimizer, 1.0, 0.0, total_iters=steps)


def whole_batches(samples: int, size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Indices of an epoch's batches in random order. A last, smaller batch is left out."""
    order = torch.randperm(samples, generator=generator)
    return order[: max(1, samples // size) * size].split(size)


@torch.no_grad()
def accuracy(net: nn.Module, data: ImageData, batch_size: int = 500) -> float:
    """Test accuracy in percent."""
    training = net.training
    net.eval()
    batches = zip(data.test_x.split(batch_size), data.test_y.split(batch_size), strict=True)
    right = sum(int((net(data.pixels(x)).argmax(1) == y).sum()) for x, y in batches)
    net.train(training)
    return 100 * right / len(data.test_y)


def cosine(a: Tensor | None, b: Tensor) -> float:
    """The cosine of two gradients as vectors; 0 where the first is absent."""
    return 0.0 if a is None else float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
