"""Train an image classifier without a backward chain: a plain PyTorch loop, one line changed.

python examples/train_classifier.py --method grape
python examples/train_classifier.py --dataset CIFAR10 --data-dir ~/data --model cnn --epochs 10
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.live import Live
from rich.text import Text
from torch import Tensor, nn

import grapefx

SUBSET = Path(__file__).resolve().parent / "data" / "mnist_subset.npz"
DATASETS = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100")  # of torchvision
Split = tuple[Tensor, Tensor]  # images (N, channels, height, width), classes


def load(dataset: str, data_dir: str | None) -> tuple[Split, Split]:
    """Training and test images with mean 0 and deviation 1. Nothing is downloaded."""
    if data_dir is None:
        with np.load(SUBSET) as z:
            found = [(z[f"{part}_images"], z[f"{part}_labels"]) for part in ("train", "test")]
    else:
        from torchvision import datasets

        sets = [getattr(datasets, dataset)(data_dir, train=train) for train in (True, False)]
        found = [(np.asarray(s.data), np.asarray(s.targets)) for s in sets]
    images = [torch.from_numpy(x).float() / 255 for x, _ in found]
    images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2) for x in images]
    mean, std = (f(images[0], dim=(0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    train, test = (
        ((x - mean) / std, torch.from_numpy(y).long())
        for x, (_, y) in zip(images, found, strict=True)
    )
    return train, test


def mlp(features: int, classes: int, depth: int = 8, width: int = 512) -> nn.Sequential:
    """``depth`` linear layers with ReLU between them, He initialisation."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise([features, *[width] * (depth - 1), classes]):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, size: int, classes: int, width: int = 16) -> nn.Sequential:
    """Three blocks of convolution, batch norm, ReLU and pooling, then a linear layer."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, width, size = width, 2 * width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes))


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
    """Test accuracy in percent."""
    net.eval()
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    correct = sum(int((net(xs).argmax(1) == ys).sum()) for xs, ys in batches)
    net.train()
    return 100 * correct / len(y)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="grape", help="bp, dfa, fdfa, grape, ...")
    parser.add_argument(
        "--calib-every", help="epochs between calibrations, or never (default: as recommended)"
    )
    parser.add_argument("--dataset", default="MNIST", choices=DATASETS)
    parser.add_argument("--data-dir", help="torchvision's root (default: a bundled MNIST subset)")
    parser.add_argument("--model", default="mlp", choices=["mlp", "cnn"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", metavar="FILE.html", help="write what happened as a page")
    args = parser.parse_args()
    if args.dataset != "MNIST" and args.data_dir is None:
        parser.error("only a subset of MNIST is bundled: --data-dir must hold the others")
    return args


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    (x, y), (test_x, test_y) = load(args.dataset, args.data_dir)
    classes, (_, channels, size, _) = int(y.max()) + 1, x.shape
    pixels = channels * size * size
    model = mlp(pixels, classes) if args.model == "mlp" else cnn(channels, size, classes)
    x, y, test_x, test_y = (t.to(args.device) for t in (x, y, test_x, test_y))
    options: dict[str, Any] = {}
    if args.calib_every is not None:
        options["calib_every"] = None if args.calib_every == "never" else int(args.calib_every)

    net = grapefx.compile(model.to(args.device), method=args.method, seed=args.seed, **options)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr)
    if not 0 < args.batch_size <= len(y):
        sys.exit(f"--batch-size must be from 1 to {len(y)}, the number of images")
    steps = len(y) // args.batch_size
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=args.epochs * steps)
    net.record()  # for the report: alignment by layer, times
    with Live(auto_refresh=False) as live:
        for epoch in range(args.epochs):
            net.set_epoch(epoch)
            order = torch.randperm(len(y), device=args.device)
            for index in order[: steps * args.batch_size].split(args.batch_size):
                loss = F.cross_entropy(net(x[index]), y[index])
                loss.backward()
                opt.step()
                opt.zero_grad()
                decay.step()
            percent = accuracy(net, test_x, test_y)
            live.console.print(
                f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {percent:.2f} %"
            )
            live.update(Text(net.report().text()), refresh=True)
    if args.report:
        Path(args.report).write_text(net.report().html(), encoding="utf-8")


if __name__ == "__main__":
    main()
