"""A model and a call become a plan: capture, placement of feedback points, the joint trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from grapefx.capture import Capture, Scope, capture, module_tree
from grapefx.errors import CaptureError, PlacementError, tell
from grapefx.ir import Captured, StepGraph
from grapefx.maps import plain_maps
from grapefx.methods import Method, get_method
from grapefx.options import Options
from grapefx.passes.differentiate.joint import trace_joint
from grapefx.passes.graph import markers
from grapefx.passes.graph.annotate import mark_forward
from grapefx.passes.graph.custom_functions import expand
from grapefx.passes.graph.folds import batch_folds
from grapefx.passes.graph.verify import check
from grapefx.passes.place.leak import with_edges
from grapefx.passes.place.placement import Placement
from grapefx.passes.place.sweep import sample_shape
from grapefx.plan.feedback_points import place_for, refuse_sparse
from grapefx.plan.plan import Plan, check_feedback
from grapefx.plan.request import resolve
from grapefx.torch_compat import (
    batch_symbol,
    release,
)


def build_plan(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    method: str | Method = "grape",
    options: Options | None = None,
    **choices: Any,
) -> Plan:
    """Capture one call of ``model`` and lay out its feedback; nothing is compiled.

    ``choices`` are options of ``grapefx.compile`` or of the method.
    """
    if options is None:
        chosen, options = resolve(method, choices)
    else:
        chosen = get_method(method, choices)
    inner = getattr(model.__dict__.get("grapefx"), "_installed", False) is True
    return plan_call(Scope(model, args, kwargs or {}, inner), chosen, options)


def plan_call(
    scope: Scope,
    method: Method,
    options: Options,
    others: frozenset[tuple[int, int]] = frozenset(),
    numbers: frozenset[str] = frozenset(),
) -> Plan:
    """``build_plan`` with further symbols: ``others`` and ``numbers`` as in ``capture``."""
    how: dict[str, Any] = {
        "front_end": options.capture, "batch_dim": options.batch_dim, "numbers": numbers
    }  # fmt: skip
    if others:
        try:
            found = capture(scope, **how, others=others)
            _check_symbolic(found, others)
            return _plan(scope.model, found, method, options)
        except _SizedError as e:
            tell(f"{e}; each new length is captured and compiled anew: pad to a few lengths")
    try:
        return _plan(scope.model, capture(scope, **how), method, options)
    except _SizedError as e:
        tell(f"{e}; each new batch size is captured again")
        return _plan(scope.model, capture(scope, **how, fixed=True), method, options)


def build_forward(
    scope: Scope,
    options: Options,
    others: frozenset[tuple[int, int]] = frozenset(),
    numbers: frozenset[str] = frozenset(),
) -> tuple[Capture, StepGraph]:
    """Capture one call for inference: the forward graph alone. Arguments as ``plan_call``."""
    how: dict[str, Any] = {
        "front_end": options.capture, "batch_dim": options.batch_dim, "numbers": numbers
    }  # fmt: skip
    with torch.no_grad():
        if others:
            try:
                found = capture(scope, **how, others=others)
                _check_symbolic(found, others)
                step = _forward(found)
                _refuse_fixed(found, step)
                return found, step
            except _SizedError as e:
                tell(f"{e}; each new length is captured and compiled anew: pad to a few lengths")
        found = capture(scope, **how)
        return found, _forward(found)


class _SizedError(Exception):
    """A plan cannot have a symbolic size; the message says which and why."""


def _plan(model: nn.Module, found: Capture, chosen: Method, options: Options) -> Plan:
    captured = found.captured
    parameters = dict(module_tree.named_parameters(model, remove_duplicate=False))
    trainable = {n for n, p in parameters.items() if p.requires_grad}
    inputs = [e for e, s in zip(found.examples, captured.inputs, strict=True) if s.role == "input"]
    frozen = not trainable and any(e.requires_grad for e in inputs)
    if frozen:  # nothing learns, an input waits for its gradient (through a frozen discriminator)
        chosen = get_method("bp", {})
        options = options.without("exact_rows")
        options = replace(options, residual="cut", points=None, mean_field=None)
    if options.residual == "leak":
        captured = with_edges(captured)
    if frozen:
        placement = Placement((), (), ())
    else:
        placement = place_for(captured, trainable, chosen, options, found.batch_size)
    if not chosen.exact:
        refuse_sparse(captured)
    try:
        joint = trace_joint(captured, placement, found.examples, trainable)
    except RuntimeError as e:
        if captured.batch is None or "SymIntArrayRef" not in str(e):
            raise
        raise _SizedError(
            "a derivative of torch's cannot have a symbolic batch size (affine_grid)"
        ) from e
    for graph in (captured.gm.graph, joint.gm.graph):
        release(n.meta.get("val") for n in graph.nodes)
    layers = tuple(c.layer for c in placement.cuts)
    mark_forward(joint, layers)
    check(joint, "joint")
    batch = _batch_of(joint, captured, options.batch_dim)
    if captured.batch is not None and batch is None:
        raise CaptureError("the batch size became fixed while the backward graph was traced")
    folds = batch_folds(joint.gm.graph, batch, found.batch_size)
    taps = markers.find(joint.gm.graph, markers.TAP)
    shapes, tap_folds = [], []
    for i in sorted(taps):
        fold = folds.get(taps[i])
        if fold is None:
            raise PlacementError(f"the error tap {taps[i].name!r} does not keep the batch")
        shapes.append(sample_shape(taps[i], fold))
        tap_folds.append((fold.dim, fold.outer, fold.inner))
    maps, rows = plain_maps(layers, shapes, tap_folds)
    plan = Plan(
        capture=found,
        captured=captured,
        placement=placement,
        joint=joint,
        layers=layers,
        full_maps=maps,
        full_rows=rows,
        method=chosen,
        options=options,
        batch=batch,
        batch_size=found.batch_size,
        differentiable=_differentiable(joint, captured),
    )
    check_feedback(plan)
    _check_lengths(plan)
    return plan


def _forward(found: Capture) -> StepGraph:
    step = trace_joint(found.captured, Placement((), (), ()), found.examples, set(), backward=False)
    for graph in (found.captured.gm.graph, step.gm.graph):
        release(n.meta.get("val") for n in graph.nodes)
    expand(step.gm.graph)
    step.gm.recompile()
    return check(step, "forward")


def _differentiable(joint: StepGraph, captured: Captured) -> tuple[bool, ...]:
    names = {s.name for s, _ in joint.select("cotangent")}
    return tuple((name or str(i)) in names for i, name in enumerate(captured.outputs))


def _batch_of(joint: StepGraph, captured: Captured, batch_dim: int) -> Any:
    """The batch symbol in the joint graph (a fresh one: the joint trace has its own symbols)."""
    if captured.batch is None:
        return None
    _, node = joint.select("input")[captured.lead]
    return batch_symbol(node.meta["val"].shape[batch_dim])


def _check_lengths(plan: Plan) -> None:
    """Raise ``_SizedError`` where a graph or a map cannot do with a symbolic size."""
    symbols = plan.capture.symbols()
    if len(symbols) == (plan.captured.batch is not None):
        return
    if plan.method.full_tangents and not plan.method.exact:
        raise _SizedError(f"method {plan.method.name!r} adds up over the tokens of a sample")
    if plan.mean_field is not None:
        raise _SizedError("mean_field averages over the batch alone")
    if plan.exact_rows is not None:
        raise _SizedError("exact_rows follows the batch alone, not other lengths that change")
    maps = () if plan.method.exact else plan.maps
    cuts = markers.find(plan.joint.gm.graph, markers.CUT)
    for m in maps:
        dims = _lengths(cuts[m.layer.index], plan.batch)
        if m.rows == "token":
            dims = [d for d in dims if d != (1 if m.layer.fold[0] == 0 else 0)]
        if dims:
            raise _SizedError(
                f"the feedback map of {m.layer.name!r} has a size that depends on dim {dims[0]} of "
                "its value, which changes between calls"
            )
    wide = any(m.rows != "token" for m in maps)
    for i, tap in markers.find(plan.joint.gm.graph, markers.TAP).items():
        if wide and (dims := _lengths(tap, plan.batch)):
            raise _SizedError(
                f"feedback maps have a size that depends on dim {dims[0]} of the error (tap {i}), "
                "which changes between calls"
            )
    _refuse_fixed(plan.capture, plan.joint)
    for step in (plan.graph(kind) for kind in plan.kinds()):
        _refuse_fixed(plan.capture, step)


def _check_symbolic(found: Capture, others: frozenset[tuple[int, int]]) -> None:
    """Raise ``_SizedError`` where none of the lengths that change became a symbol."""
    if len(found.symbols()) == (found.captured.batch is not None):
        leaf, dim = min(others)
        raise _SizedError(
            f"dim {dim} of input {leaf} is a number in the model's graph (a recurrent layer is "
            "written out over time, and len(x) or int(n) are numbers)"
        )


def _lengths(node: torch.fx.Node, batch: Any) -> list[int]:
    """The dims of a value that have a symbol beside the batch."""
    exprs = [batch_symbol(s) for s in node.meta["val"].shape]
    return [d for d, e in enumerate(exprs) if e is not None and e.free_symbols - {batch}]


def _refuse_fixed(found: Capture, step: StepGraph) -> None:
    """Raise ``_SizedError`` where a size is a symbol in the capture and a number in a graph."""
    nodes = {s.name: n for s, n in step.select("input")}
    for slot, node in zip(found.captured.inputs, found.captured.placeholders(), strict=True):
        if slot.role != "input":
            continue
        for d, size in enumerate(node.meta["val"].shape):
            now = batch_symbol(nodes[slot.name].meta["val"].shape[d])
            if batch_symbol(size) is not None and (now is None or not now.free_symbols):
                raise _SizedError(
                    f"dim {d} of input {slot.name} has a fixed length in the graph (a recurrent "
                    "layer is written out over time)"
                )
