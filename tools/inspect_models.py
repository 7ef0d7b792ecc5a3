"""Models for grapefx-inspect: `grapefx-inspect tools/inspect_models.py:mlp`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def mlp(depth: int = 8, width: int = 1024) -> nn.Module:
    """An MLP for MNIST with ``depth`` hidden layers."""
    net = nn.Sequential(nn.Flatten())
    for i in range(depth):
        net.append(nn.Sequential(nn.Linear(784 if i == 0 else width, width), nn.ReLU()))
    net.append(nn.Linear(width, 10))
    net.example_inputs = lambda: torch.zeros(128, 1, 28, 28)  # type: ignore[assignment]
    return net


def gpt(layers: int = 48, width: int = 1600, heads: int = 25, vocabulary: int = 50257) -> nn.Module:
    """A decoder like GPT-2; the default is the size of GPT-2 XL (1.6 billion parameters)."""
    return GPT(layers, width, heads, vocabulary)


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        qkv = self.qkv(self.ln1(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    """Token and position embeddings, blocks, a tied vocabulary head."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))

    @property
    def example_inputs(self) -> torch.Tensor:
        """Eight sequences of 1,024 tokens."""
        return torch.zeros(8, 1024, dtype=torch.int64, device=self.tokens.weight.device)
