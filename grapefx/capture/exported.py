"""``capture="export"``: ``torch.export`` traces the call, for models that Dynamo cannot follow.

It follows a forward by running it, so that any Python may happen in it, and watches little of what
that Python reads: the module tree, modes, hooks, layouts of tensors, plain numbers on modules and
in arguments. The user is told so once.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from grapefx.capture import module_tree
from grapefx.capture.around_trace import as_parameters, custom_functions
from grapefx.capture.call import Symbolic, choices, dense, examples, flatten, flatten_call
from grapefx.capture.canonicalize import canonicalize, keep_no_grad, passes_gradient
from grapefx.capture.cumulative import cumulative_norms
from grapefx.capture.data_writes import DataWritesRefused
from grapefx.capture.fingerprint import Fingerprint, describe_leaf
from grapefx.capture.record import Capture, Run, Scope, fixed_lead, keeps_batch
from grapefx.capture.unregistered import refuse_unregistered, tensor_attributes
from grapefx.errors import CaptureError, first_line, tell
from grapefx.ir import Captured, Slot
from grapefx.passes.graph.branches import inline_branches
from grapefx.torch_compat import (
    batch_symbol,
    facts_of,
    plain_calls,
    pytree,
    quiet_export,
    size_expression,
    unchecked_distributions,
    unwrap_for_export,
)

_PLAIN = (int, float, complex, bool, str, bytes, Enum, type(None), torch.dtype, torch.device)


class _Tensor:
    def __repr__(self) -> str:
        return "<tensor>"


TENSOR = _Tensor()


class _Flat(nn.Module):
    """The user's module as a function of a flat list of tensors to a flat tuple of tensors."""

    def __init__(self, scope: Scope, spec: Any, template: Sequence[Any]) -> None:
        super().__init__()
        self.model = scope.model
        self._inner = scope.inner
        self._call_spec = spec
        self._template = tuple(template)
        self.seen = SimpleNamespace()  # export restores lists and dicts, not this

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors)
        leaves = [next(it) if leaf is TENSOR else leaf for leaf in self._template]
        args, kwargs = pytree.tree_unflatten(leaves, self._call_spec)
        call = self.model.forward if self._inner else self.model
        with DataWritesRefused():
            result = call(*args, **kwargs)
        out, spec = flatten(result)
        for leaf in out:
            if not isinstance(leaf, (Tensor, *_PLAIN)) and size_expression(leaf) is None:
                raise CaptureError(
                    f"the model returns an object of type {type(leaf).__qualname__}, which "
                    "capture='export' cannot fill\n  remedy: return tensors, dicts, dataclasses or "
                    "named tuples of tensors"
                )
        self.seen.out = (spec, [TENSOR if isinstance(o, Tensor) else o for o in out])
        return tuple(o for o in out if isinstance(o, Tensor))


def capture_exported(scope: Scope, *, batch_dim: int = 0, fixed: bool = False) -> Capture:
    """As ``capture_dynamo``, by ``torch.export``; ``CaptureError`` names the user's line."""
    leaves, spec = flatten_call(scope.args, scope.kwargs)
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise CaptureError("the call has no tensor argument; grapefx needs a batch to trace")
    model = scope.model
    flat = _Flat(scope, spec, [TENSOR if isinstance(x, Tensor) else x for x in leaves])
    known = {d for p in module_tree.parameters(model) for d in p.shape}
    failure: Exception | None = None
    reduced: Capture | None = None
    tries = [Symbolic()] if fixed else choices(leaves, batch_dim, frozenset())
    for which in tries:
        if not which and reduced is not None:
            return reduced
        given = examples(leaves, which, batch_dim, known, real=False) if which else leaves
        tensors = [t for t in given if isinstance(t, Tensor)]
        try:
            program, facts = _export(flat, tensors, _dims(given, which, batch_dim, Dim.AUTO), model)
            if len(_symbols(program, which, given, batch_dim)) > 1:
                # some operators (diagonal) fix one size rather than find it equal to the other
                dims = _dims(given, which, batch_dim, Dim("batch"))
                program, facts = _export(flat, tensors, dims, model)
        except CaptureError:
            raise
        except Exception as e:
            if "data-dependent" in str(e) or "GuardOnDataDependent" in type(e).__name__:
                raise _explain(e) from e
            failure = failure or e
            continue
        found = _read(program, facts, flat, scope, which, tensors, leaves, batch_dim)
        if which and (found is None or not found.holds(scope)):
            continue
        assert found is not None
        captured = found.captured
        if which and not keeps_batch(captured.batch, captured.results()):
            reduced = reduced or found
            continue
        if not which and not fixed and failure is not None:
            tell(
                f"the batch dimension could not be made symbolic ({first_line(failure)}); each "
                "new batch size is captured again"
            )
        return found
    assert failure is not None
    raise _explain(failure) from failure


def _dims(given: Sequence[Any], which: Symbolic, batch_dim: int, size: Any) -> Any:
    found = [i for i, t in enumerate(given) if isinstance(t, Tensor)]
    return (tuple({batch_dim: size} if i in which.batch else {} for i in found),)


def _symbols(program: Any, which: Symbolic, given: Sequence[Any], batch_dim: int) -> set[str]:
    kinds = [s.kind for s in program.graph_signature.input_specs]
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    inputs = [n for n, k in zip(nodes, kinds, strict=True) if k is InputKind.USER_INPUT]
    tensors = [i for i, t in enumerate(given) if isinstance(t, Tensor)]
    return {
        str(n.meta["val"].shape[batch_dim])
        for i, n in zip(tensors, inputs, strict=True)
        if i in which.batch
    }


def _export(flat: _Flat, tensors: list[Tensor], dims: Any, model: nn.Module) -> tuple[Any, Any]:
    """The decomposed program, and what the model asked of symbolic sizes."""
    with (
        custom_functions(), plain_calls(module_tree.modules(model)), as_parameters(model),
        _attributes_kept(model), cumulative_norms(model), quiet_export(),
        unchecked_distributions(), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        exported = torch.export.export(flat, tuple(tensors), dynamic_shapes=dims, strict=False)
    facts = facts_of(exported)  # decomposition asks more, which is no branch of the model's
    keep_no_grad(exported.graph_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported.run_decompositions({}), facts


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What a forward assigns while it is traced (values of the trace) is taken back."""
    held = [
        (store, dict(store))
        for m in module_tree.modules(model)
        for store in (m.__dict__, m._buffers)
    ]
    try:
        yield
    finally:
        for store, before in held:
            for key in [k for k in store if k not in before]:
                del store[key]
            store.update(before)


def _read(
    program: Any,
    facts: tuple[Any, ...],
    flat: _Flat,
    scope: Scope,
    which: Symbolic,
    tensors: list[Tensor],
    leaves: Sequence[Any],
    batch_dim: int,
) -> Capture | None:
    model, gm = scope.model, program.graph_module
    notes: list[str] = []
    canonicalize(gm, notes)
    stores = _stores(model)
    slots, held = _slots(program, model, notes)
    mutated, outputs = _outputs(program)
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for slot, node in zip(slots, nodes, strict=True):
        if slot.role == "constant" and passes_gradient(node):
            refuse_unregistered(model, slot.name, held[slot.name])
    inputs = [k for k, s in enumerate(slots) if s.role == "input"]
    places = tensor_attributes(model) if held else {}

    def value(slot: Slot, given: Sequence[Tensor]) -> Tensor:
        if slot.role == "input":
            return given[int(slot.name)]
        if slot.role == "constant" and slot.name not in places:
            return held[slot.name]
        store, key = places[slot.name] if slot.role == "constant" else stores[slot.name]
        found: Tensor = store[key]
        return found

    tensor_at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    batch, lead = None, 0
    if which.batch:
        lead = tensor_at.index(which.batch[0])
        batch = batch_symbol(nodes[inputs[lead]].meta["val"].shape[batch_dim])
        if batch is None or not batch.is_Symbol:
            return None  # the model made a number of it
    else:
        results = [n.meta.get("val") for n in _output(gm)[len(mutated) :]]
        lead = fixed_lead(tensors, results, batch_dim)
    captured = inline_branches(
        Captured(gm, tuple(slots), tuple(mutated), tuple(outputs), batch, lead, tuple(notes))
    )
    first = leaves[tensor_at[lead]]
    size = first.shape[batch_dim] if first.ndim > batch_dim else 1
    watch = _Watch(model, leaves, facts, batch, tensor_at[lead], batch_dim, flat._call_spec)
    template = flat.seen.out

    def bind(run: Run) -> Any:
        def call(s: Scope) -> Any:
            args, kwargs = dense(s.args, s.kwargs) or (s.args, s.kwargs)
            given = [t for t in flatten_call(args, kwargs)[0] if isinstance(t, Tensor)]
            found = run([value(slot, given) for slot in slots])
            n = given[lead].shape[batch_dim] if given[lead].ndim > batch_dim else 1
            return _unflatten(template, found, batch, n)

        return call

    real = [value(s, tensors) for s in slots]
    return Capture(captured, tuple(real), size, watch.holds, watch.broken, lambda _: "", bind)


def _output(gm: torch.fx.GraphModule) -> Any:
    return gm.graph.output_node().args[0]


def _slots(
    program: Any, model: nn.Module, notes: list[str]
) -> tuple[list[Slot], dict[str, Tensor]]:
    buffers = dict(module_tree.named_buffers(model, remove_duplicate=False))
    # tied parameters go by the name that named_parameters() gives them
    first = {id(p): n for n, p in module_tree.named_parameters(model)}
    named = module_tree.named_parameters(model, remove_duplicate=False)
    tied = {n: first[id(p)] for n, p in named}
    held: dict[str, Tensor] = {}
    slots: list[Slot] = []
    count = 0
    for spec in program.graph_signature.input_specs:
        target = (spec.target or "").removeprefix("model.")
        if spec.kind is InputKind.PARAMETER:
            slots.append(Slot("parameter", tied.get(target, target)))
        elif spec.kind is InputKind.BUFFER and target in buffers:
            slots.append(Slot("buffer", target))
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            held[target] = program.constants[spec.target]
            slots.append(Slot("constant", target))
        elif spec.kind is InputKind.USER_INPUT:
            slots.append(Slot("input", str(count)))
            count += 1
        else:
            raise CaptureError(f"the model uses an input of kind {spec.kind.name}: {spec.target}")
    attributes = tensor_attributes(model) if held else {}
    for name in held:
        if name not in attributes:
            notes.append(f"constant {name!r} was fixed when the model was captured")
    return slots, held


def _outputs(program: Any) -> tuple[list[str], list[str]]:
    mutated: list[str] = []
    outputs: list[str] = []
    for out in program.graph_signature.output_specs:
        name = (out.target or "").removeprefix("model.")
        if out.kind is OutputKind.BUFFER_MUTATION:
            mutated.append(name)
        elif out.kind is OutputKind.USER_OUTPUT:
            outputs.append(getattr(out.arg, "name", ""))
        elif out.kind.name == "PARAMETER_MUTATION":
            raise CaptureError(
                f"the model writes into its parameter {name!r} in the forward "
                "(nn.Embedding(max_norm=...) does)\n"
                "  remedy: do it behind the optimizer's step, under torch.no_grad()"
            )
        else:
            raise CaptureError(
                f"the model changes {out.target!r} in place during the forward ({out.kind.name}); "
                "copy it first (x = x.clone())"
            )
    return mutated, outputs


def _stores(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter and buffer lives: (dict, key) by full name."""
    slots: dict[str, tuple[dict[str, Any], str]] = {}
    for prefix, module in module_tree.named_modules(model, remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for store in (module._parameters, module._buffers):
            for key in store:
                slots[dot + key] = (store, key)  # type: ignore[assignment]
    return slots


class _Watch:
    """What is compared between the captured call and others."""

    def __init__(
        self, model: nn.Module, leaves: Sequence[Any], facts: Any, batch: Any, lead: int,
        batch_dim: int, spec: Any,
    ) -> None:  # fmt: skip
        self.fingerprint = Fingerprint(model)
        self.reading = self.fingerprint.read()
        self.batch, self.lead, self.dim, self.spec = batch, lead, batch_dim, spec
        self.facts = [f for f in facts if f.free_symbols == {batch}]
        self.call, self.size = self._describe(leaves)
        self.modes = self._modes(leaves)

    def _describe(self, leaves: Sequence[Any]) -> tuple[Any, int]:
        first = leaves[self.lead]
        size = first.shape[self.dim] if first.ndim > self.dim else 1
        return tuple([describe_leaf(leaf, size, self.dim) for leaf in leaves]), size

    def _modes(self, leaves: Sequence[Any]) -> Any:
        kind = leaves[self.lead].device.type
        cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return (torch.is_grad_enabled(), cast, torch.get_default_dtype())

    def broken(self, scope: Scope) -> str:
        leaves, spec = flatten_call(scope.args, scope.kwargs)
        if spec != self.spec:
            return "the structure of the arguments"
        call, size = self._describe(leaves)
        if call != self.call:
            return "the arguments"
        if self._modes(leaves) != self.modes:
            return "gradients, autocast or the default dtype"
        if self.fingerprint.read() != self.reading:
            return "the modules"
        same = size == self.size if self.batch is None else size > 1 and all(
            f.subs({self.batch: size}) != False for f in self.facts  # noqa: E712
        )  # fmt: skip
        return "" if same else "the batch size"

    def holds(self, scope: Scope) -> bool:
        return not self.broken(scope)


def _unflatten(out: Any, tensors: Sequence[Any], batch: Any, size: int) -> Any:
    """Put flat outputs back into the structure that the user's module returned."""
    spec, template = out
    it = iter(tensors)
    leaves = []
    for o in template:
        expr = size_expression(o)
        if o is TENSOR:
            leaves.append(next(it))
        elif expr is None:
            leaves.append(o)
        else:
            found = expr.subs({batch: size})
            if found.free_symbols:
                raise CaptureError(
                    f"the model returns a number that depends on data ({o})\n"
                    "  remedy: return a tensor, or compute the number outside the model"
                )
            leaves.append(int(found) if found.is_integer else float(found))
    return pytree.tree_unflatten(leaves, spec)


def _explain(error: Exception) -> CaptureError:
    where = unwrap_for_export(error)
    if "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        remedy = (
            "the model branches on the value of a tensor; use torch.where or torch.cond, "
            "or compute the condition outside the model"
        )
    else:
        remedy = "see the error above; the model must be traceable by torch.export"
    at = f"\n  at {where}" if where else ""
    return CaptureError(f"the model cannot be captured: {first_line(error)}{at}\n  {remedy}")
