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

if not (dist.is_available() and dist.is_gloo_available()):  # pragma: no cover
    pytest.skip("torch was built without gloo", allow_module_level=True)

CASES = {2: (1, 4), 4: (2, 8)}


def spawn(work: Any, world: int, folder: Path, *args: Any) -> list[Any]:
    """Run ``work`` in so many processes; what each of them saved."""
    mp.spawn(work, (world, str(folder), *args), nprocs=world, join=True)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world)]


@pytest.fixture(scope="module")
def references() -> dict[Any, Any]:
    """One process, by (method, microbatches): losses, weights, maps."""
    found = {}
    for method in worker.METHODS:
        for m in sorted({m for counts in CASES.values() for m in counts}):
            if method in ("bp", "dfa") and m > 1:
                found[method, m] = found[method, 1]
                continue
            net = worker.model()
            x = worker.batches()[0][0]
            one = Reference(net, method, x, m)
            optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
            losses = []
            for x, y in worker.batches():
                losses.append(one.step(x, y, F.cross_entropy))
                optimizer.step()
            found[method, m] = (losses, net.state_dict(), one.state.feedback.tensors)
    return found


@pytest.mark.parametrize("world", CASES)
def test_training_equals_one_process(world: int, tmp_path: Path, references: Any) -> None:
    seen = spawn(worker.training, world, tmp_path, CASES[world])
    for key, (losses, weights, maps) in references.items():
        if key not in seen[0]:
            continue
        keys = [set(s[key][1]) for s in seen]
        assert set.union(*keys) == set(weights) and sum(map(len, keys)) == len(weights)
        for rank, s in enumerate(seen):
            found, own, own_maps, _, ends = s[key]
            assert len(ends) == world - 1
            for name, value in own.items():
                torch.testing.assert_close(value, weights[name], rtol=1e-10, atol=1e-12)
            for name, value in own_maps.items():
                torch.testing.assert_close(value, maps[name], rtol=1e-9, atol=1e-11)
            if rank == world - 1:
                torch.testing.assert_close(torch.stack(found), torch.stack(losses))
            else:
                assert found == [None] * worker.STEPS
        assert {n for s in seen for n in s[key][2]} == set(maps)
