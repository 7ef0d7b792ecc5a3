"""Stages in processes (gloo): training equals one process, checkpoints move, failures are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from tests.stages import worker
from tests.stages.reference import Reference
from tests.zoo import make

if not (dist.is_available() and dist.is_gloo_available()):  # pragma: no cover
    pytest.skip("torch was built without gloo", allow_module_level=True)

CASES = {
    2: [("bp", 1), ("bp", 4), ("dfa", 2), ("fdfa", 8), ("grape", 1)],
    4: [("bp", 8), ("dfa", 4), ("grape", 2)],
}


def spawn(work: Any, world: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``work`` in so many processes; what each of them saved."""
    mp.spawn(work, (world, str(folder), *args), nprocs=world, join=True)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world)]


def reference(
    method: str, m: int, net: Any = None, data: Any = None, loss: Any = F.cross_entropy
) -> tuple[Any, ...]:
    """One process: losses, weights, maps."""
    net = net or worker.model()
    data = data or worker.batches()
    one = Reference(net, method, data[0][0], m)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for x, y in data:
        losses.append(one.step(x, y, loss))
        optimizer.step()
    return losses, net.state_dict(), one.state.feedback.tensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoint"))


def agree(seen: list[Any], expected: tuple[Any, ...]) -> None:
    """The stages together have the weights and maps of one process."""
    losses, weights, maps = expected
    for found, own, own_maps, _, _ in seen:
        for name, value in own.items():
            torch.testing.assert_close(value, weights[name], rtol=1e-10, atol=1e-12)
        for name, value in own_maps.items():
            torch.testing.assert_close(value, maps[name], rtol=1e-9, atol=1e-11)
        if any(v is not None for v in found):
            torch.testing.assert_close(torch.stack(found), torch.stack(losses))
    assert {n for s in seen for n in s[1]} == set(weights)
    assert {n for s in seen for n in s[2]} == set(maps)


@pytest.mark.parametrize("world", CASES)
def test_training_equals_one_process(world: int, tmp_path: Path, checkpoint: str) -> None:
    """20 steps, calibrations among them; then data parallelism, and a checkpoint that moves."""
    seen = spawn(worker.training, world, tmp_path, CASES[world], checkpoint)
    for key in CASES[world]:
        runs = [s[key] for s in seen]
        agree(runs, reference(*key))
        assert all(len(ends) == world - 1 for *_, ends in runs)
        assert sum(len(own) for _, own, *_ in runs) == len(worker.model().state_dict())
        assert [r[0][0] is not None for r in runs] == [False] * (world - 1) + [True]
    if world == 2:
        for method in ("bp", "dfa"):  # a parameter that both stages hold
            tied = reference(method, 2, make("tied")[0], worker.tokens(), worker.token_loss)
            runs = [s["tied", method] for s in seen]
            agree(runs, tied)
            assert all("emb.weight" in own for _, own, *_ in runs)
        _check_clipped([s["clipped"] for s in seen])
        losses = [v.float() for v in seen[1]["bf16"]]
        assert all(v.isfinite() for v in losses) and losses[-1] < losses[0] + 0.5
    if world == 4:
        expected = reference("grape", 4)
        for name in ("2-D", "resumed 4", "resumed 1"):
            agree([s[name] for s in seen], expected)


def _check_clipped(seen: list[Any]) -> None:
    """The first step calibrates: its gradients are those of autograd, and so is their norm."""
    net = worker.model()
    x, y = worker.batches()[0]
    F.cross_entropy(net(x), y).backward()
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    for found, grads in seen:
        torch.testing.assert_close(found, norm)
        for name, g in grads.items():
            torch.testing.assert_close(g, net.get_parameter(name).grad)


def test_failures_are_named_on_every_living_rank(tmp_path: Path) -> None:
    context = mp.get_context("spawn")  # mp.spawn ends the living ranks with the dead one
    ranks = [context.Process(target=worker.failing, args=(r, 2, str(tmp_path))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    assert ranks[1].exitcode == 9  # the rank that is killed
    first, last = (torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2))
    for found in (first, last):
        assert "another parameters (differently seeded?)" in found["seeds"]
        assert "another step graph" in found["models"]
        assert "loss=None must be a function" in found["no loss"]
        assert "another batch size than stage 0 (rank 0): 12 and 16" in found["shapes"]
    assert "stage 1 (rank 1) failed in error of microbatch 0: ValueError" in last["loss"]
    assert "StageError: stage 0 (rank 0) failed in recv of microbatch 0" in first["loss"]
    assert "the first failure: stage 1 (rank 1) failed in error" in first["loss"]
    assert "stage 0 (rank 0) failed in recv of microbatch 0" in first["hanging"]
    assert "the first failure: stage 0 (rank 0) failed in recv" in last["hanging"]
    assert "stage 0 (rank 0) failed in recv of microbatch 0" in first["killed"]
