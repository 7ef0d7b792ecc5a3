"""The networks of the papers' tables, plain PyTorch, by the name that a config gives them."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(
    shape: tuple[int, ...], classes: int, depth: int, width: int, activation: str, batch_norm: bool
) -> nn.Sequential:
    """``depth`` linear layers (weight layers, the output layer counted)."""
    sizes = [shape[0] * shape[1] * shape[2], *[width] * (depth - 1)]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out)]
        layers += [nn.BatchNorm1d(fan_out)] if batch_norm else []
        layers += [ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


class _Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def mlp_copied(
    shape: tuple[int, ...], classes: int, depth: int, width: int, activation: str, batch_norm: bool
) -> nn.Sequential:
    """``mlp`` whose output is a copy of the last layer's: that layer may be a feedback point."""
    return nn.Sequential(*mlp(shape, classes, depth, width, activation, batch_norm), _Copy())


def _convolution(
    fan_in: int, fan_out: int, kernel: int, activation: str, batch_norm: bool, pool: bool
) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(fan_in, fan_out, kernel)]
    layers += [nn.BatchNorm2d(fan_out)] if batch_norm else []
    layers += [ACTIVATIONS[activation]()]
    return layers + ([nn.MaxPool2d(2)] if pool else [])


def _flat(layers: list[nn.Module], shape: tuple[int, ...]) -> int:
    """Features of one sample behind ``layers``."""
    with torch.no_grad():
        return nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).numel()


def fdfa_cnn(
    shape: tuple[int, ...], classes: int, activation: str, batch_norm: bool, pools: int
) -> nn.Sequential:
    """FDFA 2024 table 2: 15C5-P2-40C5-P2-128-10; ``pools: 1`` drops the first pool (FDFA 2024's
    code).
    """
    layers = _convolution(shape[0], 15, 5, activation, batch_norm, pools == 2)
    layers += _convolution(15, 40, 5, activation, batch_norm, True)
    layers += [nn.Flatten()]
    layers += [nn.Linear(_flat(layers, shape), 128)]
    layers += [nn.BatchNorm1d(128)] if batch_norm else []
    return nn.Sequential(*layers, ACTIVATIONS[activation](), nn.Linear(128, classes))


def lenet(
    shape: tuple[int, ...],
    classes: int,
    widths: list[int],
    hidden: list[int],
    activation: str,
    batch_norm: bool,
) -> nn.Sequential:
    """Convolutions 5x5 of ``widths``, each with a 2x2 max pool, then linear layers ``hidden``."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([shape[0], *widths]):
        layers += _convolution(fan_in, fan_out, 5, activation, batch_norm, True)
    layers += [nn.Flatten()]
    for fan_in, fan_out in pairwise([_flat(layers, shape), *hidden]):
        layers += [nn.Linear(fan_in, fan_out)]
        layers += [nn.BatchNorm1d(fan_out)] if batch_norm else []
        layers += [ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], classes))


def alexnet(
    shape: tuple[int, ...], classes: int, batch_norm: bool, affine: bool, linear: int
) -> nn.Sequential:
    """AlexNet without dropout. 224 pixels: torchvision's; 32: stride 1 and kernels of 3.

    The second form keeps widths and depth; the papers do not say how they fit 32 pixels.
    """
    large = shape[1] >= 128
    first = nn.Conv2d(3, 64, 11, 4, 2) if large else nn.Conv2d(shape[0], 64, 3, 1, 1)
    kernel = 3 if large else 2
    layers: list[nn.Module] = []
    plan = [(64, True), (192, True), (384, False), (256, False), (256, True)]
    fan_in = shape[0]
    for i, (width, pool) in enumerate(plan):
        size = 5 if large and i == 1 else 3
        layers += [first if i == 0 else nn.Conv2d(fan_in, width, size, padding=size // 2)]
        layers += [nn.BatchNorm2d(width, affine=affine)] if batch_norm else []
        layers += [nn.ReLU()]
        layers += [nn.MaxPool2d(kernel, 2)] if pool else []
        fan_in = width
    layers += [nn.Flatten()]
    for fan_in, fan_out in pairwise([_flat(layers, shape), linear, linear]):
        layers += [nn.Linear(fan_in, fan_out)]
        layers += [nn.BatchNorm1d(fan_out, affine=affine)] if batch_norm else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(linear, classes))


def vgg16(shape: tuple[int, ...], classes: int, batch_norm: bool, affine: bool) -> nn.Sequential:
    """VGG-16 for 32 pixels: 13 convolutions and one linear layer behind 5 pools (no dropout)."""
    layers: list[nn.Module] = []
    fan_in = shape[0]
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(fan_in, width, 3, padding=1)]
            layers += [nn.BatchNorm2d(width, affine=affine)] if batch_norm else []
            layers += [nn.ReLU()]
            fan_in = width
        layers += [nn.MaxPool2d(2)]
    layers += [nn.Flatten()]
    features = _flat(layers, shape)
    return nn.Sequential(*layers, nn.Linear(features, classes))


class Residual(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016), option A: pad channels, drop pixels."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.stride, self.pad = stride, fan_out - fan_in
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out, affine=affine)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        return F.relu(x + y)


def resnet(
    shape: tuple[int, ...], classes: int, depth: int, affine: bool, first: int = 16
) -> nn.Sequential:
    """ResNet-20 or -56 for 32 pixels: (depth - 2) / 6 blocks of 16, 32 and 64 channels each.

    ``first``: the channels of the first blocks, if they are others.
    """
    stem = [nn.Conv2d(shape[0], first, 3, 1, 1, bias=False), nn.BatchNorm2d(first, affine=affine)]
    blocks: list[nn.Module] = []
    fan_in = first
    for width in (first, 2 * first, 4 * first):
        for i in range((depth - 2) // 6):
            blocks += [Residual(fan_in, width, 2 if i == 0 and width > first else 1, affine)]
            fan_in = width
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * first, classes)]
    return nn.Sequential(*stem, nn.ReLU(), *blocks, *tail)


def small_resnet(
    shape: tuple[int, ...], classes: int, depth: int, width: int, pool: int
) -> nn.Sequential:
    """A ResNet of ``width``, 2 and 4 times as many channels, on images averaged over ``pool``."""
    return nn.Sequential(nn.AvgPool2d(pool), *resnet(shape, classes, depth, True, width))


class EncoderBlock(nn.Module):
    """Causal attention and a feed-forward layer, each added, then normalised, with dropout."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.drop(self.proj(mixed)))
        return self.norm2(x + self.drop(self.mlp(x)))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a linear head."""

    def __init__(
        self,
        vocab: int,
        context: int,
        dim: int,
        heads: int,
        depth: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(context, dim))
        self.blocks = nn.Sequential(
            *(EncoderBlock(dim, heads, hidden, dropout) for _ in range(depth))
        )
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.blocks(x))


# kind -> (builder, the keys of a config's ``model`` beside ``kind``)
IMAGE_MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "mlp": (mlp, ("depth", "width", "activation", "batch_norm")),
    "mlp_copied": (mlp_copied, ("depth", "width", "activation", "batch_norm")),
    "fdfa_cnn": (fdfa_cnn, ("activation", "batch_norm", "pools")),
    "lenet": (lenet, ("widths", "hidden", "activation", "batch_norm")),
    "alexnet": (alexnet, ("batch_norm", "affine", "linear")),
    "vgg16": (vgg16, ("batch_norm", "affine")),
    "resnet": (resnet, ("depth", "affine")),
    "small_resnet": (small_resnet, ("depth", "width", "pool")),
}
TEXT_KEYS = ("context", "dim", "heads", "depth", "hidden", "dropout")
MODEL_KEYS = {k: v[1] for k, v in IMAGE_MODELS.items()} | {"transformer": TEXT_KEYS}


@torch.no_grad()
def initialise(model: nn.Module, init: str) -> None:
    """``torch`` keeps PyTorch's default, ``he_uniform`` is Kaiming-uniform with biases of 0.

    ``zero`` is the forward start that FDFA 2024 appendix A prints for DFA.
    """
    if init == "torch":
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if init == "zero":
                nn.init.zeros_(module.weight)
            else:
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


INITS = ("he_uniform", "torch", "zero")
