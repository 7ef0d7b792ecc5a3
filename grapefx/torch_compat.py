"""The only file that imports private parts of torch. Everything here works on torch >= 2.11."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher as python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "batch_symbol",
    "clear_saved_tensors",
    "decompositions",
    "fake_mode_of",
    "fake_tensor",
    "forget_guards",
    "inductor_compile",
    "make_fx",
    "min_cut_partition",
    "new_fake_mode",
    "python_dispatcher",
    "pytree",
    "quiet_export",
    "restrided",
    "size_hint",
    "unwrap_for_export",
]


def new_fake_mode() -> FakeTensorMode:
    """A fake mode with its own symbols, for one joint trace."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def fake_tensor(mode: FakeTensorMode, like: torch.Tensor, dynamic: Sequence[int] = ()) -> Any:
    """A fake of ``like`` under ``mode``; the dims in ``dynamic`` get symbols (equal sizes share)."""
    sizes = [DimDynamic.DUCK if d in dynamic else DimDynamic.STATIC for d in range(like.ndim)]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(like, symbolic_context=context)


def fake_mode_of(value: Any) -> FakeTensorMode:
    """The mode that a fake tensor belongs to."""
    assert isinstance(value, FakeTensor)
    return value.fake_mode


def batch_symbol(size: Any) -> Any:
    """The sympy expression of a symbolic size, or None for a plain int."""
    return size.node.expr if isinstance(size, torch.SymInt) else None


def size_hint(size: Any) -> int:
    """A plain int for a size: its hint when it is symbolic."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


@contextlib.contextmanager
def forget_guards(mode: FakeTensorMode) -> Iterator[None]:
    """Shape questions asked inside leave no guard: what they learn is not a fact of the model."""
    env = mode.shape_env
    if env is None or not hasattr(env, "suppress_guards"):
        yield
        return
    with env.suppress_guards():
        yield


def inductor_compile(
    gm: torch.fx.GraphModule,
    example: Sequence[Any],
    *,
    user_outputs: int,
    is_backward: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[Callable[[list[Any]], Any], list[Any]]:
    """Compile a flat functional ATen graph with Inductor's inner compiler: no Dynamo, no guards.

    Only the first ``user_outputs`` outputs must keep their strides; Inductor chooses those of the
    others (saved values) and they are returned, None where nothing was reported.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = next(fake_mode_of(v) for v in example if isinstance(v, FakeTensor))
    writes = [
        (n.args[0].name, n.args[1])
        for n in gm.graph.nodes
        if n.op == "call_function" and n.target is torch.ops.aten.copy_.default
    ]
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    pure, extra = _without_writes(gm, [v for _, v in writes])
    decomposed = _retrace(pure, list(example), mode, select_decomp_table())
    _restore_writes(decomposed, [names.index(w) for w, _ in writes], extra)
    output = next(n for n in reversed(decomposed.graph.nodes) if n.op == "output")
    output.meta["user_visible_output_idxs"] = list(range(user_outputs))
    context = TracingContext(mode)
    with (
        config.patch(options or {}),
        tracing(context),
        mode,
        python_dispatcher(),
        TracingContext.report_output_strides() as strides,
    ):
        compiled = compile_fx_inner(
            decomposed, list(example), is_backward=is_backward, is_inference=False
        )
    current: Callable[[list[Any]], Any] = getattr(compiled, "current_callable", None) or compiled
    return current, list(strides or [])


def _without_writes(
    gm: torch.fx.GraphModule, written: list[torch.fx.Node]
) -> tuple[torch.fx.GraphModule, int]:
    """The graph with its in-place writes turned into outputs (appended at the end)."""
    graph = torch.fx.Graph()
    mapping: dict[torch.fx.Node, torch.fx.Node] = {}
    result: Any = None
    for n in gm.graph.nodes:
        if n.op == "output":
            result = n.args[0]
        elif not (n.op == "call_function" and n.target is torch.ops.aten.copy_.default):
            mapping[n] = graph.node_copy(n, lambda m: mapping[m])
    outs = torch.fx.node.map_arg(result, lambda m: mapping[m])
    graph.output((*outs, *[mapping[w] for w in written]))
    return torch.fx.GraphModule(gm, graph), len(written)


def _retrace(
    gm: torch.fx.GraphModule, example: list[Any], mode: FakeTensorMode, table: Any
) -> torch.fx.GraphModule:
    def run(*inputs: Any) -> Any:
        return list(torch.fx.Interpreter(gm).run(*inputs))

    with mode, python_dispatcher(), torch.no_grad():
        out = make_fx(run, decomposition_table=table, tracing_mode="real")(*example)
    out.graph.set_codegen(torch.fx.graph.CodeGen())
    out.graph.eliminate_dead_code()
    out.recompile()
    return out


def _restore_writes(gm: torch.fx.GraphModule, targets: list[int], extra: int) -> None:
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    flat = list(output.args[0])  # type: ignore[arg-type]
    kept, values = (flat[:-extra], flat[-extra:]) if extra else (flat, [])
    for index, value in zip(targets, values, strict=True):
        with gm.graph.inserting_before(output):
            node = gm.graph.call_function(
                torch.ops.aten.copy_.default, (placeholders[index], value)
            )
        node.meta["val"] = placeholders[index].meta["val"]
    output.args = (tuple(kept),)
    gm.recompile()


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
    """functorch's partitioner: what to save and what to recompute. Needs a fake mode in ``example``."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._guards import TracingContext, tracing

    mode = next(fake_mode_of(v) for v in example if isinstance(v, FakeTensor))
    with tracing(TracingContext(mode)), mode:
        return min_cut_rematerialization_partition(joint, list(example), num_fwd_outputs=outputs)


def decompositions(op: Any) -> dict[Any, Callable[..., Any]]:
    """torch's decomposition of one operator, as a table with at most one entry."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    found = decomposition_table.get(op) or core_aten_decompositions().get(op)
    return {} if found is None else {op: found}


def clear_saved_tensors(ctx: Any) -> None:
    """Drop an autograd node's saved tensors early, as AOTAutograd does."""
    clear = getattr(ctx, "maybe_clear_saved_tensors", None)
    if clear is not None:
        clear()


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Export without its log of failures (we report them), and without torch's own data-dependent
    question in ``nn.TransformerEncoder``: a mask that is not declared causal is applied as a mask.
    """
    from torch.nn.modules import transformer

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    detect = getattr(transformer, "_detect_is_causal_mask", None)
    logger.setLevel(logging.CRITICAL)
    if detect is not None:
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if detect is not None:
            transformer._detect_is_causal_mask = detect


def unwrap_for_export(error: BaseException) -> str:
    """The user's own frame of an export failure: ``file:line, in function: source``, or ''."""
    import traceback

    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and "grapefx" not in f.filename and f.line
    ]
    if not frames:
        return ""
    f = frames[-1]
    return f"{f.filename}:{f.lineno}, in {f.name}: {f.line}"
