"""Lowering: a flat functional ATen graph becomes a callable. The only place that knows backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from grapefx.errors import OptionError, nearest
from grapefx.torch_compat import boxed_standalone_compile

BACKENDS = ("inductor", "eager")

Compiled = Callable[[list[Any]], Any]


def lower(gm: GraphModule, backend: str, options: dict[str, Any] | None = None) -> Compiled:
    """Compile ``gm`` with Inductor, or run it as it is (``eager``: for tests and debugging).

    The result takes a list of inputs, which it may empty, and returns a flat sequence. Autocast is
    off while compiling: the graph already holds its casts.
    """
    if backend not in BACKENDS:
        raise OptionError(f"unknown backend {backend!r}.{nearest(backend, BACKENDS)}")
    example = [n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder"]
    if backend == "eager" or not any(n.op == "call_function" for n in gm.graph.nodes):
        gm.recompile()
        forward = gm.forward

        def run(inputs: list[Any]) -> Any:
            return forward(*inputs)

        return run
    device = next((v.device.type for v in example if isinstance(v, torch.Tensor)), "cpu")
    with torch.autocast(device, enabled=False), torch.no_grad():
        return boxed_standalone_compile(gm, example, options or {})
