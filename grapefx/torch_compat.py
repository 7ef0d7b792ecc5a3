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
    "boxed_standalone_compile",
    "clear_saved_tensors",
    "decompositions",
    "fake_mode_of",
    "fake_tensor",
    "forget_guards",
    "make_fx",
    "min_cut_partition",
    "new_fake_mode",
    "python_dispatcher",
    "pytree",
    "quiet_export",
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


def boxed_standalone_compile(
    gm: torch.fx.GraphModule, example: Sequence[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a flat functional ATen graph with Inductor: no Dynamo, no guards."""
    from torch._inductor import standalone_compile

    artifact = standalone_compile(
        gm, list(example), dynamic_shapes="from_graph", options=options or {}
    )
    # the artefact's own __call__ adds a frame and keeps its serialised bytes alive
    return getattr(artifact, "_compiled_fn", artifact)


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
