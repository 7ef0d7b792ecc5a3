"""Joint graph: forward and backward of the whole model in one graph, markers in place.

In: the captured forward graph and a ``Placement``. Out: a ``StepGraph`` whose inputs are
parameters, buffers, constants, user inputs and the cotangents of the outputs; whose outputs are the
user outputs, new buffer values, a gradient for each trainable parameter and for each input that
requires one. Composite operators are gone; every node has a fake value, a phase and a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch.fx import GraphModule, Node

from grapefx.errors import GrapefxError
from grapefx.ir import Captured, Slot, StepGraph
from grapefx.passes.differentiate import recurrent
from grapefx.passes.graph import custom_functions as functions
from grapefx.passes.graph import markers, meta
from grapefx.passes.graph.operators import op_name
from grapefx.passes.graph.order import aliases, writes
from grapefx.passes.place.placement import Placement
from grapefx.torch_compat import (
    FakeTensorMode,
    batch_symbol,
    fake_tensor,
    functionalized,
    graph_module,
    make_fx,
    new_fake_mode,
    python_dispatcher,
    pytree,
)

aten = torch.ops.aten

# torch restrides the result of a channels-last input in place, and the trace loses its gradient
_POOLS: dict[Any, list[int]] = {
    aten.adaptive_avg_pool1d.default: [-1],
    aten.adaptive_avg_pool2d.default: [-1, -2],
    aten.adaptive_avg_pool3d.default: [-1, -2, -3],
}


_CHECKS = (aten._assert_async, aten._linalg_check_errors)


class _Marked(torch.fx.Interpreter):
    """Runs the captured graph with a marker at each feedback point, tap and stopped gradient."""

    def __init__(self, gm: GraphModule, cuts: dict[Node, int], taps: dict[Node, int]) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # our errors name the line themselves
        self.cuts = cuts
        self.taps = taps
        self.before_cut: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        result: Any
        with fx_traceback.set_current_meta(n):
            if n.op == "call_function" and n.target is aten.detach.default:
                args, _ = self.fetch_args_kwargs_from_env(n)
                return markers.STOP(args[0].detach())
            if n.op == "output":
                return tuple(
                    self.before_cut.get(a, self.env.get(a)) if isinstance(a, Node) else a
                    for a in n.args[0]  # type: ignore[union-attr]
                )
            if n.op == "call_function" and n.target is aten.copy.default:
                args, _ = self.fetch_args_kwargs_from_env(n)
                result = _copied(*args)
            elif n.op == "call_function" and n.target is aten.view.default:
                args, _ = self.fetch_args_kwargs_from_env(n)
                result = _viewed(*args)
            elif n.op == "call_function" and n.target in _POOLS and set(n.args[1]) == {1}:  # type: ignore[arg-type]
                args, _ = self.fetch_args_kwargs_from_env(n)
                result = args[0].mean(_POOLS[n.target], keepdim=True)
            elif n.op == "call_function" and n.target is functions.FUNCTION:
                (tensors, key), _ = self.fetch_args_kwargs_from_env(n)
                result = list(functions.Call.apply(key, *tensors))
            elif n.op == "call_function" and n.target in recurrent.DECOMPOSITIONS:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                result = recurrent.DECOMPOSITIONS[n.target](*args, **kwargs)
            else:
                result = super().run_node(n)
            if n in self.taps:
                result = markers.Tap.apply(result, self.taps[n])
            if n in self.cuts:
                # an output that is also a feedback point is returned with its true gradient
                self.before_cut[n] = result
                result = markers.Cut.apply(result, self.cuts[n])
            return result


def _copied(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``aten.copy`` (what writing into a view becomes) by operators that have a derivative."""
    source = source.to(to.dtype)
    return source if source.shape == to.shape else source.expand(to.shape).clone()


def _viewed(x: torch.Tensor, size: Sequence[Any]) -> torch.Tensor:
    """A view, or what ``reshape`` does where there is none.

    Capture writes a ``reshape`` down as the view that it was. Attention with a bias that learns
    runs another kernel here, whose result is laid out differently.
    """
    made: torch.Tensor
    try:
        made = aten.view.default(x, size)
    except (RuntimeError, ValueError):
        made = aten.view.default(x.clone(memory_format=torch.contiguous_format), size)
    return made


def trace_joint(
    cap: Captured,
    placement: Placement,
    examples: Sequence[torch.Tensor],
    trainable: set[str],
    *,
    backward: bool = True,
) -> StepGraph:
    """Trace forward and backward together (or, with ``backward=False``, the forward alone).

    ``examples``: a tensor for each input of the captured graph. Sizes that are symbols there get
    symbols of the trace's own. ``trainable``: names of the parameters that get a gradient.
    """
    mode = new_fake_mode()
    fakes, wanted = _fakes(mode, cap, examples, trainable)
    unique = list(dict.fromkeys(fakes))
    where = {f: i for i, f in enumerate(unique)}

    cuts = {c.node: c.layer.index for c in placement.cuts}
    taps = {n: i for i, n in enumerate(placement.taps)}

    def outputs_of(flat: list[Any]) -> list[Any]:
        interpreter = _Marked(cap.gm, cuts, taps)
        return list(interpreter.run(*[flat[where[f]] for f in fakes]))

    # the captured graph holds its casts: where the model turns autocast off, it stays off
    no_casts = functools.partial(torch.autocast, unique[0].device.type, enabled=False)
    if not backward:
        with mode, python_dispatcher(), no_casts(), torch.no_grad():
            gm = make_fx(outputs_of, tracing_mode="real")(unique)
        return _finish(gm, cap, fakes, unique, [], [])
    # which outputs carry a gradient, and how they are laid out, is known only in a run
    differentiable: list[int] = []

    def joint(flat: list[Any]) -> list[Any]:
        with torch.enable_grad(), fx_traceback.preserve_node_meta():
            outs = outputs_of(flat)
        results = outs[len(cap.mutated) :]
        differentiable[:] = [
            i for i, o in enumerate(results) if isinstance(o, torch.Tensor) and o.requires_grad
        ]
        if not differentiable:
            raise GrapefxError(
                "no output of the model requires grad: every path from a trainable parameter to "
                "the output is detached"
            )
        ends = [results[i] for i in differentiable]
        with torch.no_grad():
            cotangents = [torch.empty_like(o) for o in ends]
        sources = [flat[where[fakes[k]]] for k in wanted]
        with torch.enable_grad():
            found = torch.autograd.grad(ends, sources, cotangents, allow_unused=True)
        return [*outs, *found, *cotangents]

    # anomaly mode would ask values of tensors that have none
    with mode, python_dispatcher(), no_casts(), torch.autograd.set_detect_anomaly(False):
        gm = make_fx(joint, tracing_mode="real")(unique)
        step = _finish(gm, cap, fakes, unique, wanted, differentiable)
        if any(n.op == "call_function" and writes(n) for n in step.gm.graph.nodes):
            # a derivative of torch's writes into a view (FFTs); this trace takes writes apart, but
            # runs every operator's Python a second time
            gm = make_fx(functionalized(joint), tracing_mode="real")(unique)
            step = _finish(gm, cap, fakes, unique, wanted, differentiable)
    return step


def _fakes(
    mode: FakeTensorMode, cap: Captured, examples: Sequence[torch.Tensor], trainable: set[str]
) -> tuple[list[Any], list[int]]:
    """A fake tensor for each input, one for tied weights; and the inputs that want a gradient."""
    fakes: list[Any] = []
    wanted: list[int] = []
    shared: dict[int, Any] = {}
    for k, (slot, node, real) in enumerate(
        zip(cap.inputs, cap.placeholders(), examples, strict=True)
    ):
        if slot.role == "input":
            sizes = node.meta["val"].shape
            dynamic = [d for d, s in enumerate(sizes) if batch_symbol(s) is not None]
            fake = fake_tensor(mode, real.detach(), dynamic)
            if real.requires_grad:
                fake.requires_grad_()
                wanted.append(k)
        else:
            if id(real) in shared:  # tied weights: one leaf, gradients add up
                fakes.append(shared[id(real)])
                continue
            fake = fake_tensor(mode, real.detach())
            if slot.role == "parameter" and slot.name in trainable:
                fake.requires_grad_()
                wanted.append(k)
            shared[id(real)] = fake
        fakes.append(fake)
    return fakes, wanted


def _finish(
    gm: GraphModule,
    cap: Captured,
    fakes: list[Any],
    unique: list[Any],
    wanted: list[int],
    differentiable: list[int],
) -> StepGraph:
    graph = gm.graph
    slots: list[Slot] = []
    for f in unique:
        slots.append(cap.inputs[next(k for k, g in enumerate(fakes) if g is f)])
    slots += [Slot("cotangent", cap.outputs[i] or str(i)) for i in differentiable]
    outputs = [Slot("buffer", name) for name in cap.mutated]
    outputs += [Slot("output", str(i)) for i in range(len(cap.outputs))]
    for k in wanted:
        slot = cap.inputs[k]
        outputs.append(
            Slot("gradient" if slot.role == "parameter" else "input_gradient", slot.name)
        )
    out = graph.output_node()
    flat, _ = pytree.tree_flatten(out.args[0])
    # make_fx drops None outputs into the spec; put them back in place
    spec = getattr(gm, "_out_spec", None)
    results = flat if spec is None else pytree.tree_unflatten(flat, spec)
    made = len(results) - len(differentiable)
    out.args = (tuple(results),)
    _cotangents(graph, results[made:])
    out.args = (out.args[0][:made],)  # type: ignore[index]
    graph.set_codegen(torch.fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif getattr(node.target, "overloadpacket", None) in _CHECKS:
            # torch's own, in what it took apart; the model's are gone since the capture
            graph.erase_node(node)
    graph.eliminate_dead_code()
    _out_of_place(graph)
    step = StepGraph(graph_module(gm, graph), tuple(slots), tuple(outputs))
    for slot, node in zip(step.inputs, step.placeholders(), strict=True):
        node.meta[meta.ROLE] = slot.role
        node.meta[meta.NAME] = slot.name
    return step


def _cotangents(graph: torch.fx.Graph, made: Sequence[Node]) -> None:
    """The cotangents, which the trace made when it needed them, become inputs behind the others."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for k, node in enumerate(made):
        with graph.inserting_after(last):
            last = graph.placeholder(f"grads_{k + 1}")
        last.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
        node.replace_all_uses_with(last)
        graph.erase_node(node)


def _out_of_place(graph: torch.fx.Graph) -> None:
    """Pure forms of writes into fresh values, which come from operators that torch takes apart."""
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_function" and writes(node) else None
        if not isinstance(source, torch.fx.Node) or len(source.users) > 1:
            continue
        fresh = isinstance(source.target, torch._ops.OpOverload) and not aliases(source)
        name = op_name(node).removesuffix("_")
        pure = getattr(getattr(aten, name, None), node.target._overloadname, None)
        if fresh and pure is not None and not pure._schema.is_mutable:
            node.target = pure
