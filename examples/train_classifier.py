"""Train an image classifier without a backward chain: a plain PyTorch loop, one line changed.

python examples/train_classifier.py --method grape
python examples/train_classifier.py --dataset cifar10 --data-dir ~/data --model cnn --epochs 10
"""

import argparse
import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import grapefx
from load_data import DATASETS, ImageData, load_images


def mlp(in_features: int, classes: int, depth: int = 8, width: int = 512) -> nn.Sequential:
    """``depth`` linear layers with ReLU between them, He initialisation."""
    sizes = [in_features, *[width] * (depth - 1), classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes):
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


def build(model: str, data: ImageData, width: int | None = None) -> nn.Sequential:
    """The network called ``model``, sized for ``data``."""
    _, channels, size, _ = data.train_x.shape
    if model == "mlp":
        return mlp(channels * size * size, data.classes, width=width or 512)
    return cnn(channels, size, data.classes, width=width or 16)


@torch.no_grad()
def accuracy(net: nn.Module, data: ImageData, batch_size: int = 500) -> float:
    """Test accuracy in percent."""
    net.eval()
    batches = zip(data.test_x.split(batch_size), data.test_y.split(batch_size), strict=True)
    correct = sum(int((net(data.pixels(x)).argmax(1) == y).sum()) for x, y in batches)
    net.train()
    return 100 * correct / len(data.test_y)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="grape", help="bp, dfa, fdfa, grape")
    parser.add_argument("--calib-every", default="1", help="epochs between calibrations, or never")
    parser.add_argument("--dataset", default="mnist", choices=DATASETS)
    parser.add_argument("--data-dir", help="folder of a full data set (default: bundled MNIST)")
    parser.add_argument("--model", default="mlp", choices=["mlp", "cnn"])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    data = load_images(args.dataset, args.data_dir).to(args.device)
    model = build(args.model, data).to(args.device)
    calib_every = None if args.calib_every == "never" else int(args.calib_every)

    net = grapefx.compile(model, method=args.method, calib_every=calib_every, seed=args.seed)
    opt = torch.optim.Adam(net.parameters(), lr=args.lr)
    if not 0 < args.batch_size <= len(data.train_y):
        sys.exit(f"--batch-size must be from 1 to {len(data.train_y)}, the number of images")
    steps = len(data.train_y) // args.batch_size
    decay = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=args.epochs * steps)
    for epoch in range(args.epochs):
        net.set_epoch(epoch)
        order = torch.randperm(len(data.train_y), device=args.device)
        for index in order[: steps * args.batch_size].split(args.batch_size):
            loss = F.cross_entropy(net(data.pixels(data.train_x[index])), data.train_y[index])
            loss.backward()
            opt.step()
            opt.zero_grad()
            decay.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(net, data):.2f} %")
        for layer, cosines in net.alignment().items():
            print(f"    {layer}: " + ", ".join(f"{k} {v:.2f}" for k, v in cosines.items()))


if __name__ == "__main__":
    main()
