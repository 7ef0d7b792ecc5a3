"""The gradient of max pooling over windows that tile the plane, without indices.

In: a step graph. Out: the same graph (changed in place) in which such a pooling keeps one byte for
each window, the place of its maximum, and the gradient of an input position is its window's where
the place is its own: pointwise. A scatter over indices into the plane is the slowest kernel of a
small network on a CPU. An activation whose derivative is a function of its value, in front of the
pooling, gets its gradient before it spreads: the plane, or its mask, need not be saved.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from grapefx.ir import StepGraph
from grapefx.passes.graph import meta
from grapefx.passes.graph.emit import Emitter
from grapefx.passes.graph.order import dead_code
from grapefx.torch_compat import max_pool_places

aten = torch.ops.aten

_BACKWARD = {
    aten.max_pool2d_with_indices.default: aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices.default: aten.max_pool3d_with_indices_backward.default,
}
# of (gradient, value of the activation, ...); zero where the gradient is
_BY_VALUE = (
    aten.threshold_backward.default,
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
)
_MOST = 25  # positions of a window, for which Inductor keeps places


def tile_pools(step: StepGraph) -> int:
    """Rewrite what can be; returns how many poolings were."""
    graph = step.gm.graph
    ops = max_pool_places()
    if ops is None:
        return 0
    em = Emitter(graph)
    done = 0
    for node in [n for n in graph.nodes if n.op == "call_function" and n.target in _BACKWARD]:
        window = tiles(node)
        items = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        if window is None or 1 not in items:
            continue
        gradients = [u for u in items[1].users if u.target is _BACKWARD[node.target]]
        if not gradients:
            continue
        dims = len(window)
        x: Any = node.args[0]
        plane = [int(n) for n in x.meta["val"].shape[-dims:]]
        rest = ([0] * dims, [1] * dims)
        with em.before(node, meta.notes(node)):
            pair = em.call(ops[0], x, window, window, *rest, False)
            place = em.get(pair, 1)
            top = em.get(pair, 0)
            if 0 in items:
                items[0].replace_all_uses_with(top)
        for user in gradients:
            for act in [u for u in user.users if _passes(u, x)]:
                # the gradient reaches the places of the maxima, where the value is the maximum
                with em.before(act, meta.notes(act)):
                    small = em.call(act.target, user.args[0], top, *act.args[2:])
                    act.replace_all_uses_with(em.trace(_spread_over(window), small, place))
                graph.erase_node(act)
            with em.before(user, meta.notes(user)):
                new = em.trace(_spread_over(window), user.args[0], place)
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        if items[1].users:  # tangents
            with em.before(node, meta.notes(node)):
                indices = em.call(ops[1], place, window, plane, window, *rest)
            items[1].replace_all_uses_with(indices)
        done += 1
    if done:
        dead_code(graph)
        graph.lint()
        step.gm.recompile()
    return done


def _passes(act: Node, x: Node) -> bool:
    """Whether a user of the pooling's gradient is that of the activation in front of it.

    Batch norm reads its gradient three times and would spread it each time: left as it is.
    """
    once = all(u.target is aten.convolution_backward.default for u in act.users)
    return act.target in _BY_VALUE and act.args[1] is x and once


def tiles(node: Node) -> list[int] | None:
    """The window of a pooling, if each position of the plane lies in one, and in one only."""
    x, kernel, *rest = node.args
    dims = 3 if node.target is aten.max_pool3d_with_indices.default else 2
    names = ("stride", "padding", "dilation")
    given = dict(zip(names, rest, strict=False)) | {
        k: v for k, v in node.kwargs.items() if k in names
    }
    stride, padding, dilation = (_full(given.get(k), dims) for k in names)
    window = _full(kernel, dims)
    plane = x.meta["val"].shape[-dims:]  # type: ignore[union-attr]
    count = 1
    for k in window:
        count *= k
    fits = all(isinstance(n, int) and n % k == 0 for n, k in zip(plane, window, strict=True))
    apart = (not stride or stride == window) and not any(padding) and set(dilation) <= {1}
    return window if fits and apart and count <= _MOST else None


def _full(sizes: Any, dims: int) -> list[int]:
    if isinstance(sizes, int):
        return [sizes] * dims
    return list(sizes or []) * (dims if len(sizes or []) == 1 else 1)


def _spread_over(window: Sequence[int]) -> Any:
    dims = len(window)

    def wide(x: Tensor) -> Tensor:
        """Each value at all positions of its window: (..., h, w) to (..., h * kh, w * kw)."""
        lead, plane = list(x.shape[:-dims]), list(x.shape[-dims:])
        apart = [n for pair in zip(plane, window, strict=True) for n in pair]
        for d in range(dims):
            x = x.unsqueeze(len(lead) + 2 * d + 1)
        full = [n * k for n, k in zip(plane, window, strict=True)]
        return x.expand(*lead, *apart).reshape(*lead, *full)

    def spread(grad: Tensor, place: Tensor) -> Tensor:
        """The gradient to the input (..., H, W) from that to the output (..., H/kh, W/kw).

        Every operand has the plane's shape: a loop over one window is too short for vectors.
        """
        own = torch.zeros((), dtype=torch.int64, device=place.device)
        for n, k in zip(place.shape[-dims:], window, strict=True):
            steps = torch.arange(n * k, device=place.device) % k
            own = own.unsqueeze(-1) * k + steps
        return torch.where(wide(place) == own.to(torch.int8), wide(grad), 0.0)

    return spread
