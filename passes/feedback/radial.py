"""Radial correction: what Euler's theorem knows of the true gradient at a feedback point.

Where everything from a value h_l to the error tap y is positively homogeneous of degree 1 (linear
layers and convolutions, ReLU, pooling, sums), the true gradient delta_l satisfies, for each sample,

    <h_l, delta_l> = <e, y - b>,    b: the biases behind h_l,

because y - b = J_l h_l (Euler's theorem for homogeneous functions). A projected cotangent c_l knows
nothing of it: where maps are stale, no gradient holds the scale of the activations, and they grow
without bound in deep networks. The correction

    c_l += h_l (s - <h_l, c_l>) / (|h_l|^2 + eps),    s = <e, y - b>

gives c_l the part along h_l that the true gradient has, and leaves the rest. It reads the layer's
own value and the error: no update waits for another one. Of b only the bias of the last layer is
subtracted; those of layers between shift s by their share of y, which is small.

In: a joint graph. Out: which feedback points have such a tail (``homogeneous_points``), and s as a
node of the graph (``radial_error``).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.ir import StepGraph
from grapefx.maps import to_samples
from grapefx.passes.graph import markers
from grapefx.passes.graph.order import ancestors, without_data

aten = torch.ops.aten

EPS = 1e-12

# Positively homogeneous of degree 1 in all their data taken together: f(a x) = a f(x) for a > 0.
_ALONE = frozenset(
    {
        aten.relu, aten.leaky_relu, aten.abs, aten.neg, aten.prelu, aten._prelu_kernel,
        aten.max_pool2d_with_indices, aten.max_pool3d_with_indices, aten.avg_pool2d,
        aten.avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d, aten.mean, aten.sum,
        aten.amax, aten.amin, aten.maximum, aten.minimum, aten.add, aten.sub, aten.cat, aten.stack,
        aten.view, aten.reshape, aten._unsafe_view, aten.t, aten.transpose, aten.permute,
        aten.expand, aten.clone, aten.unsqueeze, aten.squeeze, aten.slice, aten.select, aten.split,
        aten.split_with_sizes, aten.unbind, aten.flip, aten.roll, aten.constant_pad_nd,
        aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.native_dropout, aten._to_copy,
        aten.upsample_nearest1d, aten.upsample_nearest3d,
    }
)  # fmt: skip
# Of degree 1 in one operand, the others being numbers, parameters or masks
_ONE_OF = frozenset({aten.mul, aten.div, aten.mm, aten.bmm, aten.addmm, aten.baddbmm,
                     aten.convolution, aten.dot, aten.mv})  # fmt: skip
# operator -> where its bias is
_BIAS = {aten.addmm.default: 0, aten.convolution.default: 2, aten.baddbmm.default: 0}
_LOOKS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default,
                    aten._to_copy.default, aten.clone.default})  # fmt: skip


def homogeneous_points(step: StepGraph) -> frozenset[int]:
    """The feedback points of a joint graph whose whole tail is homogeneous of degree 1."""
    graph = step.gm.graph
    taps = markers.find(graph, markers.TAP)
    if not taps:
        return frozenset()
    to_tap = ancestors(taps.values())
    fixed = without_data(step)
    found = set()
    for index, cut in markers.find(graph, markers.CUT).items():
        tail = _tail(cut, to_tap)
        whole = tail.issuperset(taps.values())
        if whole and all(_homogeneous(n, tail, fixed) for n in tail - {cut}):
            found.add(index)
    return frozenset(found)


def _tail(cut: Node, to_tap: set[Node]) -> set[Node]:
    """What lies between a cut and the taps, both included."""
    tail = {cut}
    stack = [cut]
    while stack:
        for user in stack.pop().users:
            if user in to_tap and user not in tail:
                tail.add(user)
                stack.append(user)
    return tail


def _homogeneous(node: Node, tail: set[Node], fixed: set[Node]) -> bool:
    """Whether an operator of a tail is of degree 1 in what of it comes from the cut."""
    if node.target in (operator.getitem, markers.CUT, markers.TAP):
        return True
    if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return True  # a size
    packet = getattr(node.target, "overloadpacket", None)
    tensors = [
        a for a in node.all_input_nodes if isinstance(a.meta.get("val"), (Tensor, tuple, list))
    ]
    data = [a for a in tensors if a in tail]
    others = [a for a in tensors if a not in tail]
    if packet in _ONE_OF:
        # never the divisor, and of a + b c never a alone
        where = [i for i, a in enumerate(node.args) if a in data]
        first = {aten.div: (0,), aten.addmm: (1, 2), aten.baddbmm: (1, 2)}.get(packet, (0, 1))
        rounded = node.kwargs.get("rounding_mode") is not None
        scales = packet in (aten.mul, aten.div)
        alone = len(where) == 1 and where[0] in first and not rounded
        return alone and all(scales or a in fixed for a in others)
    if packet in (aten.add, aten.sub, aten.maximum, aten.minimum, aten.constant_pad_nd):
        # a number beside the data is of degree 0: x + 1, or padding with ones
        numbers = [a for a in node.args if isinstance(a, (int, float)) and a != 0]
        if numbers or (others and packet in (aten.maximum, aten.minimum)):
            return False
    # a bias is a parameter of one dim, or seen as one; anything else from outside is not the tail's
    return packet in _ALONE and all(a in fixed and _vector(a) for a in others)


def _vector(node: Node) -> bool:
    shape = node.meta["val"].shape
    return sum(not (isinstance(s, int) and s == 1) for s in shape) <= 1


def bias_of(tap: Node) -> Node | None:
    """The bias that the last layer in front of a tap adds; None where it has none."""
    node: Any = tap.args[0]
    while isinstance(node, Node) and node.target in _LOOKS:
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    if node.target in _BIAS:
        found = node.args[_BIAS[node.target]]
        return found if isinstance(found, Node) else None
    if node.target is aten.add.Tensor:
        for a in node.args[:2]:
            if isinstance(a, Node) and a.op == "placeholder" and a.meta["val"].ndim == 1:
                return a
    return None


def radial_error(
    errors: list[Tensor],
    values: list[Tensor],
    biases: list[Tensor | None],
    folds: list[tuple[int, int, int]],
) -> Tensor:
    """s (N,): <e, y - b> of each sample, over all taps; at least in single precision.

    ``errors`` and ``values``: e and y at each tap. ``biases``: (C,), over the last dim of y, or
    over dim 1 of planes.
    """
    total: Any = None
    for e, y, b, fold in zip(errors, values, biases, folds, strict=True):
        wide = torch.promote_types(y.dtype, torch.float32)
        e, y = e.to(wide), y.to(wide)
        if b is not None:
            planes = y.ndim > 2 and y.shape[-1] != b.shape[0]
            y = y - (b.view(-1, *[1] * (y.ndim - 2)) if planes else b)
        part = (to_samples(e, fold) * to_samples(y, fold)).flatten(1).sum(1)
        total = part if total is None else total + part
    found: Tensor = total
    return found


def corrected(c: Tensor, h: Tensor, s: Tensor, fold: tuple[int, int, int]) -> Tensor:
    """c with the part along h that s asks for; c and h are values at one feedback point.

    ``s``: (N,), see ``radial_error``. GrAPE and FDFA have nothing like it.
    """
    wide = s.dtype
    rows, value = to_samples(c, fold).to(wide), to_samples(h, fold).to(wide)
    within = list(range(1, value.ndim))
    inner = (rows * value).sum(within)
    scale = (s - inner) / ((value * value).sum(within) + EPS)
    shape = [1] * h.ndim
    dim, outer, per = fold
    wide_scale = scale
    if outer * per > 1:
        wide_scale = scale.repeat_interleave(per).repeat(outer)
    shape[dim] = -1
    return (c.to(wide) + h.to(wide) * wide_scale.view(shape)).to(c.dtype)
