"""Capture: a module and an example call become one functional ATen graph.

``torch.export`` (non-strict) traces the call; what it loses is put back first: regions under
``no_grad`` keep their meaning (their outputs are detached explicitly). The graph stays at the level
of composite ops (``linear``, ``layer_norm``, ``lstm``), which is where feedback points are placed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from grapefx.around_trace import as_parameters, custom_functions
from grapefx.batch_facts import Number, holds, number
from grapefx.constants import refuse_unregistered, tensor_attributes
from grapefx.cumulative import cumulative_norms
from grapefx.errors import CaptureError, tell
from grapefx.ir import Captured, Slot
from grapefx.lost import refuse_only_lost, without_lost
from grapefx.side_effects import Watch
from grapefx.tidy import keep_no_grad, passes_gradient, tidy
from grapefx.torch_compat import (
    batch_symbol,
    facts_of,
    plain_calls,
    pytree,
    quiet_export,
    unwrap_for_export,
)

aten = torch.ops.aten


class _Seen:
    """What a trace finds out on the side (export restores lists and dicts, not this)."""

    out_spec: Any = None


class _Flat(nn.Module):
    """The user's module as a function of a flat list of tensors to a flat tuple of tensors."""

    def __init__(self, model: nn.Module, spec: Any, template: Sequence[Any], watch: Watch) -> None:
        super().__init__()
        self.model = model
        self.watch = watch
        self._call_spec = spec
        self._template = tuple(template)
        self._seen = _Seen()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        it = iter(tensors)
        leaves = [next(it) if leaf is TENSOR else leaf for leaf in self._template]
        args, kwargs = pytree.tree_unflatten(leaves, self._call_spec)
        out, spec = flatten(self.watch.call(*args, **kwargs))
        template = [TENSOR if isinstance(o, torch.Tensor) else without_lost(o) for o in out]
        refuse_only_lost(template, TENSOR)
        self._seen.out_spec = (spec, template)
        return tuple(o for o in out if isinstance(o, torch.Tensor))


class _Tensor:
    def __repr__(self) -> str:
        return "<tensor>"


TENSOR = _Tensor()


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """Leaves and structure of a call. Dataclasses are taken apart too."""
    return flatten((args, kwargs))


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of what a model takes or returns."""
    leaves, spec = pytree.tree_flatten(tree)
    unknown = {type(leaf) for leaf in leaves if _unknown_dataclass(leaf)}
    for cls in unknown:
        _register(cls)
    return flatten(tree) if unknown else (leaves, spec)


def _unknown_dataclass(leaf: Any) -> bool:
    return hasattr(type(leaf), "__dataclass_fields__")


def _register(cls: type) -> None:
    torch.export.register_dataclass(cls)


def pick_hint(sizes: set[int], near: int) -> int:
    """A batch size to trace with that no other size equals, divides or is a multiple of."""
    hint = max(near, 3)
    while any(s > 1 and (s % hint == 0 or hint % s == 0) for s in sizes):
        hint += 1
    return hint


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    batch_dim: int = 0,
    fixed: bool = False,
) -> Captured:
    """Trace ``model(*args, **kwargs)`` in its present mode; the batch dim becomes symbolic.

    It stays a number with ``fixed``, where what the model asks of the batch size has another answer
    for the size that is traced with, and for one sample: sizes 1 broadcast.
    Raises ``CaptureError`` naming the user's line where the model cannot be traced.
    """
    leaves, spec = flatten_call(args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    template = [TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if not tensors:
        raise CaptureError("the call has no tensor argument; grapefx needs a batch to trace")
    notes: list[str] = []
    flat = _Flat(model, spec, template, Watch(model, notes))

    sizes = {i: t.shape[batch_dim] for i, t in enumerate(tensors) if t.ndim > batch_dim}
    attempts: list[list[int]] = []
    # the first input holds the batch, or else (a table, a mask) one of those that follow
    for size in dict.fromkeys(s for s in sizes.values() if s > 1):
        carriers = [i for i, s in sizes.items() if s == size]
        attempts.append(carriers)
        # a square mask (T, T) with T == N looks like a batch; try each input alone next
        if len(carriers) > 1:
            attempts += [[i] for i in carriers]
    if fixed or next(iter(sizes.values()), 1) == 1:
        attempts = []  # this graph is for one size (sizes 1 broadcast)
    batch = next(iter(sizes.values()), 1)

    failure: Exception | None = None
    reduced: Captured | None = None
    for dynamic in [*attempts, []]:
        if not dynamic and reduced is not None:
            return reduced  # every output is reduced over the batch: the first guess stands
        try:
            exported, facts = _export(flat, tensors, dynamic, batch_dim, model)
            if not _one_size(exported, dynamic, batch_dim):
                # some operators (diagonal) fix one size rather than find it equal to the other
                exported, facts = _export(flat, tensors, dynamic, batch_dim, model, Dim("batch"))
        except CaptureError:
            raise
        except Exception as e:
            if _data_dependent(e):
                raise _explain(e) from e
            failure = failure or e
            continue
        captured = _read(exported, facts, flat, model, dynamic, batch_dim, notes)
        if dynamic and not holds(captured, sizes[dynamic[0]]):
            fixed = True  # what this size does is another graph than what was traced
            continue
        if dynamic and not _keeps_batch(captured):
            if captured.batch is not None and reduced is None:
                reduced = captured
            continue
        if not dynamic and batch > 1 and not fixed:
            why = f" ({_first_line(failure)})" if failure is not None else ""
            tell(
                f"the batch dimension could not be made symbolic{why}; each new batch size is "
                "captured again"
            )
        if not dynamic:
            captured = replace(captured, lead=_fixed_lead(captured, sizes, batch_dim))
        return captured
    assert failure is not None
    raise _explain(failure) from failure


def _one_size(exported: torch.export.ExportedProgram, dynamic: list[int], batch_dim: int) -> bool:
    """Whether the batch has one symbol in all inputs that hold it (or none at all)."""
    kinds = [s.kind for s in exported.graph_signature.input_specs]
    nodes = [n for n in exported.graph.nodes if n.op == "placeholder"]
    inputs = [n for n, k in zip(nodes, kinds, strict=True) if k is InputKind.USER_INPUT]
    sizes = {str(inputs[i].meta["val"].shape[batch_dim]) for i in dynamic}
    return len(sizes) < 2


def _outputs_of(captured: Captured) -> list[torch.Tensor]:
    results = next(n for n in reversed(captured.gm.graph.nodes) if n.op == "output").args[0]
    found = [n.meta.get("val") for n in results[len(captured.mutated) :]]  # type: ignore[index,union-attr]
    return [v for v in found if isinstance(v, torch.Tensor) and v.is_floating_point() and v.ndim]


def _keeps_batch(captured: Captured) -> bool:
    """Whether the batch stayed symbolic and reaches an output (a scalar loss may stand for it)."""
    if captured.batch is None:
        return False
    outputs = _outputs_of(captured)
    exprs = [batch_symbol(s) for v in outputs for s in v.shape]
    return not outputs or any(e is not None and captured.batch in e.free_symbols for e in exprs)


def _fixed_lead(captured: Captured, sizes: dict[int, int], batch_dim: int) -> int:
    """The input that holds the batch of a graph without a symbol: as long as the output is."""
    found = [v.shape[batch_dim] for v in _outputs_of(captured) if v.ndim > batch_dim]
    return next((i for i, s in sizes.items() if s in found), next(iter(sizes), 0))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    first = text.splitlines()[0][:200] if text else ""
    return first if " " in first else f"{type(error).__name__}: {first}".rstrip(": ")


def _data_dependent(error: BaseException) -> bool:
    return "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__


def _explain(error: Exception) -> CaptureError:
    where = unwrap_for_export(error)
    data_dependent = _data_dependent(error)
    if data_dependent:
        remedy = (
            "the model branches on the value of a tensor; use torch.where or torch.cond, "
            "or compute the condition outside the model"
        )
    elif "fake tensor in the exported program constant" in str(error):
        remedy = "use x.detach() where the model has x.data, which a trace does not see"
    else:
        remedy = "see the error above; the model must be traceable by torch.export"
    at = f"\n  at {where}" if where else ""
    return CaptureError(f"the model cannot be captured: {_first_line(error)}{at}\n  {remedy}")


def resized_example(tensor: torch.Tensor, size: int, batch_dim: int) -> torch.Tensor:
    """A tensor like ``tensor`` with ``size`` samples; only its metadata is read by the trace."""
    shape = list(tensor.shape)
    shape[batch_dim] = size
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        fmt = torch.contiguous_format if tensor.is_contiguous() else torch.channels_last
        out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).to(memory_format=fmt)
    else:
        out = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return out.requires_grad_(tensor.requires_grad)


def _export(
    flat: _Flat,
    tensors: list[torch.Tensor],
    dynamic: list[int],
    batch_dim: int,
    model: nn.Module,
    size: Any = Dim.AUTO,
) -> tuple[torch.export.ExportedProgram, tuple[Any, ...]]:
    """The decomposed program, and what the model asked of symbolic sizes."""
    if dynamic:
        sizes = {d for p in model.parameters() for d in p.shape}
        sizes |= {d for i, t in enumerate(tensors) for d in t.shape if i not in dynamic}
        sizes |= {d for i in dynamic for k, d in enumerate(tensors[i].shape) if k != batch_dim}
        hint = pick_hint(sizes, tensors[dynamic[0]].shape[batch_dim])
        examples = [
            resized_example(t, hint, batch_dim) if i in dynamic else t
            for i, t in enumerate(tensors)
        ]
    else:
        examples = list(tensors)
    shapes = tuple({batch_dim: size} if i in dynamic else {} for i in range(len(examples)))
    with (
        custom_functions(), plain_calls(model), as_parameters(model), flat.watch.watching(),
        cumulative_norms(model), quiet_export(), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            flat, tuple(examples), dynamic_shapes=(shapes,), strict=False
        )
    facts = facts_of(exported)  # decomposition asks more, which is no branch of the model's
    keep_no_grad(exported.graph_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported.run_decompositions({}), facts


def _read(
    exported: torch.export.ExportedProgram,
    facts: tuple[Any, ...],
    flat: _Flat,
    model: nn.Module,
    dynamic: list[int],
    batch_dim: int,
    notes: list[str],
) -> Captured:
    gm = exported.graph_module
    tidy(gm, notes)
    signature = exported.graph_signature
    buffers = dict(model.named_buffers(remove_duplicate=False))
    # tied parameters go by the name that named_parameters() gives them
    first = {id(p): n for n, p in model.named_parameters()}
    tied = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    constants: dict[str, torch.Tensor] = {}
    slots: list[Slot] = []
    count = 0
    for spec in signature.input_specs:
        target = (spec.target or "").removeprefix("model.")
        if spec.kind is InputKind.PARAMETER:
            slots.append(Slot("parameter", tied.get(target, target)))
        elif spec.kind is InputKind.BUFFER and target in buffers:
            slots.append(Slot("buffer", target))
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            constants[target] = exported.constants[spec.target]  # type: ignore[index]
            slots.append(Slot("constant", target))
        elif spec.kind is InputKind.USER_INPUT:
            slots.append(Slot("input", str(count)))
            count += 1
        else:
            raise CaptureError(f"the model uses an input of kind {spec.kind.name}: {spec.target}")
    mutated: list[str] = []
    outputs: list[str] = []
    for out in signature.output_specs:
        if out.kind is OutputKind.BUFFER_MUTATION:
            mutated.append((out.target or "").removeprefix("model."))
        elif out.kind is OutputKind.USER_OUTPUT:
            outputs.append(getattr(out.arg, "name", ""))
        elif out.kind.name == "PARAMETER_MUTATION":
            name = (out.target or "").removeprefix("model.")
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
    attributes = tensor_attributes(model) if constants else {}
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for slot, node in zip(slots, nodes, strict=True):
        if slot.role == "constant" and passes_gradient(node):
            refuse_unregistered(model, slot.name, constants[slot.name])
    for name in constants:
        if name not in attributes:
            notes.append(f"constant {name!r} was fixed when the model was captured")
    symbol = None
    if dynamic:
        carrier = [n for n in gm.graph.nodes if n.op == "placeholder"][
            [k for k, s in enumerate(slots) if s.role == "input"][dynamic[0]]
        ]
        symbol = batch_symbol(carrier.meta["val"].shape[batch_dim])
        if symbol is not None and not symbol.free_symbols:
            symbol = None  # the model made a number of it (len(x), int(n)): it holds for this size
    spec_of, template = flat._seen.out_spec
    return Captured(
        gm=gm,
        inputs=tuple(slots),
        mutated=tuple(mutated),
        outputs=tuple(outputs),
        out_spec=(spec_of, [number(leaf, symbol) for leaf in template]),
        constants=constants,
        batch=symbol,
        dynamic=tuple(dynamic),
        lead=dynamic[0] if dynamic else 0,
        notes=tuple(notes),
        facts=tuple(f for f in facts if f.free_symbols == {symbol}),
        read=tuple(flat.watch.read),
    )


def unflatten_outputs(out_spec: Any, tensors: Sequence[Any], batch: int) -> Any:
    """Put flat outputs back into the structure that the user's module returned."""
    spec, template = out_spec
    it = iter(tensors)
    leaves = [
        next(it) if o is TENSOR else o.at(batch) if isinstance(o, Number) else o for o in template
    ]
    return pytree.tree_unflatten(leaves, spec)


__all__ = ["TENSOR", "capture", "flatten_call", "pick_hint", "resized_example", "unflatten_outputs"]
