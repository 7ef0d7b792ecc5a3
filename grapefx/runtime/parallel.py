"""In which form an update runs: as it is, batched over layers, on several streams; the fastest.

``FORMS`` are the choices of ``grapefx.compile(parallel=...)`` beside "auto", which measures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from grapefx.analysis import DeviceModel, build_dag, list_schedule, load_device
from grapefx.analysis.dag import Dag
from grapefx.analysis.dag import Task as Work
from grapefx.errors import tell
from grapefx.ir import StepGraph
from grapefx.lowering import Compiled, lower_tasks, lower_update, update_for
from grapefx.passes.divide.horizontal import batch_layers
from grapefx.passes.divide.partition import Split
from grapefx.passes.divide.tasks import Tasks, split_tasks, take
from grapefx.passes.runner import PassRun
from grapefx.runtime.cudagraph import WARM, Graphed, Recorder, record_cuda

FORMS = ("off", "graphs", "horizontal", "streams")
STREAMS = 4
ROUNDS = 5  # timed runs of each candidate

# The forms that are compiled for each choice. Streams and CUDA graphs are CUDA's.
ON_CPU = {"off": ("off",), "graphs": ("off",), "horizontal": ("horizontal",),
          "streams": ("off",), "auto": ("off", "horizontal")}  # fmt: skip
ON_CUDA = {**{form: (form,) for form in FORMS}, "auto": FORMS}


def forms_of(parallel: str, device: str, *, fixed: bool) -> tuple[str, ...]:
    """The forms to compile. A symbolic batch size leaves no choice."""
    if not fixed:
        return ("off",)
    table = ON_CUDA if device == "cuda" else ON_CPU
    return table[parallel]


def lower_forms(
    parts: Split,
    strides: list[Any],
    forms: Sequence[str],
    backend: str,
    options: dict[str, Any] | None,
    recorder: Recorder = record_cuda,
    *,
    kind: str = "update",
    cuda: bool = False,
    runs: list[PassRun] | None = None,
) -> Compiled:
    """The update as one callable. Where nothing can be batched, that form is left out."""
    update = update_for(parts, strides, kind, backend, runs)
    made: dict[str, Compiled] = {}
    stable = frozenset(range(parts.saved))
    lasting = frozenset(
        i for i, s in enumerate(parts.update_outputs) if s.role in ("feedback", "metric")
    )

    def graphed(call: Compiled) -> Compiled:
        return Graphed(call, stable=stable, lasting=lasting, recorder=recorder)

    batched: GraphModule | None = None
    tasks: Tasks | None = None
    for form in forms:  # first of all: lowering may write into the graph
        try:
            if form == "horizontal":
                found, groups = batch_layers(update, decompose=backend != "eager")
                batched = found if groups else None
            elif form == "streams":
                tasks = split_tasks(update)
        except Exception as e:
            _left_out(form, e)
    left_out = {n for n, v in (("horizontal", batched), ("streams", tasks)) if v is None}
    wanted = [f for f in forms if f not in left_out] or ["graphs" if cuda else "off"]
    # lowering may write into a graph
    second = _copied(update) if "off" in wanted and "graphs" in wanted else update
    for form in wanted:
        try:
            if form == "off":
                made[form] = lower_update(update, strides, backend, options)
            elif form == "streams" and tasks is not None:
                made[form] = graphed(on_streams(tasks, strides, backend, options))
            else:
                gm = batched if form == "horizontal" and batched is not None else second
                call = lower_update(gm, strides, backend, options)
                made[form] = graphed(call) if cuda else call
        except Exception as e:
            if form == "off" or len(wanted) == 1:
                raise
            _left_out(form, e)
    return Fastest(made) if len(made) > 1 else next(iter(made.values()))


def _left_out(form: str, error: Exception) -> None:
    """One form of several that does not work leaves the others."""
    lines = str(error).splitlines() or [""]
    text = f"parallel={form!r} is left out: {type(error).__name__}: {lines[0]}"
    tell(text)


def _copied(gm: GraphModule) -> GraphModule:
    return StepGraph(gm, (), ()).copy().gm


class Fastest:
    """Measures its candidates at the first call, on what came, and keeps one.

    ``timer`` gives the seconds of one run: ``timer(name, run)``.
    """

    def __init__(
        self,
        candidates: dict[str, Compiled],
        timer: Callable[[str, Callable[[], Any]], float] | None = None,
    ) -> None:
        self.candidates = candidates
        self.timer = timer or seconds
        self.found: dict[str, float] = {}
        self.chosen = ""
        self.call: Compiled = self._first

    def __call__(self, inputs: list[Any]) -> Any:
        """As the candidates: takes, and empties, a list."""
        return self.call(inputs)

    def _first(self, inputs: list[Any]) -> Any:
        measured: dict[str, float] = {}
        for name, call in self.candidates.items():
            try:
                for _ in range(WARM + 2):
                    call(list(inputs))
                measured[name] = statistics.median(
                    self.timer(name, lambda call=call: call(list(inputs)))  # type: ignore[misc]
                    for _ in range(ROUNDS)
                )
            except RuntimeError as e:
                if name == "off":
                    raise
                _left_out(name, e)
        chosen = min(measured, key=measured.__getitem__)
        call = self.candidates[chosen]
        if isinstance(call, Graphed):
            call.reset()
        self.found, self.chosen, self.call, self.candidates = measured, chosen, call, {}
        return call(inputs)


def seconds(name: str, run: Callable[[], Any]) -> float:
    """Wall time of one run, to the end of what it started."""
    del name
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# streams


def on_streams(
    tasks: Tasks, strides: list[Any], backend: str, options: dict[str, Any] | None
) -> Compiled:
    """The update on ``STREAMS`` streams: each layer's part as soon as its inputs are there."""
    calls = lower_tasks(tasks, strides, backend, options)
    order, lanes = assign(tasks, STREAMS, load_device("h100"))
    return StreamRunner(tasks, calls, order, lanes)


def assign(
    tasks: Tasks, streams: int, device: DeviceModel | str, costs: Sequence[float] | None = None
) -> tuple[list[int], list[int]]:
    """The order in which tasks are launched, and each task's stream, by the list scheduler.

    ``costs`` in seconds replace the estimates for ``device``.
    """
    work = list(costs) if costs is not None else [estimate(t.gm, device) for t in tasks.tasks]
    dag = Dag(
        tuple(
            Work(t.name, "group", "update", t.name, 0, 0, 0, w, True, t.nodes)
            for t, w in zip(tasks.tasks, work, strict=True)
        ),
        tuple(t.preds for t in tasks.tasks),
    )
    found = list_schedule(dag, streams)
    order = sorted(range(len(work)), key=lambda i: (found.start[i], i))
    return order, [max(w, 0) for w in found.worker]


def estimate(gm: GraphModule, device: DeviceModel | str) -> float:
    """Roofline seconds of a graph on one worker."""
    return build_dag(gm, device=device).work("seconds")


class StreamRunner:
    """Runs tasks on streams that fork from the current one and join it; captures in a CUDA graph.

    Everything made is held until all streams have joined: then memory goes back to its stream only
    when the current stream waits for what used it. Without CUDA the tasks run one by one.
    """

    def __init__(
        self,
        tasks: Tasks,
        calls: Sequence[Compiled],
        order: Sequence[int],
        lanes: Sequence[int],
    ) -> None:
        self.tasks, self.calls, self.order, self.lanes = tasks, list(calls), order, lanes
        self.streams: dict[int, list[Any]] = {}

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """As any compiled graph: takes, and empties, a list."""
        made: list[Any] = [None] * len(self.calls)
        device = next((v.device for v in inputs if isinstance(v, Tensor)), torch.device("cpu"))
        if device.type == "cuda":
            self._on_streams(inputs, made, device)
        else:
            for i in self.order:
                made[i] = self._task(i, made, inputs)
        results = [None if r is None else take(r, made, inputs) for r in self.tasks.results]
        inputs.clear()
        return results

    def _task(self, i: int, made: list[Any], inputs: list[Any]) -> Any:
        return self.calls[i]([take(r, made, inputs) for r in self.tasks.tasks[i].reads])

    def _on_streams(self, inputs: list[Any], made: list[Any], device: torch.device) -> None:
        main = torch.cuda.current_stream(device)
        index = main.device_index
        if index not in self.streams:
            self.streams[index] = [torch.cuda.Stream(device) for _ in range(max(self.lanes))]
        lanes = [main, *self.streams[index]]
        fork = torch.cuda.Event()
        fork.record(main)
        forked = {0}
        done: list[Any] = [None] * len(made)
        for i in self.order:
            lane = self.lanes[i]
            stream = lanes[lane]
            if lane not in forked:
                stream.wait_event(fork)
                forked.add(lane)
            for p in self.tasks.tasks[i].preds:
                if self.lanes[p] != lane:
                    stream.wait_event(done[p])
            with torch.cuda.stream(stream):
                made[i] = self._task(i, made, inputs)
            done[i] = torch.cuda.Event()
            done[i].record(stream)
        for lane in forked - {0}:
            join = torch.cuda.Event()
            join.record(lanes[lane])
            main.wait_event(join)


def stable_inputs(step: StepGraph, used: Sequence[int]) -> frozenset[int]:
    """Which inputs of the forward graph keep their address from step to step."""
    kept = ("parameter", "buffer", "constant")
    return frozenset(k for k, i in enumerate(used) if step.inputs[i].role in kept)
