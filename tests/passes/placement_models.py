"""Architectures whose feedback points are pinned by ``test_partition``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.proj, self.out = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.conv(x)))
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(h.mean((2, 3), keepdim=True)))))
        return self.out(F.relu(self.proj(h * gate)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.mid, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.u1, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.d1(x))
        h = self.up(F.relu(self.mid(F.relu(self.d2(a)))))
        return self.out(F.relu(self.u1(torch.cat([h, a], 1))))


class Dense(nn.Module):
    """Every layer (pre-norm) reads all values before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * k) for k in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * k, 3, 3, padding=1) for k in range(3))
        self.out = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.out(torch.cat(features, 1).mean((2, 3)))


class Rotary(nn.Module):
    """A decoder: RMS pre-norm, fused q-k-v, rotary embedding, gated MLP."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2 = nn.RMSNorm(16), nn.RMSNorm(16)
            self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
            self.gate, self.up, self.down = (
                nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
            )  # fmt: skip

        def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            n, t, _ = h.shape
            q, k, v = self.qkv(self.n1(h)).view(n, t, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + self.o(a.transpose(1, 2).reshape(n, t, 16))
            z = self.n2(h)
            return h + self.down(F.silu(self.gate(z)) * self.up(z))

        @staticmethod
        def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.norm, self.out = nn.RMSNorm(16), nn.Linear(16, 20)
        self.register_buffer("cos", torch.randn(6, 8))
        self.register_buffer("sin", torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.emb(x)
        for block in self.blocks:
            h = block(h, self.cos, self.sin)
        return self.out(self.norm(h))


class Normed(nn.Module):
    """Weight norm: a function of parameters only is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.skip = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.out(h + torch.tanh(self.skip(h)))


class Gated(nn.Module):
    """``x * sigmoid(x)`` written out: the branches meet again, so nothing is cut between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.b(h * torch.sigmoid(h))
        return self.out((h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True) + 1e-3).sqrt())


class DualPath(nn.Module):
    """The halves of a projection meet again, but one has met other weights (dual path networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.a = nn.Linear(8, 10), nn.Linear(8, 7)
        self.b, self.c, self.out = nn.Linear(7, 6), nn.Linear(7, 5), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = self.skip(x)
        h = torch.relu(self.a(x))
        return self.out(torch.cat([s[:, :6] + self.b(h), s[:, 6:], self.c(h)], 1))
