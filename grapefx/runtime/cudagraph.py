"""A compiled graph captured in a CUDA graph: one launch a call, in memory that stays.

What comes in is copied to where the capture reads it, unless it is there already (parameters,
buffers, what a captured forward saved). Results come in two sorts: those that outlive the step are
copied out; the others (gradients, saved values) are lent. While anybody still holds something lent,
the next call runs uncaptured: two forwards before a backward, gradient accumulation and whoever
keeps ``p.grad`` see what they would see without CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from grapefx.errors import tell
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
    device = next(v.device for v in inputs if isinstance(v, Tensor))
    with torch.cuda.device(device):
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
        for i, (new, own) in enumerate(zip(inputs, self.inputs, strict=True)):
            if i in self.stable and isinstance(new, Tensor):
                if new.data_ptr() != own:
                    return False
            elif not isinstance(new, Tensor) and new != own:
                return False
        return True

    def _capture(self, inputs: list[Any]) -> bool:
        self.captures += 1
        if len({v.device for v in inputs if isinstance(v, Tensor)}) != 1:
            # a number that lies on the host would be read once, at the capture
            self.captures = CAPTURES + 1
            return False
        own = [
            _copy(v) if isinstance(v, Tensor) and i not in self.stable else v
            for i, v in enumerate(inputs)
        ]
        try:
            replay, outputs = self.recorder(self.fn, own)
        except RuntimeError as e:
            self.captures = CAPTURES + 1
            tell(
                f"a graph could not be captured in a CUDA graph and runs without: "
                f"{str(e).splitlines()[0]}"
            )
            return False
        # of stable inputs the address alone: holding what a captured forward saved would look as if
        # somebody else still needed it
        self.inputs = [
            v.data_ptr() if isinstance(v, Tensor) and i in self.stable else v
            for i, v in enumerate(own)
        ]
        self.replay, self.outputs = replay, outputs
        foreign = {_storage(own[i]) for i in self.stable if isinstance(own[i], Tensor)}
        lent = {
            _storage(v): v
            for i, v in enumerate(outputs)
            if isinstance(v, Tensor) and i not in self.lasting and _storage(v) not in foreign
        }
        self.watched = [(v, holders(v)) for v in lent.values()]
        return True

    def _run(self, inputs: list[Any]) -> list[Any]:
        moved = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and i not in self.stable]
        if moved:
            copy_all([self.inputs[i] for i in moved], [inputs[i] for i in moved])
        inputs.clear()
        assert self.replay is not None
        self.replay()
        results = [v.detach() if isinstance(v, Tensor) else v for v in self.outputs]
        last = [i for i in self.lasting if isinstance(results[i], Tensor)]
        if last:
            fresh = [_empty(results[i]) for i in last]
            copy_all(fresh, [results[i] for i in last])
            for i, v in zip(last, fresh, strict=True):
                results[i] = v
        return results


def _empty(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


def _copy(value: Tensor) -> Tensor:
    return _empty(value).copy_(value)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()
