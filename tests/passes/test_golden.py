"""Golden graphs: what every kind of step of a tiny model computes, and what each pass rewrites.

Each file in ``golden/`` holds the model and the graph, node by node with what it reads, its phase
and its layer. ``pytest tests/passes/test_golden.py --accept`` writes the files anew: read the
difference before it is committed. How views and layouts are written differs between versions of
torch and says nothing about the method: those nodes are left out, their readers read what is behind
them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Node

from grapefx.ir import StepGraph
from grapefx.passes.divide.partition import split
from grapefx.passes.graph.text import as_text
from grapefx.passes.peephole.channels_last import channels_last
from grapefx.passes.peephole.join_products import join_products
from grapefx.passes.peephole.late_bias import add_bias_late
from grapefx.passes.peephole.pooling import tile_pools
from grapefx.plan import Plan, build_plan

HERE = Path(__file__).parent / "golden"
VIEWS = {
    "view", "reshape", "t", "transpose", "permute", "clone", "_unsafe_view", "detach", "alias",
    "unsqueeze", "squeeze", "expand", "_to_copy",
}  # fmt: skip


def without_views(step: StepGraph) -> StepGraph:
    """A copy in which readers of a view read what it looks at."""
    step = step.copy()
    graph = step.gm.graph
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        name = schema.name.split("::")[-1] if schema is not None else ""
        if node.op == "call_function" and name in VIEWS and isinstance(node.args[0], Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return step


def mlp() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    return net, torch.randn(5, 4)


def pools() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    )
    return net, torch.randn(5, 1, 4, 4)


def planes() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(32, 2)
    )
    return net, torch.randn(5, 2, 4, 4)


def planned(
    model: Callable[[], tuple[nn.Module, torch.Tensor]], method: str, **options: object
) -> Plan:
    net, x = model()
    return build_plan(net, (x,), method=method, noise="gaussian", **options)


def half(plan: Plan, kind: str, which: int, change: Callable[[StepGraph], object]) -> StepGraph:
    """The forward (0) or update graph (1) of a step, after a rewrite in place."""
    step = split(plan.graph(kind)).halves()[which]
    change(step)
    return step


def pooled() -> StepGraph:
    step = planned(pools, "dfa").graph("update").copy()
    assert tile_pools(step) == 1
    return step


def last_channels() -> StepGraph:
    """The update of a network of planes whose saved values lie with their channels last."""
    parts = split(planned(planes, "dfa").graph("update"))
    step = parts.halves()[1]
    values = [n.meta["val"] for n in step.placeholders()][: parts.saved]
    strides: list[Any] = [
        v.to(memory_format=torch.channels_last).stride()
        if isinstance(v, torch.Tensor) and v.ndim == 4
        else None
        for v in values
    ]
    assert channels_last(step.gm, strides) > 0
    return step


STEPS = [
    ("bp", "calibration"), ("dfa", "update"), ("dfa", "calibration"), ("fdfa", "align"),
    ("fdfa", "update"), ("fdfa", "calibration"), ("grape", "align"), ("grape", "update"),
    ("grape", "calibration"),
]  # fmt: skip
PASSES: dict[str, Callable[[], StepGraph]] = {
    "joint": lambda: planned(mlp, "dfa").joint,
    "stand_in (fa)": lambda: planned(mlp, "fa").graph("update"),
    "perturbed (fg-w)": lambda: planned(mlp, "fg-w").graph("align"),
    "second_forward (pepita)": lambda: planned(mlp, "pepita").graph("update"),
    "tile_pools": pooled,
    "channels_last": last_channels,
    "late_bias": lambda: half(
        planned(mlp, "dfa"), "update", 0, lambda s: add_bias_late(s.gm) or pytest.fail()
    ),
    "join_products": lambda: half(
        planned(mlp, "grape"), "align", 0, lambda s: join_products(s.gm) or pytest.fail()
    ),
    "split forward": lambda: half(planned(mlp, "dfa"), "update", 0, operator.truth),
    "split update": lambda: half(planned(mlp, "dfa"), "update", 1, operator.truth),
}


def compare(name: str, model: nn.Module, step: StepGraph, accept: bool) -> None:
    text = f"{model}\n\n{as_text(without_views(step))}"
    file = HERE / (re.sub(r"\W+", "_", name).strip("_") + ".txt")
    if accept:
        HERE.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "the graph changed; --accept writes the file anew"


@pytest.mark.parametrize(("method", "kind"), STEPS)
def test_golden_steps(method: str, kind: str, request: pytest.FixtureRequest) -> None:
    accept = request.config.getoption("--accept")
    compare(f"mlp {method} {kind}", mlp()[0], planned(mlp, method).graph(kind), accept)


@pytest.mark.parametrize("name", PASSES)
def test_golden_passes(name: str, request: pytest.FixtureRequest) -> None:
    model = {"tile_pools": pools, "channels_last": planes}.get(name, mlp)
    compare(f"pass {name}", model()[0], PASSES[name](), request.config.getoption("--accept"))
