"""What the tangent rules emit: few nodes, right dtypes, one draw, kernels of other devices."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from grapefx.errors import TangentError
from grapefx.ir import Slot, StepGraph
from grapefx.passes.graph.emit import values
from grapefx.torch_compat import fake_tensor, new_fake_mode
from tests.passes.tangent_oracle import differentiate, trace

aten = torch.ops.aten


def emitted(fn: Callable[..., Any], *tensors: Tensor, which: tuple[int, ...] = (0,)) -> list[str]:
    """The operators that the tangent of a function takes."""
    step, _ = trace(lambda t: fn(*t), tensors, which)
    differentiate(step, which)
    made = [n for n in step.gm.graph.nodes if n.meta.get("grapefx_phase") == "tangent"]
    return [n.target._schema.name.split("::")[1] for n in made if n.op == "call_function"]


@pytest.mark.parametrize(
    ("fn", "wanted"),
    [
        (torch.relu, ["threshold_backward"]),
        (F.gelu, ["gelu_backward"]),
        (F.silu, ["silu_backward"]),
        (torch.sigmoid, ["sigmoid_backward"]),
        (torch.tanh, ["tanh_backward"]),
        (F.hardswish, ["hardswish_backward"]),
        (F.relu6, ["hardtanh_backward"]),
        (torch.exp, ["mul"]),
        (torch.sin, ["cos", "mul"]),
        (lambda x: x * 3 + 1, ["mul"]),
        (lambda x: x**2, ["mul", "mul"]),
        (lambda x: torch.softmax(x, -1), ["_softmax_backward_data"]),
        (lambda x: x.mean(-1), ["mean"]),
        (lambda x: x.transpose(0, 1)[1:], ["transpose", "slice"]),
        (lambda x: x > 0, []),
        (lambda x: torch.sign(x) + 1, []),
        (torch.rand_like, []),
    ],
)
def test_few_nodes(fn: Callable[..., Any], wanted: list[str]) -> None:
    assert emitted(fn, torch.randn(4, 6)) == wanted


def test_zero_tangents_cost_nothing() -> None:
    x, w = torch.randn(4, 6), torch.randn(6, 5)
    assert emitted(torch.matmul, x, w) == ["mm"]
    assert emitted(torch.matmul, x, w, which=(0, 1)) == ["mm", "mm", "add"]
    assert emitted(torch.add, x, torch.randn(6)) == []
    assert emitted(lambda x, w: x @ w.tanh(), x, w) == ["mm"]


def test_a_derived_pointwise_operator_neither_expands_nor_repeats_its_forward() -> None:
    names = emitted(lambda x: torch.erf(x) + torch.special.i1(x), torch.randn(4, 6))
    assert "expand" not in names
    assert "erf" not in names
    assert "special_i1" not in names  # its gradient needs its value, which the graph has


def test_broadcast_tangents_have_the_shape_of_the_output() -> None:
    assert emitted(torch.add, torch.randn(6), torch.randn(4, 6)) == ["expand"]


def test_dropout_is_drawn_once() -> None:
    def fn(x: Tensor) -> Tensor:
        return F.dropout(F.dropout2d(x, 0.5), 0.25)

    step, _ = trace(lambda t: fn(*t), [torch.randn(3, 4, 5, 5)], (0,))
    before = _random(step.gm.graph)
    differentiate(step, (0,))
    assert _random(step.gm.graph) == before == 2
    x, t = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    y, d = step.gm(x, t)
    torch.testing.assert_close(d, t * (y / x))


def _random(graph: Graph) -> int:
    tag = torch.Tag.nondeterministic_seeded
    return sum(
        isinstance(n.target, torch._ops.OpOverload) and tag in n.target.tags for n in graph.nodes
    )


class _Strides(Interpreter):
    """Runs a graph; every value must lie in memory as its fake value says."""

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            assert out.stride() == n.meta["val"].stride(), n.format_node()
        return out


@pytest.mark.parametrize("last", [(True, False), (False, True), (True, True), (False, False)])
def test_batch_norm_of_a_tangent_in_another_memory_order(last: tuple[bool, bool]) -> None:
    """The kernel returns x's order, its fake value the tangent's: a view behind it would fail."""
    formats = [torch.channels_last if on else torch.contiguous_format for on in last]
    a = torch.randn(4, 3, 2, 5).double().contiguous(memory_format=formats[0])
    b = torch.randn(4, 3, 2, 5).double().contiguous(memory_format=formats[1])

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return F.batch_norm(a * b, None, None, training=True).sin()

    step, _ = trace(lambda t: fn(*t), [a, b], (1,))
    differentiate(step, (1,))
    t = torch.randn(4, 3, 2, 5).double().contiguous(memory_format=formats[1])
    # the product a * t takes the order of its first factor, t, as a * b takes that of a
    _, d = _Strides(step.gm).run(a, b, t)
    torch.testing.assert_close(d, torch.func.jvp(fn, (a, b), (torch.zeros_like(a), t))[1])


def test_autocast_graphs_keep_each_value_s_dtype() -> None:
    """bf16 and f32 mixed; ``differentiate`` checks every tangent's dtype and shape."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.linear(x, w)
            h = torch.cat([h, x], -1) + F.layer_norm(torch.cat([h, h], -1), (12,))
            h = torch.where(h > 0, h, (h * 0.1).bfloat16()) + F.softmax(h @ v, -1)
            return F.log_softmax(F.linear(h, v.t()).bfloat16(), -1, dtype=torch.float32)

    tensors = [torch.randn(4, 6), torch.randn(6, 6), torch.randn(12, 12)]
    step, _ = trace(lambda t: fn(*t), tensors, (0, 1, 2))
    differentiate(step, (0, 1, 2))
    tangents = [torch.randn_like(t) for t in tensors]
    _, d = step.gm(*tensors, *tangents)
    wanted = torch.func.jvp(fn, tuple(tensors), tuple(tangents))[1]
    assert d.dtype == torch.float32
    assert (d - wanted).norm() < 0.05 * wanted.norm()


# Kernels that exist on other devices only: the rule sees the node, and a function of plain tensors
# stands for the kernel when the graph runs.


def single(
    op: Any, kernel: Callable[..., Any], tensors: list[Tensor], *rest: Any, **kwargs: Any
) -> StepGraph:
    """A graph of one call; its values come from ``kernel``."""
    mode = new_fake_mode()
    graph = Graph()
    places = []
    for i, t in enumerate([*tensors, *[a for a in rest if isinstance(a, Tensor)]]):
        node = graph.placeholder(f"x{i}")
        node.meta["val"] = fake_tensor(mode, t)
        places.append(node)
    fixed = iter(places[len(tensors) :])
    rest = tuple(next(fixed) if isinstance(a, Tensor) else a for a in rest)
    slots = tuple(Slot("input", p.name) for p in places)
    places = places[: len(tensors)]
    call = graph.call_function(op, (*places, *rest), kwargs)
    with mode:
        call.meta["val"] = kernel(*values((*places, *rest)), **kwargs)
    first = call
    if isinstance(call.meta["val"], (tuple, list)):
        first = graph.call_function(operator.getitem, (call, 0))
        first.meta["val"] = call.meta["val"][0]
    graph.output((first,))
    return StepGraph(GraphModule({}, graph), slots, (Slot("output", "0"),))


def run(step: StepGraph, kernel: Callable[..., Any], *tensors: Tensor) -> Any:
    """Run a graph of ``single`` with ``kernel`` in place of the call."""
    for node in step.gm.graph.nodes:
        if "flash" in str(node.target) or "attention" in str(node.target):
            node.target = kernel
        if "batch_norm" in str(node.target) and "backward" not in str(node.target):
            node.target = kernel
    step.gm.recompile()
    return step.gm(*tensors)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Attention written out."""
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    logits = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    if bias is not None:
        logits = logits + bias
    if causal:
        keep = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        logits = logits.masked_fill(~keep, -math.inf)
    return logits.softmax(-1).nan_to_num() @ v


def _qkv(heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 5, 6), (3, heads, 7, 6), (3, heads, 7, 8)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_flash_attention(heads: int, causal: bool, scale: float | None) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, p: float, causal: bool, **kw: Any) -> Any:
        return attend(q, k, v, None, causal, kw.get("scale")), q.sum(-1)

    op = aten._scaled_dot_product_flash_attention.default
    _compare(op, kernel, _qkv(heads), 0.0, causal, scale=scale)


@pytest.mark.parametrize("masked", ["none", "bias", "row without a key"])
def test_efficient_attention(masked: str) -> None:
    tensors = _qkv(4)
    bias = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    if masked == "row without a key":
        bias[1, :, 2] = -math.inf

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any) -> Any:
        mask = rest[0] if masked != "none" else None
        return attend(q, k, v, mask, False, kw.get("scale")), q.sum(-1)

    op = aten._scaled_dot_product_efficient_attention.default
    if masked == "none":
        _compare(op, kernel, tensors, None, True)
    else:
        _compare(op, kernel, [*tensors, bias], True)


def _compare(
    op: Any, kernel: Callable[..., Any], tensors: list[Tensor], *rest: Any, **kwargs: Any
) -> None:
    which = list(range(len(tensors)))
    step = single(op, kernel, tensors, *rest, **kwargs)
    differentiate(step, which)
    tangents = [torch.randn_like(t) for t in tensors]
    _, d = run(step, kernel, *tensors, *tangents)
    _, wanted = torch.func.jvp(
        lambda *t: kernel(*t, *rest, **kwargs)[0], tuple(tensors), tuple(tangents)
    )
    torch.testing.assert_close(d, wanted.nan_to_num(), rtol=1e-8, atol=1e-8)


def test_attention_dropout_in_a_fused_kernel_is_refused() -> None:
    """The mask is inside the kernel: a second draw would be another mask."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        return attend(q, k, v, None, False, None), q.sum(-1)

    op = aten._scaled_dot_product_flash_attention.default
    step = single(op, kernel, _qkv(), 0.1)
    with pytest.raises(TangentError, match="dropout to 0"):
        differentiate(step, [0])


@pytest.mark.parametrize("statistics", ["full", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_cudnn_batch_norm(training: bool, statistics: str) -> None:
    eps = 1e-3

    def kernel(
        x: Tensor, w: Tensor, b: Tensor, rm: Tensor, rv: Tensor, training: bool, m: float, e: float
    ) -> Any:
        mean = x.mean((0, 2, 3)) if training else rm
        var = x.var((0, 2, 3), correction=0) if training else rv
        if statistics == "frozen":
            mean, var = mean.detach(), var.detach()
        invstd = (var + e).rsqrt()
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) * (invstd * w).view(shape) + b.view(shape)
        return y, mean, invstd, x.new_empty(0)

    tensors = [
        torch.randn(4, 3, 5, 5), torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3) + 1,
    ]  # fmt: skip
    tensors = [t.double() for t in tensors]
    rest = (training, 0.1, eps)
    step = single(aten.cudnn_batch_norm.default, kernel, tensors, *rest)
    differentiate(step, [0, 1, 2], statistics)
    tangents = [torch.randn_like(t) for t in tensors[:3]]
    _, d = run(step, kernel, *tensors, *tangents)

    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    y = kernel(*leaves, *tensors[3:], *rest)[0]
    u = torch.zeros_like(y).requires_grad_()
    grads = torch.autograd.grad(y, leaves, u, create_graph=True)
    (wanted,) = torch.autograd.grad(grads, u, tangents)
    torch.testing.assert_close(d, wanted, rtol=1e-8, atol=1e-8)


def _real(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


_LINE, _PLANE, _SOLID = _real(2, 3, 4), _real(2, 3, 4, 5), _real(1, 2, 3, 3, 2)
# operators that torch takes apart while it traces, so that its samples never show them
CALLS: dict[str, tuple[Any, list[Tensor], tuple[Any, ...], dict[str, Any]]] = {
    "rms_norm": (aten._fused_rms_norm.default, [_real(4, 6)], ([6], _real(6), 1e-5), {}),
    "nearest 1d": (aten.upsample_nearest1d.default, [_real(2, 3, 4)], ([9],), {}),
    "nearest 2d": (aten.upsample_nearest2d.default, [_PLANE], ([9, 8],), {}),
    "nearest 2d vec": (aten.upsample_nearest2d.vec, [_PLANE], (None, [2.0, 2.0]), {}),
    "bilinear": (aten.upsample_bilinear2d.default, [_PLANE], ([9, 8], False), {}),
    "bicubic": (aten.upsample_bicubic2d.default, [_PLANE], ([9, 8], True), {}),
    "trilinear": (aten.upsample_trilinear3d.default, [_real(1, 2, 3, 3, 2)], ([4, 5, 3], True), {}),
    "reflection 3d": (aten.reflection_pad3d.default, [_real(1, 2, 3, 3, 2)], ([1] * 6,), {}),
    "replication 3d": (aten.replication_pad3d.default, [_real(1, 2, 3, 3, 2)], ([1] * 6,), {}),
    "im2col": (aten.im2col.default, [_PLANE], ([2, 2], [1, 1], [1, 0], [2, 1]), {}),
    "col2im": (
        aten.col2im.default, [_real(2, 12, 20)], ([5, 6], [2, 2], [1, 1], [0, 0], [1, 1]), {},
    ),
    "hardshrink": (aten.hardshrink.default, [_real(4, 6)], (0.3,), {}),
    "softshrink": (aten.softshrink.default, [_real(4, 6)], (0.3,), {}),
    "relu6": (aten.relu6.default, [_real(4, 6) * 5], (), {}),
    "square": (aten.square.default, [_real(4, 6)], (), {}),
    "channel shuffle": (aten.native_channel_shuffle.default, [_real(2, 6, 3, 3)], (3,), {}),
    "stable sort": (aten.sort.stable, [_real(4, 6)], (), {"stable": True, "dim": 0}),
    "linear": (aten.linear.default, [_real(4, 6), _real(5, 6), _real(5)], (), {}),
    "norm": (aten.norm.Scalar, [_real(4, 6)], (3,), {}),
    "nearest 1d vec": (aten.upsample_nearest1d.vec, [_LINE], ([9], None), {}),
    "nearest 3d": (aten.upsample_nearest3d.default, [_SOLID], ([4, 5, 3],), {}),
    "nearest 3d vec": (aten.upsample_nearest3d.vec, [_SOLID], (None, [2.0, 1.5, 2.0]), {}),
    "exact 1d": (aten._upsample_nearest_exact1d.default, [_LINE], ([9],), {}),
    "exact 2d": (aten._upsample_nearest_exact2d.default, [_PLANE], ([9, 3],), {}),
    "exact 3d": (aten._upsample_nearest_exact3d.default, [_SOLID], ([4, 5, 3],), {}),
    "linear 1d": (aten.upsample_linear1d.default, [_LINE], ([9], True), {}),
    "linear 1d vec": (aten.upsample_linear1d.vec, [_LINE], ([9], False, None), {}),
    "bilinear vec": (aten.upsample_bilinear2d.vec, [_PLANE], (None, True, [1.5, 2.0]), {}),
    "bicubic vec": (aten.upsample_bicubic2d.vec, [_PLANE], ([9, 8], False, None), {}),
    "bicubic smooth": (aten._upsample_bicubic2d_aa.default, [_PLANE], ([2, 3], False), {}),
    "trilinear vec": (aten.upsample_trilinear3d.vec, [_SOLID], ([4, 5, 3], False, None), {}),
    "adaptive 1d": (aten.adaptive_avg_pool1d.default, [_LINE], ([3],), {}),
    "average 1d": (aten.avg_pool1d.default, [_LINE], ([2], [1], [1]), {}),
    "slice copy": (aten.slice_copy.Tensor, [_LINE], (2, 1, 4, 2), {}),
    "select copy": (aten.select_copy.int, [_LINE], (1, -1), {}),
    "split": (aten.unsafe_split_with_sizes.default, [_LINE], ([1, 3], 2), {}),
    "chunk": (aten.chunk.default, [_LINE], (2, 1), {}),
    "contiguous": (aten.contiguous.default, [_LINE.transpose(0, 1)], (), {}),
    "reshape": (aten.reshape.default, [_LINE.transpose(0, 1)], ([6, -1],), {}),
    "matmul": (aten.matmul.default, [_real(5, 4, 6), _real(6, 2)], (), {}),
    "matmul of vectors": (aten.matmul.default, [_real(6), _real(6)], (), {}),
    "fill": (aten.fill.Tensor, [_LINE, _real()], (), {}),
    "conjugate": (aten.conj_physical.default, [_LINE], (), {}),
    "training batch norm": (aten.native_batch_norm.default, [_PLANE, _real(3), _real(3)],
                            (None, None, True, 0.1, 1e-5), {}),
    "eval batch norm": (
        aten._native_batch_norm_legit_no_training.default,
        [_PLANE, _real(3), _real(3)],
        (torch.zeros(3).double(), torch.ones(3).double() * 2, 0.1, 1e-5),
        {},
    ),
    "weightless eval batch norm": (
        aten._native_batch_norm_legit_no_training.default,
        [_PLANE],
        (None, None, torch.zeros(3).double(), torch.ones(3).double() * 2, 0.1, 1e-5),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_single_call_against_central_differences(name: str) -> None:
    op, tensors, rest, kwargs = CALLS[name]
    constants = [a for a in rest if isinstance(a, Tensor)]
    step = single(op, op, tensors, *rest, **kwargs)
    differentiate(step, list(range(len(tensors))))
    tangents = [torch.randn_like(t) for t in tensors]
    _, d = step.gm(*tensors, *constants, *tangents)

    def at(h: float) -> Tensor:
        moved = [x + h * t for x, t in zip(tensors, tangents, strict=True)]
        out = op(*moved, *rest, **kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out

    h = 1e-6
    torch.testing.assert_close(d, (at(h) - at(-h)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_squares_of_complex_values() -> None:
    """A complex gradient is conjugated: such operators are left to forward AD."""
    x, t = torch.randn(4, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128)
    step, _ = trace(lambda v: torch.exp(v[0].square() / 3), [x], (0,))
    differentiate(step, (0,))
    _, d = step.gm(x, t)
    torch.testing.assert_close(d, torch.exp(x * x / 3) * 2 * x / 3 * t)
