"""A simple model of pointwise fusion, so that predicted times are those of a compiled step.

As Inductor does, a pointwise op is computed inside its consumers and never written, when every
consumer is pointwise, a reduction, a norm or a softmax of the same layer and phase, and reading its
inputs once more for each of them moves fewer bytes than writing and reading its result. Nothing is
fused across layers or phases, so no task waits for more than the graph says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from torch.fx import Node

from grapefx.analysis.cost import OpCost
from grapefx.analysis.device import DeviceModel

_PRODUCERS = frozenset({"pointwise", "factory", "random"})
_CONSUMERS = frozenset({"pointwise", "reduction", "norm", "softmax", "copy", "pool", "scatter"})
# an op that would read more arrays than this is written out (Inductor's thresholds are alike)
_MAX_READS = 8


def fused(
    nodes: Sequence[Node],
    costs: Mapping[Node, OpCost],
    sizes: Mapping[Node, int],
    device: DeviceModel,
    key: Callable[[Node], Hashable],
) -> list[tuple[float, int]]:
    """Seconds of each node on one worker, and the bytes that it moves between memory and registers.

    Views are free; a fused node launches nothing and moves nothing: its consumers read its inputs.

    Args:
        nodes: in topological order.
        costs: of each of them.
        sizes: bytes of each node's value, graph inputs included.
        device: the worker.
        key: nodes with different keys are not fused.
    """
    bases: dict[Node, dict[Node, int]] = {}
    out: list[tuple[float, int]] = []
    for node in nodes:
        cost = costs[node]
        if cost.kind == "view":
            # a part of something is read as a part
            own = sizes[node]
            bases[node] = {b: min(n, own) for b, n in _reads(node, bases, sizes).items()}
            out.append((0.0, 0))
            continue
        reads = _reads(node, bases, sizes) if cost.kind in _CONSUMERS else None
        times = _inlined(node, cost, reads or {}, costs, key)
        if times:
            bases[node] = reads or {}
            vector = cost.vector_flops * times
            seconds = device.seconds(cost.matmul_flops, vector, 0, cost.dtype, launches=0)
            out.append((seconds, 0))
            continue
        read = cost.read_bytes if reads is None else sum(reads.values())
        moved = read + cost.written_bytes
        seconds = device.seconds(cost.matmul_flops, cost.vector_flops, moved, cost.dtype)
        out.append((seconds, moved))
    return out


def _reads(
    node: Node, bases: Mapping[Node, dict[Node, int]], sizes: Mapping[Node, int]
) -> dict[Node, int]:
    """The arrays in memory that a fused kernel for ``node`` reads, and the bytes of each."""
    found: dict[Node, int] = {}
    for p in node.all_input_nodes:
        for base, n in bases.get(p, {p: sizes.get(p, 0)}).items():
            found[base] = max(n, found.get(base, 0))
    return found


def _inlined(
    node: Node,
    cost: OpCost,
    reads: Mapping[Node, int],
    costs: Mapping[Node, OpCost],
    key: Callable[[Node], Hashable],
) -> int:
    """Into how many consumers a node is fused; 0 when it is a kernel of its own."""
    if cost.kind not in _PRODUCERS or len(reads) > _MAX_READS:
        return 0
    users = _consumers(node, costs)
    own = key(node)
    for user in users:
        if user not in costs or costs[user].kind not in _CONSUMERS or key(user) != own:
            return 0
    times = len(users)
    if cost.kind == "random" and times > 1:
        return 0
    read, written = sum(reads.values()), cost.written_bytes
    return times if times * read <= read + (1 + times) * written else 0


def _consumers(node: Node, costs: Mapping[Node, OpCost]) -> list[Node]:
    """The nodes that compute with a value, seen through views."""
    found: dict[Node, None] = {}
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in costs and costs[user].kind == "view":
            stack.extend(user.users)
        else:
            found.setdefault(user)
    return list(found)
