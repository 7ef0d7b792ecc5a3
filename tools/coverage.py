"""Which published architectures work: capture, exact gradients, feedback steps, tangents.

    python tools/coverage.py --zoo timm              # everything not measured yet, then a summary
    python tools/coverage.py --zoo torchvision --only resnet18 vit_b_16 --again
    python tools/coverage.py --table                 # only docs/coverage.md, from what is there

Each model runs in a process of its own under a time and a memory limit, in float64 on the CPU and
without a compiler (``backend="eager"``); nothing is downloaded, weights are random. One JSON line a
model is written as soon as it is known, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

# the oracles are the tests' own
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import apart
import grapefx
from coverage_page import document, line, summary
from grapefx.capture import flatten_call
from grapefx.choices import resolve
from grapefx.passes.tangent import add_tangents
from grapefx.plan import Plan, build_plan
from zoos import ZOOS, Sample, cut

# by name: the tests are no part of what mypy checks
oracle = importlib.import_module("tests.passes.tangent_oracle")
loss_of = importlib.import_module("tests.zoo").loss_of

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-6
# every map is allowed: whether one fits is a matter of size, not of the architecture
OPTIONS: dict[str, Any] = {"backend": "eager", "calib_every": None, "feedback_budget": 2**40}
# bytes of float64 maps above which points are placed by block: a step holds each five times
MAP_LIMIT = 0.5 * 2**30
RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p", "attn_drop", "layerdrop")


class Mismatch(Exception):
    """A number is wrong: the failure that matters most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a zoo and write the table."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process that has used a GPU cannot be forked
    args = parse_args(argv)
    known = apart.read(args.jsonl, lambda r: (r["zoo"], r["name"]))
    if args.zoo:
        jobs = [
            (args.zoo, name)
            for name in ZOOS[args.zoo]()
            if (not args.only or name in args.only)
            and (args.again or (args.zoo, name) not in known)
        ]
        unknown = sorted(set(args.only or ()) - set(ZOOS[args.zoo]()))
        if unknown:
            print(f"{args.zoo} has no model {', '.join(unknown)}", file=sys.stderr)
            return 2
        print(f"{len(jobs)} models of {args.zoo} to run", flush=True)
        if len(jobs) > 1:
            warm_up()
        for k, (zoo, name) in enumerate(jobs):
            row = guarded(zoo, name, args.timeout, args.memory * 2**30, args.depth)
            apart.append(args.jsonl, row)
            known[zoo, name] = row
            print(f"[{k + 1}/{len(jobs)}] {line(row)}", flush=True)
    if args.table:
        args.out.write_text(document(known.values()))
        print(f"wrote {args.out}")
    shown = [r for r in known.values() if not args.zoo or r["zoo"] == args.zoo]
    print(summary(shown))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--zoo", choices=sorted(ZOOS), help="which models to run")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these models of the zoo only")
    p.add_argument("--again", action="store_true", help="run models with a result once more")
    p.add_argument(
        "--jsonl",
        type=Path,
        default=ROOT / "docs/results/coverage.jsonl",
        help="results, one line a model (default: docs/results/coverage.jsonl)",
    )
    p.add_argument(
        "--depth",
        type=int,
        default=0,
        metavar="N",
        help="keep N of each run of equal blocks (default: all): the same code in less time",
    )
    p.add_argument("--table", action="store_true", help="write the table of all results")
    p.add_argument("--out", type=Path, default=ROOT / "docs/coverage.md", help="where to")
    p.add_argument("--timeout", type=float, default=240, help="seconds a model may take")
    p.add_argument("--memory", type=float, default=16, help="GiB that a model may take")
    args = p.parse_args(argv)
    if not args.zoo and not args.table:
        p.error("name a --zoo, or ask for the --table")
    return args


# one model in a process


def warm_up() -> None:
    """Load what torch loads on first use, before there are children to do it each anew."""
    torch.set_num_threads(1)
    small = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)
    )
    for _ in examine(Sample(small, (torch.randn(3, 3, 8, 8),)), 0):
        pass


def guarded(zoo: str, name: str, timeout: float, memory: float, depth: int) -> apart.Row:
    """One model in a process of its own; a crash, a hang or a hunger becomes its reason."""
    out = apart.run(functools.partial(_report, zoo, name, depth), timeout=timeout, memory=memory)
    row: apart.Row = {"zoo": zoo, "name": name, **out.row}
    if "ok" not in row:
        row |= {"ok": False, "reason": f"{row.get('stage', 'build')}: {out.stop or out.death}"}
    return row | {"rss_mib": out.rss_mib, "seconds": out.seconds}


def _report(zoo: str, name: str, depth: int, send: Callable[[apart.Row], None]) -> None:
    row: apart.Row = {}
    try:
        for stage, found in check(zoo, name, depth):
            row |= found
            row["stage"] = stage
            send(row)
        row["ok"] = True
    except BaseException as e:  # whatever it is, it is this model's result
        row |= {"ok": False, "reason": reason(row.get("stage", "build"), e)}
        if os.environ.get("GRAPEFX_COVERAGE_TRACE"):
            traceback.print_exc()
    send(row)


def reason(stage: str, error: BaseException) -> str:
    """One line: where it failed and the first line of the error."""
    kind = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
    return f"{stage}: {kind}{apart.one_line(error)}"[:300]


def check(zoo: str, name: str, depth: int = 0) -> Iterator[tuple[str, apart.Row]]:
    """The stages, each announced before it runs with what is known by then."""
    yield "build", {}
    torch.manual_seed(0)
    yield from examine(ZOOS[zoo]()[name](), depth)


def examine(sample: Sample, depth: int) -> Iterator[tuple[str, apart.Row]]:
    """``check`` from the model on."""
    sample = prepared(sample)
    model, args, kwargs = sample.model, sample.args, sample.kwargs
    if depth:
        cuts = cut(model, depth, lambda: model(*args, **kwargs))
        sample.note = "; ".join(n for n in (sample.note, cuts) if n)
    yield (
        "eager",
        {
            "mode": "train" if model.training else "eval",
            "note": sample.note,
            "parameters": sum(p.numel() for p in model.parameters()),
        },
    )
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    wanted = _taken(model)
    _restore(model, buffers)
    yield "capture", {}
    _, options = resolve("grape", OPTIONS)
    plan = build_plan(model, args, kwargs, method="bp", options=options)
    if plan.maps and sum(2 * m.bytes for m in plan.maps) > MAP_LIMIT:
        _, options = resolve("grape", OPTIONS | {"granularity": "block"})
        plan = build_plan(model, args, kwargs, method="bp", options=options)
    points: dict[str, Any] = {"points": len(plan.layers), "nodes": len(plan.joint.gm.graph.nodes)}
    points |= {"granularity": options.granularity, "captured": True}
    yield "bp", points
    found = step(model, sample, "bp", plan)
    _restore(model, buffers)
    error, worst = _apart(wanted, _taken(model))
    off = abs(float(found - loss.detach())) / max(abs(float(loss.detach())), 1e-12)
    if not max(error, off) <= TOLERANCE:
        what = f"gradient of {worst}" if error >= off or error != error else "loss"
        raise Mismatch(f"relative error {max(error, off):.1e} ({what})")
    del wanted
    for k, method in enumerate(("dfa", "grape")):
        yield method, {} if k else {"bp_error": error}
        step(model, sample, method, plan)
        _restore(model, buffers)
        bad = [n for n, g in _taken(model).items() if g is not None and not g.isfinite().all()]
        if bad:
            raise Mismatch(f"{len(bad)} gradients are not finite ({bad[0]})")
    yield "tangent", {"dfa": True, "grape": True}
    yield "done", tangent(model, sample, plan)


def prepared(sample: Sample) -> Sample:
    """In float64, without randomness, and without parameters that start at one value.

    A scale of 1e-6 or a bias of 0 would hide an error in what it multiplies.
    """
    model = sample.model.double()
    for module in model.modules():
        for key in RATES:
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and p.is_floating_point() and bool((p == p.flatten()[0]).all()):
                p.add_(torch.rand_like(p) * 0.3)
    model.train(sample.train)
    sample.args = tuple(_double(a) for a in sample.args)
    sample.kwargs = {k: _double(v) for k, v in sample.kwargs.items()}
    return sample


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def step(model: nn.Module, sample: Sample, method: str, plan: Plan) -> Tensor:
    """One training step of ``grapefx.compile``; the one capture serves every method."""
    options = {**OPTIONS, "granularity": plan.options.granularity}
    net = grapefx.compile(model, method=method, **options)

    def shared(*_: Any, method: Any, options: Any, **__: Any) -> Plan:
        return plan.for_method(method, options)

    with mock.patch("grapefx.runtime.captures.build_plan", shared):
        loss = loss_of(net(*sample.args, **sample.kwargs))
    loss.backward()
    return loss.detach()


def _taken(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients, which leave the model."""
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for n, b in model.named_buffers():
            if n in buffers:
                b.copy_(buffers[n])


def _apart(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> tuple[float, str]:
    """The largest relative error of a gradient. Rounding in one that is zero does not count."""
    largest = max((float(g.norm()) for g in a.values() if g is not None), default=0.0)
    if not 0 < largest < float("inf"):
        raise Mismatch(f"the eager gradients are no measure (largest norm {largest})")
    worst = (0.0, "")
    for name, x in a.items():
        y = b[name]
        if x is None or y is None:
            rest = x if y is None else y
            if rest is not None and rest.any():
                return float("inf"), f"{name}, of which one side has none"
            continue
        error = float((x - y).norm()) / max(float(x.norm()), 1e-9 * largest)
        if error != error:
            return error, name
        if error > worst[0]:
            worst = (error, name)
    return worst


def tangent(model: nn.Module, sample: Sample, plan: Plan) -> dict[str, Any]:
    """The tangents at the error tap against forward AD of the captured graph, same noise."""
    if not plan.layers:
        return {"tangent": "skipped: no feedback point"}
    leaves, _ = flatten_call(sample.args, sample.kwargs)
    inputs = tuple(x for x in leaves if isinstance(x, Tensor))
    values = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **plan.captured.constants,
    }
    case = oracle.Case(plan.captured, plan.placement, values, inputs, 0, plan.joint, {})
    probe = oracle._Noisy(case.cap, case.placed, {})
    it = iter(inputs)
    with torch.no_grad():
        probe.run(
            *[
                next(it) if s.role == "input" else values[s.name].clone()
                for s in plan.captured.inputs
            ]
        )
    generator = torch.Generator().manual_seed(1)
    case.noise = {
        i: torch.randn(s, generator=generator, dtype=torch.float64) for i, s in probe.shapes.items()
    }
    made = add_tangents(
        plan.joint,
        plan.layers,
        batch=plan.batch,
        batch_size=plan.batch_size,
        streams=(tuple(range(len(plan.layers))),),
        batch_stats="full",
    )
    ours = case.run(made)
    theirs, how = _expected(case)
    tolerance = 1e-3 if how == "differences" else TOLERANCE
    scale = float(theirs.norm())
    if not scale > 0:
        raise Mismatch("no tangent reaches the error tap: nothing was compared")
    error = float((ours - theirs).norm()) / scale
    if not error <= tolerance:
        raise Mismatch(f"tangents differ from {how} by {error:.1e}")
    return {"tangent": how, "tangent_error": error, "derived": len(made.derived)}


def _expected(case: Any) -> tuple[Tensor, str]:
    """Forward AD; for custom autograd functions the gradients transposed, which they declare.

    Differences where an operator has no forward AD (some double-precision kernels).
    """
    zero = {i: torch.zeros_like(v) for i, v in case.noise.items()}
    for node in case.cap.gm.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            # the math kernel of attention lays its result out differently
            node.target = torch.ops.aten.reshape.default
    if case.has_functions():
        return case.transposed(), "gradients"
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(case._eager, (zero,), (case.noise,))[1], "forward AD"
    except (NotImplementedError, RuntimeError):
        h = 1e-6
        up = case._eager({i: h * v for i, v in case.noise.items()})
        down = case._eager({i: -h * v for i, v in case.noise.items()})
        return (up - down) / (2 * h), "differences"


if __name__ == "__main__":
    sys.exit(main())
