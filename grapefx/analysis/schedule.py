"""List scheduling on P equal workers: upward-rank priority (HEFT: Topcuoglu et al., 2002).

With equal workers and free communication HEFT's rank is the longest path from a task to the end.
No worker idles while a task is ready, so Graham's and Brent's bound holds:
max(span, work / P) <= makespan <= work / P + span (1 - 1 / P).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from grapefx.analysis.dag import Dag


@dataclass(frozen=True)
class Schedule:
    """Who does what when. ``workers`` is None for as many as the graph can use.

    ``start``, ``duration`` and ``worker`` are by task index (``worker`` is -1 for a task of no
    duration that has no predecessor); ``used`` is the number of workers that got a task.
    """

    workers: int | None
    makespan: float
    work: float
    span: float
    start: tuple[float, ...]
    duration: tuple[float, ...]
    worker: tuple[int, ...]

    @property
    def used(self) -> int:
        """Workers that got at least one task."""
        return max(self.worker, default=-1) + 1

    @property
    def lower_bound(self) -> float:
        """No schedule on this many workers is shorter: max(span, work / P)."""
        return self.span if self.workers is None else max(self.span, self.work / self.workers)

    @property
    def brent_bound(self) -> float:
        """No schedule without needless idling is longer: work / P + span (1 - 1 / P)."""
        if self.workers is None:
            return self.span
        return self.work / self.workers + self.span * (1 - 1 / self.workers)


def upward_rank(weights: Sequence[float], succs: Sequence[Sequence[int]]) -> list[float]:
    """For each task the longest path from its start to the end of the DAG."""
    rank = [0.0] * len(weights)
    for i in range(len(weights) - 1, -1, -1):
        rank[i] = weights[i] + max((rank[s] for s in succs[i]), default=0.0)
    return rank


def list_schedule(dag: Dag, workers: int | None, what: str = "seconds") -> Schedule:
    """Schedule a DAG on ``workers`` equal workers (None: unlimited) by a field of its tasks.

    A ready task of the highest rank goes first, to the worker that finished its last predecessor
    if that one is free. Tasks of no duration (views) take no worker.

    Raises:
        ValueError: ``workers`` is less than 1.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    weights = dag.weights(what)
    rank = upward_rank(weights, dag.succs)
    run = _Run(dag, weights, rank, workers)
    makespan = run.simulate()
    return Schedule(
        workers,
        makespan,
        sum(weights),
        max(rank, default=0.0),
        tuple(run.start),
        tuple(weights),
        tuple(run.worker),
    )


class _Run:
    """The state of one simulation."""

    def __init__(
        self, dag: Dag, weights: Sequence[float], rank: Sequence[float], workers: int | None
    ) -> None:
        n = len(weights)
        self.succs, self.weights, self.rank = dag.succs, weights, rank
        self.waiting = [len(p) for p in dag.preds]
        self.start = [0.0] * n
        self.worker = [-1] * n
        self.favourite = [-1] * n
        self.ready: list[tuple[float, int]] = []
        self.limit = workers
        self.free = set(range(workers or 0))
        self.lanes = workers or 0

    def simulate(self) -> float:
        running: list[tuple[float, int]] = []
        now = 0.0
        # listed first: releasing one root may bring others' counts to zero
        for i in [i for i, count in enumerate(self.waiting) if count == 0]:
            self._push(i, now)
        while self.ready or running:
            while self.ready and (self.free or self.limit is None):
                _, i = heapq.heappop(self.ready)
                self.start[i], self.worker[i] = now, self._take(self.favourite[i])
                heapq.heappush(running, (now + self.weights[i], i))
            now, i = heapq.heappop(running)
            self._finish(i, now)
            while running and running[0][0] <= now:
                self._finish(heapq.heappop(running)[1], now)
        return now

    def _take(self, favourite: int) -> int:
        if not self.free:
            self.lanes += 1
            return self.lanes - 1
        chosen = favourite if favourite in self.free else min(self.free)
        self.free.discard(chosen)
        return chosen

    def _finish(self, i: int, now: float) -> None:
        self.free.add(self.worker[i])
        self._release(i, now)

    def _release(self, i: int, now: float) -> None:
        stack = [i]
        while stack:
            done = stack.pop()
            for s in self.succs[done]:
                self.waiting[s] -= 1
                self.favourite[s] = self.worker[done]
                if self.waiting[s] == 0:
                    if self.weights[s] > 0:
                        heapq.heappush(self.ready, (-self.rank[s], s))
                    else:
                        self.start[s], self.worker[s] = now, self.worker[done]
                        stack.append(s)

    def _push(self, i: int, now: float) -> None:
        if self.weights[i] > 0:
            heapq.heappush(self.ready, (-self.rank[i], i))
        else:
            self.start[i] = now
            self._release(i, now)
