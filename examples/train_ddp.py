"""Train copies of a network on parts of each batch: DistributedDataParallel, one line changed.

OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE torchrun --nproc-per-node 2 examples/train_ddp.py

Where the model fits on one device, try this before a pipeline.
"""

import argparse
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from train_classifier import load, mlp

import grapefx


def main() -> None:
    """Train, and say how the loss falls."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--method", default="grape")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--steps", type=int, default=0, help="steps an epoch (0: all)")
    p.add_argument("--batch", type=int, default=128, help="of all processes together")
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--backend", default="inductor")
    args = p.parse_args()
    warnings.simplefilter("ignore")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())

    (images, classes), _ = load("MNIST", None)
    torch.manual_seed(0)
    model = mlp(images[0].numel(), int(classes.max()) + 1).to(device)
    net = grapefx.compile(model, method=args.method, backend=args.backend)
    ddp = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), args.lr)

    for epoch in range(args.epochs):
        net.set_epoch(epoch)
        order = torch.randperm(len(images))  # the same on all ranks: each takes its part
        batches = order.split(args.batch)[: -1 if len(order) % args.batch else None]
        for rows in batches[: args.steps or None]:
            mine = rows.chunk(world)[rank]
            optimizer.zero_grad()
            loss = F.cross_entropy(ddp(images[mine].to(device)), classes[mine].to(device))
            loss.backward()
            optimizer.step()
        if rank == 0:
            print(f"epoch {epoch}: loss of the last step {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
