"""Everything else: models as people write them by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.coverage.zoos.sample import BATCH, CLASSES, Builder, Sample, images


class _Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.rnn = cell(8, 12, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(24, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(tokens))
        return self.out(h[:, -1])


class _MessagePassing(nn.Module):
    """Two rounds on one graph: gather at the sources, a message net, index_add at the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.message = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])
        self.update = nn.ModuleList([nn.GRUCell(8, 8), nn.GRUCell(8, 8)])
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        n, nodes, _ = x.shape
        h = torch.relu(self.embed(x))
        source, target = edges[0], edges[1]
        for message, update in zip(self.message, self.update, strict=True):
            ends = torch.cat([h.index_select(1, source), h.index_select(1, target)], -1)
            total = torch.zeros_like(h).index_add(1, target, torch.relu(message(ends)))
            h = update(total.reshape(n * nodes, 8), h.reshape(n * nodes, 8)).view(n, nodes, 8)
        return self.out(h.mean(1))


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.join, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        return self.out(F.relu(self.join(torch.cat([a, self.up(self.middle(b))], 1))))


class _Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out((self.net(a) - self.net(b)).abs())


class _Experts(nn.Module):
    """Top-2 of four experts, dense: each computes everything, the gate is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(8, 12), nn.Linear(12, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(4)
        )
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        weight, chosen = self.gate(h).softmax(-1).topk(2, -1)
        gates = torch.zeros(len(h), 4, dtype=h.dtype).scatter(1, chosen, weight)
        every = torch.stack([e(h) for e in self.experts], 1)
        return self.out(h + (gates[..., None] * every).sum(1))


class _Cells(nn.Module):
    """Two cells in a loop that its author wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 8), nn.Linear(12, CLASSES)
        self.lstm, self.gru = nn.LSTMCell(8, 12), nn.GRUCell(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = c = g = x.new_zeros(x.shape[0], 12)
        for t in range(tokens.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(h, g)
        return self.out(g)


class _Towers(nn.Module):
    """A contrastive loss on all pairs of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.to_a, self.to_b = nn.Linear(12, 5), nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = F.normalize(self.to_a(self.a(x)), dim=-1)
        b = F.normalize(self.to_b(self.b(y)), dim=-1)
        pairs = a @ b.t() * self.scale.exp()
        own = pairs.diagonal()
        return (pairs.logsumexp(0) - own).mean() + (pairs.logsumexp(1) - own).mean()


class _OwnLoss(nn.Module):
    """Returns its loss and its prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.out(self.net(x))
        return F.cross_entropy(logits, y), logits


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 24),
        nn.ReLU(), nn.Linear(24, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip


def _edges() -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])


def _labels() -> Tensor:
    return torch.randint(0, CLASSES, (BATCH,))


def other() -> dict[str, Builder]:
    """Recurrent nets, graphs, autoencoders, twins, experts, a loss inside the model."""
    tokens = torch.randint(0, 20, (BATCH, 5))
    return {
        "gru": lambda: Sample(_Recurrent(nn.GRU), (tokens,)),
        "lstm": lambda: Sample(_Recurrent(nn.LSTM), (tokens,)),
        "rnn": lambda: Sample(_Recurrent(nn.RNN), (tokens,)),
        "cells": lambda: Sample(_Cells(), (tokens,)),
        "towers": lambda: Sample(_Towers(), (torch.randn(BATCH, 8), torch.randn(BATCH, 6))),
        "message passing": lambda: Sample(_MessagePassing(), (torch.randn(BATCH, 6, 5), _edges())),
        "autoencoder": lambda: Sample(_autoencoder(), (images(8, 1),)),
        "u-net": lambda: Sample(_UNet(), (images(8, 1),)),
        "siamese": lambda: Sample(_Siamese(), (torch.randn(BATCH, 8), torch.randn(BATCH, 8))),
        "experts": lambda: Sample(_Experts(), (torch.randn(BATCH, 8),)),
        "own loss": lambda: Sample(_OwnLoss(), (torch.randn(BATCH, 8), _labels())),
        "nn.Transformer": lambda: Sample(
            nn.Transformer(16, 2, 2, 2, 24, dropout=0.0, batch_first=True),
            (torch.randn(BATCH, 5, 16), torch.randn(BATCH, 4, 16)),
        ),
    }
