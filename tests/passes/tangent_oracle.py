"""Oracles for tangents: whole models with noise at the cuts, and single calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from grapefx.capture import Scope, capture
from grapefx.ir import Captured, Slot, StepGraph
from grapefx.passes.differentiate.joint import trace_joint
from grapefx.passes.differentiate.propagate import TangentEmitter, propagate
from grapefx.passes.differentiate.tangent import add_tangents, streams_of
from grapefx.passes.graph import custom_functions as functions
from grapefx.passes.place.placement import CutPoint, Placement, place
from grapefx.torch_compat import (
    batch_symbol,
    fake_tensor,
    functionalized,
    make_fx,
    new_fake_mode,
    python_dispatcher,
    pytree,
)

aten = torch.ops.aten


class _Noisy(Interpreter):
    """Runs the captured graph with noise added behind each feedback point."""

    def __init__(self, cap: Captured, placed: Placement, noise: dict[int, Tensor]) -> None:
        super().__init__(cap.gm)
        self.cuts = {c.node: c.layer.index for c in placed.cuts}
        self.taps = placed.taps
        self.noise = noise
        self.shapes: dict[int, torch.Size] = {}
        self.found: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is functions.FUNCTION:
            (tensors, key), _ = self.fetch_args_kwargs_from_env(n)
            out: Any = functions.applied(tensors, key)
        elif n.target is aten.copy.default:  # it has no derivative
            args, _ = self.fetch_args_kwargs_from_env(n)
            out = args[1].to(args[0].dtype).expand(args[0].shape).clone()
        else:
            out = super().run_node(n)
        if n in self.taps:
            self.found[n] = out
        if n in self.cuts:
            index = self.cuts[n]
            self.shapes[index] = out.shape
            if index in self.noise:
                out = out + self.noise[index]
        return out


@dataclass
class Case:
    """A captured model with its values, ready to be differentiated both ways."""

    cap: Captured
    placed: Placement
    values: dict[str, Tensor]
    args: tuple[Tensor, ...]
    batch_dim: int
    joint: Any
    noise: dict[int, Tensor]
    model: Any = None

    def tangents(self, rows: int | None = None, batch_stats: str = "frozen") -> StepGraph:
        """The joint graph with tangents; ``rows`` is only a hint, any number runs."""
        layers = tuple(c.layer for c in self.placed.cuts)
        return add_tangents(
            self.joint,
            layers,
            batch=self._batch(),
            batch_size=self.size,
            streams=(tuple(range(len(layers))),),
            rows_hint=rows,
            batch_stats=batch_stats,
        )

    def _batch(self) -> Any:
        first = next(n for _, n in self.joint.select("input"))
        return batch_symbol(first.meta["val"].shape[self.batch_dim])

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.args[0].shape[self.batch_dim]

    def run(self, made: StepGraph, rows: int | None = None) -> Tensor:
        """``d`` at the error tap; of several taps, flat and one after the other."""
        graph = made.gm.graph
        graph.lint()
        keep = graph.output_node().args
        at = streams_of(made)[0].taps
        graph.output_node().args = (tuple(at.values()),)
        forward = torch.fx.GraphModule(made.gm, _pruned(graph))
        graph.output_node().args = keep
        by_name = {c.layer.name: c for c in self.placed.cuts}
        inputs = iter(self.args)
        values: list[Tensor] = []
        for slot in made.inputs:
            if slot.role in ("parameter", "buffer", "constant"):
                values.append(self.values[slot.name])
            elif slot.role == "input":
                values.append(next(inputs))
            elif slot.role == "noise":
                cut = by_name[slot.name.split("/", 1)[1]]
                values.append(self._rows(cut, rows))
            else:
                values.append(torch.zeros(()))
        torch.manual_seed(5)
        with torch.no_grad():
            found = dict(zip(at, forward(*values), strict=True))
        if len(self.placed.taps) == 1:
            return found[0]
        values_at = self._eager({}, apart=True)
        return joined([found.get(i, torch.zeros_like(v)) for i, v in enumerate(values_at)])

    def _rows(self, cut: CutPoint, rows: int | None) -> Tensor:
        full = self.noise[cut.layer.index]
        return full if rows is None else first_rows(full, cut.layer.fold, self.size, rows)

    def expected(self) -> Tensor:
        """Forward AD of the eager graph; central differences where an operator has none."""

        def f(noise: dict[int, Tensor]) -> Tensor:
            return self._eager(noise)

        zero = {i: torch.zeros_like(v) for i, v in self.noise.items()}
        if self.has_functions():
            return self.transposed()
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.func.jvp(f, (zero,), (self.noise,))[1]
        except (NotImplementedError, RuntimeError):
            h = 1e-6
            up = f({i: h * v for i, v in self.noise.items()})
            down = f({i: -h * v for i, v in self.noise.items()})
            return (up - down) / (2 * h)

    def has_functions(self) -> bool:
        """Whether the model calls custom autograd functions, which have no forward AD."""
        return any(n.target is functions.FUNCTION for n in self.cap.gm.graph.nodes)

    def transposed(self) -> Tensor:
        """``J v`` from the gradients: what custom functions declare."""
        keys = list(self.noise)

        def f(*noise: Tensor) -> Tensor:
            return self._eager(dict(zip(keys, noise, strict=True)))

        zero = tuple(torch.zeros_like(self.noise[k]) for k in keys)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.jvp(f, zero, tuple(self.noise[k] for k in keys))[1]

    def _eager(self, noise: dict[int, Tensor], apart: bool = False) -> Any:
        """The values at the taps: joined, or (``apart``) as they are."""
        torch.manual_seed(5)
        it = iter(self.args)
        values = [
            next(it) if s.role == "input" else self.values[s.name].detach().clone()
            for s in self.cap.inputs
        ]
        runner = _Noisy(self.cap, self.placed, noise)
        runner.run(*values)
        found = [runner.found[n] for n in self.placed.taps]
        return found if apart else joined(found)


def joined(values: Sequence[Tensor]) -> Tensor:
    """One value as it is, several flat and one after the other."""
    return values[0] if len(values) == 1 else torch.cat([v.flatten() for v in values])


def _pruned(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy with what the output needs, and all placeholders."""
    needed: set[Node] = set()
    stack = [graph.output_node()]
    while stack:
        n = stack.pop()
        if n not in needed:
            needed.add(n)
            stack.extend(n.all_input_nodes)
    out = torch.fx.Graph()
    new: dict[Node, Node] = {}
    for n in graph.nodes:
        if n in needed or n.op == "placeholder":
            new[n] = out.node_copy(n, lambda m: new[m])
    return out


def first_rows(x: Tensor, fold: tuple[int, int, int], size: int, rows: int) -> Tensor:
    """The first samples of a value whose dim ``fold[0]`` is outer * N * inner."""
    dim, outer, inner = fold
    shape = x.shape
    apart = x.reshape(*shape[:dim], outer, size, inner, *shape[dim + 1 :])
    part = apart.narrow(dim + 1, 0, rows)
    return part.reshape(*shape[:dim], outer * rows * inner, *shape[dim + 1 :]).contiguous()


def make_case(
    model: nn.Module, *args: Tensor, batch_dim: int = 0, train: bool = True, seed: int = 0
) -> Case:
    """Capture ``model`` in float64 and draw noise for its feedback points."""
    torch.manual_seed(seed)
    model = model.double().train(train)
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    with torch.no_grad():  # no weight of 1, no bias or mean of 0: they would hide errors
        for v in (*model.parameters(), *model.buffers()):
            if v.is_floating_point():
                v.add_(torch.rand_like(v) * 0.3)
    found = capture(Scope(model, args, {}), batch_dim=batch_dim)
    cap = found.captured
    names = dict(model.named_parameters(remove_duplicate=False))
    placed = place(cap, trainable=set(names), batch_size=args[0].shape[batch_dim])
    buffers = dict(model.named_buffers(remove_duplicate=False))
    made = {s.name: e for s, e in zip(cap.inputs, found.examples, strict=True)}
    values: dict[str, Tensor] = {**made, **names, **buffers}
    joint = trace_joint(cap, placed, found.examples, set(names))
    case = Case(cap, placed, values, args, batch_dim, joint, {}, model)
    probe = _Noisy(cap, placed, {})
    it = iter(args)
    with torch.no_grad():
        probe.run(*[next(it) if s.role == "input" else values[s.name].clone() for s in cap.inputs])
    generator = torch.Generator().manual_seed(seed + 1)
    case.noise = {
        i: torch.randn(shape, generator=generator, dtype=torch.float64)
        for i, shape in probe.shapes.items()
    }
    return case


def is_float(x: Any) -> bool:
    """What can carry a tangent."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    return [x for x in pytree.tree_flatten(tree)[0] if isinstance(x, Tensor)]


def trace(
    fn: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor], which: Sequence[int]
) -> tuple[StepGraph, list[Tensor]]:
    """A function as a functional ATen graph on fake values, and the constants it uses.

    ``which`` inputs require a gradient, as in a joint graph.
    """
    mode = new_fake_mode()
    fakes = [fake_tensor(mode, t) for t in tensors]

    def wrapped(tensors: list[Tensor]) -> list[Tensor]:
        leaves = list(tensors)
        for i in which:
            leaves[i] = leaves[i].detach().requires_grad_()
        with torch.enable_grad():
            return tensors_of(fn(leaves))

    with mode, python_dispatcher():
        try:
            gm = make_fx(functionalized(wrapped), tracing_mode="real")(fakes)
        except AssertionError:  # operators with side effects (linalg's error checks)
            gm = make_fx(wrapped, tracing_mode="real")(fakes)
    graph = gm.graph
    constants: list[Tensor] = []
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op == "get_attr":
            value = getattr(gm, str(node.target))
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(constants)}")
            last.meta["val"] = mode.from_tensor(value)
            constants.append(value)
            node.replace_all_uses_with(last)
            graph.erase_node(node)
        elif node.target in (aten.alias.default, aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    out = graph.output_node()
    out.args = (tuple(pytree.tree_flatten(out.args[0])[0]),)
    graph.set_codegen(torch.fx.graph.CodeGen())
    slots = tuple(Slot("input", n.name) for n in graph.nodes if n.op == "placeholder")
    outputs = tuple(Slot("output", str(i)) for i in range(len(out.args[0])))
    return StepGraph(GraphModule(gm, graph), slots, outputs), constants


def differentiate(step: StepGraph, which: Sequence[int], batch_stats: str = "full") -> list[str]:
    """Add tangents of the inputs ``which``, behind the outputs; returns what was derived."""
    graph, places = step.gm.graph, step.placeholders()
    em = TangentEmitter(step, None, 0, None, batch_stats)
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    last = places[-1]
    for i in which:
        with graph.inserting_after(last):
            last = graph.placeholder(f"tangent_{i}")
        with em.mode:
            last.meta["val"] = torch.empty_like(places[i].meta["val"])
        em.tangents[places[i]] = last
    derived: dict[str, None] = {}
    propagate(em, nodes, {}, derived)
    for node, t in em.tangents.items():
        if isinstance(t, Node):
            made, primal = t.meta["val"], node.meta["val"]
            assert made.dtype == primal.dtype, node
            assert made.ndim == primal.ndim, node
            for a, b in zip(made.shape, primal.shape, strict=True):
                assert a == b if isinstance(a, int) and isinstance(b, int) else True, node
    out = graph.output_node()
    outputs = list(out.args[0])  # type: ignore[arg-type]
    tangents = [em.tangents.get(o) if isinstance(o, Node) else None for o in outputs]
    out.args = ((*outputs, *tangents),)
    graph.lint()
    step.gm.recompile()
    return list(derived)
