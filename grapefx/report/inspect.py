"""Implements ``grapefx.inspect`` and ``net.explain()``: from a model to the report on its step.

A model is captured once as a graph; every method asked for gets a plan (where it cuts the backward
pass, which feedback maps it needs) and from it the graphs of its training steps, which the report
is built from. Everything runs on fake tensors: nothing is computed.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from grapefx.analysis import Dag, DeviceModel, build_dag
from grapefx.capture import module_tree
from grapefx.capture.untraceable import refuse_untraceable
from grapefx.errors import CaptureError, GrapefxWarning, InputError, OptionError, nearest
from grapefx.methods import Method, get_method, names, option_names
from grapefx.options import OPTION_NAMES, Options
from grapefx.passes.runner import PassRun
from grapefx.plan import Plan, build_plan
from grapefx.report.build import build_report, opened
from grapefx.report.from_plan import method_graphs, parameter_count
from grapefx.report.records import PassRow
from grapefx.report.report import Report
from grapefx.torch_compat import FakeTensorMode, pytree

METHODS = ("bp", "dfa", "grape")


def inspect(
    model: nn.Module,
    example: Any,
    method: str | Method | Sequence[str | Method] = METHODS,
    *,
    device: DeviceModel | str = "cpu-2core",
    workers: Sequence[int | None] = (1, 2, 4, 8, None),
    batch: int | None = None,
    calib_every: int | str | None = None,
    steps_per_epoch: int | None = None,
    name: str | None = None,
    **options: Any,
) -> Report:
    """Inspect a model without training, compiling or running it.

    Args:
        model: any module that Dynamo can follow as one graph, in the mode that it is trained in.
            Its tensors may be on the meta device: nothing is allocated then.
        example: one call's arguments: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Only shapes and dtypes matter.
        method: one method or several; BP is always added, as the baseline.
        device: a bundled device model's name, a YAML file, or a model.
        workers: numbers of workers to schedule for; None is unlimited.
        batch: report for this batch size instead of the example's.
        calib_every: T, one full backward step every T epochs; None leaves it out. As ``compile``'s.
        steps_per_epoch: mini-batches an epoch, for the share of calibration.
        name: the model's name in the report.
        options: options of ``grapefx.compile`` (not ``preset``, ``inplace``) and of the methods.

    Returns:
        The report: ``print`` it, or see its ``html()``, ``json()``, ``to_dict()``.

    Raises:
        GrapefxError: what ``grapefx.compile`` raises, but for ``BudgetError``: feedback maps that
            are too large are shown with their size, and a warning.
        InputError: the model does not accept the example; the message names the layer.
    """
    plans = build_plans(model, example, method, calib_every=calib_every, **options)
    return report_plans(
        plans,
        device=device,
        workers=workers,
        batch=batch,
        calib_every=_epochs(plans[-1].options),
        steps_per_epoch=steps_per_epoch,
        name=name or type(model).__name__,
    )


def build_plans(
    model: nn.Module,
    example: Any,
    method: str | Method | Sequence[str | Method] = METHODS,
    **options: Any,
) -> list[Plan]:
    """A plan a method, BP's first, from one capture of the model. Arguments as ``inspect``."""
    if not isinstance(model, nn.Module):
        raise OptionError(f"grapefx.inspect takes an nn.Module, not {type(model).__name__}")
    refuse_untraceable(model)
    asked = [method] if isinstance(method, (str, Method)) else list(method)
    chosen = _methods(asked, options)
    opts = Options(**{k: v for k, v in options.items() if k in OPTION_NAMES})
    args, kwargs = call_of(example)
    if not any(p.requires_grad for p in module_tree.parameters(model)):
        raise InputError("the model has no trainable parameter: there is no backward to inspect")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GrapefxWarning)  # the report shows notes itself
            first = build_plan(model, args, kwargs, method="bp", options=_for_bp(opts))
    except CaptureError as e:
        raise locate(model, args, kwargs) or e from e
    plans = [first]
    for m in chosen:
        if m.name != "bp":
            plans.append(first.for_method(m, opts))
    return plans


def report_plans(
    plans: Sequence[Plan],
    *,
    device: DeviceModel | str = "cpu-2core",
    workers: Sequence[int | None] = (1, 2, 4, 8, None),
    batch: int | None = None,
    calib_every: float | None = None,
    steps_per_epoch: int | None = None,
    name: str = "model",
) -> Report:
    """The report on plans of one capture, BP's among them."""
    first = plans[0]
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise InputError(f"batch={batch!r} must be a positive integer")
    if isinstance(workers, int) or not all(w is None or isinstance(w, int) for w in workers):
        raise InputError(f"workers={workers!r} must be a list of integers, None for unlimited")
    if first.captured.batch is None:
        if batch not in (None, first.batch_size):
            raise InputError(
                f"batch={batch} was asked for, but the graph holds for {first.batch_size} only "
                "(a first batch of 1, or a model that fixes its batch size): give an example input "
                f"of batch {batch}"
            )
        size, evaluate = first.batch_size, None
    else:
        size = evaluate = batch or first.batch_size
    return build_report(
        [method_graphs(p) for p in plans],
        model=name,
        parameters=parameter_count(first),
        device=device,
        workers=workers,
        batch=evaluate,
        shown_batch=size,
        align_every=first.options.align_every,
        calib_every=calib_every,
        steps_per_epoch=steps_per_epoch,
    )


def explain(
    plan: Plan,
    name: str,
    *,
    device: DeviceModel | str = "cpu-2core",
    workers: Sequence[int | None] = (1, 2, 4, 8, None),
    batch: int | None = None,
    passes: bool = False,
    chosen: str = "",
    lowered: Mapping[str, Sequence[PassRun]] = MappingProxyType({}),
) -> Report:
    """The report on a plan that is in use, beside BP on the same capture (``net.explain()``).

    ``passes``: also what each compiler pass did; ``lowered`` are those that ran behind the plan, by
    kind of step. ``chosen``: what the preset added, and why.
    """
    o = plan.options
    plans = [plan] if plan.method.name == "bp" else [plan.for_method("bp", _for_bp(o)), plan]
    report = report_plans(
        plans,
        device=device,
        workers=workers,
        batch=batch,
        calib_every=_epochs(o),
        steps_per_epoch=o.steps_per_epoch,
        name=name,
    )
    report = replace(report, chosen=chosen)
    if not passes:
        return report
    rows = [
        PassRow(kind, run.name, run.before, run.after, run.seconds)
        for kind in plan.kinds()
        for run in (*plan.passes.get(kind, ()), *lowered.get(kind, ()))
    ]
    return replace(report, passes=tuple(rows))


def shown_dag(plan: Plan, device: DeviceModel | str, batch: int | None) -> tuple[str, Dag]:
    """A plan's most frequent kind of step (an aligning one on ties), and its dependencies."""
    kinds = [k for k in plan.kinds() if k != "calibration"] or ["calibration"]
    align = "align" in kinds and plan.options.align_every == 1
    kind = "align" if align else kinds[0]
    gm, loss = opened(plan.graph(kind))
    size = (batch or plan.batch_size) if plan.captured.batch is not None else None
    return kind, build_dag(method_graphs(plan).cost(gm, size), device=device, loss=loss)


def _for_bp(options: Options) -> Options:
    """Without what only methods with feedback maps or tangents take."""
    return replace(
        options.without("exact_rows"),
        perturb="activation",
        align_warmup=0,
        calib_forget=None,
        radial=False,
        mean_field=None,
    )


def _epochs(options: Options) -> int | None:
    """Epochs between calibrations, where they are counted in epochs."""
    every = options.calib_every
    return every if isinstance(every, int) and options.calib_unit == "epoch" else None


def call_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that an example stands for."""
    if isinstance(example, dict):
        return (), dict(example)
    if isinstance(example, tuple) and not hasattr(example, "_fields"):
        return example, {}
    return (tuple(example) if isinstance(example, list) else (example,)), {}


def locate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InputError | None:
    """The error of a plain call without data, if it fails: which layer rejects what shape."""
    inside: list[tuple[str, nn.Module, Any]] = []
    deepest: list[tuple[str, nn.Module, Any]] = []
    handles = []
    for path, module in module_tree.named_modules(model):

        def enter(m: nn.Module, a: Any, k: Any, path: str = path) -> None:
            inside.append((path, m, (a, k)))
            deepest[:] = inside

        def leave(m: nn.Module, a: Any, out: Any) -> None:
            inside.pop()
            deepest[:] = inside

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        with _dry(args, kwargs) as (a, k):
            model(*a, **k)
    except Exception as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        if "data-dependent" in first or "meta tensors" in first or not deepest:
            return None
        path, module, call = deepest[-1]
        got = ", ".join(
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
            for t in pytree.tree_leaves(call)
            if isinstance(t, torch.Tensor)
        )
        where = f"layer {path!r} ({type(module).__name__})" if path else type(module).__name__
        return InputError(
            f"the model does not accept the example input: {where} fails on {got or 'its input'}\n"
            f"  {type(e).__name__}: {first}"
        )
    finally:
        for h in handles:
            h.remove()
    return None


@contextlib.contextmanager
def _dry(args: Any, kwargs: Any) -> Iterator[Any]:
    """A call without data: on fake tensors, or on the model's own if they are on meta."""
    leaves = pytree.tree_leaves((args, kwargs))
    if any(isinstance(t, torch.Tensor) and t.is_meta for t in leaves):
        mode: Any = contextlib.nullcontext()
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)  # sizes stay numbers
        args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
    with mode, torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        yield args, kwargs


def _methods(asked: Sequence[str | Method], options: dict[str, Any]) -> list[Method]:
    """The methods with their own options; an option must be known to one of them."""
    if not asked:
        raise OptionError(f"no method asked for.{nearest('', names())}")
    rest = {k: v for k, v in options.items() if k not in OPTION_NAMES}
    own = {m: option_names(m) for m in asked if isinstance(m, str)}
    valid = OPTION_NAMES.union(*own.values())
    for key in rest:
        if key not in valid:
            raise OptionError(f"unknown option {key!r}.{nearest(key, valid)}")
    found: dict[str, Method] = {}
    for m in asked:
        mine = own.get(m, frozenset()) if isinstance(m, str) else frozenset()
        method = get_method(m, {k: v for k, v in rest.items() if k in mine})
        found.setdefault(method.name, method)
    return list(found.values())
