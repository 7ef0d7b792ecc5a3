"""The only file that imports private parts of torch. Everything here works on torch >= 2.11."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import io
import logging
import os
import random
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher as python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# torch's own that other files import from here; what is written below needs no mention
__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "make_fx",
    "python_dispatcher",
    "pytree",
]


def graph_module(root: Any, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A graph as a module, whose Python is written when something calls it or asks for it.

    Most of our graphs are only handed on, and a large one's code takes a while to write.
    """
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def forward_of(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """What a graph computes, as a function, without what calling a module costs."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    _LazyGraphModule.force_recompile(gm)
    run: Callable[..., Any] = gm.forward
    return run


def lazy_graph_modules() -> contextlib.AbstractContextManager[None]:
    """Inside, torch's own tracers and partitioners make modules as ``graph_module`` does."""
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    return _use_lazy_graph_module(True)


def new_fake_mode() -> FakeTensorMode:
    """A fake mode with its own symbols, for one joint trace."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_tensor(mode: FakeTensorMode, like: torch.Tensor, dynamic: Sequence[int] = ()) -> Any:
    """A fake of ``like`` under ``mode``; the dims in ``dynamic`` get symbols (equal sizes share).

    A meta tensor becomes one of the CPU, whose kernels the graph then describes.
    """
    sizes = [DimDynamic.DUCK if d in dynamic else DimDynamic.STATIC for d in range(like.ndim)]
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
    fake = mode.from_tensor(like, symbolic_context=context)
    if not like.is_meta:
        return fake
    with mode:
        return torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device="cpu")


def new_size(mode: FakeTensorMode, hint: int) -> Any:
    """A symbolic size of its own, equal to no other; ``hint`` says how large it may be.

    A hint of 0 or 1 would be taken for a fact.
    """
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC]
    )
    return mode.from_tensor(torch.empty(max(2, hint)), symbolic_context=context).shape[0]


def fake_mode_of(value: Any) -> FakeTensorMode:
    """The mode that a fake tensor belongs to."""
    assert isinstance(value, FakeTensor)
    return value.fake_mode


def release(values: Iterable[Any]) -> None:
    """Let the modes of fake tensors forget the real ones that they were made from.

    They hold weak references, with which torch cannot swap a parameter (``swap_tensors``).
    """
    modes = {v.fake_mode for v in values if isinstance(v, FakeTensor)}
    for mode in modes:
        converter = mode.fake_tensor_converter.meta_converter
        for memo in (converter.describer.lookup_tensor, converter.tensor_memo):
            memo.clear()


def batch_symbol(size: Any) -> Any:
    """The sympy expression of a symbolic size, or None for a plain int."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def size_expression(value: Any) -> Any:
    """The sympy expression of a symbolic number (int, float or bool), or None for anything else."""
    kinds = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return value.node.expr if isinstance(value, kinds) else None


def facts_of(exported: torch.export.ExportedProgram) -> tuple[Any, ...]:
    """What the trace asked of symbolic sizes, as sympy relations that were true."""
    values = (n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder")
    fake = next((v for v in values if isinstance(v, FakeTensor)), None)
    env = fake_mode_of(fake).shape_env if fake is not None else None
    return tuple(g.expr for g in env.guards) if env is not None else ()


def fixed_size(symbol: Any, value: Any) -> Any:
    """The number that a size symbol was found to be equal to while graphs were traced, or None.

    ``value`` is any fake tensor of the graph.
    """
    env = fake_mode_of(value).shape_env
    found = env.replacements.get(symbol) if env is not None and symbol is not None else None
    return None if found is None or found.free_symbols else int(found)


def from_data(value: Any) -> bool:
    """Whether a number, or a size of a tensor, follows from the values of tensors."""
    return bool(free_unbacked_symbols(value))


def size_hint(size: Any) -> int:
    """A plain int for a size: its hint when it is symbolic."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else int(size)


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Inside, no dispatch mode and no hook on saved tensors that was on outside."""

    def keep(value: Any) -> Any:
        return value

    with _disable_current_modes(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
        yield


def inductor_compile(
    gm: torch.fx.GraphModule,
    example: Sequence[Any],
    *,
    user_outputs: int,
    is_backward: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """Compile a flat, decomposed ATen graph with Inductor's inner compiler: no Dynamo, no guards.

    Only the first ``user_outputs`` outputs must keep their strides; Inductor chooses those of the
    others (saved values). Returned are the strides, None where nothing was reported.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    mode = next(fake_mode_of(v) for v in example if isinstance(v, FakeTensor))
    output = gm.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(user_outputs))
    context = TracingContext(mode)
    context.fakify_first_call = True  # torch 2.11: strides as symbols, not as their hints
    gm.recompile()
    # The error is read by every layer: of the operators that read one tensor, pair only near ones.
    # The kernels stay the same (make perf), and deep networks compile in less time.
    near = "max_fusion_buffer_group_pairwise_attempts"
    defaults = {near: 8} if hasattr(config, near) else {}
    with (
        config.patch(defaults | (options or {})),
        tracing(context),
        mode,
        python_dispatcher(),
        TracingContext.report_output_strides() as strides,
    ):
        compiled = compile_fx_inner(gm, list(example), is_backward=is_backward, is_inference=False)
    current: Callable[[list[Any]], Any] = getattr(compiled, "current_callable", None) or compiled
    return current, list(strides or [])


@functools.cache
def prepare_inductor() -> None:
    """Let a thread ask the C++ compiler, once a process, which vector instructions it knows.

    Inductor asks in front of its first kernel, by test programs, and waits for seconds where its
    cache on disk has no answer. Asked in time, the answer is there, or soon, behind its locks; a
    capture goes on meanwhile.
    """
    # here: two threads in one circle of imports get halves of modules
    for name in ("codecache", "compile_fx", "cpp_builder", "cpu_vec_isa"):
        importlib.import_module(f"torch._inductor.{name}")
    from torch._inductor import cpu_vec_isa

    if not hasattr(cpu_vec_isa.VecISA, "_probe_load"):
        return  # torch 2.11 keeps the program, but asks it again

    def ask() -> None:
        with contextlib.suppress(Exception):  # Inductor will meet it, and say so
            known = cpu_vec_isa.x86_isa_checker()
            for isa in cpu_vec_isa.supported_vec_isa_list:
                if all(flag in known for flag in str(isa).split()):
                    # of a class of its own: asking changes an object, and answers go by class
                    bool(type("Asked", (type(isa),), {})())

    caller = contextvars.copy_context()  # which holds Inductor's options
    name = "grapefx vector instructions"
    threading.Thread(target=caller.run, args=(ask,), name=name, daemon=True).start()


class PendingKernels:
    """Graphs that ``inductor_compile`` compiles inside need not wait for the C++ compiler.

    The kernels of one graph are built while the next one is lowered. No graph can be called before
    ``wait`` returned.
    """

    def __init__(self) -> None:
        self._waits: list[Callable[[], None]] = []

    def __enter__(self) -> PendingKernels:
        from torch._inductor.async_compile import AsyncCompile

        self._original = original = AsyncCompile.wait
        owner = threading.get_ident()

        def later(compiler: Any, scope: dict[str, Any]) -> None:
            if threading.get_ident() == owner:
                self._waits.append(functools.partial(original, compiler, scope))
            else:
                original(compiler, scope)

        AsyncCompile.wait = later  # type: ignore
        return self

    def __exit__(self, *_: object) -> None:
        from torch._inductor.async_compile import AsyncCompile

        AsyncCompile.wait = self._original  # type: ignore[method-assign]

    def wait(self) -> None:
        """Until the kernels of all graphs are there; raises what the compiler of one raised."""
        from torch._dynamo.utils import get_metrics_context

        with get_metrics_context():
            while self._waits:
                self._waits.pop(0)()


def inductor_options(options: dict[str, Any] | None) -> contextlib.AbstractContextManager[Any]:
    """Inductor's options, in force inside."""
    from torch._inductor import config

    patch: contextlib.AbstractContextManager[Any] = config.patch(options or {})
    return patch


def native_random(gm: torch.fx.GraphModule) -> None:
    """Random operators of a graph become Inductor's, drawn from seeds of torch's generator.

    Inductor compiles no other ones; its option ``fallback_random`` leaves torch's, which it calls.
    """
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.virtualized import V

    values = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    fake = next((v for v in values if isinstance(v, FakeTensor)), None)
    if fake is None:
        return
    with V.set_fake_mode(fake.fake_mode), fake.fake_mode:
        replace_random_passes(gm)


@dataclass
class Counts:
    """Kernels that Inductor generated (library calls left out), and bytes that all of them move."""

    kernels: int = 0
    bytes: int = 0
    cached: int = 0


@contextlib.contextmanager
def inductor_counts(*, compiled: bool = False) -> Iterator[Counts]:
    """What Inductor generates inside, counted.

    Caches are off, so that it does generate, and there is no C++ compiler: such kernels write
    zeros. With ``compiled`` all is as usual, and ``cached`` says how many graphs came from a cache,
    which were not counted.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import async_compile, compile_fx, config, metrics

    def zeros(_: Any, types: list[str], __: str) -> Callable[..., None]:
        def kernel(*arguments: Any) -> None:
            for kind, value in zip(types, arguments, strict=True):
                if isinstance(value, torch.Tensor) and "const" not in kind:
                    value.zero_()

        return kernel

    def hits() -> int:
        return sum(
            counters[part][name]
            for part, name in (
                ("inductor", "fxgraph_cache_hit"),
                ("aot_autograd", "autograd_cache_hit"),
            )
        )

    counts = Counts()
    kernels, moved = metrics.generated_kernel_count, metrics.num_bytes_accessed
    cached = hits()
    log = compile_fx.inductor_metrics_log  # bytes are only counted when this log listens
    level, propagate = log.level, log.propagate
    build = async_compile.AsyncCompile.cpp_pybinding
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(quiet := logging.NullHandler())
    try:
        if not compiled:
            async_compile.AsyncCompile.cpp_pybinding = zeros  # type: ignore
        with config.patch({} if compiled else {"force_disable_caches": True}):
            yield counts
    finally:
        async_compile.AsyncCompile.cpp_pybinding = build  # type: ignore
        log.setLevel(level)
        log.propagate = propagate
        log.removeHandler(quiet)
    counts.kernels = metrics.generated_kernel_count - kernels
    counts.bytes = metrics.num_bytes_accessed - moved
    counts.cached = hits() - cached


def decomposed(
    gm: torch.fx.GraphModule, example: Sequence[Any], keep: Sequence[str], *, inductor: bool = True
) -> torch.fx.GraphModule:
    """Retrace a flat graph with Inductor's decompositions, as AOTAutograd does to partition.

    ``example`` are fake inputs (and plain sizes); metadata under the keys ``keep`` goes from each
    node to those that replace it. ``inductor=False`` keeps the operators: sizes become plain.
    """
    for n in gm.graph.nodes:
        n.meta["custom"] = {k: n.meta[k] for k in keep if k in n.meta}

    class Run(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            with fx_traceback.set_current_meta(n):
                return super().run_node(n)

    def run(*inputs: Any) -> Any:
        with fx_traceback.preserve_node_meta():
            return list(Run(gm).run(*inputs))

    out = retrace(run, example, decompose=inductor)
    for n in out.graph.nodes:
        n.meta.update(n.meta.get("custom") or {})
    return out


def retrace(
    run: Callable[..., list[Any]], example: Sequence[Any], *, decompose: bool
) -> torch.fx.GraphModule:
    """The flat graph of ``run`` on fake inputs, with Inductor's decompositions if asked for."""
    table: Any = None
    if decompose:
        importlib.import_module("torch._inductor.lowering")  # decompositions look it up
        from torch._inductor.decomposition import select_decomp_table

        table = select_decomp_table()
    mode = next(fake_mode_of(v) for v in example if isinstance(v, FakeTensor))
    with mode, python_dispatcher(), torch.no_grad():
        out = make_fx(run, decomposition_table=table, tracing_mode="real")(*example)
    out.graph.set_codegen(torch.fx.graph.CodeGen())
    out.recompile()
    return out


def max_pool_places() -> tuple[Any, Any] | None:
    """Inductor's max pooling that returns (values, int8 places in the window); places to indices.

    None where this torch has none.
    """
    import torch._inductor.inductor_prims  # registers them

    names = ("_low_memory_max_pool_with_offsets", "_low_memory_max_pool_offsets_to_indices")
    found = [getattr(torch.ops.prims, name, None) for name in names]
    return None if None in found else (found[0].default, found[1].default)  # type: ignore[union-attr]


@contextlib.contextmanager
def vmap_rules_only() -> Iterator[None]:
    """Inside, ``torch.vmap`` raises for an operator without a batching rule, instead of a loop."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def concrete(vals: Sequence[Any], sizes: dict[Any, int]) -> list[Any]:
    """Fake values with their symbols replaced by numbers, under a fake mode of their own.

    The mode has a (here unused) shape environment: without one Inductor skips its cache on disk.
    """
    mode = new_fake_mode()

    def number(size: Any) -> int:
        expr = batch_symbol(size)
        return int(size) if expr is None else int(expr.xreplace(sizes))

    out: list[Any] = []
    for v in vals:
        if isinstance(v, torch.Tensor):
            shape, stride = [number(s) for s in v.shape], [number(s) for s in v.stride()]
            with mode:
                out.append(torch.empty_strided(shape, stride, dtype=v.dtype, device=v.device))
        else:
            out.append(number(v))
    return out


def restrided(value: Any, stride: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor in the strides that Inductor gave the real one."""
    if stride is None or not isinstance(value, FakeTensor):
        return value
    if len(stride) != value.ndim or tuple(value.stride()) == tuple(stride):
        return value
    with mode:
        return value.as_strided(value.size(), tuple(stride))


def min_cut_partition(
    joint: torch.fx.GraphModule, example: Sequence[Any], outputs: int
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """functorch's partitioner: what to save, what to recompute. ``example`` must hold fakes.

    A view is never saved: a saved value's strides are Inductor's choice, a saved view's are not.
    """
    import torch._functorch.config as functorch_config
    from functorch.compile import (  # type: ignore[import-untyped]
        min_cut_rematerialization_partition,
    )
    from torch._guards import TracingContext, tracing

    mode = next(fake_mode_of(v) for v in example if isinstance(v, FakeTensor))
    views = functorch_config.patch(recompute_views=True)
    with tracing(TracingContext(mode)), mode, views:
        parts: tuple[torch.fx.GraphModule, torch.fx.GraphModule]
        parts = min_cut_rematerialization_partition(joint, list(example), num_fwd_outputs=outputs)
        return parts


def decompositions(op: Any) -> dict[Any, Callable[..., Any]]:
    """torch's decomposition of one operator, as a table with at most one entry."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    found = decomposition_table.get(op) or core_aten_decompositions().get(op)
    return {} if found is None else {op: found}


def functionalized(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` without in-place operators, also those that torch's composite operators use inside
    (``cosine_similarity``, circular padding, channels-last pooling). To be traced by ``make_fx``.
    """
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize

    return dispatch_functionalize(fn, FunctionalTensorMode())


def transforming() -> bool:
    """Whether a function transform (``torch.func.grad``, ``vmap``, ``jvp``) is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def clear_saved_tensors(ctx: Any) -> None:
    """Drop an autograd node's saved tensors early, as AOTAutograd does."""
    clear = getattr(ctx, "maybe_clear_saved_tensors", None)
    if clear is not None:
        clear()


def in_dual_level() -> bool:
    """Whether forward-mode differentiation is on (``torch.autograd.forward_ad.dual_level``)."""
    return forward_ad._current_level >= 0


def dual(*groups: Iterable[Any]) -> bool:
    """Whether a tensor in one of these groups carries a forward-mode tangent."""
    return any(
        isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None
        for group in groups
        for t in group
    )


def memory(value: torch.Tensor) -> int:
    """Which memory a tensor lies in: the same number for a tensor and its views, fakes included."""
    return int(value.untyped_storage()._cdata)


def written(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among an operator's arguments that it writes into, as its schema says."""
    found = []
    for i, arg in enumerate(op._schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            found.append(args[i] if i < len(args) else kwargs.get(arg.name))
    return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


def holders(value: torch.Tensor) -> int:
    """How many tensors and handles share the memory of ``value``; to be compared with itself."""
    return int(torch._C._storage_Use_Count(memory(value)))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Write each source into its target: one call, which no signal interrupts."""
    torch._foreach_copy_(list(targets), list(sources))


def subtraction(
    targets: Sequence[torch.Tensor], amounts: Sequence[torch.Tensor], alpha: float
) -> Callable[[], Any]:
    """To be called: ``target -= alpha * amount`` for each, in place, without a line of Python."""
    return functools.partial(torch._foreach_sub_, list(targets), list(amounts), alpha=alpha)


def set_call(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """What ``module(...)`` runs, as ``nn.Module.compile`` sets it; None: its forward again.

    Copies and pickles of the module do not carry it.
    """
    if call is None:
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module.__dict__["_compiled_call_impl"] = call


def call_of(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What ``set_call`` or ``nn.Module.compile`` set, or None."""
    found: Callable[..., Any] | None = module.__dict__.get("_compiled_call_impl")
    return found


def global_hooks() -> bool:
    """Whether there are hooks on all modules (``register_module_forward_hook``)."""
    module = torch.nn.modules.module
    return bool(
        module._global_forward_hooks or module._global_forward_pre_hooks
        or module._global_backward_hooks or module._global_backward_pre_hooks
    )  # fmt: skip


@contextlib.contextmanager
def without_trackers() -> Iterator[None]:
    """Inside, the hooks on all modules by which ``FlopCounterMode`` knows where it is are gone."""
    module = torch.nn.modules.module
    stores: list[Any] = [module._global_forward_pre_hooks, module._global_forward_hooks]
    held = [dict(store) for store in stores]
    for store in stores:
        for key, hook in list(store.items()):
            if getattr(hook, "__module__", "") == "torch.utils.module_tracker":
                del store[key]
    try:
        yield
    finally:
        for store, before in zip(stores, held, strict=True):
            store.clear()
            store.update(before)


def plain_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's hooks and forward, whatever ``set_call`` set."""
    return module._call_impl(*args, **kwargs)


@contextlib.contextmanager
def plain_calls(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """These modules run their own forward: a capture must not meet another compiler."""
    name = "_compiled_call_impl"
    held = [(m.__dict__, m.__dict__.pop(name)) for m in modules if m.__dict__.get(name)]
    try:
        yield
    finally:
        for store, call in held:
            store[name] = call


@contextlib.contextmanager
def unchecked_distributions() -> Iterator[None]:
    """``torch.distributions`` without checks of values, which branch on them: none in a graph."""
    from torch.distributions import Distribution

    plain = Distribution.__init__

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args[:2], **{**kwargs, "validate_args": False})

    Distribution.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        Distribution.__init__ = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Export without its log of failures (we report them), and without torch's own data-dependent
    question in ``nn.TransformerEncoder``: a mask that is not declared causal is applied as a mask.

    A hook on buffers that a failed export leaves behind (torch 2.11) is taken away again, also one
    of a user's own export: no other trace of a model that assigns buffers would get past it.
    """
    from torch.nn.modules import module, transformer

    hooks = module._global_buffer_registration_hooks
    if not torch.compiler.is_exporting():
        for key, hook in list(hooks.items()):
            if "register_buffer_assignment_hook" in getattr(hook, "__qualname__", ""):
                del hooks[key]
    before = set(hooks)

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    detect = getattr(transformer, "_detect_is_causal_mask", None)
    logger.setLevel(logging.CRITICAL)
    if detect is not None:
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        # torch prints the graph of a failed export: to stdout, from 2.15 on to stderr
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logger.setLevel(level)
        for left in set(hooks) - before:
            del hooks[left]
        if detect is not None:
            transformer._detect_is_causal_mask = detect


def unwrap_for_export(error: BaseException) -> str:
    """The user's own frame of an export failure: ``file:line, in function: source``, or ''."""
    import traceback

    package = os.path.dirname(__file__)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and not f.filename.startswith(package) and f.line
    ]
    if not frames:
        return ""
    f = frames[-1]
    return f"{f.filename}:{f.lineno}, in {f.name}: {f.line}"


# Dynamo: one call of a function becomes a graph, guards on what the trace read, and the bytecode
# that stands in for the call.


@dataclass
class DynamoTrace:
    """What Dynamo made of one call.

    ``gm``: torch operators, its placeholders as ``example_inputs`` (real tensors, and symbolic
    sizes). ``backend_id``: the global by which ``bytecode`` calls the graph.
    """

    gm: torch.fx.GraphModule
    example_inputs: list[Any]
    mode: FakeTensorMode
    backend_id: str
    _output: Any
    _code: types.CodeType
    _globals: dict[str, Any]

    def guards(self) -> DynamoGuards:
        """Guards on all that the trace read, and on what was asked of its sizes until now."""
        from torch._dynamo import convert_frame
        from torch._dynamo.guards import CheckFunctionManager

        held: list[Any] = []

        class Holding(CheckFunctionManager):
            # A guard on an object's identity is void once the object is gone and another one may
            # take its address; Dynamo drops the graph then, we keep the object.
            def id_ref(self, obj: object, obj_str: str) -> int:
                held.append(obj)
                return super().id_ref(obj, obj_str)

        original = convert_frame.CheckFunctionManager  # type: ignore[attr-defined]
        convert_frame.CheckFunctionManager = Holding  # type: ignore
        try:
            with _dynamo_settings():
                manager = self._output.build_guards(self._code).guard_manager
        finally:
            convert_frame.CheckFunctionManager = original  # type: ignore
        tracked = getattr(self.mode.shape_env, "tracked_fakes", None)
        if tracked:
            tracked.clear()  # they refer to the parameters, see ``release``
        return DynamoGuards(manager, manager.check, held)

    def function(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """The traced function, with ``run(*graph inputs)`` in the place of the graph.

        It replays the side effects of the call, and returns what the call returned.
        """
        scope = self._globals  # which guards refer to as well: in it, the graph gives way
        for alias, name in self._output.import_sources.items():
            scope[alias] = importlib.import_module(name)
        scope[self.backend_id] = run
        out = self._output
        return types.FunctionType(out.bytecode, scope, "grapefx", out.argdefs, out.closure or None)


@dataclass
class DynamoGuards:
    """Whether a trace still holds for a call: ``check({"name of an argument": value})``."""

    manager: Any
    check: Callable[[dict[str, Any]], bool]
    held: list[Any]

    def changed_integer(self, scope: dict[str, Any]) -> str:
        """The integer whose new value is why the first guard does not hold, or ''."""
        found = re.match(r"(L\[.*\S) == -?\d+(\s|$)", self.broken(scope))
        name = found.group(1) if found else ""
        try:  # torch takes a list of names, split at commas, for regular expressions
            re.compile(name)
        except re.error:
            return ""
        return "" if "," in name or "'*" in name else name

    def broken(self, scope: dict[str, Any]) -> str:
        """The first guard that does not hold, with the user's line where Dynamo noted it."""
        found = self.manager.check_verbose(scope)
        return "" if found.result else "; ".join(str(p) for p in found.verbose_code_parts)


@contextlib.contextmanager
def _dynamo_settings(numbers: frozenset[str] = frozenset()) -> Iterator[None]:
    from torch._dynamo import config
    from torch._dynamo.utils import dynamo_timed, get_metrics_context

    settings: dict[str, Any] = {
        "automatic_dynamic_shapes": False,
        "assume_static_by_default": True,
        "allow_rnn": True,
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
        "skip_nnmodule_hook_guards": False,
        "skip_guards_on_constant_func_defaults": False,
        "skip_tensor_guards_with_matching_dict_tags": False,
        "record_pre_graph_bytecode_in_traces": False,
        "reorderable_logging_functions": {print, warnings.warn},
        # what transformers adds to loggers, and says once
        "ignore_logging_functions": {
            f for n in ("warning_once", "info_once") if (f := getattr(logging.Logger, n, None))
        },
        "verbose": False,
        "suppress_errors": False,
        "disable": False,
        "allow_unspec_int_on_nn_module": bool(numbers),
    }
    known = {k: v for k, v in settings.items() if hasattr(config, k)}
    symbolic = torch.compiler.config.patch(  # type: ignore[attr-defined]
        dynamic_sources=",".join(sorted(numbers))
    )
    with get_metrics_context(), dynamo_timed("grapefx"), config.patch(known), symbolic:
        yield


@contextlib.contextmanager
def _leaves_inside() -> Iterator[None]:
    """``h.requires_grad = True`` on an activation without gradient is left out of a trace.

    No parameter feels it (transformers' speech models say it for checkpoints). Dynamo refuses it.
    """
    from torch._dynamo.variables import TensorVariable, builtin

    owner: Any = getattr(builtin, "SetAttrBuiltinVariable", builtin.BuiltinVariable)
    name = "_call_setattr" if hasattr(owner, "_call_setattr") else "call_setattr"  # torch 2.11
    original = getattr(owner, name)

    def call_setattr(self: Any, tx: Any, obj: Any, attribute: Any, value: Any) -> Any:
        said = [v.as_python_constant() for v in (attribute, value) if v.is_python_constant()]
        activation = isinstance(obj, TensorVariable) and obj.source is None
        if said == ["requires_grad", True] and activation and not obj.requires_grad:
            return value
        return original(self, tx, obj, attribute, value)

    setattr(owner, name, call_setattr)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _without_function_modes() -> contextlib.AbstractContextManager[Any]:
    """Sets modes such as ``torch.device(...)`` aside for a trace, which knows of them.

    Where the trace itself does it (torch 2.11), a second time would lose them.
    """
    from torch._dynamo import convert_frame
    from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

    around = convert_frame.preserve_global_state.__code__
    inner = [around, *(c for c in around.co_consts if isinstance(c, types.CodeType))]
    if any("torch_function_mode_stack_state_mgr" in code.co_names for code in inner):
        return contextlib.nullcontext()
    return torch_function_mode_stack_state_mgr


def _add_missing_shapes() -> torch.library.Library | None:
    """The shape of an encoder layer in fast inference, which torch 2.11 lacks for tracing."""
    name = "_transformer_encoder_layer_fwd"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
        return None
    library = torch.library.Library("aten", "IMPL")
    library.impl(name, lambda src, *_: torch.empty_like(src), "Meta")
    return library


_shapes = _add_missing_shapes()  # registered for as long as this is held


def dynamo_trace(
    fn: types.FunctionType, arguments: tuple[Any, ...], numbers: frozenset[str] = frozenset()
) -> DynamoTrace | None:
    """Trace ``fn(*arguments)``; None where it computes with no tensor.

    ``numbers``: integers that become symbols, as guards name them (``L['model'].count``).
    Dynamo's own exceptions come through (``dynamo_refusal`` reads them).
    """
    from torch._dynamo import convert_frame

    drawn = random.getstate()
    try:
        with (
            convert_frame.compile_lock, _dynamo_settings(numbers),
            _without_function_modes(), quiet_export(), unchecked_distributions(),
            _leaves_inside(), warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            out = convert_frame.fullgraph_capture(fn, arguments)
    finally:
        random.setstate(drawn)
    found = out.backend_input
    if found is None:
        return None
    return DynamoTrace(
        found.graph_module, list(found.example_inputs), found.fake_mode, found.backend_id,
        out.graph_capture_output, fn.__code__, fn.__globals__,
    )  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """Why Dynamo cannot follow a call: in one sentence, and the user's line (or '')."""

    why: str
    where: str
    final: bool  # whatever sizes it is traced with


def dynamo_refusal(error: BaseException) -> Refusal | None:
    """What an exception of a trace says; None for one that is none of Dynamo's."""
    from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError, Unsupported, UserError

    if not isinstance(error, TorchDynamoException):
        return None
    lines = [line.strip() for line in str(error).splitlines()]
    name = lines[0] if lines else type(error).__name__
    details = [
        t.removeprefix("Explanation:").strip() for t in lines if t.startswith("Explanation:")
    ]
    context = [
        t.partition(": ")[2] for t in lines if t.startswith("Developer debug context: raised")
    ]
    why = ": ".join([name, *(context or details)[:1]])
    frames = [
        f for f in getattr(error, "real_stack", None) or []
        if "/torch/" not in f.filename and not f.filename.startswith(os.path.dirname(__file__))
    ]  # fmt: skip
    where = (
        f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}"
        if frames
        else ""
    )
    sized = isinstance(error, TorchRuntimeError) or bool(context)
    return Refusal(why, where, isinstance(error, (Unsupported, UserError)) and not sized)


def mark_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Ask Dynamo for a symbol in a dim of an example; it may find that there can be none."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def functional_graph(
    run: torch.nn.Module, fakes: Sequence[Any], mode: FakeTensorMode
) -> tuple[torch.fx.GraphModule, dict[str, str]]:
    """A module's call on fake tensors as one functional ATen graph; composite operators stay.

    Returned beside it: the outputs (first in the graph) that are new values of inputs, by name.
    """
    from torch._functorch.aot_autograd import aot_export_module
    from torch._guards import TracingContext, tracing
    from torch.export.exported_program import (
        _override_composite_implicit_decomp,
        _split_decomp_table_to_cia_and_python_decomp,
    )

    composite, _ = _split_decomp_table_to_cia_and_python_decomp({})
    with (
        mode, _override_composite_implicit_decomp(composite), tracing(TracingContext(mode)),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("ignore")
        gm, signature = aot_export_module(
            run, list(fakes), trace_joint=False, decompositions={}, pre_dispatch=False
        )
    written = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    assert isinstance(gm, torch.fx.GraphModule)
    return gm, {str(out): str(name) for out, name in written.items()}


def default_store() -> Any:
    """The key-value store that the default process group met in."""
    return torch.distributed.distributed_c10d._get_default_store()
