"""What the processes of the tests run: every scenario in turn; what each saw goes to a file."""

from __future__ import annotations

import datetime
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

import grapefx
from tests.stages.reference import OPTIONS
from tests.zoo import MLP, make

STEPS = 20
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter, not by group


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


def tokens() -> list[tuple[Tensor, Tensor]]:
    """Batches of the model with tied weights."""
    generator = torch.Generator().manual_seed(4)
    found = torch.randint(0, 11, (4, 2, 4, 5), generator=generator)
    return [(x, y) for x, y in found]


def token_loss(out: Tensor, y: Tensor) -> Tensor:
    """A mean over samples and tokens."""
    return F.cross_entropy(out.flatten(0, 1), y.flatten())


def train(
    net: Any,
    data: list[tuple[Tensor, Tensor]],
    optimizer: Any = None,
    loss: Any = F.cross_entropy,
) -> Any:
    """Steps in a row; returns the losses and the optimizer."""
    losses = []
    if optimizer is None:
        net.prepare(data[0][0])
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        found = net.step(x, target=y, loss=loss)
        optimizer.step()
        losses.append(None if found is None else found.mean())
    return losses, optimizer


def compiled(method: str, mesh: Any, microbatches: int, **more: Any) -> Any:
    return grapefx.compile(
        model(), method=method, pipeline=mesh, microbatches=microbatches, **{**OPTIONS, **more}
    )


def training(
    rank: int, world: int, folder: str, cases: list[tuple[str, int]], checkpoint: str
) -> None:
    """Steps in a row, each in a pipeline of all processes; one run leaves a checkpoint on its way,
    or goes on from the one that is there.
    """
    begin(rank, world, folder)
    mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("pp",))
    seen: dict[Any, Any] = {}
    for method, m in cases:
        net = compiled(method, mesh["pp"], m)
        losses, _ = train(net, batches())
        seen[method, m] = state(net, losses)
    if world == 2:
        net = compiled("dfa", mesh["pp"], 2)
        train(net, batches()[:1])
        norm = net.clip_grad_norm(0.01)
        seen["clipped"] = norm, {n: p.grad for n, p in net.named_parameters()}
        with torch.autocast("cpu", torch.bfloat16):
            net = grapefx.compile(model().float(), method="grape", pipeline=mesh["pp"],
                                  microbatches=2, **OPTIONS)  # fmt: skip
            seen["bf16"] = train(net, [(x.float(), y) for x, y in batches()])[0]
        for method in ("bp", "dfa"):
            net = grapefx.compile(make("tied")[0], method=method, pipeline=mesh["pp"],
                                  microbatches=2, stages=["emb"], **OPTIONS)  # fmt: skip
            losses, _ = train(net, tokens(), loss=token_loss)
            seen["tied", method] = state(net, losses)
        net = compiled("grape", mesh["pp"], 4)
        _, optimizer = train(net, batches()[:10])
        save(net, optimizer, checkpoint)
    else:
        pairs = DeviceMesh("cpu", torch.arange(world).view(2, 2), mesh_dim_names=("dp", "pp"))
        net = compiled("grape", pairs["pp"], 2, data_parallel=pairs["dp"])
        half = [(x.chunk(2)[pairs.get_local_rank("dp")], y.chunk(2)[pairs.get_local_rank("dp")])
                for x, y in batches()]  # fmt: skip
        train(net, half)
        seen["2-D"] = state(net, [])
        alone = DeviceMesh("cpu", torch.arange(world).view(world, 1), mesh_dim_names=("x", "pp"))
        for name, part in (("resumed 4", mesh["pp"]), ("resumed 1", alone["pp"])):
            net = compiled("grape", part, 4)
            optimizer = load(net, checkpoint)
            train(net, batches()[10:], optimizer)
            seen[name] = state(net, [])
    torch.save(seen, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def state(net: Any, losses: list[Any]) -> tuple[Any, ...]:
    """What is compared with one process."""
    maps = net.feedback_state_dict()["tensors"]
    return losses, net.state_dict(), maps, net.alignment(), net.ends


def save(net: Any, optimizer: Any, folder: str) -> None:
    """A checkpoint with the whole model's keys."""
    dcp.save(
        {
            "model": net.state_dict(),
            "optimizer": get_optimizer_state_dict(net, optimizer, options=FLAT),
            "feedback": net.feedback_state_dict(),
        },
        checkpoint_id=folder,
    )


def load(net: Any, folder: str) -> Any:
    """An optimizer, and the net, as they were saved by another number of stages."""
    net.prepare(batches()[0][0])
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for p in net.parameters():
        p.data.zero_()
    found = {
        "model": net.state_dict(),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=FLAT),
        "feedback": net.feedback_state_dict(),
    }
    dcp.load(found, checkpoint_id=folder)
    net.load_state_dict(found["model"])
    set_optimizer_state_dict(net, optimizer, found["optimizer"], options=FLAT)
    net.load_feedback_state_dict(found["feedback"])
    return optimizer


def failing(rank: int, world: int, folder: str) -> None:
    """Every way to fail; the messages, and whether anything was committed."""
    begin(rank, world, folder)
    seen: dict[str, Any] = {}
    data = batches()

    def scene(name: str, loss: Any = F.cross_entropy, net: Any = None, x: Any = None) -> None:
        group = dist.new_group(list(range(world)))
        made = net(group) if net else compiled("dfa", group, 2, stage_timeout=10)
        message = ""
        try:
            made.prepare(data[0][0] if x is None else x)
            before = [p.detach().clone() for p in made.parameters()]
            made.step(data[0][0], target=data[0][1], loss=F.cross_entropy)
            state = made._trainer.state
            steps, grads = state.schedule.step, [p.grad.clone() for p in made.parameters()]
            made.step(data[1][0], target=data[1][1], loss=loss)
        except grapefx.GrapefxError as e:
            message = f"{type(e).__name__}: {e}"
            if "failed in" in message:
                assert state.schedule.step == steps
                assert all(torch.equal(p.grad, g) for p, g in
                           zip(made.parameters(), grads, strict=True))  # fmt: skip
                assert all(torch.equal(p, b) for p, b in
                           zip(made.parameters(), before, strict=True))  # fmt: skip
                with pytest.raises(grapefx.errors.StageError, match="failed before"):
                    made.step(data[0][0], target=data[0][1], loss=F.cross_entropy)
        seen[name] = message
        torch.save(seen, Path(folder) / f"{rank}.pt")
        dist.barrier()

    def other_seed(group: Any) -> Any:
        torch.manual_seed(rank)
        return grapefx.compile(MLP(10, 5, nn.Tanh).double(), method="dfa", pipeline=group,
                               backend="eager")  # fmt: skip

    def other_width(group: Any) -> Any:
        return grapefx.compile(MLP(10 + rank, 5, nn.Tanh).double(), method="dfa", pipeline=group,
                               backend="eager")  # fmt: skip

    def slow(out: Tensor, y: Tensor) -> Tensor:
        time.sleep(15)
        return F.cross_entropy(out, y)

    def wrong(out: Tensor, y: Tensor) -> Tensor:
        raise ValueError("no such loss")

    def killed(out: Tensor, y: Tensor) -> Tensor:
        os._exit(9)

    scene("seeds", net=other_seed)
    scene("models", net=other_width)
    scene("shapes", x=data[0][0][: 16 - 4 * rank])
    scene("loss", wrong)
    scene("no loss", None)
    scene("hanging", slow)
    scene("killed", killed)
