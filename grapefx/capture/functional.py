"""Dynamo's graph of torch calls becomes one functional ATen graph, as the passes want it.

Composite operators (``linear``, ``layer_norm``, ``lstm``) stay whole, since feedback points are
placed behind them. What plain tracing would lose is put back first: values that enter a ``no_grad``
region are detached there, a custom ``autograd.Function`` stays one node with its own derivative.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from grapefx.capture import module_tree
from grapefx.capture.canonicalize import canonicalize
from grapefx.capture.data_writes import refuse_data_writes
from grapefx.capture.hidden_writes import show_writes
from grapefx.errors import CaptureError
from grapefx.ir import Captured, Slot, copied
from grapefx.passes.graph import custom_functions
from grapefx.passes.graph.branches import inline_branches
from grapefx.passes.graph.source import quoted
from grapefx.torch_compat import (
    DynamoTrace,
    batch_symbol,
    from_data,
    functional_graph,
    graph_module,
    size_expression,
)

_ENTERS = "grapefx_from"


class NumberError(Exception):
    """An integer with a symbol reaches a tensor: the graph must know its value."""


@dataclass(frozen=True)
class Given:
    """An output of the traced graph that is one of its inputs: the caller's own tensor."""

    index: int


@dataclass(frozen=True)
class Computed:
    """An output that the functional graph computes: its ``index``-th."""

    index: int


@dataclass(frozen=True)
class Size:
    """An output that is a number made from sizes: a sympy expression over the batch and others."""

    expr: Any


@dataclass(frozen=True)
class Functional:
    """The functional graph, and how it stands in for the traced one.

    ``captured``: the graph; its inputs are ordered as parameters, buffers, inputs.
    ``order``: for each of these the position among the traced graph's placeholders.
    ``examples``: for each its example, a real tensor.
    ``outputs``: what the traced graph returns, in order: a ``Given``, ``Computed``, ``Size`` or
    a plain value.
    ``numbers``: integers with symbols, by symbol: their place among the traced graph's inputs.
    """

    captured: Captured
    order: tuple[int, ...]
    examples: tuple[Tensor, ...]
    outputs: tuple[Any, ...]
    numbers: dict[Any, int]


def functional(trace: DynamoTrace, model: nn.Module, call: Sequence[Any]) -> Functional:
    """The functional graph of a trace of ``model``; ``call`` are the leaves of its arguments.

    Raises:
        CaptureError: the model writes into a parameter or into an argument that wants a gradient,
            gives a tensor other memory, or makes a number or a shape from the values of a tensor.
    """
    refuse_data_writes(trace.gm)
    nodes = [n for n in trace.gm.graph.nodes if n.op == "placeholder"]
    places = [i for i, e in enumerate(trace.example_inputs) if isinstance(e, Tensor)]
    fakes = [nodes[i].meta["example_value"] for i in places]
    real = [trace.example_inputs[i] for i in places]
    names = _names(model, real, call)
    origins = _number_nodes(trace.gm)
    runner = _Runner(trace.gm, nodes, places, trace.example_inputs)
    gm, written = functional_graph(runner, fakes, trace.mode)
    notes: list[str] = []
    canonicalize(gm, notes)
    tensors = [n for n in gm.graph.nodes if n.op == "placeholder"]
    slots, tensors, real, places = _with_constants(gm, trace, names, tensors, real, places)
    by_name = {n.name: k for k, n in enumerate(tensors)}
    result: Any = gm.graph.output_node()
    mutated = []
    for value in result.args[0][: len(written)]:
        k = by_name[written[value.name]]
        slots[k] = _written(slots[k], tensors[k], real[k])
        mutated.append(slots[k].name)
    rank = {"parameter": 0, "buffer": 1, "constant": 2, "input": 3}
    key = [(rank[s.role], int(s.name) if s.role == "input" else i) for i, s in enumerate(slots)]
    order = sorted(range(len(slots)), key=key.__getitem__)
    slots = [slots[i] for i in order]
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for i in order:
        first.prepend(tensors[i])
    gm.recompile()
    _trace_back(gm, origins)
    outputs = list(result.args[0][len(mutated) :])
    captured = Captured(
        gm=gm,
        inputs=tuple(slots),
        mutated=tuple(mutated),
        outputs=tuple(getattr(o, "name", "") for o in outputs),
        notes=tuple(notes),
    )
    return Functional(
        inline_branches(captured),
        tuple(places[i] for i in order),
        tuple(real[i] for i in order),
        tuple(_number(o) for o in runner.outputs),
        dict(runner.numbers),
    )


class _Runner(nn.Module):
    """Runs Dynamo's graph on tensors alone: sizes are read from them."""

    def __init__(
        self, gm: GraphModule, nodes: list[Node], places: list[int], examples: list[Any]
    ) -> None:
        super().__init__()
        graph, sources = _detached(gm), list[tuple[int, int | None]]()
        _items_as_tensors(graph.graph)
        self.sizes = _sizes_returned(graph.graph)
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self._run: Callable[[list[Any]], Any] = lambda args: _Interpreter(graph).run(
            *args
        )  # not a child: it has no parameters
        self.sources = sources
        self.numbers: dict[int, Any] = {}
        self.outputs: list[Any] = []
        where: dict[Any, tuple[int, int]] = {}
        for k, i in enumerate(places):
            for dim, size in enumerate(nodes[i].meta["example_value"].shape):
                if (expr := batch_symbol(size)) is not None:
                    where.setdefault(expr, (k, dim))
        position = {i: k for k, i in enumerate(places)}
        for i, node in enumerate(nodes):
            value = node.meta.get("example_value", examples[i])
            if i in position:
                sources.append((position[i], None))
            elif (expr := size_expression(value)) in where:
                sources.append(where[expr])
            elif placeholders[i].users:
                raise NumberError
            else:
                sources.append((0, None))  # which nothing reads
                self.numbers[expr] = i

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args = [tensors[k] if dim is None else tensors[k].shape[dim] for k, dim in self.sources]
        with fx_traceback.preserve_node_meta():
            found = self._run(args)
        outputs: list[Any] = []
        computed: list[Tensor] = []
        for i, leaf in enumerate(found):
            given = next((k for k, t in enumerate(tensors) if t is leaf), None)
            if given is not None:
                own = next(
                    i for i, (k, dim) in enumerate(self.sources) if k == given and dim is None
                )
                outputs.append(Given(own))
            elif i in self.sizes:
                outputs.append(self.sizes[i])
            elif isinstance(leaf, Tensor):
                outputs.append(Computed(len(computed)))
                computed.append(leaf)
            else:
                outputs.append(leaf)
        self.outputs = outputs
        return tuple(computed)


class _Interpreter(torch.fx.Interpreter):
    """Dynamo's higher-order operators become what the passes have for them."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.extra_traceback = False

    def run_node(self, n: Node) -> Any:
        with fx_traceback.set_current_meta(n):
            if n.op == "call_function":
                special = _SPECIAL.get(getattr(n.target, "__name__", ""))
                if special is None and isinstance(n.target, torch._ops.HigherOrderOperator):
                    special = _SPECIAL.get(n.target.name())
                if special is not None:
                    args, kwargs = self.fetch_args_kwargs_from_env(n)
                    return special(n, args, kwargs)
            return super().run_node(n)


def _checkpointed(node: Node, args: Any, kwargs: Any) -> Any:
    return _Interpreter(_detached(args[0])).run(*args[1:])


def _custom_function(node: Node, args: Any, kwargs: Any) -> Any:
    """A user's autograd function, of which Dynamo has made two graphs."""
    forward, backward, *operands = args
    backward = _in_one_mode(backward)
    fixed = set(kwargs.get("non_differentiable_idx") or ())
    idle = _idle_results(node, backward)

    class CustomFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *xs: Any) -> Any:
            out, saved = forward(*xs)
            ctx.is_tensor = [isinstance(s, Tensor) for s in saved]
            ctx.others = [s for s in saved if not isinstance(s, Tensor)]
            ctx.save_for_backward(*[s for s in saved if isinstance(s, Tensor)])
            ctx.count = len(xs)
            outs = out if isinstance(out, tuple | list) else (out,)
            ctx.mark_non_differentiable(*[o for i, o in enumerate(outs) if i in fixed - idle])
            if isinstance(out, Tensor):
                return out
            return tuple(None if i in idle else o for i, o in enumerate(out))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
            saved = [next(tensors) if kind else next(others) for kind in ctx.is_tensor]
            found = backward(*grads, *saved)
            found = found if isinstance(found, tuple | list) else (found,)
            return (*found, *[None] * (ctx.count - len(found)))

    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    named = [m.group(1) for line in lines if (m := re.search(r"(\w+)\.apply\(", line))]
    CustomFunction.__qualname__ = named[-1] if named else "autograd.Function"
    return custom_functions.record(CustomFunction, operands)


def _idle_results(node: Node, backward: GraphModule) -> set[int]:
    """Results that neither the model nor the backward reads; torch 2.11 adds some of its own."""
    if any(u.target is not operator.getitem for u in node.users):
        return set()
    read = {u.args[1] for u in node.users if u.users}
    cotangents = [n for n in backward.graph.nodes if n.op == "placeholder"]
    return {i for i, n in enumerate(cotangents) if not n.users and i not in read}


def _in_one_mode(gm: GraphModule) -> GraphModule:
    """A copy whose caller decides whether gradients are recorded, as in any ``backward``."""
    graph = copied(gm.graph)
    for n in list(graph.nodes):
        if n.op == "call_function" and n.target is torch._C._set_grad_enabled:
            graph.erase_node(n)
    return graph_module(gm, graph)


_SPECIAL: dict[str, Any] = {
    "tag_activation_checkpoint": _checkpointed,
    "autograd_function_apply": _custom_function,
}


def _detached(gm: GraphModule) -> GraphModule:
    """A copy in which what enters a ``no_grad`` region is detached there; the region is gone.

    Detaching what leaves would be wrong for memory written inside.
    """
    graph = copied(gm.graph)
    show_writes(graph)
    inside: set[Node] = set()
    off = False
    for n in list(graph.nodes):
        if n.op == "call_function" and n.target is torch._C._set_grad_enabled:
            off = n.args[0] is False
            graph.erase_node(n)
        elif off and n.op not in ("placeholder", "get_attr", "output"):
            inside.add(n)
    for n in [n for n in graph.nodes if n in inside]:
        for a in n.all_input_nodes:
            value = a.meta.get("example_value")
            if a in inside or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            with graph.inserting_before(n):
                stopped = graph.call_method("detach", (a,))
            stopped.meta = dict(a.meta)
            n.replace_input_with(a, stopped)
    return graph_module(gm, graph)


def _sizes_returned(graph: Graph) -> dict[int, Any]:
    """Numbers among the outputs, which follow from sizes and integers: they leave the graph."""
    output = graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    found = {}
    for i, n in enumerate(returned):
        value = n.meta.get("example_value") if isinstance(n, Node) else None
        if size_expression(value) is not None:
            found[i], returned[i] = value, None
    output.args = (tuple(returned),)
    for n in reversed(list(graph.nodes)):
        value = n.meta.get("example_value")
        if n.op == "call_function" and not n.users and size_expression(value) is not None:
            graph.erase_node(n)
    return found


_ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub,
    operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div,
}  # fmt: skip


def _items_as_tensors(graph: Graph) -> None:
    """``x.item()`` that is added to or multiplied with a tensor, or returned, stays a tensor
    without dims: a number would be fixed in the graph.
    """
    for n in list(graph.nodes):
        if not _is_item(n) or not all(_keeps_type(u) for u in n.users):
            continue
        with graph.inserting_before(n):
            detached = graph.call_method("detach", (n.args[0],))
            number = graph.call_method("reshape", (detached, ()))
        for new in (detached, number):
            new.meta = {k: v for k, v in n.meta.items() if k != "example_value"}
        for user in [u for u in n.users if u.target is torch.scalar_tensor]:
            user.op, user.target = "call_method", "to"
            user.args, user.kwargs = (number, user.meta["example_value"].dtype), {}
        n.replace_all_uses_with(number)
        graph.erase_node(n)


def _is_item(n: Node) -> bool:
    if n.op == "call_method":
        return n.target == "item" and isinstance(n.args[0], Node)
    # of a NumPy scalar, which Dynamo has as a tensor
    return n.op == "call_function" and getattr(n.target, "__name__", "") == "wrapped_item"


def _keeps_type(user: Node) -> bool:
    """Whether a tensor without dims does in a node what a number of its kind does."""
    if user.op == "call_function" and user.target is torch.scalar_tensor:
        return True
    if user.op != "call_function" or user.target not in _ARITHMETIC or user.kwargs:
        return False
    values = [a.meta.get("example_value") for a in user.args if isinstance(a, Node)]
    return any(isinstance(v, Tensor) and v.ndim and v.is_floating_point() for v in values)


def _names(model: nn.Module, real: list[Tensor], call: Sequence[Any]) -> list[Slot]:
    """What each tensor is: a parameter or buffer by name, or an input by number.

    An argument's number is its place among the tensors of the call; others follow.
    """
    own: dict[int, Slot] = {}
    for name, b in module_tree.named_buffers(model):
        own[id(b)] = Slot("buffer", name)
    for name, p in module_tree.named_parameters(model):
        own[id(p)] = Slot("parameter", name)
    given = [leaf for leaf in call if isinstance(leaf, Tensor)]
    arguments = {id(leaf): i for i, leaf in reversed(list(enumerate(given)))}
    slots = []
    for i, tensor in enumerate(real):
        number = arguments.get(id(tensor), len(given) + i)
        slots.append(own.get(id(tensor)) or Slot("input", str(number)))
    return slots


def _with_constants(
    gm: GraphModule,
    trace: DynamoTrace,
    slots: list[Slot],
    tensors: list[Node],
    real: list[Tensor],
    places: list[int],
) -> tuple[list[Slot], list[Node], list[Tensor], list[int]]:
    """Tensors that the trace made (``torch.tensor([1, 2])``) become inputs, role "constant"."""
    slots, tensors, real, places = list(slots), list(tensors), list(real), list(places)
    for n in [n for n in gm.graph.nodes if n.op == "get_attr"]:
        value = getattr(gm, n.target)
        if not isinstance(value, Tensor):
            continue
        with gm.graph.inserting_after(tensors[-1]):
            new = gm.graph.placeholder(n.target)
        new.meta = {**n.meta, "val": trace.mode.from_tensor(value)}
        n.replace_all_uses_with(new)
        gm.graph.erase_node(n)
        tensors.append(new)
        slots.append(Slot("constant", str(n.target)))
        real.append(value)
        places.append(-1)
    return slots, tensors, real, places


def _written(slot: Slot, node: Node, real: Tensor) -> Slot:
    """An input that the model writes into, as a buffer: its new value is written in place."""
    if slot.role == "buffer":
        return slot
    if slot.role == "parameter":
        raise CaptureError(
            f"the model writes into its parameter {slot.name!r} in the forward "
            "(nn.Embedding(max_norm=...) does)\n"
            "  remedy: do it behind the optimizer's step, under torch.no_grad()"
        )
    symbolic = any(batch_symbol(s) is not None for s in node.meta["val"].shape)
    if real.requires_grad or symbolic:
        raise CaptureError(
            f"the model changes an input of shape {tuple(real.shape)} in place during the forward"
            f"{quoted(next(iter(node.users), node))}\n  remedy: copy it first (x = x.clone())"
        )
    return Slot("buffer", f"input {slot.name}")


def _number_nodes(gm: GraphModule) -> list[Node]:
    """Every node of the graph and of graphs inside gets a number that its ATen nodes inherit."""
    found = [n for m in gm.modules() if isinstance(m, GraphModule) for n in m.graph.nodes]
    for k, n in enumerate(found):
        n.meta["custom"] = {_ENTERS: k}
    return found


def _trace_back(gm: GraphModule, origins: list[Node]) -> None:
    """Each ATen node knows its module and its source line."""
    for n in gm.graph.nodes:
        for key in ("example_value", "from_node"):  # they hold what Dynamo traced with
            n.meta.pop(key, None)
        k = (n.meta.get("custom") or {}).get(_ENTERS)
        if k is None:
            continue
        meta = origins[k].meta
        stack = meta.get("nn_module_stack") or {}
        n.meta["nn_module_stack"] = {key: (_path(path), cls) for key, (path, cls) in stack.items()}
        n.meta["stack_trace"] = meta.get("stack_trace")


def _path(path: str) -> str:
    """``L['model'].layers.0`` -> ``layers.0``."""
    head, _, rest = path.partition("].")
    return rest if head.startswith("L[") else path


def _number(leaf: Any) -> Any:
    """A leaf of the traced graph's outputs that is no tensor: a plain value, or a ``Size``."""
    if (
        from_data(leaf)
        if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool)
        else False
    ):
        raise CaptureError(
            f"the model returns, or keeps, a number that depends on data ({leaf})\n"
            "  remedy: return a tensor, or compute the number outside the model"
        )
    expr = size_expression(leaf)
    return leaf if expr is None else Size(expr)
