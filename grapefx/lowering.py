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

from grapefx.errors import OptionError, nearest
from grapefx.torch_compat import FakeTensor, fake_mode_of, inductor_compile, restrided

BACKENDS = ("inductor", "eager")

Compiled = Callable[[list[Any]], Any]


def lower_forward(gm: GraphModule, backend: str, options: dict[str, Any] | None = None) -> Compiled:
    """Compile a graph whose outputs all go to the user. Takes a list of inputs, which it empties."""
    return _lower(gm, backend, options, _examples(gm), _outputs(gm), False)[0]


def lower_pair(
    forward: GraphModule,
    update: GraphModule,
    outputs: int,
    saved: int,
    backend: str,
    options: dict[str, Any] | None = None,
) -> tuple[Compiled, Compiled]:
    """Compile a forward graph (``outputs`` for the user, then ``saved``) and its update graph."""
    first, strides = _lower(forward, backend, options, _examples(forward), outputs, False)
    examples = _examples(update)
    kept = strides[outputs : outputs + saved] if len(strides) >= outputs + saved else []
    for i, stride in enumerate(kept):
        if isinstance(examples[i], FakeTensor):
            examples[i] = restrided(examples[i], stride, fake_mode_of(examples[i]))
    second, _ = _lower(update, backend, options, examples, _outputs(update), True)
    return first, second


def _examples(gm: GraphModule) -> list[Any]:
    return [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]


def _outputs(gm: GraphModule) -> int:
    return len(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])  # type: ignore[arg-type]


def _lower(
    gm: GraphModule,
    backend: str,
    options: dict[str, Any] | None,
    examples: list[Any],
    user_outputs: int,
    is_backward: bool,
) -> tuple[Compiled, list[Any]]:
    if backend not in BACKENDS:
        raise OptionError(f"unknown backend {backend!r}.{nearest(backend, BACKENDS)}")
    if backend == "eager" or not any(n.op == "call_function" for n in gm.graph.nodes):
        gm.recompile()
        run = gm.forward
        return (lambda inputs: run(*inputs)), []
    device = next((v.device.type for v in examples if isinstance(v, torch.Tensor)), "cpu")
    with torch.autocast(device, enabled=False), torch.no_grad():
        return inductor_compile(
            gm, examples, user_outputs=user_outputs, is_backward=is_backward, options=options
        )
