"""Train a network in stages, one stage a process, without a backward chain.

OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE torchrun --nproc-per-node 2 examples/train_stages.py
torchrun --nproc-per-node 4 examples/train_stages.py --data-parallel 2 --microbatches 4

Every process builds the same model from the same seed and draws the same batches; each trains its
own stage. A checkpoint has the plain model's keys: it can be loaded by any number of stages.
"""

import argparse
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from train_classifier import load, mlp

import grapefx


def main() -> None:
    """Train, and leave a checkpoint where asked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--method", default="grape", help="bp, dfa, fdfa or grape")
    p.add_argument("--microbatches", type=int, default=2)
    p.add_argument("--data-parallel", type=int, default=1, help="copies of the pipeline")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--steps", type=int, default=0, help="steps an epoch (0: all)")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=3e-4)
    p.add_argument("--backend", default="inductor")
    p.add_argument("--checkpoint", help="a folder")
    args = p.parse_args()
    warnings.simplefilter("ignore")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    stages = dist.get_world_size() // args.data_parallel
    mesh = init_device_mesh(device, (args.data_parallel, stages), mesh_dim_names=("dp", "pp"))

    (images, classes), _ = load("MNIST", None)
    torch.manual_seed(0)  # the same weights and the same batches everywhere
    model = mlp(images[0].numel(), int(classes.max()) + 1).to(device)
    net = grapefx.compile(
        model,
        method=args.method,
        pipeline=mesh["pp"],
        data_parallel=mesh["dp"] if args.data_parallel > 1 else None,
        microbatches=args.microbatches,
        backend=args.backend,
    )
    copy = mesh.get_local_rank("dp")
    net.prepare(images[: args.batch].chunk(args.data_parallel)[copy].to(device))
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    print(f"rank {dist.get_rank()}: stage {net.stage} of {stages}, ends behind {net.ends}")

    for epoch in range(args.epochs):
        net.set_epoch(epoch)
        order = torch.randperm(len(images))
        batches = order.split(args.batch)[: -1 if len(order) % args.batch else None]
        for rows in batches[: args.steps or None]:
            mine = rows.chunk(args.data_parallel)[copy]
            optimizer.zero_grad()
            losses = net.step(
                images[mine].to(device), target=classes[mine].to(device), loss=F.cross_entropy
            )
            optimizer.step()
        if losses is not None and copy == 0:
            print(f"epoch {epoch}: loss of the last step {losses.mean():.3f}")
    if args.checkpoint:
        state = {"model": net.state_dict(), "feedback": net.feedback_state_dict()}
        dcp.save(state, checkpoint_id=Path(args.checkpoint))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
