"""The methods written out by hand for an MLP with ReLU, in eager torch and nothing of grapefx.

An oracle for the compiled core: same noise, same feedback maps, so the same numbers. Notation of
docs/method.md: e (N, C) output error, h_l (N, n_l) value behind layer l, B_l (C, n_l).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def columns(b: Tensor) -> Tensor:
    """Euclidean norm of every column, as a row."""
    return b.pow(2).sum(0, keepdim=True).sqrt()


@dataclass
class Reference:
    """An MLP given by its weights and biases, trained by one method; ``b`` are the hidden maps."""

    method: str
    weights: list[Tensor]
    biases: list[Tensor]
    b: list[Tensor]
    eta: float = 0.01
    momentum: float = 0.9
    norm: str = "fitted"
    alpha: float = 0.01
    ridge: float = 1e-2
    m: list[Tensor] = field(default_factory=list)
    scale: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.m = [torch.zeros_like(b) for b in self.b]
        self.scale = [torch.ones_like(b[:1]) for b in self.b]

    def values(self, x: Tensor) -> list[Tensor]:
        """x, h_1, ..., h_{L-1} and the output."""
        out = [x]
        last = len(self.weights) - 1
        for i, (w, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            a = out[-1] @ w.t() + bias
            out.append(a if i == last else a.relu())
        return out

    def tangent(self, h: list[Tensor], noise: list[Tensor]) -> Tensor:
        """d = sum_l J_l v_l: one stream, every feedback point adds its own noise."""
        rows = len(noise[0])
        t = torch.zeros_like(h[0][:rows])
        for w, value, v in zip(self.weights[:-1], h[1:-1], noise, strict=True):
            t = (t @ w.t()) * (value[:rows] > 0) + v
        return t @ self.weights[-1].t()

    def learn(self, estimates: list[Tensor]) -> None:
        """B_l from J^_l: FDFA 2024 eq. 8, or GrAPE 2026 eq. 5-6 and 17 with momentum."""
        for i, j in enumerate(estimates):
            if self.method == "fdfa":
                self.b[i] = (1 - self.alpha) * self.b[i] + self.alpha * j
            elif self.method == "grape":
                # the gradient of 1 - cos by autograd, at a B with columns of norm 1
                b = (self.b[i] / self.scale[i]).requires_grad_()
                (1 - F.cosine_similarity(b, j, dim=0)).sum().backward()
                assert b.grad is not None
                self.m[i] = self.momentum * self.m[i] + b.grad
                b = (b - self.eta * self.m[i]).detach()
                self.b[i] = b / columns(b) * self.scale[i]

    def refit(self, e: Tensor, deltas: list[Tensor]) -> None:
        """Ridge regression of the true cotangents on the error."""
        gram = e.t() @ e
        ridge = self.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=e.dtype)
        for i, delta in enumerate(deltas):
            b = torch.linalg.inv(gram + ridge) @ e.t() @ delta
            if self.method == "grape":
                self.scale[i] = columns(b) if self.norm == "fitted" else torch.ones_like(b[:1])
                self.m[i] = torch.zeros_like(b)
                b = b / columns(b) * self.scale[i]
            self.b[i] = b

    def gradients(
        self, x: Tensor, y: Tensor, noise: list[Tensor] | None = None, calibrate: bool = False
    ) -> list[Tensor]:
        """Weight and bias gradients of one training step, layer by layer; the maps learn."""
        h = self.values(x)
        output = h[-1].detach().requires_grad_()
        (e,) = torch.autograd.grad(F.cross_entropy(output, y), output)
        deltas, local = [e], e
        for w, value in zip(self.weights[:0:-1], h[-2:0:-1], strict=True):  # the chain rule
            deltas.insert(0, local @ w)
            local = deltas[0] * (value > 0)
        if calibrate:
            if self.method != "bp":
                self.refit(e, deltas[:-1])
        elif self.method != "bp":
            if noise is not None:
                d = self.tangent(h, noise)
                self.learn([d.t() @ v / len(v) for v in noise])
            deltas = [*(e @ b for b in self.b), e]
        found = []
        for below, value, delta in zip(h[:-1], h[1:], deltas, strict=True):
            local = delta if value is h[-1] else delta * (value > 0)
            found += [local.t() @ below, local.sum(0)]
        return found
