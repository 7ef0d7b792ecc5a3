"""The figures that the performance gate compares: all deterministic, none a time.

For each model and form of a method, and each kind of step: nodes by phase and operator, FLOPs (in
all and on the critical path), bytes saved for the update, bytes of the largest live set, and, where
the step is lowered, Inductor's kernels and the bytes that they move. For each model and form
besides: the number of graphs, of compiled variants over five batch sizes, and of calls that our
passes make.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import grapefx
from grapefx.analysis import build_dag
from grapefx.lowering import lower_saving, lower_update, update_for
from grapefx.methods import Method
from grapefx.passes.divide.partition import split
from grapefx.passes.pipeline import LowerContext, prepare
from grapefx.plan import Plan, build_plan, sizes_of
from grapefx.report.build import opened
from grapefx.runtime import program
from grapefx.torch_compat import inductor_counts

BATCH = 32
Figures = dict[str, dict[str, Any]]


def mlp() -> tuple[nn.Module, Tensor]:
    """Four weight layers."""
    sizes = [48, 64, 64, 64, 10]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), torch.randn(BATCH, 48)


def cnn() -> tuple[nn.Module, Tensor]:
    """Two convolution blocks with batch norm and pooling, two linear layers."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 9, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    return net, torch.randn(BATCH, 1, 12, 12)


def transformer() -> tuple[nn.Module, Tensor]:
    """A two-layer encoder on 12 tokens; one output row a token."""
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(20, 24), encoder, nn.Linear(24, 11)), torch.randn(BATCH, 12, 20)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
}


@dataclass(frozen=True)
class Form:
    """A method with its options; of all its kinds of step one is lowered too."""

    method: str | Method
    lowered: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


FORMS: dict[str, Form] = {
    "bp": Form("bp", "calibration"),
    "dfa": Form("dfa", "update"),
    "grape": Form("grape", "align"),
    "grape on 1 in 8": Form("grape", "align", {"tangent_fraction": 1 / 8}),
}


def measure(
    models: Sequence[str] = tuple(MODELS),
    forms: Mapping[str, Form] = MappingProxyType(FORMS),
    *,
    kernels: bool = True,
) -> Figures:
    """The figures by "model/form" and "model/form/kind"."""
    out: Figures = {}
    for name in models:
        for label, form in forms.items():
            torch.manual_seed(0)
            model, x = MODELS[name]()
            plan, calls = counted_plan(model, x, form)
            for kind in plan.kinds():
                lowered = kernels and kind == form.lowered
                out[f"{name}/{label}/{kind}"] = step_figures(plan, kind, lowered)
            out[f"{name}/{label}"] = {"graphs": len(plan.kinds()), "pass_calls": calls}
            if name == "mlp":
                out[f"{name}/{label}"]["variants"] = variants(model, x, form)
    return out


def counted_plan(model: nn.Module, x: Tensor, form: Form) -> tuple[Plan, int]:
    """A plan with all its graphs, and how many calls our own code made to build it.

    Calls stand for time: they do not vary with the machine or its load. Traced rules are cached in
    the process, so the count belongs to the order of the models in a whole run.
    """
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            name = frame.f_code.co_filename
            count += "/passes/" in name or "/grapefx/" in name

    sys.setprofile(profile)
    try:
        plan = build_plan(model, (x,), method=form.method, **form.options)
        for kind in plan.kinds():
            plan.graph(kind)
    finally:
        sys.setprofile(None)
    return plan, count


def step_figures(plan: Plan, kind: str, lowered: bool) -> dict[str, Any]:
    """The figures of one kind of step at batch size ``BATCH``."""
    step = plan.graph(kind)
    graph, loss = opened(step)
    dag = build_dag(graph, loss=loss)
    nodes = Counter(
        f"{n.meta.get('grapefx_phase', 'other')} {n.target}"
        for n in step.gm.graph.nodes
        if n.op == "call_function"
    )
    sizes = sizes_of(step, plan.batch_size, plan.rows(plan.batch_size))
    parts = split(prepare(step, kind, "inductor", LowerContext(sizes)))
    saved = [n for n in parts.update.graph.nodes if n.op == "placeholder"][: parts.saved]
    kept = {n.name for n in parts.forward.graph.nodes if n.op == "placeholder"}
    # a parameter or an input that the update reads again takes no memory of its own
    intermediate = [n for n in saved if n.name not in kept]
    figures: dict[str, Any] = {
        "nodes": dict(sorted(nodes.items())),
        "flops": int(dag.work()),
        "critical_path_flops": int(dag.span()),
        "saved_bytes": sum(nbytes(n) for n in intermediate),
        "peak_bytes": peak(parts.forward, parts.update, {n.name for n in intermediate}),
    }
    if lowered:
        with inductor_counts() as counts:
            _, strides = lower_saving(parts, kind, "inductor")
            lower_update(update_for(parts, strides, kind, "inductor"), strides, "inductor")
        figures |= {"kernels": counts.kernels, "bytes_moved": counts.bytes}
    return figures


def nbytes(node: Node) -> int:
    """Bytes of a node's value; 0 for what is not one tensor."""
    val = node.meta.get("val")
    return int(val.numel()) * val.element_size() if isinstance(val, Tensor) else 0


def peak(forward: GraphModule, update: GraphModule, saved: set[str]) -> int:
    """Most bytes of intermediate values alive at once, if nothing were fused or reused.

    Inputs (parameters, buffers, the batch) are not counted; a view lives in what it views.
    """
    top = 0
    held = 0
    for gm, before in ((forward, set()), (update, saved)):
        nodes = list(gm.graph.nodes)
        owner: dict[Node, Node] = {}
        last: dict[Node, int] = {}
        for i, n in enumerate(nodes):
            first = n.all_input_nodes[0] if n.all_input_nodes else n
            owner[n] = owner[first] if _is_view(n) else n
            for used in [n, *n.all_input_nodes]:
                last[owner[used]] = i
        if gm is forward:
            for n in nodes:
                if n.name in saved:
                    last[owner[n]] = len(nodes)
        live = held
        ends: dict[int, list[Node]] = {}
        for n, i in last.items():
            ends.setdefault(i, []).append(n)
        counted = {
            n
            for n in last
            if n.op == "call_function" or (n.op == "placeholder" and n.name in before)
        }
        for i, n in enumerate(nodes):
            if n in counted and n.op == "call_function":
                live += nbytes(n)
            top = max(top, live)
            live -= sum(nbytes(d) for d in ends.get(i, ()) if d in counted)
        held = sum(nbytes(n) for n in nodes if n.name in saved and gm is forward)
    return top


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not node.all_input_nodes:
        return False
    return any(r.alias_info is not None for r in schema.returns)


def variants(model: nn.Module, x: Tensor, form: Form) -> int:
    """Compiled steps over batch sizes 1 and more, the kernels themselves left out."""
    compile_step = program.compile_step

    def quick(step: Any, kind: str, sizes: Any, backend: str, options: Any, *rest: Any) -> Any:
        return compile_step(step, kind, sizes, "eager", options, "off", rest[-1])

    with mock.patch.object(program, "compile_step", quick):
        net = grapefx.compile(model, method=form.method, **form.options)
        net.set_epoch(0)
        for size in (1, BATCH, 5, 7, BATCH):
            rows = x[:1].expand(size, *x.shape[1:]).contiguous()
            for _ in range(2):
                out = net(rows)
                F.mse_loss(out, torch.zeros_like(out)).backward()
    return sum(len(p.steps) for p in net._captures.programs.values())
