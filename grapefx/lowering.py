"""Lowering: flat functional ATen graphs become callables. The only place that knows backends.

Inductor's inner compiler is called directly: the graphs are functional ATen already, so Dynamo and
AOTAutograd have nothing to add but call overhead. The forward graph's saved values keep whatever
strides Inductor finds best, and the update graph is compiled for those strides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from grapefx.errors import OptionError, nearest
from grapefx.ir import StepGraph
from grapefx.passes.order import dead_code
from grapefx.torch_compat import (
    FakeTensor,
    concrete,
    decomposed,
    fake_mode_of,
    inductor_compile,
    pytree,
    restrided,
)

BACKENDS = ("inductor", "eager")

Compiled = Callable[[list[Any]], Any]


# A batch size for each symbol; None makes one graph for every batch size.
Sizes = dict[Any, int] | None

_KEEP = ("grapefx_phase", "grapefx_layer", "grapefx_role", "grapefx_name", "grapefx_fold")


def prepare(step: StepGraph, sizes: Sizes, backend: str) -> StepGraph:
    """What a backend wants done to a step graph before it is split.

    Inductor decomposes first: what is worth saving shows in its own small operators (one-byte
    pooling offsets instead of indices, batch norm's statistics instead of its output). For "eager"
    sizes are put in, no more.
    """
    if backend not in BACKENDS:
        raise OptionError(f"unknown backend {backend!r}.{nearest(backend, BACKENDS)}")
    if backend == "eager" and sizes is None:
        return step
    work = step.copy()
    before = work.placeholders()
    example = _examples(work.gm)
    if sizes is not None:
        example = concrete(example, sizes)
    device = _device(example)
    with torch.autocast(device, enabled=False):
        gm = decomposed(work.gm, example, _KEEP, inductor=backend != "eager")
    after = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for old, new in zip(before, after, strict=True):
        new.meta.update({k: old.meta[k] for k in _KEEP if k in old.meta})
    out = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    results = iter(pytree.tree_leaves(out.args[0], is_leaf=lambda x: x is None))
    out.args = (tuple(results),)
    dead_code(gm.graph)
    return replace(work, gm=gm)


def lower_forward(gm: GraphModule, backend: str, options: dict[str, Any] | None = None) -> Compiled:
    """Compile a graph whose outputs all go to the user. It takes, and empties, a list."""
    return _lower(gm, backend, options, _examples(gm), _outputs(gm), False)[0]


def lower_pair(
    forward: GraphModule,
    update: GraphModule,
    outputs: int,
    saved: int,
    donated: tuple[int, ...],
    backend: str,
    options: dict[str, Any] | None = None,
) -> tuple[Compiled, Compiled]:
    """Compile a forward graph (``outputs`` for the user, then ``saved``) and its update graph.

    The update may overwrite the ``donated`` ones of the saved values.
    """
    first, strides = _lower(forward, backend, options, _examples(forward), outputs, False)
    examples = _examples(update)
    kept = strides[outputs : outputs + saved] if len(strides) >= outputs + saved else []
    for i, stride in enumerate(kept):
        if isinstance(examples[i], FakeTensor):
            examples[i] = restrided(examples[i], stride, fake_mode_of(examples[i]))
    second, _ = _lower(update, backend, options, examples, _outputs(update), True, donated)
    return first, second


def _examples(gm: GraphModule) -> list[Any]:
    return [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]


def _device(examples: list[Any]) -> str:
    return next((v.device.type for v in examples if isinstance(v, torch.Tensor)), "cpu")


def _outputs(gm: GraphModule) -> int:
    return len(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])  # type: ignore[arg-type]


def _lower(
    gm: GraphModule,
    backend: str,
    options: dict[str, Any] | None,
    examples: list[Any],
    user_outputs: int,
    is_backward: bool,
    donated: tuple[int, ...] = (),
) -> tuple[Compiled, list[Any]]:
    if backend == "eager" or not any(n.op == "call_function" for n in gm.graph.nodes):
        gm.recompile()
        run = gm.forward
        return (lambda inputs: run(*inputs)), []
    with torch.autocast(_device(examples), enabled=False), torch.no_grad():
        return inductor_compile(
            gm,
            examples,
            user_outputs=user_outputs,
            is_backward=is_backward,
            donated=donated,
            options=options,
        )
