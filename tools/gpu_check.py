"""What only a GPU can say: parity on CUDA, then step times against backpropagation.

    make gpu-check                                   # everything that fits into 9 minutes
    python -m tools.gpu_check --sections parity transformer8 --seconds 300
    python -m tools.gpu_check --device cpu --smoke --out runs/smoke.md   # the same path, tiny

Sections do not depend on each other: what fails is a row with its error. Rows are kept in --jsonl:
a second call goes on where the time of the first ran out (--fresh forgets them); the page is
written after every row. Exit codes: 0; 1, something failed or is not right; 2, no CUDA or usage.

A time is the median over rounds of ``--inner`` steps (gradients cleared, forward, loss, backward)
with one synchronisation at their end, variants interleaved; "update" is backward alone, with one
synchronisation before and one behind.
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grapefx
from tools import ROOT
from tools.bench.models import COLOUR, MODELS, SMALL, VARIANTS, Benchmark, Step
from tools.common import cli, networks, results
from tools.common.machine import machine
from tools.common.process import error_text
from tools.common.results import Row
from tools.common.timing import interleaved, median_ms
from tools.gpu.page import METHODS, PLAIN, page
from tools.gpu.parity import difference

FORMS = ("off", "graphs", "horizontal", "streams", "auto")
# every form once on the smallest model; on the others the forms that rewrite the graph
PARITY = (
    *(("mlp", m, form, torch.float64) for m in ("grape", "dfa") for form in FORMS),
    ("micro", "grape", "horizontal", torch.float64),
    ("micro", "grape", "streams", torch.float64),
    ("micro", "dfa", "horizontal", torch.float32),  # fused attention
    ("micro", "dfa", "streams", torch.float32),
    ("macro", "grape", "horizontal", torch.float32),
    ("resnet", "grape", "horizontal", torch.float64),
)
SMOKE_PARITY = (
    ("mlp", "grape", "streams", torch.float64),
    ("mlp", "dfa", "horizontal", torch.float64),
)


def small_transformer() -> nn.Module:
    """Of three blocks, on windows of six tokens."""
    return networks.Transformer(11, 6, 16, 2, 3, 24, 0.0)


SMOKE = {
    "tokens": Benchmark(small_transformer, (6,), "tokens", (("granularity", "layer"),), 11),
    "mlp": Benchmark(lambda: networks.mlp(SMALL, 10, 4, 16, "relu", False), SMALL),
}


@dataclass(frozen=True)
class Case:
    """A network to time, its batch size and its variants."""

    section: str
    network: str
    batch: int
    variants: tuple[str, ...]


def _variants(forms: Sequence[str], methods: Sequence[str] = METHODS) -> tuple[str, ...]:
    return (*PLAIN, *(f"{m}, {form}" for m in methods for form in forms))


def cases(smoke: bool) -> list[Case]:
    """In the order of what matters most."""
    if smoke:
        return [
            Case("transformer8", "tokens", 4, _variants(("auto",), ("dfa",))),
            Case("mlp", "mlp", 4, _variants(("off", "streams"), ("dfa",))),
        ]
    found = []
    for depth, forms in ((8, FORMS), (16, ("off", "auto")), (2, ("off", "auto")), (4, ("auto",))):
        for kind in ("micro", "macro"):
            methods = METHODS if depth == 8 else ("dfa", "grape 1/8")
            found.append(
                Case(f"transformer{depth}", f"transformer{depth}-{kind}", 8,
                     _variants(forms, methods))
            )  # fmt: skip
    for batch in (8, 128):
        found.append(Case("mlp", "mlp8x1024", batch, _variants(("off", "auto"))))
    found.append(Case("resnet20", "resnet20", 128, _variants(("off", "auto"))))
    few = _variants(("off", "auto"), ("dfa", "grape 1/8"))
    found.append(Case("vgg16", "vgg16", 128, few))
    found.append(Case("gpt2-small", "gpt2-small", 8, few))
    return found


def network(name: str) -> Benchmark:
    """A network that ``cases`` names."""
    return SMOKE.get(name) or MODELS[name]


# the run


class Run:
    """The rows so far, the clock, and where they go."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self.start = time.monotonic()
        self.device = torch.device(a.device)
        if a.fresh:
            a.jsonl.unlink(missing_ok=True)
        kept = results.latest(a.jsonl, lambda row: str(row["key"]))
        self.rows: dict[str, Row] = {k: r for k, r in kept.items() if r["ok"]}

    @property
    def left(self) -> float:
        """Seconds left."""
        return float(self.a.seconds) - (time.monotonic() - self.start)

    def add(self, key: str, **row: Any) -> None:
        """Keep a row; write the page."""
        self.rows[key] = row
        results.append(self.a.jsonl, {"key": key, "machine": machine(self.device), **row})
        text = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in row.items()
            if k != "section"
        )
        print(f"[{time.monotonic() - self.start:5.0f} s] {key}: {text}", flush=True)
        self.write()

    def write(self) -> None:
        """The page."""
        results.write(self.a.out, page(self.rows, machine(self.device)))

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# parity


# small models of each sort
PARITY_MODELS = {
    "mlp": Benchmark(lambda: networks.mlp(SMALL, 10, 5, 16, "tanh", False), SMALL),
    "micro": Benchmark(small_transformer, (6,), "tokens", (), 11),
    "macro": Benchmark(small_transformer, (6,), "tokens", (("granularity", "block"),), 11),
    "resnet": Benchmark(lambda: networks.resnet(COLOUR, 10, 20, True), COLOUR),
}


def drawn(run: Run, name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, an input and targets, always the same."""
    torch.manual_seed(0)
    model = PARITY_MODELS[name].build().to(run.device, dtype)
    x, y = (t.to(run.device) for t in PARITY_MODELS[name].example(4))
    return model, x.to(dtype) if x.is_floating_point() else x, y


def gradients(net: nn.Module, x: Tensor, y: Tensor, times: int = 1) -> list[Tensor]:
    """Gradients after ``times`` backward passes that add up."""
    for p in net.parameters():
        p.grad = None
    for _ in range(times):
        out = net(x)
        F.cross_entropy(out.flatten(0, -2), y.flatten()).backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def parity(run: Run) -> Iterator[tuple[str, Callable[[], float], float]]:
    """(what is compared, the comparison, its tolerance)."""
    cases = SMOKE_PARITY if run.a.smoke else PARITY
    for name in PARITY_MODELS:
        if not run.a.smoke:
            yield f"bp = eager, {name}", functools.partial(bp_is_exact, run, name), 1e-8
        for model, method, form, dtype in cases:
            if model == name:
                bits = str(dtype).removeprefix("torch.float")
                yield (
                    f"{method}, {form} = graph by graph, {name}, float{bits}",
                    functools.partial(forms_agree, run, name, method, form, dtype),
                    1e-8 if dtype == torch.float64 else 1e-2,
                )


def bp_is_exact(run: Run, name: str) -> float:
    """The step with exact gradients against eager PyTorch."""
    model, x, y = drawn(run, name, torch.float64)
    twin = copy.deepcopy(model)
    net = grapefx.compile(model, method="bp", backend=run.a.backend)
    return difference(gradients(net, x, y), gradients(twin, x, y))


def forms_agree(run: Run, name: str, method: str, form: str, dtype: torch.dtype) -> float:
    """Six steps (CUDA graphs are captured in the third), then sums and two calls in flight."""
    model, x, y = drawn(run, name, dtype)
    twin = copy.deepcopy(model)
    common = {"method": method, "calib_every": None, **dict(PARITY_MODELS[name].options)}
    chosen: dict[str, Any] = {"backend": run.a.backend, "parallel": form, **common}
    net = grapefx.compile(model, **chosen)
    plain = grapefx.compile(twin, backend="eager", parallel="off", **common)
    worst = 0.0
    held = []
    for times in (1, 1, 1, 1, 2, 1):
        mine = gradients(net, x, y, times)
        held.append([p.grad for p in net.parameters() if p.grad is not None])
        kept = [g.clone() for g in held[-1]]
        worst = max(worst, difference(mine, gradients(plain, x, y, times)))
        if times == 1:  # what is kept must not change under the next step
            gradients(net, x, y)
            gradients(plain, x, y)
            worst = max(worst, difference(held[-1], kept))
            held.pop()
    for n in (net, plain):
        for p in n.parameters():
            p.grad = None
        first, second = n(x), n(x)
        F.cross_entropy(second.flatten(0, -2), y.flatten()).backward()
        F.cross_entropy(2 * first.flatten(0, -2), y.flatten()).backward()
    both = [[p.grad for p in n.parameters() if p.grad is not None] for n in (net, plain)]
    return max(worst, difference(both[0], both[1]))  # type: ignore[arg-type]


# times


@dataclass
class Trained(Step):
    """A variant ready to be timed."""

    marks: bool

    def forward(self) -> Tensor:
        """Loss."""
        if self.marks:
            torch.compiler.cudagraph_mark_step_begin()
        return super().forward()


def build(run: Run, case: Case, variant: str) -> Trained:
    """One variant of one network."""
    torch.manual_seed(0)
    found = network(case.network)
    model = found.build().to(run.device)
    torch.manual_seed(1)
    x, y = (t.to(run.device) for t in found.example(case.batch))
    graphs = variant == "compiled + CUDA graphs" and run.device.type == "cuda"
    if variant in PLAIN:
        net: Any = model
        if variant != "eager" and run.a.backend == "eager":
            net = torch.compile(model, backend="eager")
        elif variant != "eager":
            net = torch.compile(model, mode="reduce-overhead" if graphs else "default")
        return Trained(net, x, y, graphs)
    method, form = variant.split(", ")
    options: dict[str, Any] = VARIANTS[method][0] | dict(found.options)
    net = grapefx.compile(model, **{"parallel": form, "backend": run.a.backend, **options})
    return Trained(net, x, y, False)


def chosen(net: nn.Module) -> dict[str, Any]:
    """What parallel="auto" measured and chose."""
    captures = getattr(net, "_captures", None)
    for program in captures.programs.values() if captures else ():
        for step in program.steps.values():
            found = getattr(step.update, "found", None)
            if found:
                ms = {k: round(1e3 * v, 4) for k, v in found.items()}
                return {"chose": step.update.chosen, "found_ms": ms}
    return {}


def time_case(run: Run, case: Case) -> None:
    """Rows of one network."""
    torch.compiler.reset()
    ready: dict[str, Trained] = {}
    notes: dict[str, Row] = {}
    for variant in case.variants:
        key = f"{case.network}/{case.batch}/{variant}"
        if run.rows.get(key, {}).get("ok"):
            continue
        if run.left < 20:
            run.add(key, section=case.section, ok=False, error="not reached: the time ran out")
            continue
        start = time.monotonic()
        try:
            trained = build(run, case, variant)
            for _ in range(6):
                trained()
            run.sync()
        except Exception as e:
            run.add(key, section=case.section, ok=False, error=error_text(e))
            continue
        ready[variant] = trained
        notes[variant] = {"compile_s": round(time.monotonic() - start, 1), **chosen(trained.net)}
        print(f"[{time.monotonic() - run.start:5.0f} s] {key} built", flush=True)

    def measure(variant: str) -> tuple[float, float]:
        """Once a variant has failed, it is a row with its error and is not run again."""
        if variant in ready:
            try:
                return timed(run, ready[variant], run.a.inner)
            except Exception as e:
                del ready[variant]
                key = f"{case.network}/{case.batch}/{variant}"
                run.add(key, section=case.section, ok=False, error=error_text(e))
        return 0.0, 0.0

    measurements = {v: functools.partial(measure, v) for v in ready}
    found = interleaved(measurements, run.a.rounds, warm_up=1)
    for v in ready:
        step_ms, update_ms = (median_ms(times) for times in zip(*found[v], strict=True))
        run.add(
            f"{case.network}/{case.batch}/{v}",
            section=case.section,
            ok=True,
            step_ms=step_ms,
            update_ms=update_ms,
            **notes[v],
        )


def timed(run: Run, step: Trained, inner: int) -> tuple[float, float]:
    """Seconds of one step among ``inner``, and of one backward alone."""
    run.sync()
    start = time.perf_counter()
    for _ in range(inner):
        step()
    run.sync()
    whole = (time.perf_counter() - start) / inner
    loss = step.forward()
    run.sync()
    start = time.perf_counter()
    loss.backward()
    run.sync()
    return whole, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    p = cli.parser("tools.gpu_check", __doc__)
    names = ("parity", *dict.fromkeys(c.section for c in cases(False)))
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (with --smoke)")
    p.add_argument("--smoke", action="store_true", help="tiny networks, graphs run uncompiled")
    p.add_argument("--sections", nargs="+", choices=names, default=list(names))
    p.add_argument("--seconds", type=float, default=540, help="start nothing after so long")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--inner", type=int, default=10)
    p.add_argument("--fresh", action="store_true", help="forget the rows in --jsonl")
    p.add_argument("--jsonl", type=Path, help="results, one line a row (default: beside --out)")
    p.add_argument("--out", type=Path, default=ROOT / "docs/results/gpu.md")
    a = p.parse_args(argv)
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "no CUDA device is available: run this on a machine with one\n"
            "  without one: python -m tools.gpu_check --device cpu --smoke --out runs/smoke.md"
        )
        return 2
    if a.device == "cpu" and not a.smoke:
        p.error("on a CPU only --smoke makes sense")
    a.backend = "eager" if a.smoke else "inductor"
    a.jsonl = a.jsonl or a.out.with_suffix(".jsonl")
    warnings.simplefilter("ignore")
    run = Run(a)
    print(machine(run.device), flush=True)
    if "parity" in a.sections:
        # no more than a third of the time: compiling each form of each model is slow
        limit = run.left - float(a.seconds) / 3
        for name, check, tol in parity(run):
            if run.rows.get(name, {}).get("ok"):
                continue
            if run.left < limit:
                run.add(name, section="parity", ok=False, error="not reached: the time ran out")
                continue
            try:
                value = check()
                run.add(name, section="parity", ok=value <= tol, difference=value)
            except Exception as e:
                run.add(name, section="parity", ok=False, error=error_text(e))
    for case in cases(a.smoke):
        if case.section in a.sections:
            time_case(run, case)
    run.write()
    return 0 if all(r["ok"] for r in run.rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
