"""The stages through which ``tools.coverage`` takes a model, uncompiled and with Inductor."""

from __future__ import annotations

import importlib
import time
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import grapefx
from grapefx import CaptureError
from grapefx.capture import flatten_call
from grapefx.passes.differentiate.tangent import add_tangents
from grapefx.plan import Plan, build_plan, resolve
from grapefx.torch_compat import pytree
from tools.common.results import Row
from tools.coverage.zoos import Sample, cut

# the tests' own oracles, by name: the tests are no part of what mypy checks
oracle = importlib.import_module("tests.passes.tangent_oracle")
loss_of = importlib.import_module("tests.zoo").loss_of

TOLERANCE = 1e-6
# every map is allowed: whether one fits is a matter of size, not of the architecture
OPTIONS: dict[str, Any] = {"backend": "eager", "calib_every": None, "feedback_budget": 2**40}
# bytes of float64 maps above which points are placed by block: a step holds each five times
MAP_LIMIT = 0.5 * 2**30
RATES = ("p", "drop_prob", "drop_rate", "dropout", "dropout_p", "attn_drop", "layerdrop")

# what is compiled: method and options
COMPILED: dict[str, tuple[str, dict[str, Any]]] = {
    "bp": ("bp", {}),
    "grape": ("grape", {}),
    "grape on half": ("grape", {"tangent_fraction": 0.5}),
}

Stages = Iterator[tuple[str, Row]]
Call = tuple[tuple[Any, ...], dict[str, Any]]
Outcome = tuple[Tensor, dict[str, Tensor | None]]  # a step's loss and gradients


class Mismatch(Exception):
    """A number is wrong: the failure that matters most."""


def examine(sample: Sample, depth: int) -> Stages:
    """Capture, exact gradients, feedback steps and tangents, as the graphs say (no compiler)."""
    sample = prepared(sample)
    yield "eager", _described(sample, depth)
    model, args, kwargs = sample.model, sample.args, sample.kwargs
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss = loss_of(model(*args, **kwargs))
    loss.backward()
    wanted = _taken(model)
    _restore(model, buffers)
    yield "capture", {}
    plan = _planned(sample)
    yield "bp", _points(plan)
    found = step(model, sample, "bp", plan)
    _restore(model, buffers)
    error = _agree((loss.detach(), wanted), (found, _taken(model)))
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


def examine_captured(sample: Sample, depth: int) -> Stages:
    """Capture by Dynamo and exact gradients of ``bp``; what capture="export" takes for the same.

    CPU seconds of capture, placement and the joint graph together; every other model begins with
    "export", since the first trace in a process loads more.
    """
    sample = prepared(sample)
    yield "eager", _described(sample, depth)
    model = sample.model
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss = loss_of(model(*sample.args, **sample.kwargs))
    loss.backward()
    wanted = _taken(model)
    _restore(model, buffers)
    found: Row = {}
    kinds = ["dynamo", "export"]
    if zlib.crc32(type(model).__name__.encode()) % 2:
        kinds.reverse()
    for kind in kinds:
        yield "capture" if kind == "dynamo" else "export", found
        begin = time.process_time()
        try:
            planned = _planned(sample, capture=kind)
        except CaptureError as e:
            if kind == "dynamo":
                raise
            found["export_fails"] = str(e).splitlines()[0]
            continue
        found[f"{kind}_s"] = time.process_time() - begin
        if kind == "dynamo":
            plan = planned
    yield "bp", found | _points(plan)
    ours = step(model, sample, "bp", plan)
    error = _agree((loss.detach(), wanted), (ours, _taken(model)))
    yield "done", {"bp_error": error}


def examine_compiled(sample: Sample, depth: int) -> Stages:
    """Inductor against no compiler: gradients of ``bp`` and ``grape``, also with tangents on half
    of the batch, each at two batch sizes (the first has fixed sizes, the second symbolic ones).
    """
    sample = prepared(sample)
    yield "capture", _described(sample, depth)
    plan = _planned(sample)
    calls = [(sample.args, sample.kwargs)]
    if plan.captured.batch is not None:
        calls.append(_fewer(sample, plan))
    options = OPTIONS | {"granularity": plan.options.granularity}
    seen = _points(plan) | {"sizes": len(calls)}
    for stage, (method, own) in COMPILED.items():
        yield stage, seen
        chosen = options | own
        ours = grapefx.compile(sample.model, method=method, **(chosen | {"backend": "inductor"}))
        plain: Any = sample.model
        if method != "bp":
            plain = grapefx.compile(sample.model, method=method, **chosen)
        error = max(_difference(sample.model, plain, ours, call) for call in calls)
        seen = {f"{stage} error": error}
    yield "done", seen


def _difference(model: nn.Module, plain: Any, ours: Any, call: Call) -> float:
    """How far a step of ``ours`` is from one of ``plain``."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    found = []
    for net in (plain, ours):
        loss = loss_of(net(*call[0], **call[1]))
        loss.backward()
        found.append((loss.detach(), _taken(model)))
        _restore(model, buffers)
    return _agree(*found)


def _agree(wanted: Outcome, had: Outcome) -> float:
    """The relative error of loss and gradients; ``Mismatch`` where it is not small."""
    error, worst = relative_error(wanted[1], had[1])
    off = abs(float(had[0] - wanted[0])) / max(abs(float(wanted[0])), 1e-12)
    if not max(error, off) <= TOLERANCE:
        what = f"gradient of {worst}" if error >= off or error != error else "loss"
        raise Mismatch(f"relative error {max(error, off):.1e} ({what})")
    return max(error, off)


def _fewer(sample: Sample, plan: Plan) -> Call:
    """The same call with one sample less."""
    leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    numbers = [int(s.name) for s in plan.captured.inputs if s.role == "input"]
    for k in (numbers[i] for i in plan.captured.dynamic):
        leaves[tensors[k]] = leaves[tensors[k]][:-1].contiguous()
    call: Call = pytree.tree_unflatten(leaves, spec)
    return call


def _described(sample: Sample, depth: int) -> Row:
    """What is known before anything runs; with ``depth``, repeats of blocks are dropped."""
    model = sample.model
    if depth:
        cuts = cut(model, depth, lambda: model(*sample.args, **sample.kwargs))
        sample.note = "; ".join(n for n in (sample.note, cuts) if n)
    return {
        "mode": "train" if model.training else "eval",
        "note": sample.note,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _planned(sample: Sample, **chosen: Any) -> Plan:
    """The capture, with points by block where those by layer would take too much memory."""
    for granularity in ("layer", "block"):
        _, options = resolve("grape", OPTIONS | {"granularity": granularity} | chosen)
        plan = build_plan(sample.model, sample.args, sample.kwargs, method="bp", options=options)
        if not plan.maps or sum(2 * m.bytes for m in plan.maps) <= MAP_LIMIT:
            break
    return plan


def _points(plan: Plan) -> Row:
    return {
        "points": len(plan.layers),
        "nodes": len(plan.joint.gm.graph.nodes),
        "granularity": plan.options.granularity,
        "captured": True,
    }


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

    def shared(_: Any, method: Any, options: Any, *__: Any) -> Plan:
        return plan.for_method(method, options)

    with mock.patch("grapefx.runtime.captures.plan_call", shared):
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


def relative_error(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> tuple[float, str]:
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
    traced = {s.name: e for s, e in zip(plan.captured.inputs, plan.capture.examples, strict=True)}
    values = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
        **traced,
    }
    case = oracle.Case(plan.captured, plan.placement, values, inputs, 0, plan.joint, {})
    probe = oracle._Noisy(case.cap, case.placed, {})
    with torch.no_grad():
        probe.run(
            *[
                inputs[int(s.name)] if s.role == "input" else values[s.name].clone()
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
