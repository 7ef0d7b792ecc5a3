"""A compiled graph captured in a CUDA graph: one launch a call, in memory that stays.

What comes in is copied to where the capture reads it, unless it is there already (parameters,
buffers, what a captured forward saved). Results come in two sorts: those that outlive the step are
copied out; the others (gradients, saved values) are lent. While anybody still holds something lent,
the next call runs uncaptured: two forwards before a backward, gradient accumulation and whoever
keeps ``p.grad`` see what they would see without CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grapefx.errors import GrapefxWarning
from grapefx.torch_compat import copy_all, holders

Call = Callable[[list[Any]], Any]

WARM = 2  # calls before the capture: lazy initialisation and autotuning must be over
MISSES = 8  # calls in a row with other addresses before a new capture
CAPTURES = 4  # at most; then addresses keep changing, and the graph runs uncaptured


class Recorder(Protocol):
    """Captures a call; tests put a stand-in here."""

    def __call__(self, fn: Call, inputs: list[Any]) -> tuple[Callable[[], Any], list[Any]]:
        """What replays the call, and the results in the memory that a replay writes."""


def record_cuda(fn: Call, inputs: list[Any]) -> tuple[Callable[[], Any], list[Any]]:
    """Capture in a memory pool of its own."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # thread_local: other threads (a loader that pins memory) may go on
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = list(fn(list(inputs)))
    return graph.replay, outputs


class Graphed:
    """A callable of a list, captured after ``WARM`` calls.

    ``stable``: inputs that keep their address. ``lasting``: outputs that are copied out; all others
    are lent.
    """

    def __init__(
        self,
        fn: Call,
        *,
        stable: frozenset[int],
        lasting: frozenset[int],
        recorder: Recorder = record_cuda,
    ) -> None:
        self.fn, self.stable, self.lasting, self.recorder = fn, stable, lasting, recorder
        self.captures = 0
        self.reset()

    def reset(self) -> None:
        """Capture again, at the next inputs' addresses."""
        self.calls = self.misses = 0
        self.replay: Callable[[], Any] | None = None
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.watched: list[tuple[Tensor, int]] = []

    def __call__(self, inputs: list[Any]) -> Any:
        """As ``fn``: takes, and empties, a list."""
        self.calls += 1
        if self.calls <= WARM or self.captures > CAPTURES:
            return self.fn(inputs)
        if self.replay is None:
            if not self._capture(inputs):
                return self.fn(inputs)
        elif not self._fits(inputs):
            self.misses += 1
            if self.misses >= MISSES:
                self.reset()
            return self.fn(inputs)
        elif any(holders(t) > count for t, count in self.watched):
            return self.fn(inputs)
        self.misses = 0
        return self._run(inputs)

    def _fits(self, inputs: Sequence[Any]) -> bool:
        return all(
            a.data_ptr() == b.data_ptr() if isinstance(a, Tensor) and i in self.stable
            else isinstance(a, Tensor) or a == b
            for i, (a, b) in enumerate(zip(inputs, self.inputs, strict=True))
        )  # fmt: skip

    def _capture(self, inputs: list[Any]) -> bool:
        self.captures += 1
        own = [
            _copy(v) if isinstance(v, Tensor) and i not in self.stable else v
            for i, v in enumerate(inputs)
        ]
        try:
            replay, outputs = self.recorder(self.fn, own)
        except RuntimeError as e:
            self.captures = CAPTURES + 1
            warnings.warn(
                f"a graph could not be captured in a CUDA graph and runs without: "
                f"{str(e).splitlines()[0]}",
                GrapefxWarning,
                stacklevel=2,
            )
            return False
        self.replay, self.inputs, self.outputs = replay, own, outputs
        kept = {_storage(v) for i, v in enumerate(own) if isinstance(v, Tensor) and i in self.stable}
        lent = {
            _storage(v): v
            for i, v in enumerate(outputs)
            if isinstance(v, Tensor) and i not in self.lasting and _storage(v) not in kept
        }
        del outputs
        self.watched = [(v, holders(v)) for v in lent.values()]
        return True

    def _run(self, inputs: list[Any]) -> list[Any]:
        moved = [
            (own, v)
            for i, (own, v) in enumerate(zip(self.inputs, inputs, strict=True))
            if isinstance(v, Tensor) and i not in self.stable
        ]
        if moved:
            copy_all([own for own, _ in moved], [v for _, v in moved])
        inputs.clear()
        assert self.replay is not None
        self.replay()
        return [
            v if not isinstance(v, Tensor) else v.clone() if i in self.lasting else v.detach()
            for i, v in enumerate(self.outputs)
        ]


def _copy(value: Tensor) -> Tensor:
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.copy_(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
