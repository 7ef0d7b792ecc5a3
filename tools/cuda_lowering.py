"""What Inductor makes of our graphs for a CUDA GPU, without one: right values, number of launches.

    TRITON_INTERPRET=1 python -m tools.cuda_lowering --check   # every form against eager graphs
    TRITON_INTERPRET=1 python -m tools.cuda_lowering           # docs/results/cuda_launches.md

Values: each network, method, kind of step and form on a batch of 4, lowered for CUDA and run by
Triton's interpreter (``tools/gpu/cuda_standin.py``), against the same graphs run uncompiled; a
line of JSON each. Launches: Triton kernels and library calls of one forward and one update at batch
8, the transformer of GrAPE 2026 table 5 by depth. Attention is written out in both, for autograd
cannot trace CUDA's without a driver. Exit codes: 0; 1, something differs or failed; 2, this machine
cannot do it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from grapefx.errors import GrapefxWarning
from grapefx.ir import StepGraph
from grapefx.plan import Plan, build_plan, sizes_of
from grapefx.runtime.parallel import FORMS
from grapefx.runtime.program import CompiledStep, compile_step
from grapefx.torch_compat import concrete
from tools import ROOT
from tools.bench.models import MODELS, SMALL, VARIANTS, Benchmark
from tools.common import cli, networks, process
from tools.common.table import Table
from tools.gpu import cuda_standin
from tools.gpu.cuda_standin import Launches, OnCpu, Unfit, on_cuda
from tools.gpu.parity import difference

BATCH = 4
TOLERANCE = 2e-5  # float32; sums in another order
NETWORKS = {
    "mlp": Benchmark(lambda: networks.mlp((1, 4, 4), 10, 4, 16, "tanh", False), (1, 4, 4)),
    "cnn": Benchmark(lambda: networks.lenet(SMALL, 10, [2, 3], [8, 8], "relu", False), SMALL),
    "resnet": Benchmark(lambda: networks.resnet((3, 8, 8), 10, 8, True), (3, 8, 8)),
    "layers": Benchmark(
        lambda: networks.Transformer(11, 6, 8, 2, 2, 12, 0.0), (6,), "tokens", (), 11
    ),
}
NETWORKS["blocks"] = replace(NETWORKS["layers"], options=(("granularity", "block"),))
METHODS = ("grape", "dfa", "fdfa")
DEPTHS = (2, 4, 8, 16)
COUNTED = ("bp", "dfa", "grape 1/8")


def plan_of(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Plan:
    """A plan with every graph traced: autograd has to be through before CUDA is replaced."""
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        plan = build_plan(model.train(), (x,), **options)
    for kind in plan.kinds():
        plan.graph(kind)
    return plan


def values(step: StepGraph, sizes: dict[Any, int]) -> list[Any]:
    """Something for each input of a step graph."""
    torch.manual_seed(0)
    out: list[Any] = []
    fakes = concrete([node.meta["val"] for node in step.placeholders()], sizes)
    for fake, slot in zip(fakes, step.inputs, strict=True):
        if not isinstance(fake, Tensor):
            out.append(fake)
        elif fake.dtype.is_floating_point:
            drawn = torch.randn(fake.shape, dtype=fake.dtype)
            out.append(drawn.abs() if slot.role == "buffer" else drawn)  # variances
        else:
            out.append(torch.randint(0, 2, fake.shape).to(fake.dtype))
    return out


def run_step(made: CompiledStep, step: StepGraph, given: Sequence[Any]) -> list[Any]:
    """Both callables of a compiled step on these inputs: outputs, buffers, then results."""

    def own(v: Any) -> Any:
        return v.clone() if isinstance(v, Tensor) else v

    named: dict[Any, Any] = {}
    cotangents: list[Any] = []
    for i, slot in enumerate(step.inputs):
        named[slot.role, slot.name] = given[i]
        if slot.role == "cotangent":
            cotangents.append(given[i])
    inputs = [own(given[i]) for _, i in made.sources]
    roles = [step.inputs[i].role for _, i in made.sources]
    buffers = [v for v, role in zip(inputs, roles, strict=True) if role == "buffer"]
    found = list(made.forward(inputs))
    late = [cotangents[k] if role == "cotangent" else named[role, k] for role, k in made.late]
    outputs, saved = found[: made.outputs], found[made.outputs :]
    results = made.update([*map(own, saved), *map(own, late)])
    return [*map(own, outputs), *buffers, *results]


def check(names: Sequence[str], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Each form of each kind of step against the uncompiled graphs; one row a comparison."""
    plans: dict[tuple[str, str], Plan] = {}
    for name in names:
        network = NETWORKS[name]
        for method in methods:
            options = {"method": method, **dict(network.options)}
            plans[name, method] = plan_of(network.build(), network.example(BATCH)[0], options)
    cuda_standin.install()
    rows = []
    for (name, method), plan in plans.items():
        for kind in plan.kinds():
            step = plan.graph(kind)
            sizes = sizes_of(step, BATCH, plan.rows(BATCH))
            given = values(step, sizes)
            expected = run_step(compile_step(step, kind, sizes, "eager", None), step, given)
            chain = kind == "calibration" or plan.method.sequential
            for form in ("off",) if chain else FORMS:
                row: dict[str, Any] = {"net": name, "method": method, "kind": kind, "form": form}
                try:
                    with warnings.catch_warnings():
                        # a form that is left out is an error here
                        warnings.simplefilter("error", category=GrapefxWarning)
                        made = compile_step(on_cuda(step), kind, sizes, "inductor", None, form)
                    with OnCpu():
                        row["difference"] = difference(run_step(made, step, given), expected)
                except Exception as e:
                    row["error"] = process.error_text(e)[:300]
                row["ok"] = row.get("difference", 1.0) <= TOLERANCE
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def launches(depths: Sequence[int]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(feedback points, variant) -> launches of (forward, update) by depth."""
    plans: dict[tuple[str, str], list[tuple[Plan, str]]] = {}
    for points in ("micro", "macro"):
        for method in COUNTED:
            for depth in depths:
                torch.manual_seed(0)
                benchmark = MODELS[f"transformer{depth}-{points}"]
                options = {**VARIANTS[method][0], **dict(benchmark.options)}
                plan = plan_of(benchmark.build(), benchmark.example(8)[0], options)
                kind = "align" if "align" in plan.kinds() else plan.kinds()[0]
                plans.setdefault((points, method), []).append((plan, kind))
    cuda_standin.install()
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (points, method), made in plans.items():
        for form in ("off",) if method == "bp" else ("off", "horizontal"):
            row = found.setdefault((points, f"{method}, {form}"), [])
            for plan, kind in made:
                step = plan.graph(kind)
                sizes = sizes_of(step, 8, plan.rows(8))
                with Launches() as counter:
                    compile_step(on_cuda(step), kind, sizes, "inductor", None, form)
                forward, update = counter.counts
                row.append((forward, update))
            print(points, method, form, row, flush=True)
    return found


def page(found: dict[tuple[str, str], list[tuple[int, int]]], depths: Sequence[int]) -> str:
    """The table."""
    blocks = [f"{d} blocks:" for d in depths]
    table = Table("points", "variant", *blocks, f"update, {depths[-1]} over {depths[0]}:")
    rows = [
        (
            *names,
            *(f"{forward} + {update}" for forward, update in row),
            f"{row[-1][1] / row[0][1]:.2f}",
        )
        for names, row in found.items()
    ]
    lines = [
        "# Launches of a step on a CUDA GPU",
        "",
        "Triton kernels and library calls that Inductor generates for one forward + one update of",
        "the transformer of GrAPE 2026 table 5 (width 128, 64 tokens, batch 8), counted in the",
        "code. No GPU has run it. Attention is written out, not one fused operator.",
        "",
        f"Made by `TRITON_INTERPRET=1 python -m tools.cuda_lowering`, torch {torch.__version__}.",
        "",
        table.markdown(rows),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = cli.parser("tools.cuda_lowering", __doc__)
    p.add_argument("--check", action="store_true", help="values, not launches")
    p.add_argument("--nets", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--methods", nargs="+", default=list(METHODS))
    p.add_argument("--depths", nargs="+", type=int, choices=DEPTHS, default=list(DEPTHS))
    p.add_argument("--out", type=Path, default=ROOT / "docs/results/cuda_launches.md")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if a.check:
            return 0 if all(row["ok"] for row in check(a.nets, a.methods)) else 1
        a.out.write_text(page(launches(a.depths), a.depths))
    except Unfit as e:
        print(f"cuda_lowering: {e}", file=sys.stderr)
        return 2
    print(a.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
