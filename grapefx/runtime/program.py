"""A captured call with its compiled graphs. Graphs are compiled when a step first needs them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.capture import Capture
from grapefx.errors import tell
from grapefx.ir import StepGraph
from grapefx.lowering import Compiled, lower_forward, lower_saving
from grapefx.options import Options
from grapefx.passes.divide.tail import Tail
from grapefx.passes.graph import meta
from grapefx.passes.graph.layout import strided
from grapefx.passes.pipeline import LowerContext, divide, inference
from grapefx.passes.runner import PassRun
from grapefx.plan import Plan, sizes_of
from grapefx.runtime import cudagraph
from grapefx.runtime.building import building
from grapefx.runtime.cudagraph import Graphed
from grapefx.runtime.parallel import forms_of, lower_forms, stable_inputs
from grapefx.torch_compat import PendingKernels, batch_symbol, copy_all

# the position of each input of a captured graph, by (role, name)
Places = dict[tuple[str, str], int]


@dataclass(frozen=True)
class NoiseInput:
    """One noise placeholder: its index in the step's inputs, its shape with rows left open.

    A size that is a symbol of the graph (a sympy expression) is open as well.
    """

    index: int
    dim: int
    factor: int
    shape: tuple[Any, ...]
    dtype: torch.dtype

    def sized(self, rows: int, sizes: dict[Any, int]) -> tuple[int, ...]:
        """The shape for a number of samples, and for the sizes that symbols stand for."""
        s = [n if isinstance(n, int) else int(n.subs(sizes)) for n in self.shape]
        s[self.dim] = rows * self.factor
        return tuple(s)


@dataclass(frozen=True)
class RandomInput:
    """A placeholder for N(0, 1) of a fixed shape: noise at a weight."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class CompiledStep:
    """One kind of training step: two callables and the wiring between them.

    ``sources``: for each input of the forward callable, ("given", position) or (role, index).
    ``saved_tensors`` and ``saved_sizes``: positions among the saved values.
    ``late``: for each late input of the update callable, ("cotangent", k), ("target", k)
    or ("feedback", name).
    ``results``: for each output of the update callable, its slot.
    ``leaves``: for each of ``gradients``, the input that it is the gradient of.
    ``needs``: for each of ``gradients``, the cotangents that it depends on.
    ``passes``: what took the step graph here.
    """

    kind: str
    forward: Compiled
    update: Compiled
    sources: tuple[tuple[str, int], ...]
    noise: tuple[NoiseInput, ...]
    random: tuple[RandomInput, ...]
    outputs: int
    saved_tensors: tuple[int, ...]
    saved_sizes: tuple[int, ...]
    late: tuple[tuple[str, Any], ...]
    results: tuple[tuple[str, Any], ...]
    gradients: tuple[tuple[str, str], ...]
    leaves: tuple[int, ...]
    needs: tuple[frozenset[int], ...]
    seconds: float
    passes: tuple[PassRun, ...]


@dataclass(frozen=True)
class CompiledForward:
    """Inference: one callable."""

    forward: Compiled
    sources: tuple[tuple[str, int], ...]
    seconds: float


class Program:
    """The compiled graphs of one captured call: of its plan (training), or of its forward alone.

    ``call(scope)`` is the whole call, once ``FeedbackModule`` has bound what runs the graphs.
    Graphs take the captured graph's inputs, in its order, as ``given``.
    """

    def __init__(
        self,
        capture: Capture,
        plan: Plan | None,
        inference: StepGraph | None,
        options: Options,
        renamed: dict[str, str],
    ) -> None:
        sparse = _sparse(plan.joint if plan is not None else inference)
        if sparse and (options.backend != "eager" or options.parallel != "off"):
            tell(f"{sparse} is sparse, which Inductor has no code for: its graphs run uncompiled")
            options = replace(options, backend="eager", parallel="off")
        self.capture = capture
        self.plan = plan
        self.inference = inference
        self.options = options
        self.renamed = renamed  # feedback tensors that go by another key
        captured = capture.captured
        self.places: Places = {(s.role, s.name): k for k, s in enumerate(captured.inputs)}
        self.written = tuple(self.places["buffer", name] for name in captured.mutated)
        self.call: Callable[[Any], Any] = _unbound
        inputs = [k for k, s in enumerate(captured.inputs) if s.role == "input"]
        self._lead = inputs[captured.lead] if inputs else 0
        # by (kind, batch size); batch size None: any
        self.steps: dict[tuple[str, int | None], CompiledStep] = {}
        self.forwards: dict[int | None, CompiledForward] = {}
        # other symbolic sizes than the batch: one graph for all. Batching and CUDA graphs want a
        # fixed batch size.
        several = len(capture.symbols()) > (captured.batch is not None)
        fixes = options.backend != "eager" or options.parallel != "off"
        self.dynamic = True if several or not fixes else options.dynamic
        self._symbols = _symbols_of(plan.joint, self.places) if plan is not None else {}
        self._kept: list[Tensor] = []

    def batch(self, given: list[Any]) -> int:
        """Samples in a call."""
        lead, dim = given[self._lead], self.options.batch_dim
        return int(lead.shape[dim]) if lead.ndim > dim else 1

    def sizes(self, given: list[Any]) -> dict[Any, int]:
        """What the size symbols of the plan's graphs stand for in a call."""
        if not self.dynamic:
            return {}
        return {s: int(given[k].shape[dim]) for s, (k, dim) in self._symbols.items()}

    def keep(self, buffers: list[Tensor]) -> list[Tensor]:
        """Copies of what the forward writes, in memory that stays."""
        if [(b.shape, b.dtype, b.device) for b in buffers] != [
            (k.shape, k.dtype, k.device) for k in self._kept
        ]:
            with torch.inference_mode(False):
                self._kept = [torch.empty_like(b, requires_grad=False) for b in buffers]
        with torch.no_grad():
            copy_all(self._kept, buffers)
        return self._kept

    @staticmethod
    def put_back(buffers: list[Tensor], kept: list[Tensor]) -> None:
        """The buffers as they were."""
        with torch.no_grad():
            copy_all(buffers, kept)

    def _variant(self, have: Any, batch: int) -> int | None:
        """The first batch size gets a graph of its own, any other one shared by all the rest.

        Fixed sizes make faster kernels (a CNN's by half on a CPU); most runs see one size.
        """
        if self.dynamic is True or (self.dynamic is None and any(b != batch for b in have)):
            return None
        return batch

    def step(self, kind: str, batch: int) -> CompiledStep:
        """The compiled step of a kind, for a batch size."""
        found = self._known_step(kind, batch)
        if found is not None:
            return found
        with building():  # another thread may have been first
            return self._known_step(kind, batch) or self._new_step(kind, batch)

    def _known_step(self, kind: str, batch: int) -> CompiledStep | None:
        return self.steps.get((kind, batch)) or self.steps.get((kind, None))

    def _new_step(self, kind: str, batch: int) -> CompiledStep:
        assert self.plan is not None
        graph = self.plan.graph(kind)
        variant = self._variant([b for k, b in self.steps if k == kind], batch)
        sizes = None if variant is None else sizes_of(graph, batch, self.plan.rows(batch))
        chain = kind in ("calibration", "start") or self.plan.method.sequential
        options = self.options
        step = self.steps[kind, variant] = compile_step(
            graph,
            kind,
            sizes,
            "eager" if kind == "start" else options.backend,  # one step: not worth compiling
            options.backend_options,
            "off" if chain else options.parallel,
            self.places,
        )
        return step

    def infer(self, batch: int) -> CompiledForward:
        """The compiled inference forward, for a batch size."""
        found = self._known_forward(batch)
        if found is not None:
            return found
        with building():
            return self._known_forward(batch) or self._new_forward(batch)

    def _known_forward(self, batch: int) -> CompiledForward | None:
        return self.forwards.get(batch) or self.forwards.get(None)

    def _new_forward(self, batch: int) -> CompiledForward:
        assert self.inference is not None
        start = time.perf_counter()
        variant = self._variant(self.forwards, batch)
        sizes = None if variant is None else sizes_of(self.inference, batch, batch)
        options = self.options
        context = LowerContext(sizes, options.backend_options)
        step, used = inference(self.inference, options.backend, context)
        sources = tuple(_source(self.inference, i, self.places) for i in used)
        fn = lower_forward(step.gm, options.backend, options.backend_options)
        found = CompiledForward(fn, sources, time.perf_counter() - start)
        self.forwards[variant] = found
        return found


def _sparse(step: StepGraph | None) -> str:
    """The first tensor of a graph without strides, in words; empty where there is none."""
    if step is None:
        return ""
    slots = dict(zip(step.placeholders(), step.inputs, strict=True))
    for node in step.gm.graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor) and not strided(val):
            slot = slots.get(node)
            if slot is None:
                return f"the value {node.name!r}"
            if slot.role == "input":
                return f"tensor {int(slot.name) + 1} of the arguments"
            return f"the {slot.role} {slot.name!r}"
    return ""


def _symbols_of(step: StepGraph, places: Places) -> dict[Any, tuple[int, int]]:
    found: dict[Any, tuple[int, int]] = {}
    for slot, node in step.select("input"):
        for dim, size in enumerate(node.meta["val"].shape):
            expr = batch_symbol(size)
            if expr is not None and expr.is_Symbol:
                found.setdefault(expr, (places["input", slot.name], dim))
    return found


def _source(step: StepGraph, index: int, places: Places) -> tuple[str, int]:
    """Where an input of the forward comes from: ("given", position), or drawn: (role, index)."""
    slot = step.inputs[index]
    if slot.role in ("noise", "random"):
        return (slot.role, index)
    return ("given", places[slot.role, slot.name])


def _drawn(step: StepGraph) -> tuple[tuple[NoiseInput, ...], tuple[RandomInput, ...]]:
    """The inputs that are drawn, used or not: the stream of draws does not depend on dead code."""
    noise, random = [], []
    for i, (slot, node) in enumerate(zip(step.inputs, step.placeholders(), strict=True)):
        if slot.role == "noise":
            noise.append(_noise_input(node, i))
        elif slot.role == "random":
            val = node.meta["val"]
            random.append(RandomInput(i, tuple(val.shape), val.dtype))
    return tuple(noise), tuple(random)


def _noise_input(node: Node, index: int) -> NoiseInput:
    dim, outer, inner = node.meta[meta.FOLD]
    val = node.meta["val"]
    shape = tuple(
        0 if d == dim else s if isinstance(s, int) else batch_symbol(s)
        for d, s in enumerate(val.shape)
    )
    return NoiseInput(index, dim, outer * inner, shape, val.dtype)


def _late(step: StepGraph, late_inputs: Sequence[int]) -> tuple[tuple[str, Any], ...]:
    """Where the late inputs of the update come from, as ``CompiledStep.late``."""
    cotangents = [i for i, s in enumerate(step.inputs) if s.role == "cotangent"]
    return tuple(
        ("cotangent", cotangents.index(i))
        if step.inputs[i].role == "cotangent"
        else (step.inputs[i].role, step.inputs[i].name)
        for i in late_inputs
    )


def compile_step(
    step: StepGraph,
    kind: str,
    sizes: dict[Any, int] | None,
    backend: str,
    options: dict[str, Any] | None,
    parallel: str = "off",
    places: Places | None = None,
) -> CompiledStep:
    """Split and lower one step graph.

    ``parallel``: how its update runs. ``places``: the position of each input among those
    of the call, by (role, name); without it, among the step's own.
    """
    if places is None:
        places = {(s.role, s.name): i for i, s in enumerate(step.inputs)}
    start = time.perf_counter()
    noise, random = _drawn(step)
    gradients = [s for s in step.outputs if s.role in ("gradient", "input_gradient")]
    runs: list[PassRun] = []
    parts, tail = divide(step, kind, backend, LowerContext(sizes, options), runs)
    sources = tuple(_source(step, i, places) for i in parts.forward_inputs)
    saved = [n.meta["val"] for n in parts.update.graph.nodes if n.op == "placeholder"][
        : parts.saved
    ]
    device = _device_of(step)
    forms = forms_of(parallel, device, fixed=sizes is not None)
    pending = PendingKernels()
    # Triton's kernels are waited for: Inductor puts them into its cache together with the graph
    with pending if device == "cpu" else contextlib.nullcontext():
        forward, strides = lower_saving(parts, kind, backend, options, runs)
    cuda = device == "cuda"
    update = lower_forms(
        parts, strides, forms, backend, options, cudagraph.record_cuda,
        kind=kind, cuda=cuda, runs=runs,
    )  # fmt: skip
    pending.wait()
    if cuda and forms != ("off",):
        forward = Graphed(
            forward,
            recorder=cudagraph.record_cuda,
            stable=stable_inputs(step, parts.forward_inputs),
            lasting=frozenset(range(len(parts.forward_outputs))),
        )
    results = [(s.role, s.name) for s in parts.update_outputs]
    if tail is not None:
        update = _followed(update, tail)
        results[-len(tail.orders) :] = [(s.role, s.name) for s in tail.outputs]
    return CompiledStep(
        kind=kind,
        forward=forward,
        update=update,
        sources=sources,
        noise=noise,
        random=random,
        outputs=len(parts.forward_outputs),
        saved_tensors=tuple(i for i, v in enumerate(saved) if isinstance(v, Tensor)),
        saved_sizes=tuple(i for i, v in enumerate(saved) if not isinstance(v, Tensor)),
        late=_late(step, parts.late_inputs),
        results=tuple(results),
        gradients=tuple((s.role, s.name) for s in gradients),
        leaves=tuple(
            places["parameter" if s.role == "gradient" else "input", s.name] for s in gradients
        ),
        needs=cotangents_of(step),
        seconds=time.perf_counter() - start,
        passes=tuple(runs),
    )


def cotangents_of(step: StepGraph) -> tuple[frozenset[int], ...]:
    """For each gradient, in order, the numbers of the cotangents that it depends on."""
    slots = iter(step.inputs)
    count = 0
    reads: dict[Any, frozenset[int]] = {}
    for node in step.gm.graph.nodes:
        found = frozenset().union(*(reads[n] for n in node.all_input_nodes))
        if node.op == "placeholder" and next(slots).role == "cotangent":
            found, count = frozenset({count}), count + 1
        reads[node] = found
    return tuple(
        reads.get(node, frozenset())
        for slot, node in zip(step.outputs, step.results(), strict=True)
        if slot.role in ("gradient", "input_gradient")
    )


def _followed(update: Compiled, tail: Tail) -> Compiled:
    tail.gm.recompile()
    return lambda inputs: tail.run(update(inputs))


def _device_of(step: StepGraph) -> str:
    vals = (n.meta["val"] for n in step.placeholders())
    return next(v.device.type for v in vals if isinstance(v, Tensor))


def _unbound(scope: Any) -> Any:
    raise AssertionError("a program is called before it is bound")
