"""A safe, simple model of pointwise fusion, so that predicted times are those of a compiled step.

A pointwise op is merged into its consumer when that is its only consumer, the consumer is
pointwise, a reduction, a norm or a softmax, and both belong to the same layer and phase. Merging a
node whose only edge leads to the merged node makes no cycle, so the order of merges is free.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from torch.fx import Node

from grapefx.analysis.cost import OpCost
from grapefx.analysis.device import DeviceModel

_PRODUCERS = frozenset({"pointwise", "factory", "random"})
_CONSUMERS = frozenset({"pointwise", "reduction", "norm", "softmax", "copy", "pool"})
_FREE = frozenset({"view"})


def fused_seconds(
    nodes: Sequence[Node],
    costs: Mapping[Node, OpCost],
    device: DeviceModel,
    key: Callable[[Node], Hashable],
) -> list[float]:
    """Seconds of each node on one worker; a node fused into another has no launch of its own.

    Views are free. The bytes of a fused intermediate are neither written nor read again.
    """
    saved_read: dict[Node, int] = {}
    fused: set[Node] = set()
    for node in nodes:
        cost = costs[node]
        if cost.kind not in _PRODUCERS:
            continue
        into = _only_consumer(node, costs)
        if into is None or costs[into].kind not in _CONSUMERS or key(into) != key(node):
            continue
        fused.add(node)
        saved_read[into] = saved_read.get(into, 0) + cost.written_bytes
    return [_seconds(n, costs[n], device, n in fused, saved_read.get(n, 0)) for n in nodes]


def _only_consumer(node: Node, costs: Mapping[Node, OpCost]) -> Node | None:
    """The one consumer of a node, seen through views; None when there are none or several."""
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        cost = costs.get(user)
        if cost is None or cost.kind not in _FREE:
            return user if cost is not None else None
        node = user


def _seconds(node: Node, cost: OpCost, device: DeviceModel, fused: bool, saved: int) -> float:
    if cost.kind in _FREE or (cost.kind == "factory" and fused):
        return 0.0
    read = max(0, cost.read_bytes - saved)
    moved = read if fused else read + cost.written_bytes
    return device.seconds(
        cost.matmul_flops, cost.vector_flops, moved, cost.dtype, launches=0 if fused else 1
    )
