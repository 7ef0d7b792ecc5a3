"""The front end: Dynamo traces a call, and its guards say for which calls the graph holds.

A guard stands for everything that the trace read (numbers and objects at any depth, globals,
closures, modes, hooks), so that a step never runs on a graph that is no longer the model's. Around
the graph runs the bytecode that Dynamo made of the call: it repeats what the forward does beside
computing (assigned attributes, Python's random numbers) and returns the model's own objects.

The traced function is one of ours, with globals of its own. ``torch.compile`` itself is not used:
inside another ``torch.compile``, or under ``set_stance``, it would leave our step out and let
backpropagation run without a word.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grapefx.capture import module_tree
from grapefx.capture.call import Symbolic, choices, examples, flatten_call
from grapefx.capture.cumulative import cumulative_norms
from grapefx.capture.functional import Computed, Functional, Given, NumberError, Size, functional
from grapefx.capture.record import Capture, Run, Scope, fixed_lead, keeps_batch
from grapefx.errors import CaptureError, first_line, tell
from grapefx.torch_compat import (
    DynamoGuards,
    DynamoTrace,
    batch_symbol,
    dynamo_refusal,
    dynamo_trace,
    fixed_size,
    plain_calls,
    pytree,
    size_expression,
)


def _call(model: Any, args: Any, kwargs: Any) -> Any:
    return model._call_impl(*args, **kwargs)


def _forward(model: Any, args: Any, kwargs: Any) -> Any:
    # read, so that a hook on all modules is seen: calls of children do not look at them
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        pass
    return model.forward(*args, **kwargs)


class _RefusedError(Exception):
    """These sizes cannot be symbolic; others may be."""


def capture_dynamo(
    scope: Scope,
    *,
    batch_dim: int = 0,
    fixed: bool = False,
    others: frozenset[tuple[int, int]] = frozenset(),
    numbers: frozenset[str] = frozenset(),
) -> Capture:
    """Trace a call in its present mode. The batch gets a symbol, and so do the dims in ``others``,
    (leaf of the call, dim), and the integers in ``numbers``, as ``Capture.changed`` names them.

    With ``fixed`` no size gets one: the graph is for the sizes of this call.

    Raises:
        CaptureError: Dynamo cannot follow the model; the message names the user's line.
    """
    if numbers:
        try:
            return _capture(scope, batch_dim, fixed, others, numbers)
        except NumberError:
            pass  # a value of its own makes a graph of its own
    return _capture(scope, batch_dim, fixed, others, frozenset())


def _capture(
    scope: Scope,
    batch_dim: int,
    fixed: bool,
    others: frozenset[tuple[int, int]],
    numbers: frozenset[str],
) -> Capture:
    leaves, spec = flatten_call(scope.args, scope.kwargs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError(
            "the call has no tensor argument, and so no batch to trace with\n"
            "  remedy: call the net with the model's inputs, net(x)"
        )
    code = (_forward if scope.inner else _call).__code__
    own = {"__builtins__": __builtins__, "__name__": __name__, "torch": torch}
    fn = types.FunctionType(code, own, "grapefx_call")
    known = {d for p in module_tree.parameters(scope.model) for d in p.shape}
    reduced: Capture | None = None
    why = ""
    last: Exception | None = None
    with plain_calls(module_tree.modules(scope.model)), cumulative_norms(scope.model):
        tries = [Symbolic()] if fixed else choices(leaves, batch_dim, others)
        for which in tries:
            if not which and reduced is not None:
                return reduced  # every output is reduced over the batch: the first guess stands
            for real in (False, True) if which else (True,):
                given = examples(leaves, which, batch_dim, known, real=real) if which else leaves
                try:
                    found = _trace(fn, scope, given, spec, which, leaves, batch_dim, numbers)
                except _RefusedError as e:
                    why, last = why or str(e), e
                    continue
                if not which:
                    if not fixed and why:
                        tell(
                            f"the batch dimension could not be made symbolic ({why}); each new "
                            "batch size is captured again"
                        )
                    return found
                if which.batch and not keeps_batch(found.captured.batch, found.captured.results()):
                    reduced = reduced or found
                    break
                return found
    raise _as_error(last) from None


def _as_error(last: Exception | None) -> Exception:
    cause = last.__cause__ if last is not None else None
    return (
        explain(cause)
        if cause is not None
        else CaptureError(f"the model cannot be captured: {last}")
    )


def _trace(
    fn: types.FunctionType,
    scope: Scope,
    given: Sequence[Any],
    spec: Any,
    which: Symbolic,
    leaves: Sequence[Any],
    batch_dim: int,
    numbers: frozenset[str],
) -> Capture:
    """One trace, for calls like ``scope``; ``_RefusedError`` where other sizes may do."""
    args, kwargs = scope.args, scope.kwargs
    if which:
        args, kwargs = pytree.tree_unflatten(list(given), spec)
    try:
        trace = dynamo_trace(fn, (scope.model, args, kwargs), numbers)
    except Exception as e:
        refusal = dynamo_refusal(e)
        if refusal is not None and refusal.final:
            raise explain(e) from None
        raise _RefusedError(refusal.why if refusal is not None else first_line(e)) from e
    if trace is None:
        raise CaptureError(
            "the model computes with no tensor in this call: there is nothing to train"
        )
    _one_batch(trace, {id(given[i]) for i in which.batch}, batch_dim)
    try:
        graph = functional(trace, scope.model, given)
    except (CaptureError, NumberError):
        raise
    except Exception as e:
        if not which:
            raise explain(e) from e
        raise _RefusedError(first_line(e)) from e
    guards = trace.guards()
    if not guards.check(scope.names()):
        raise _RefusedError(guards.broken(scope.names())[:200])
    captured = _with_batch(graph, which, given, leaves, batch_dim)
    size = _batch_size(captured, graph, batch_dim, which, leaves)
    return Capture(
        captured,
        graph.examples,
        size,
        lambda s: bool(guards.check(s.names())),
        lambda s: guards.broken(s.names()),
        lambda s: guards.changed_integer(s.names()),
        lambda run: _bound(trace, guards, graph, captured, run),
    )


def _one_batch(trace: DynamoTrace, carriers: set[int], batch_dim: int) -> None:
    """The inputs that hold the batch have one size: to ask is to guard."""
    nodes = [n for n in trace.gm.graph.nodes if n.op == "placeholder"]
    sizes = [
        n.meta["example_value"].shape[batch_dim]
        for n, e in zip(nodes, trace.example_inputs, strict=True)
        if id(e) in carriers
    ]
    assert all(bool(sizes[0] == s) for s in sizes[1:])


def _batch_size(
    captured: Any, graph: Functional, batch_dim: int, which: Symbolic, leaves: Sequence[Any]
) -> int:
    """The batch size of the call that was captured."""
    if which.batch:
        return int(leaves[which.batch[0]].shape[batch_dim])
    inputs = [t for t, s in zip(graph.examples, captured.inputs, strict=True) if s.role == "input"]
    lead = inputs[captured.lead] if inputs else None
    return int(lead.shape[batch_dim]) if lead is not None and lead.ndim > batch_dim else 1


def _with_batch(
    graph: Functional, which: Symbolic, given: Sequence[Any], leaves: Sequence[Any], batch_dim: int
) -> Any:
    """The captured graph, with its batch symbol and the input that holds it."""
    captured = graph.captured
    nodes = captured.placeholders()
    inputs = [k for k, s in enumerate(captured.inputs) if s.role == "input"]
    carriers = {id(given[i]) for i in which.batch}
    for position, k in enumerate(inputs):
        if id(graph.examples[k]) not in carriers:
            continue
        symbol = batch_symbol(nodes[k].meta["val"].shape[batch_dim])
        if symbol is None or not symbol.is_Symbol:
            continue
        if fixed_size(symbol, nodes[k].meta["val"]) is not None:
            raise _RefusedError("an operator of the model fixes its size")
        return replace(captured, batch=symbol, lead=position)
    if which.batch:
        raise _RefusedError("the model makes a number of it, as len(x) or int(n) do")
    examples = [graph.examples[k] for k in inputs]
    return replace(captured, lead=fixed_lead(examples, captured.results(), batch_dim))


def _bound(
    trace: DynamoTrace, guards: DynamoGuards, graph: Functional, captured: Any, run: Run
) -> Any:
    """The call: Dynamo's bytecode around ``run``."""
    order = graph.order
    constants = {k: t for k, t in enumerate(graph.examples) if order[k] < 0}
    where: dict[Any, tuple[int, int]] = {}
    for k, node in enumerate(captured.placeholders()):
        for dim, size in enumerate(node.meta["val"].shape):
            expr = size_expression(size)
            if expr is not None and expr.is_Symbol:
                where.setdefault(expr, (order[k], dim))
    outputs, numbers = graph.outputs, graph.numbers

    def compute(*given: Any) -> tuple[Any, ...]:
        inputs = [given[i] if i >= 0 else constants[k] for k, i in enumerate(order)]
        found = run(inputs)
        out = []
        for o in outputs:
            if type(o) is Computed:
                out.append(found[o.index])
            elif type(o) is Given:
                out.append(given[o.index])
            elif type(o) is Size:
                out.append(_number(o.expr, where, numbers, given))
            else:
                out.append(o)
        return tuple(out)

    fn = trace.function(compute)

    def call(scope: Scope) -> Any:
        return fn(scope.model, scope.args, scope.kwargs)

    return call


def _number(
    expr: Any, where: dict[Any, tuple[int, int]], numbers: dict[Any, int], given: Sequence[Any]
) -> Any:
    values = {
        s: given[numbers[s]] if s in numbers else given[where[s][0]].shape[where[s][1]]
        for s in expr.free_symbols
    }
    if expr in values:
        return values[expr]
    found = expr.subs(values)
    if found.is_Boolean:
        return bool(found)
    return int(found) if found.is_integer else float(found)


def explain(error: BaseException) -> CaptureError:
    """What the user reads when a model cannot be captured: the reason, their line, what to do."""
    refusal = dynamo_refusal(error)
    if refusal is None:
        return CaptureError(f"the model cannot be captured: {first_line(error)}")
    at = f"\n  at {refusal.where}" if refusal.where else ""
    return CaptureError(
        f"the model cannot be captured: {refusal.why}{at}\n  remedy: {_remedy(refusal.why)}"
    )


def _remedy(why: str) -> str:
    if "ata-dependent" in why or "data dependent" in why:
        return (
            "the model branches on the value of a tensor; use torch.where or torch.cond, or "
            "compute the condition outside the model"
        )
    return (
        "leave that line out of the forward, or use capture='export', which runs it at the capture "
        "alone and watches less of what the model reads"
    )
