"""Capture: a module and an example call become one functional ATen graph.

``torch.export`` (non-strict) traces the call; what it loses is put back first: regions under
``no_grad`` keep their meaning (their outputs are detached explicitly). The graph stays at the level
of composite ops (``linear``, ``layer_norm``, ``lstm``), which is where feedback points are placed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from grapefx.batch_facts import Number, holds, number
from grapefx.constants import refuse_unregistered, tensor_attributes
from grapefx.cumulative import cumulative_norms
from grapefx.errors import CaptureError, tell
from grapefx.ir import Captured, Slot
from grapefx.lost import refuse_only_lost, without_lost
from grapefx.passes import functions
from grapefx.passes.source import quoted
from grapefx.side_effects import Watch
from grapefx.torch_compat import (
    batch_symbol,
    facts_of,
    from_data,
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
        _watch_functions(), plain_calls(model), _as_parameters(model), flat.watch.watching(),
        cumulative_norms(model), quiet_export(), warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            flat, tuple(examples), dynamic_shapes=(shapes,), strict=False
        )
    facts = facts_of(exported)  # decomposition asks more, which is no branch of the model's
    _keep_no_grad(exported.graph_module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported.run_decompositions({}), facts


@contextlib.contextmanager
def _as_parameters(model: nn.Module) -> Iterator[None]:
    """Tensors that ``torch.func.functional_call`` put in the places of parameters become ones."""
    held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        values: dict[str, Any] = module.__dict__["_parameters"]
        for name, t in values.items():
            if t is None or isinstance(t, nn.Parameter):
                continue
            held.append((values, name, t))
            made.setdefault(id(t), nn.Parameter(t.detach(), requires_grad=t.requires_grad))
    for store, name, t in held:
        store[name] = made[id(t)]
    try:
        yield
    finally:
        for store, name, t in held:
            store[name] = t


@contextlib.contextmanager
def _watch_functions() -> Iterator[None]:
    """Keep a user's autograd.Function as one node: export would silently drop its backward."""
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if (cls.__module__, cls.__name__) == ("torch.utils.checkpoint", "CheckpointFunction"):
            # it runs its function under no_grad: a capture would cut every gradient
            raise CaptureError(
                "the model calls torch.utils.checkpoint with use_reentrant=True, whose backward a "
                "capture would lose\n  remedy: checkpoint(..., use_reentrant=False); it changes "
                "nothing here, since a step graph decides by itself what to recompute"
            )
        if cls.__module__.startswith("torch."):
            return original.__get__(None, cls)(*args, **kwargs)
        if kwargs:
            return original.__get__(None, cls)(*args, **kwargs)  # which refuses them
        return functions.record(cls, args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def _keep_no_grad(gm: torch.fx.GraphModule) -> None:
    """Decomposition inlines ``no_grad`` regions and forgets them: detach their outputs."""
    for module in list(gm.modules()):
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op != "call_function" or "set_grad_enabled" not in str(node.target):
                continue
            if not node.args or node.args[0] is not False:
                continue
            for item in list(node.users):
                value = item.meta.get("val")
                if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                    continue
                with module.graph.inserting_after(item):
                    stop = module.graph.call_function(aten.detach.default, (item,))
                stop.meta = dict(item.meta)
                item.replace_all_uses_with(stop, delete_user_cb=lambda u, stop=stop: u is not stop)
        module.recompile()


def _passes_gradient(node: torch.fx.Node) -> bool:
    """Whether an output depends on a value otherwise than through ``detach`` (or ``no_grad``)."""
    seen: set[torch.fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n.op == "output":
            return True
        if n not in seen and n.target is not aten.detach.default:
            seen.add(n)
            stack.extend(n.users)
    return False


def _refuse_data(graph: torch.fx.Graph) -> None:
    """Drop what checks numbers read from tensors; ``CaptureError`` where an output needs one."""
    checks = ("_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
    for node in list(graph.nodes):
        if getattr(node.target, "overloadpacket", None) in [getattr(aten, c) for c in checks]:
            graph.erase_node(node)
    needed = {next(n for n in reversed(graph.nodes) if n.op == "output")}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in list(graph.nodes):
        if node not in needed or not from_data(node.meta.get("val")):
            continue
        raise CaptureError(
            f"{node.target} (node {node.name!r}) makes a number or a size of the values of a "
            f"tensor, which a graph made once cannot follow{quoted(node)}\n"
            "  remedy: compute with tensors of fixed sizes: leave .item() out, use torch.where or "
            "a product with the mask instead of indexing by it, or do it outside the model"
        )
    graph.eliminate_dead_code()


def _tidy(gm: torch.fx.GraphModule, notes: list[str]) -> None:
    """Drop assertions: on dtypes and devices (each call is compared with the capture), on values.

    A model without weights (device meta) is laid out for the CPU, see ``fake_tensor``.
    """
    meta, cpu = torch.device("meta"), torch.device("cpu")
    parts = [m for m in gm.modules() if isinstance(m, torch.fx.GraphModule)]  # no_grad regions
    for node in [n for m in parts for n in m.graph.nodes]:
        if node.target is aten._assert_tensor_metadata.default:
            node.graph.erase_node(node)
        elif getattr(node.target, "overloadpacket", None) is aten._assert_async:
            text = repr(node.args[1]) if len(node.args) > 1 else "torch._assert_async"
            notes.append(f"the model's assertion on values is not checked in a step: {text}")
            node.graph.erase_node(node)
        elif meta in node.args or meta in node.kwargs.values():
            node.args = tuple(cpu if a == meta else a for a in node.args)
            node.kwargs = {k: cpu if a == meta else a for k, a in node.kwargs.items()}
    if any("unbacked_bindings" in n.meta for n in gm.graph.nodes):
        _refuse_data(gm.graph)
    for m in parts:
        m.recompile()


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
    _tidy(gm, notes)
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
        if slot.role == "constant" and _passes_gradient(node):
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
