"""Lowering: flat functional ATen graphs become callables. The only place that knows backends.

Inductor's inner compiler is called directly: the graphs are functional ATen already, so Dynamo and
AOTAutograd have nothing to add but call overhead. The forward graph's saved values keep whatever
strides Inductor finds best, and the update graph is compiled for those strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from grapefx.passes.divide.partition import Split
from grapefx.passes.divide.tasks import Tasks
from grapefx.passes.graph.layout import described
from grapefx.passes.peephole.size_inputs import size_inputs
from grapefx.passes.pipeline import FORWARD, UPDATE, LowerContext
from grapefx.passes.runner import PassRun, run
from grapefx.torch_compat import (
    FakeTensor,
    fake_mode_of,
    forward_of,
    inductor_compile,
    restrided,
)

# How an update runs (``grapefx/runtime/parallel.py``).
PARALLEL = ("off", "graphs", "horizontal", "streams", "auto")

Compiled = Callable[[list[Any]], Any]


def lower_forward(gm: GraphModule, backend: str, options: dict[str, Any] | None = None) -> Compiled:
    """Compile a graph whose outputs all go to the user. It takes, and empties, a list."""
    return _lower(gm, backend, options, _examples(gm), _outputs(gm), False)[0]


def lower_saving(
    parts: Split,
    kind: str,
    backend: str,
    options: dict[str, Any] | None = None,
    runs: list[PassRun] | None = None,
) -> tuple[Compiled, list[Any]]:
    """Compile a forward graph; also the strides of what it saves (none reported: an empty list)."""
    forward = run(FORWARD[backend], parts.halves()[0], LowerContext(), kind, runs).gm
    outputs, saved = len(parts.forward_outputs), parts.saved
    first, strides = _lower(forward, backend, options, _examples(forward), outputs, False)
    return first, strides[outputs : outputs + saved] if len(strides) >= outputs + saved else []


def update_for(
    parts: Split, strides: list[Any], kind: str, backend: str, runs: list[PassRun] | None = None
) -> GraphModule:
    """The update graph, rewritten for saved values that come in ``strides``."""
    context = LowerContext(strides=strides)
    return run(UPDATE[backend], parts.halves()[1], context, kind, runs).gm


def lower_update(
    update: GraphModule,
    strides: list[Any],
    backend: str,
    options: dict[str, Any] | None = None,
) -> Compiled:
    """Compile an update graph whose first inputs come in ``strides``."""
    examples = _restrided(_examples(update), strides)
    return _lower(update, backend, options, examples, _outputs(update), True)[0]


def lower_tasks(
    tasks: Tasks, strides: list[Any], backend: str, options: dict[str, Any] | None = None
) -> list[Compiled]:
    """Compile each part of an update on its own; equal parts share one compilation."""
    given: dict[tuple[int, int], Any] = {(-1, i): s for i, s in enumerate(strides)}
    known: dict[Any, tuple[Compiled, list[Any]]] = {}
    calls = []
    for index, task in enumerate(tasks.tasks):
        examples = _restrided(_examples(task.gm), [given.get(r) for r in task.reads])
        text = str(task.gm.graph.python_code("self").src)
        key = (text, *(_description(v) for v in examples))
        if key not in known:
            known[key] = _lower(task.gm, backend, options, examples, _outputs(task.gm), False)
        call, made = known[key]
        given |= {(index, i): stride for i, stride in enumerate(made)}
        calls.append(call)
    return calls


def _restrided(examples: list[Any], strides: list[Any]) -> list[Any]:
    """Fake values in the strides that Inductor gave the real ones."""
    out = list(examples)
    for i, stride in enumerate(strides):
        if isinstance(out[i], FakeTensor):
            out[i] = restrided(out[i], stride, fake_mode_of(out[i]))
    return out


def _description(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return (tuple(value.shape), described(value), value.dtype, value.device)


def _examples(gm: GraphModule) -> list[Any]:
    return [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]


def _device(examples: list[Any]) -> str:
    return next((v.device.type for v in examples if isinstance(v, torch.Tensor)), "cpu")


def _outputs(gm: GraphModule) -> int:
    return len(gm.graph.output_node().args[0])  # type: ignore[arg-type]


def _lower(
    gm: GraphModule,
    backend: str,
    options: dict[str, Any] | None,
    examples: list[Any],
    user_outputs: int,
    is_backward: bool,
) -> tuple[Compiled, list[Any]]:
    empty = not any(n.op == "call_function" for n in gm.graph.nodes)
    if backend == "eager" or empty or not any(isinstance(v, FakeTensor) for v in examples):
        gm.recompile()
        run = forward_of(gm)
        return (lambda inputs: run(*inputs)), []
    gm, places = size_inputs(gm, examples)
    examples = [*examples, *_examples(gm)[len(examples) :]]
    with torch.autocast(_device(examples), enabled=False), torch.no_grad():
        call, strides = inductor_compile(
            gm,
            examples,
            user_outputs=user_outputs,
            is_backward=is_backward,
            options=options,
        )
    if not places:
        return call, strides

    def sized(inputs: list[Any]) -> Any:
        inputs.extend([place.read(inputs) for place in places])
        return call(inputs)

    return sized, strides
