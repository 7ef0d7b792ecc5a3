"""Transfers between the ranks of a pipeline on torch.distributed, and what they agree on.

Receives are posted ahead, in the order in which each peer sends, so that a transport without names
(NCCL) pairs them up. The error and tangents travel in a group of their own, which on a GPU is a
stream of its own: they do not wait behind activations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grapefx.analysis.pipelines import Action
from grapefx.errors import StageError
from grapefx.runtime.stages.compiled import StageStep
from grapefx.torch_compat import default_store

AHEAD = 4  # receives that are posted before they are asked for, for each peer and group
_NOTE = "grapefx/stages/failed"


class Links:
    """The ranks of one pipeline: ``rank`` is this process's stage, ``ranks`` the global ones."""

    def __init__(self, group: Any, timeout: float) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_process_group_ranks(group)
        self.timeout = timedelta(seconds=timeout)
        # its own timeout: what ranks agree on must not wait longer than a transfer
        made: Any = dist.new_group(self.ranks, timeout=self.timeout, use_local_synchronization=True)
        self.late: dist.ProcessGroup = made
        self.note = f"{_NOTE}/{made.group_name}"

    def agree(self, what: dict[str, Any]) -> None:
        """Every rank has the same values.

        Raises:
            StageError: two ranks differ; the message names the rank and what differs.
        """
        found: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(found, what, group=self.late)
        for rank, other in enumerate(found):
            for key, value in found[0].items():
                if other.get(key) != value:
                    raise StageError(
                        f"stage {rank} (rank {self.ranks[rank]}) has another {key} than stage 0 "
                        f"(rank {self.ranks[0]}): {_short(other.get(key))} and {_short(value)}. "
                        "All ranks of a pipeline must build the same model from the same seed and "
                        "call step() with batches of the same shapes and options"
                    )

    def failed(self, action: object, error: BaseException) -> StageError:
        """The error of this rank, with the first failure of the pipeline where others report one;
        the other ranks find this one.
        """
        mine = (
            f"stage {self.rank} (rank {self.ranks[self.rank]}) failed in {action}: "
            f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        )
        try:
            store = default_store()
            if not store.check([self.note]):
                store.set(self.note, mine)
                first = mine
            else:
                first = store.get(self.note).decode()
        except Exception:  # the store's process may be the one that is gone
            first = mine
        because = "" if first == mine else f"\n  the first failure: {first}"
        return StageError(
            f"{mine}{because}\n  gradients, feedback maps and counters of this rank are as before "
            "the step; a pipeline cannot go on without one of its ranks: restart from a checkpoint"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


class Transfers:
    """The sends and receives of one step."""

    def __init__(self, links: Links, step: StageStep, device: torch.device) -> None:
        self.links, self.device = links, device
        self.vals = {c.name: c.val for c in step.stages.channels}
        self.waiting = {k: deque(v) for k, v in step.schedule.arriving(links.rank).items()}
        self.posted: dict[Action, tuple[Any, Tensor, Tensor]] = {}
        self.sent: list[tuple[Any, Tensor, Action]] = []
        for key in self.waiting:
            self._post(key, AHEAD)

    def _post(self, key: tuple[int, bool], count: int) -> None:
        queue = self.waiting[key]
        for _ in range(min(count, len(queue))):
            action = queue.popleft()
            like = self.vals[action.value]
            view = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=self.device
            )
            wire = _flat(view)
            work = dist.irecv(wire, self.links.ranks[action.peer], group=self._group(action))
            self.posted[action] = (work, wire, view)

    def _group(self, action: Action) -> Any:
        return self.links.late if action.kind == "late" else self.links.group

    def recv(self, action: Action) -> Tensor:
        """Wait for a value."""
        key = (action.peer, action.kind == "late")
        while action not in self.posted:
            self._post(key, 1)
        work, wire, view = self.posted.pop(action)
        self._post(key, 1)
        work.wait(self.links.timeout)
        if wire.data_ptr() != view.data_ptr():  # strides with holes: it came in a dense copy
            view.copy_(wire.view(view.dtype).view(view.shape))
        return view

    def send(self, action: Action, value: Tensor) -> None:
        """Start a transfer."""
        wire = _flat(value)
        if wire.data_ptr() != value.data_ptr():
            wire = value.contiguous().view(-1).view(torch.uint8)
        work = dist.isend(wire, self.links.ranks[action.peer], group=self._group(action))
        self.sent.append((work, wire, action))

    def finish(self) -> None:
        """Wait until everything has been taken over."""
        for work, _, _ in self.sent:
            work.wait(self.links.timeout)
        self.sent.clear()


def _flat(value: Tensor) -> Tensor:
    """The memory of a value as bytes; a new one where its strides leave holes or overlap."""
    size = value.numel()
    if size == 0:
        return torch.empty(0, dtype=torch.uint8, device=value.device)
    dense = sorted(zip(value.stride(), value.shape, strict=True))
    expected = 1
    for stride, length in dense:
        if length > 1:
            if stride != expected:
                break
            expected *= length
    else:
        return value.as_strided((size,), (1,)).view(torch.uint8)
    return torch.empty(size, dtype=value.dtype, device=value.device).view(torch.uint8)


class Replicas:
    """The data-parallel ranks of one stage; alone where there is no group."""

    def __init__(self, group: Any | None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def __call__(self, how: str, value: Tensor) -> Tensor:
        """One contribution of all replicas, as ``passes.divide.commit.reduced`` over ranks."""
        if self.size == 1:
            return value
        if how == "cat":
            found = [torch.empty_like(value) for _ in range(self.size)]
            dist.all_gather(found, value.contiguous(), group=self.group)
            return torch.cat(found)
        if how == "all":
            flag = value.to(torch.int32)
            dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
            return flag.bool()
        total = value.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total / self.size if how == "mean" else total

    def sums(self, gradients: dict[str, Tensor]) -> None:
        """Gradients summed over the replicas, in place."""
        if self.size > 1:
            for name in sorted(gradients):
                gradients[name] = self("sum", gradients[name])


def share(
    links: Links, shared: dict[str, tuple[int, ...]], gradients: dict[str, Tensor],
    like: dict[str, Tensor],
) -> None:  # fmt: skip
    """Sum the gradients of parameters that several stages hold: on the first of them, and back."""
    for name in sorted(shared):
        held: Sequence[int] = shared[name]
        if links.rank not in held:
            continue
        own = gradients.get(name, torch.zeros_like(like[name])).contiguous()
        first, others = held[0], held[1:]
        if links.rank == first:
            for other in others:
                part = torch.empty_like(own)
                _wait(dist.irecv(part, links.ranks[other], group=links.group), links)
                own = own + part
            for other in others:
                _wait(dist.isend(own, links.ranks[other], group=links.group), links)
        else:
            _wait(dist.isend(own, links.ranks[first], group=links.group), links)
            own = torch.empty_like(own)
            _wait(dist.irecv(own, links.ranks[first], group=links.group), links)
        gradients[name] = own


def _wait(work: Any, links: Links) -> None:
    work.wait(links.timeout)
