"""What is timed: networks with their inputs, and variants (how each is trained)."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from tools.common import networks

SMALL, COLOUR = (1, 28, 28), (3, 32, 32)
VOCABULARY, CONTEXT = 65, 64


@dataclass(frozen=True)
class Benchmark:
    """A network, the shape of one sample and its kind: "image" or "tokens"."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "image"
    options: tuple[tuple[str, Any], ...] = ()  # for every grapefx variant
    vocabulary: int = VOCABULARY  # of tokens

    def example(self, batch: int) -> tuple[Tensor, Tensor]:
        """A batch of inputs and targets."""
        if self.kind == "tokens":
            tokens = torch.randint(0, self.vocabulary, (batch, self.shape[0] + 1))
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return torch.randn(batch, *self.shape), torch.randint(0, 10, (batch,))


def mlp(depth: int, width: int) -> Callable[[], nn.Module]:
    """``depth`` weight layers."""
    return lambda: networks.mlp(SMALL, 10, depth, width, "relu", False)


def deep(depth: int) -> nn.Module:
    """What compile time is measured on by depth: equal layers, none of which costs much."""
    body: list[nn.Module] = []
    for _ in range(depth):
        body += [nn.Linear(64, 64), nn.Tanh()]
    return nn.Sequential(*body, nn.Linear(64, 10))


def cnn() -> nn.Module:
    """A small net with batch norm for 28 x 28 images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def transformer(depth: int) -> Callable[[], nn.Module]:
    """GrAPE 2026 table 5: width 128."""
    return lambda: networks.Transformer(VOCABULARY, CONTEXT, 128, 4, depth, 512, 0.0)


def gpt2_small() -> nn.Module:
    """GPT-2-small's sizes, on windows of 256 tokens; the head has weights of its own. For GPUs."""
    return networks.Transformer(50_257, 256, 768, 12, 12, 3072, 0.0)


def _models() -> dict[str, Benchmark]:
    out = {
        "tiny": Benchmark(mlp(3, 16), SMALL),
        "cnn": Benchmark(cnn, SMALL),
        "lenet": Benchmark(
            lambda: networks.lenet(SMALL, 10, [6, 16], [120, 84], "relu", False), SMALL
        ),
        "fdfa_cnn": Benchmark(lambda: networks.fdfa_cnn(SMALL, 10, "tanh", False, 2), SMALL),
        "resnet20": Benchmark(lambda: networks.resnet(COLOUR, 10, 20, True), COLOUR),
        "resnet14": Benchmark(  # that of reproduce/learning_resnet14.yaml
            lambda: networks.small_resnet(COLOUR, 10, 14, 8, 2), COLOUR
        ),
        "vgg16": Benchmark(lambda: networks.vgg16(COLOUR, 10, True, True), COLOUR),
    }
    for depth, width in ((3, 1024), (8, 1024), (32, 256), *((d, 512) for d in (2, 4, 8, 16, 64))):
        out[f"mlp{depth}x{width}"] = Benchmark(mlp(depth, width), SMALL)
    for depth in (2, 4, 8, 16):
        for name, granularity in (("macro", "block"), ("micro", "layer")):
            out[f"transformer{depth}-{name}"] = Benchmark(
                transformer(depth), (CONTEXT,), "tokens", (("granularity", granularity),)
            )
    out["gpt2-small"] = Benchmark(gpt2_small, (256,), "tokens", (), 50_257)
    return out


MODELS: dict[str, Benchmark] = _models()

# a third of the samples exact, so weighted that the gradient is unbiased
THIRD = {"exact_rows": 0.334, "exact_weight": 3.0}
# (options, steps in a period): the time of a variant is the mean over its period
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "bp": ({"method": "bp"}, 1),
    "dfa": ({"method": "dfa", "calib_every": None}, 1),
    "dfa radial": ({"method": "dfa", "calib_every": None, "radial": "auto"}, 1),
    "dfa exact rows": (
        {"method": "dfa", "calib_every": None, "exact_rows": 0.125, "exact_pick": "largest"},
        1,
    ),
    "dfa exact rows, late": (
        {
            "method": "dfa",
            "calib_every": None,
            "exact_rows": 0.125,
            "exact_pick": "largest",
            "exact_late": True,
        },
        1,
    ),
    "dfa sixteenth exact": (
        {"method": "dfa", "calib_every": None, "exact_rows": 0.0625, "exact_pick": "largest"},
        1,
    ),
    "dfa third exact": ({"method": "dfa", "calib_every": None, **THIRD}, 1),
    "dfa blocks": ({"method": "dfa", "calib_every": None, "granularity": "block"}, 1),
    "dfa blocks, third exact": (
        {"method": "dfa", "calib_every": None, "granularity": "block", **THIRD},
        1,
    ),
    "dfa mean field": ({"method": "dfa", "calib_every": None, "mean_field": 1}, 1),
    "fdfa": ({"method": "fdfa", "calib_every": None}, 1),
    "grape": ({"method": "grape", "calib_every": None}, 1),
    "grape 1/8": ({"method": "grape", "calib_every": None, "tangent_fraction": 1 / 8}, 1),
    "grape k=8": ({"method": "grape", "calib_every": None, "align_every": 8}, 8),
}
PLAIN = ("eager", "compiled")
# by the mode of another package, if it is installed: eager, and of images only (it has no linear
# layer of sequences)
PEERS = {"biotorch dfa": "dfa"}


def peers(name: str) -> list[str]:
    """The variants of ``PEERS`` that can train a network here."""
    installed = importlib.util.find_spec("biotorch") is not None
    return list(PEERS) if installed and benchmark(name).kind == "image" else []


def benchmark(name: str) -> Benchmark:
    """One of ``MODELS``, ``depthN`` (N hidden layers, 64 wide) or a torchvision classifier.

    ``resnet50@64`` is one for images of 64 x 64 instead of 224 x 224.
    """
    if name in MODELS:
        return MODELS[name]
    if name.startswith("depth") and name[5:].isdigit():
        return Benchmark(lambda: deep(int(name[5:])), (64,))
    zoo = importlib.import_module("torchvision.models")
    name, _, side = name.partition("@")
    size = int(side or 224)
    return Benchmark(lambda: zoo.get_model(name, weights=None), (3, size, size))


def build(name: str, variant: str, seed: int = 0, backend: str = "inductor") -> nn.Module:
    """A network under one variant; ``eager`` and ``compiled`` are plain backpropagation."""
    torch.manual_seed(seed)
    found = benchmark(name)
    model = found.build()
    if variant == "eager":
        return model
    if variant == "compiled":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    if variant in PEERS:
        peer = importlib.import_module("biotorch.module.biomodule")
        with contextlib.redirect_stdout(io.StringIO()):  # it says which layers it converts
            made: nn.Module = peer.BioModule(model, mode=PEERS[variant], output_dim=10)
        return made
    options: dict[str, Any] = VARIANTS[variant][0] | dict(found.options)
    return grapefx.compile(model, **{"backend": backend, **options})


@dataclass
class Step:
    """One training step without the optimizer, in two halves."""

    net: nn.Module
    x: Tensor
    y: Tensor

    def forward(self) -> Tensor:
        """Loss."""
        self.clear()
        return F.cross_entropy(self.net(self.x).flatten(0, -2), self.y.flatten())

    def clear(self) -> None:
        """No gradients."""
        for p in self.net.parameters():
            p.grad = None

    def __call__(self) -> None:
        self.forward().backward()


class PeerStep(Step):
    """BioTorch's own call: the network is told the targets and the loss."""

    def forward(self) -> Tensor:
        """Loss."""
        self.clear()
        return F.cross_entropy(self.net(self.x, self.y, F.cross_entropy), self.y)


def make(name: str, variant: str, batch: int, backend: str = "inductor") -> Step:
    """A step, with the same batch for every variant."""
    torch.manual_seed(1)
    x, y = benchmark(name).example(batch)
    kind = PeerStep if variant in PEERS else Step
    return kind(build(name, variant, backend=backend), x, y)
