"""Models for the tests of stages, beside those of the zoo: skips, tables, convolutional nets."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import MLP, ZOO, Model


class UNet(nn.Module):
    """Two levels down and up, with a skip at each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((2, 4), (4, 6), (6, 6))
        )
        self.up_b, self.up_a = nn.Conv2d(12, 5, 3, padding=1), nn.Conv2d(9, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        c = F.silu(self.c(F.max_pool2d(b, 2)))
        b = F.relu(self.up_b(torch.cat([b, F.interpolate(c, scale_factor=2)], 1)))
        a = F.relu(self.up_a(torch.cat([a, F.interpolate(b, scale_factor=2)], 1)))
        return self.out(a).mean((2, 3))


class Rotary(nn.Module):
    """Attention blocks that all read one table of positions and one mask."""

    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(depth))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("table", torch.randn(1, 16, width))
        self.out = nn.Linear(width, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        turn = torch.cos(self.table[:, : x.shape[1]])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for qkv, mix in zip(self.qkv, self.mix, strict=True):
            q, k, v = (t.unsqueeze(1) for t in (qkv(h) * 1.0).chunk(3, -1))
            a = F.scaled_dot_product_attention(q * turn, k * turn, v, attn_mask=mask)
            h = h + mix(torch.tanh(a.squeeze(1)))
        return self.out(h)


class Wide(nn.Module):
    """A head so wide that the error is taken in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 6)])
        self.head = nn.Linear(6, 1100)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def vgg() -> nn.Module:
    """VGG in small: convolutions, pools, dropout, three linear layers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(),
        nn.Dropout(), nn.Linear(12, 5),
    )  # fmt: skip


def _x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


MODELS: dict[str, Callable[[], Model]] = {
    **ZOO,
    "unet": lambda: (UNet(), (_x(4, 2, 8, 8),)),
    "rotary": lambda: (Rotary(), (torch.randint(0, 11, (4, 5)),)),
    "wide": lambda: (Wide(), (_x(6, 8),)),
    "vgg": lambda: (vgg(), (_x(6, 2, 8, 8),)),
    "deep": lambda: (MLP(10, 7), (_x(8, 8),)),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A model with an example call, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, args = MODELS[name]()
        model.to(dtype)
    return model, tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
