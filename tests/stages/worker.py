"""What the processes of the tests run: every scenario in turn; what each saw goes to a file."""

from __future__ import annotations

import datetime
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import grapefx
from tests.stages.reference import OPTIONS
from tests.zoo import MLP

METHODS = ("bp", "dfa", "fdfa", "grape")
STEPS = 20


def model() -> nn.Module:
    torch.manual_seed(0)
    return MLP(10, 5, nn.Tanh).double()


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(count, 16, 8, generator=generator, dtype=torch.float64)
    return [(x, (x.sum(1) > 0).long() + 2 * (x[:, 0] > 0).long()) for x in xs]


def begin(rank: int, world: int, folder: str) -> None:
    """A process group of this process and the others."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )


def train(net: Any, data: list[tuple[Tensor, Tensor]], optimizer: Any = None) -> Any:
    """Steps in a row; returns the losses and the optimizer."""
    losses = []
    if optimizer is None:
        net.prepare(data[0][0])
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        found = net.step(x, target=y, loss=F.cross_entropy)
        optimizer.step()
        losses.append(None if found is None else found.mean())
    return losses, optimizer


def compiled(method: str, mesh: Any, microbatches: int, **more: Any) -> Any:
    return grapefx.compile(
        model(), method=method, pipeline=mesh, microbatches=microbatches, **{**OPTIONS, **more}
    )


def training(rank: int, world: int, folder: str, counts: tuple[int, ...]) -> None:
    """Every method with several numbers of microbatches."""
    begin(rank, world, folder)
    mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("pp",))
    seen: dict[Any, Any] = {}
    for method in METHODS:
        for m in counts:
            net = compiled(method, mesh["pp"], m)
            losses, _ = train(net, batches())
            maps = net.feedback_state_dict()["tensors"]
            seen[method, m] = (losses, net.state_dict(), maps, net.alignment(), net.ends)
    torch.save(seen, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
