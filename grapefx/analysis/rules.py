"""Prices one op call from the shapes of its arguments and results."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from grapefx.analysis import op_tables as ops
from grapefx.analysis.sizes import Meta, Size, product
from grapefx.passes.graph.operators import ATTENTION, ATTENTION_BACKWARD


@dataclass(frozen=True, slots=True)
class Call:
    """One op call: its arguments and result with tensors replaced by :class:`Meta`."""

    target: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def result(self) -> Meta | None:
        """The first tensor of the result."""
        return next(iter(tensors(self.out)), None)

    def inputs(self) -> list[Meta]:
        """Every tensor among the arguments."""
        return tensors((self.args, tuple(self.kwargs.values())))

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


@dataclass(frozen=True, slots=True)
class Price:
    """What a rule says of a call.

    ``matmul`` FLOPs run on matrix units, ``vector`` FLOPs elsewhere. ``read`` and ``written``
    (bytes) replace the default (every argument once, every result once) where it is wrong.
    ``weight`` is the part of the FLOPs that makes parameter gradients in an op that makes both.
    """

    kind: str
    matmul: Size = 0
    vector: Size = 0
    read: Size | None = None
    written: Size | None = None
    known: bool = True
    weight: Size = 0


Rule = Callable[[Call], Price]

_CUSTOM: dict[str, Rule] = {}


def register_cost(name: str, rule: Rule) -> None:
    """Price the op ``name`` ("namespace::op") by ``rule``; replaces an earlier one.

    FLOP formulas given to ``torch.utils.flop_counter.register_flop_formula`` are used without this.
    """
    _CUSTOM[name] = rule


def tensors(tree: Any) -> list[Meta]:
    """The :class:`Meta` leaves of nested tuples."""
    if isinstance(tree, Meta):
        return [tree]
    if isinstance(tree, tuple):
        return [m for item in tree for m in tensors(item)]
    return []


def price(call: Call) -> Price:
    """The cost of one call. An op without a rule gets ``known=False`` and one FLOP an element."""
    custom = _CUSTOM.get(call.name)
    if custom is not None:
        return custom(call)
    if call.target is operator.getitem:
        return _FREE
    short = call.name.rpartition("::")[2]
    if short not in _SHAPED and short.endswith("_") and not short.endswith("__"):
        short = short[:-1]
    rule = _SHAPED.get(short)
    if rule is not None:
        return rule(call)
    found = _by_table(short, call)
    if found is not None:
        return found
    found = _by_registry(call)
    if found is not None:
        return found
    return _by_tag(call)


_FREE = Price("view", read=0, written=0)


def _numel(value: Any) -> Size:
    return value.numel if isinstance(value, Meta) else 0


def _by_table(short: str, call: Call) -> Price | None:
    if short in ops.VIEWS:
        return _FREE
    out = _numel(call.result())
    first = next(iter(call.inputs()), None)
    if short in ops.POINTWISE:
        return Price("pointwise", vector=ops.POINTWISE[short] * out)
    if short in ops.REDUCTIONS:
        # a two-operand max/min is pointwise
        two = short in ("max", "min") and isinstance(call.arg(1, "other"), Meta)
        return Price(
            "pointwise" if two else "reduction",
            vector=ops.REDUCTIONS[short] * (out if two else _numel(first)),
        )
    if short in ops.PER_INPUT:
        return Price(
            "norm" if "norm" in short else "softmax", vector=ops.PER_INPUT[short] * _numel(first)
        )
    if short in ops.COPIES:
        return Price("copy")
    if short in ops.FACTORIES:
        return Price("factory", read=0, written=0 if "empty" in short else None)
    if short in ops.RANDOM:
        return Price("random", vector=out, read=0)
    if short in ops.GATHERS:
        index = sum(m.bytes for m in call.inputs() if not m.dtype.is_floating_point)
        return Price("gather", read=sum(m.bytes for m in tensors(call.out)) + index)
    if short in ops.SCATTERS:
        source = max(
            (_numel(m) for m in call.inputs()[1:] if m.dtype.is_floating_point),
            default=_numel(first),
            key=_order,
        )
        return Price("scatter", vector=source)
    if short in ops.RESAMPLES:
        return Price("resample", vector=ops.RESAMPLES[short] * out)
    forward = short.removesuffix("_backward")
    if forward in ops.RESAMPLES:
        return Price("resample", vector=ops.RESAMPLES[forward] * _numel(first))
    return None


def _order(size: Size) -> Any:
    # expressions of the batch are compared by their value at a large batch
    free = getattr(size, "free_symbols", None)
    return size.xreplace(dict.fromkeys(free, 1 << 20)) if free else size


def _by_registry(call: Call) -> Price | None:
    """A formula of ``torch.utils.flop_counter``, built in or registered by the user."""
    packet = getattr(call.target, "overloadpacket", call.target)
    try:
        formula = flop_registry.get(packet)
    except TypeError:
        return None
    if formula is None:
        return None
    # formulas registered without get_raw are wrapped to take shapes
    shaped = hasattr(formula, "__wrapped__")
    args, kwargs, out = call.args, call.kwargs, call.out
    if shaped:
        args, kwargs, out = _shapes(args), {k: _shapes(v) for k, v in kwargs.items()}, _shapes(out)
    try:
        flops = formula(*args, **kwargs, out_val=out)
    except Exception:  # a formula of someone else's: whatever it raises, the op is flagged
        return None
    return Price("matmul", matmul=flops)


def _shapes(tree: Any) -> Any:
    if isinstance(tree, Meta):
        return torch.Size(tree.shape) if all(isinstance(s, int) for s in tree.shape) else tree.shape
    if isinstance(tree, tuple):
        return tuple(_shapes(t) for t in tree)
    return tree


def _by_tag(call: Call) -> Price:
    tags = getattr(call.target, "tags", ())
    if getattr(call.target, "is_view", False):
        return _FREE
    if torch.Tag.pointwise in tags:
        return Price("pointwise", vector=_numel(call.result()))
    size = max([_numel(m) for m in [*call.inputs(), *tensors(call.out)]] or [0], key=_order)
    return Price("unknown", vector=size, known=False)


# Rules that need more than element counts.


def _mm(call: Call) -> Price:
    a, b = call.args[0], call.args[1]
    return Price("matmul", matmul=2 * product(a.shape) * b.shape[-1])


def _addmm(call: Call) -> Price:
    _, a, b = call.args[:3]
    beta = call.kwargs.get("beta", 1)
    bias = _numel(call.result()) if beta != 0 else 0
    return Price("matmul", matmul=2 * product(a.shape) * b.shape[-1], vector=bias)


def _mv(call: Call) -> Price:
    a = call.args[1] if call.name.endswith("addmv") else call.args[0]
    return Price("matmul", matmul=2 * product(a.shape))


def _linear(call: Call) -> Price:
    x, w = call.args[0], call.args[1]
    bias = _numel(call.result()) if isinstance(call.arg(2, "bias"), Meta) else 0
    return Price("matmul", matmul=2 * product(x.shape) * w.shape[0], vector=bias)


def _matmul(call: Call) -> Price:
    a, b = call.args[0], call.args[1]
    columns = b.shape[-1] if len(b.shape) > 1 else 1
    rows = a.shape[-1]
    out = _numel(call.result())
    return Price("matmul", matmul=2 * out * rows if out != 1 else 2 * rows * columns)


def _convolution(call: Call) -> Price:
    x, w = call.args[0], call.args[1]
    bias = _numel(call.result()) if isinstance(call.arg(2, "bias"), Meta) else 0
    return Price(
        "matmul", matmul=_conv_products(x, w, call.result(), call.arg(6, "transposed")), vector=bias
    )


def _conv_products(x: Meta, w: Meta, out: Any, transposed: bool) -> Size:
    # every position of the denser side meets every tap; w is (C_out, C_in / groups, *k)
    positions = product((x if transposed else out).shape[2:])
    return 2 * x.shape[0] * positions * product(w.shape)


def _convolution_backward(call: Call) -> Price:
    grad, x, w = call.args[:3]
    transposed, mask = call.args[7], call.args[10]
    # both gradients meet the same pairs as the forward product, groups included
    one = _conv_products(x, w, grad, transposed)
    bias = grad.numel if mask[2] else 0
    read = grad.bytes + (w.bytes if mask[0] else 0) + (x.bytes if mask[1] else 0)
    return Price(
        "matmul",
        matmul=one * (int(bool(mask[0])) + int(bool(mask[1]))),
        vector=bias,
        read=read,
        weight=bias + one if mask[0] and mask[1] else 0,
    )


def _attention(call: Call) -> Price:
    q, k, v = call.args[:3]
    base = _by_registry(call)
    scores = product(q.shape[:-1]) * k.shape[-2]
    products = 2 * scores * (q.shape[-1] + v.shape[-1])
    return Price("attention", matmul=base.matmul if base else products, vector=6 * scores)


def _attention_backward(call: Call) -> Price:
    _, q, k, v = call.args[:4]
    base = _by_registry(call)
    scores = product(q.shape[:-1]) * k.shape[-2]
    products = 2 * scores * (3 * q.shape[-1] + 2 * v.shape[-1])
    return Price("attention", matmul=base.matmul if base else products, vector=10 * scores)


def _pool(call: Call) -> Price:
    x, out = call.args[0], call.result()
    if "adaptive" in call.name:
        return Price("pool", vector=_numel(x))
    kernel = call.arg(1, "kernel_size")
    window = _window(kernel, x)
    return Price("pool", vector=window * _numel(out))


def _pool_backward(call: Call) -> Price:
    grad, x = call.args[0], call.args[1]
    if "max" in call.name:
        return Price("pool", vector=_numel(grad))
    if "adaptive" in call.name:
        return Price("pool", vector=_numel(x))
    return Price("pool", vector=_window(call.arg(2, "kernel_size"), x) * _numel(grad))


def _window(kernel: Any, x: Meta) -> Size:
    if isinstance(kernel, int):
        kernel = (kernel,)
    if len(kernel) > 1:
        return product(kernel)
    dims = len(x.shape) - 2
    return kernel[0] ** max(dims, 1)


def _recurrent(call: Call) -> Price:
    # each step multiplies the input and the state by the layer's matrices
    x = call.args[0]
    weights = sum(m.numel for m in call.inputs()[1:] if len(m.shape) == 2)
    passes = 2 if call.name.endswith("backward") else 1
    steps = product(x.shape[:-1])
    return Price("matmul", matmul=2 * passes * steps * weights, vector=10 * _numel(call.result()))


def _sort(call: Call) -> Price:
    x = call.args[0]
    dim = call.arg(1, "dim", -1) if "topk" not in call.name else call.arg(2, "dim", -1)
    n = x.shape[dim if isinstance(dim, int) else -1] if x.shape else 1
    steps = max(1, round(log2(n))) if isinstance(n, int) and n > 1 else 1
    return Price("sort", vector=steps * x.numel)


def _cdist(call: Call) -> Price:
    a, b = call.args[0], call.args[1]
    return Price("matmul", vector=3 * product(a.shape) * b.shape[-2])


def _linalg(cubic: float, per_column: float) -> Rule:
    """LAPACK-style cost: ``cubic`` n^3 for the factor, ``per_column`` n^2 a right-hand side."""

    def rule(call: Call) -> Price:
        square = next(
            (m for m in call.inputs() if len(m.shape) >= 2 and m.shape[-1] == m.shape[-2]),
            call.inputs()[0],
        )
        n = square.shape[-1]
        flops = cubic * square.numel * n
        if per_column:
            flops = flops + per_column * n * n * product(_rhs(call, square).shape) / n
        return Price("linalg", matmul=_whole(flops))

    return rule


def _rhs(call: Call, square: Meta) -> Meta:
    return next((m for m in call.inputs() if m is not square), square)


def _whole(flops: Any) -> Size:
    return int(flops) if isinstance(flops, (int, float)) else flops


def _fft(call: Call) -> Price:
    x = call.args[0]
    dims = call.args[1]
    n = product([x.shape[d] for d in dims])
    steps = max(1, round(log2(n))) if isinstance(n, int) and n > 1 else 1
    return Price("fft", vector=5 * steps * x.numel)


_SHAPED: dict[str, Rule] = {
    "mm": _mm,
    "bmm": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addbmm": _addmm,
    "mv": _mv,
    "dot": _mv,
    "vdot": _mv,
    "addmv": _mv,
    "linear": _linear,
    "matmul": _matmul,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(ATTENTION_BACKWARD, _attention_backward),
    **dict.fromkeys(
        (
            "max_pool1d",
            "max_pool2d",
            "max_pool3d",
            "max_pool2d_with_indices",
            "max_pool3d_with_indices",
            "_low_memory_max_pool_with_offsets",
            "avg_pool1d",
            "avg_pool2d",
            "avg_pool3d",
            "_adaptive_avg_pool2d",
            "_adaptive_avg_pool3d",
            "adaptive_avg_pool1d",
            "adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "adaptive_max_pool3d",
        ),
        _pool,
    ),
    **dict.fromkeys(
        (
            "max_pool2d_with_indices_backward",
            "max_pool3d_with_indices_backward",
            "avg_pool2d_backward",
            "avg_pool3d_backward",
            "_adaptive_avg_pool2d_backward",
            "_adaptive_avg_pool3d_backward",
            "adaptive_max_pool2d_backward",
            "_low_memory_max_pool_offsets_to_indices",
        ),
        _pool_backward,
    ),
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu", "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"),
        _recurrent,
    ),
    **dict.fromkeys(("sort", "topk", "argsort", "unique_dim", "_unique2"), _sort),
    **dict.fromkeys(("_cdist_forward", "cdist"), _cdist),
    "cholesky": _linalg(1 / 3, 0),
    "linalg_cholesky_ex": _linalg(1 / 3, 0),
    "cholesky_solve": _linalg(0, 2),
    "cholesky_inverse": _linalg(2 / 3, 0),
    "linalg_solve_triangular": _linalg(0, 1),
    "triangular_solve": _linalg(0, 1),
    "linalg_lu_factor_ex": _linalg(2 / 3, 0),
    "linalg_lu_solve": _linalg(0, 2),
    "_linalg_solve_ex": _linalg(2 / 3, 2),
    "linalg_solve_ex": _linalg(2 / 3, 2),
    "linalg_inv_ex": _linalg(2, 0),
    "_linalg_eigh": _linalg(9, 0),
    "_linalg_svd": _linalg(22, 0),
    "linalg_qr": _linalg(4 / 3, 0),
    "_fft_r2c": _fft,
    "_fft_c2c": _fft,
    "_fft_c2r": _fft,
}
