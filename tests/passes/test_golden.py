"""Golden text of a tiny MLP's step graphs: what is computed, in which phase, for which layer.

``GRAPEFX_GOLDEN=write`` rewrites the files. Only operator names, phases and layers are kept, sorted
and counted, so that the text does not depend on torch's node order.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from grapefx.ir import StepGraph
from grapefx.plan import build_plan

HERE = Path(__file__).parent / "golden"
# how sizes and layouts are handled differs between torch versions and says nothing about the method
NOISE = {
    "view", "reshape", "t", "transpose", "permute", "clone", "sym_size", "_unsafe_view", "detach",
    "alias", "unsqueeze", "expand", "getitem", "mul_", "squeeze", "unbind",
}  # fmt: skip


def summary(step: StepGraph) -> str:
    lines: Counter[str] = Counter()
    for node in step.gm.graph.nodes:
        if node.op != "call_function":
            continue
        target = node.target
        name = target._schema.name if isinstance(target, torch._ops.OpOverload) else str(target)
        name = name.split("::")[-1]
        if name in NOISE or "built-in" in name:
            continue
        phase, layer = node.meta.get("grapefx_phase"), node.meta.get("grapefx_layer")
        lines[f"{phase:<12} {layer or '-':<5} {name}"] += 1
    inputs = [f"in  {s.role} {s.name}" for s in step.inputs]
    outputs = [f"out {s.role} {s.name}" for s in step.outputs]
    body = [f"{line} x{count}" for line, count in sorted(lines.items())]
    return "\n".join([*inputs, *body, *outputs]) + "\n"


@pytest.mark.parametrize(
    ("method", "kind"), [("dfa", "update"), ("fdfa", "align"), ("dfa", "calibration")]
)
def test_golden(method: str, kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    plan = build_plan(model, (torch.randn(5, 4),), method=method, noise="gaussian")
    text = summary(plan.graph(kind))
    file = HERE / f"mlp_{method}_{kind}.txt"
    if os.environ.get("GRAPEFX_GOLDEN") == "write":
        HERE.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), "the graph changed; GRAPEFX_GOLDEN=write accepts it"
