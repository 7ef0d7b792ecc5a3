"""A step graph as text: one line a node, with what it reads, what it is for, and its layer.

Golden tests compare it, and the log of passes shows what a pass changed by it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from grapefx.ir import StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.operators import op_name


def as_text(step: StepGraph) -> str:
    """The graph's inputs, operators and outputs, numbered in the order of the graph.

    Names of nodes depend on the passes that ran before; numbers do not. Sizes that are symbols are
    written as ``?``: their names are the tracer's.
    """
    numbers: dict[Node, str] = {}
    lines = []
    for slot, node in zip(step.inputs, step.placeholders(), strict=True):
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{numbers[node]} = input {slot.role} {slot.name!r} {_value(node)}")
    for node in step.gm.graph.nodes:
        if node.op != "call_function":
            continue
        args = ", ".join(
            [_argument(a, numbers) for a in node.args]
            + [f"{k}={_argument(a, numbers)}" for k, a in node.kwargs.items()]
        )
        numbers[node] = f"%{len(numbers)}"
        name = "getitem" if node.target is operator.getitem else op_name(node)
        label = f"{meta.phase(node) or '-'} {meta.layer(node) or '-'}"
        lines.append(f"{numbers[node]} = {name}({args}) {_value(node)}  # {label}")
    for slot, result in zip(step.outputs, step.results(), strict=True):
        shown = numbers[result] if isinstance(result, Node) else str(result)
        lines.append(f"output {slot.role} {slot.name!r} = {shown}")
    return "\n".join(lines) + "\n"


def _argument(value: Any, numbers: dict[Node, str]) -> str:
    return repr(map_arg(value, lambda n: _Name(numbers[n]))).replace("'", "")


class _Name(str):
    """A node's number, in a list of arguments."""

    def __repr__(self) -> str:
        return str(self)


def _value(node: Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "size" if isinstance(value, torch.SymInt) else ""
    sizes = "x".join(str(s) if isinstance(s, int) else "?" for s in value.shape)
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
